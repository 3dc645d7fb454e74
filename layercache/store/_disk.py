"""The seam to the filesystem: the only module of the store that reads or changes files.

:class:`Disk` is what the store asks of a filesystem, :class:`PosixDisk` asks the kernel for it. The store never sees a
path: everything is a name in an open directory, no link is ever followed, and a handle does not survive a fork.
Verbs raise ``OSError``; ``_faults`` says what each one means to the store.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

from layercache.errors import UnsafeRootError
from layercache.store import _kernel, _proc
from layercache.store._faults import guarding

__all__ = ["Dir", "Disk", "File", "Handle", "Kind", "PosixDisk", "Room", "Stat", "Word"]

Buffer = bytes | bytearray | memoryview | mmap.mmap
Kind = Literal["file", "dir", "other"]


class Stat(NamedTuple):
    """What an entry is: ``allocated`` are the bytes it takes. ``links`` above one on a file: others named it too."""

    # Made so often that a tuple is worth it.

    kind: Kind
    size: int
    inode: int
    links: int
    mtime: float
    allocated: int


@dataclass(frozen=True, slots=True)
class Room:
    """A filesystem's size and what is left of it, in bytes and in inodes (0 where it has no count)."""

    total: int
    free: int
    total_inodes: int
    free_inodes: int


class Handle:
    """An open file or directory. Closed by :meth:`Disk.close`, by fork in the child, and by nothing else."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def closed(self) -> bool:
        """True when this handle can no longer be used."""
        return self.fd < 0


class Dir(Handle):
    """An open directory."""

    __slots__ = ()


class File(Handle):
    """An open regular file. A lock taken through it ends with it.

    :ivar inode: what it is, whatever its name leads to by now.
    :ivar size: bytes it had when it was opened.
    """

    __slots__ = ("inode", "size")

    def __init__(self, fd: int, inode: int, size: int) -> None:
        self.fd = fd
        self.inode = inode
        self.size = size


class Word(Protocol):
    """The first eight bytes of a file, seen without a system call as soon as anybody has written them."""

    def get(self) -> int:
        """Return the value now."""
        ...


class Disk(Protocol):
    """One local filesystem below one directory."""

    root: Dir
    boot: str
    """Changes with every boot of the machine: what was not flushed in another boot may be lost."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def elapsed(self) -> float:
        """Seconds since some moment: never goes back."""
        ...

    def pause(self, seconds: float) -> None:
        """Let others run for a while (the only way the store waits)."""
        ...

    def token(self) -> str:
        """Return a name part that nobody else has."""
        ...

    def dir(self, at: Dir, name: str) -> Dir:
        """Open a directory; a link or a file of that name is an error."""
        ...

    def make_dir(self, at: Dir, name: str) -> None:
        """Make a directory (0700)."""
        ...

    def create(self, at: Dir, name: str, *, exist_ok: bool = False) -> File:
        """Open a file (0600) for reading and writing, made new unless ``exist_ok``."""
        ...

    def open(self, at: Dir, name: str) -> File:
        """Open a regular file for reading."""
        ...

    def read(self, file: File, into: Buffer, offset: int) -> int:
        """Fill ``into`` from ``offset``; return the count, short only at the end of the file."""
        ...

    def write(self, file: File, data: Buffer, offset: int) -> None:
        """Write all of ``data``."""
        ...

    def reserve(self, file: File, size: int) -> None:
        """Take the blocks for ``size`` bytes now, so that writing cannot run out of space; the size stays."""
        ...

    def truncate(self, file: File, size: int) -> None:
        """Set the size."""
        ...

    def start_flush(self, file: File, offset: int, length: int) -> None:
        """Begin writing a range back, so that :meth:`sync` has less to wait for. Promises nothing."""
        ...

    def sync(self, handle: Handle) -> None:
        """Make the content of a file, or the names in a directory, survive a power cut."""
        ...

    def touch(self, file: File, when: float | None = None) -> None:
        """Set the modification time, in seconds since the epoch; to now without one."""
        ...

    def rename(self, at: Dir, name: str, to: Dir, new: str, *, replace: bool) -> None:
        """Move an entry. Without ``replace`` an existing target is an error and stays."""
        ...

    def remove(self, at: Dir, name: str) -> None:
        """Unlink a file, or whatever is not a directory."""
        ...

    def remove_dir(self, at: Dir, name: str) -> None:
        """Remove an empty directory."""
        ...

    def names(self, at: Dir) -> list[str]:
        """Return the names in a directory, in no order."""
        ...

    def stat(self, at: Dir, name: str) -> Stat | None:
        """Return what an entry is, not following links; ``None`` where there is none."""
        ...

    def fstat(self, handle: Handle) -> Stat:
        """Return what a handle is."""
        ...

    def lock(self, handle: Handle, *, exclusive: bool) -> bool:
        """Take or change the lock of this handle without waiting; false where somebody else's lock excludes it."""
        ...

    def lease(self, file: File) -> bool:
        """Tell whether nobody else has the file open or mapped; if so, nobody can open it before this handle is closed.

        An error says that the kernel gives no such answer here, or not to this process.
        """
        ...

    def word(self, file: File) -> Word:
        """Map the first eight bytes of a file, for reading: a store there can kill the process on a full disk."""
        ...

    def room(self) -> Room:
        """Return how large the filesystem is and what is left of it."""
        ...

    def openers(self, *, but: Handle | None = None, quick: bool = False) -> dict[int, frozenset[int]]:
        """Return the inodes of this filesystem that a process we may see has open or mapped, each with their ids.

        ``but`` does not count. ``quick``: only those who hold a lock, as all do who work with this library. The kernel
        lists locks at once; a look at every process takes long where there are many.
        """
        ...

    def trim(self) -> int:
        """Hand every free block to the device for good; return the bytes. An error where that cannot be said of all."""
        ...

    def background(self, job: Callable[[], None]) -> Callable[[], None] | None:
        """Run ``job`` beside the caller and return what waits for its end; ``None`` where it was not begun."""
        ...

    def close(self, handle: Handle) -> None:
        """Close; ends the lock and the lease taken through it. Closing twice is nothing."""
        ...


_H = TypeVar("_H", bound=Handle)

_LARGE = 1 << 20  # bytes of a read for which it is worth asking the page cache first
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""NONBLOCK: a planted fifo must not make us wait for a writer."""

# Every handle of this process, so that a forked child can drop its copies: a lock belongs to the open file, and a copy
# of it in a child would hold it after the parent's close. Closing a copy does not unlock; unlocking it would.
# One call adds to a set or takes from it, so that no other thread, and no fork, sees it half done.
_handles: set[Handle] = set()


def _drop_handles() -> None:
    for handle in list(_handles):
        fd, handle.fd = handle.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
    _handles.clear()


os.register_at_fork(after_in_child=_drop_handles)


class _MappedWord:
    __slots__ = ("_view",)

    def __init__(self, fd: int) -> None:
        # The mapping outlives the descriptor; it is shared memory of the page cache, so no flush is needed to be seen.
        self._view = memoryview(mmap.mmap(fd, 8, prot=mmap.PROT_READ)).cast("Q")

    def get(self) -> int:
        return self._view[0]


class PosixDisk:
    """The directory ``path``, which must exist. Entries belong to the directory's owner, also where root makes them."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.root = self._track(Dir(fd))
        try:
            status = os.fstat(fd)
            self.boot = _proc.boot_id()
        except OSError:
            self.close(self.root)
            raise
        self._give_to = (status.st_uid, status.st_gid) if os.geteuid() == 0 and status.st_uid != 0 else None

    @staticmethod
    def open_root(path: str | os.PathLike[str]) -> PosixDisk:
        """Return the disk below ``path``, made (0700) if it is not there.

        :raises UnsafeRootError: when it is not a directory, is another user's, or can be written by others.
        """
        hint = "choose another root"
        with guarding("open the root"):
            try:
                _make_durably(os.path.abspath(path))
                disk = PosixDisk(os.fspath(path))
            except (NotADirectoryError, FileExistsError) as error:
                raise UnsafeRootError("the root is not a directory", hint=hint) from error
            try:
                status = os.fstat(disk.root.fd)
                if os.geteuid() not in (0, status.st_uid):
                    raise UnsafeRootError("the root belongs to another user", hint=f"run as its owner, or {hint}")
                if status.st_mode & 0o022:
                    raise UnsafeRootError("others can write to the root", hint="chmod 700 it")
            except (OSError, UnsafeRootError):
                disk.close(disk.root)
                raise
            return disk

    def now(self) -> float:
        return time.time()

    def elapsed(self) -> float:
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def token(self) -> str:
        return secrets.token_hex(8)

    def dir(self, at: Dir, name: str) -> Dir:
        return self._track(Dir(os.open(name, _FOLDER, dir_fd=at.fd)))

    def make_dir(self, at: Dir, name: str) -> None:
        os.mkdir(name, 0o700, dir_fd=at.fd)
        if self._give_to is not None:
            os.chown(name, *self._give_to, dir_fd=at.fd, follow_symlinks=False)

    def create(self, at: Dir, name: str, *, exist_ok: bool = False) -> File:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(name, flags if exist_ok else flags | os.O_EXCL, 0o600, dir_fd=at.fd)
        file = self._regular(fd, name)
        if self._give_to is not None:
            try:
                os.fchown(fd, *self._give_to)
            except OSError:
                self.close(file)
                raise
        return file

    def open(self, at: Dir, name: str) -> File:
        return self._regular(os.open(name, _PLAIN, dir_fd=at.fd), name)

    def read(self, file: File, into: Buffer, offset: int) -> int:
        done = _kernel.read_cached(file.fd, memoryview(into), offset) if len(into) >= _LARGE else 0
        done = done or os.preadv(file.fd, [into], offset)
        if 0 < done < len(into):
            view = memoryview(into)
            while (count := os.preadv(file.fd, [view[done:]], offset + done)) > 0:
                done += count
                if done == len(view):
                    break
        return done

    def write(self, file: File, data: Buffer, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(file.fd, view, offset)
            view = view[count:]
            offset += count

    def reserve(self, file: File, size: int) -> None:
        if size:
            _kernel.allocate(file.fd, size)

    def truncate(self, file: File, size: int) -> None:
        os.ftruncate(file.fd, size)

    def start_flush(self, file: File, offset: int, length: int) -> None:
        _kernel.start_writeback(file.fd, offset, length)

    def sync(self, handle: Handle) -> None:
        os.fsync(handle.fd)
        if isinstance(handle, File):
            # Some filesystems tell at a close what their fsync did not. A second descriptor closes now, while the file
            # has no name yet and can be dropped, and the lock stays with the first.
            with suppress(InterruptedError):  # it is closed all the same
                os.close(os.dup(handle.fd))

    def touch(self, file: File, when: float | None = None) -> None:
        os.utime(file.fd, None if when is None else (when, when))

    def rename(self, at: Dir, name: str, to: Dir, new: str, *, replace: bool) -> None:
        if replace:
            os.rename(name, new, src_dir_fd=at.fd, dst_dir_fd=to.fd)
            return
        if _kernel.rename_noreplace(at.fd, name, to.fd, new):
            return
        # No such call on this filesystem. Our own processes act on one name under one lock, so looking first is enough.
        if self.stat(to, new) is not None:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(name, new, src_dir_fd=at.fd, dst_dir_fd=to.fd)

    def remove(self, at: Dir, name: str) -> None:
        os.unlink(name, dir_fd=at.fd)

    def remove_dir(self, at: Dir, name: str) -> None:
        os.rmdir(name, dir_fd=at.fd)

    def names(self, at: Dir) -> list[str]:
        # Through a descriptor of its own: a listing moves the position of the one it is made through, so that two
        # threads at one directory would each miss names, or see them twice.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def stat(self, at: Dir, name: str) -> Stat | None:
        try:
            return _stat(os.stat(name, dir_fd=at.fd, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def fstat(self, handle: Handle) -> Stat:
        return _stat(os.fstat(handle.fd))

    def lock(self, handle: Handle, *, exclusive: bool) -> bool:
        if handle.closed:  # flock answers this one with a ValueError
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            fcntl.flock(handle.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lease(self, file: File) -> bool:
        return _kernel.write_lease(file.fd)

    def word(self, file: File) -> Word:
        return _MappedWord(file.fd)

    def room(self) -> Room:
        now = os.fstatvfs(self.root.fd)
        return Room(now.f_blocks * now.f_frsize, now.f_bavail * now.f_frsize, now.f_files, now.f_favail)

    def openers(self, *, but: Handle | None = None, quick: bool = False) -> dict[int, frozenset[int]]:
        device = os.fstat(self.root.fd).st_dev
        return _proc.lockers(device) if quick else _proc.openers(device, but=-1 if but is None else but.fd)

    def trim(self) -> int:
        return _kernel.trim(self.root.fd)

    def background(self, job: Callable[[], None]) -> Callable[[], None] | None:
        # A daemon: it may be cut short anywhere, as by a crash, and must not keep the host from ending.
        thread = threading.Thread(target=job, name="layercache-purge", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the host is ending
            return None
        return thread.join

    def close(self, handle: Handle) -> None:
        fd, handle.fd = handle.fd, -1
        if fd >= 0:
            _handles.discard(handle)
            # The descriptor is gone whatever close says, and what had to be durable has been through `sync`.
            with suppress(OSError):
                os.close(fd)

    def _regular(self, fd: int, name: str) -> File:
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # a second name is somebody else's doing
                raise OSError(errno.EMEDIUMTYPE, "not a plain file of ours", name)
        except OSError:
            with suppress(OSError):
                os.close(fd)
            raise
        return self._track(File(fd, status.st_ino, status.st_size))

    @staticmethod
    def _track(handle: _H) -> _H:
        _handles.add(handle)
        return handle


def _make_durably(path: str | os.PathLike[str]) -> None:
    """Make a directory (0700) and those above it, where missing or empty, so that no power cut takes their names."""
    # Empty: whoever made it may have died before its name was durable.
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.listdir(fd):
                return
        finally:
            os.close(fd)
    above = os.path.dirname(path)
    if above != path and not os.path.isdir(above):
        _make_durably(above)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    with suppress(PermissionError):  # it may be searched and not read: then its owner made this one
        fd = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _stat(status: os.stat_result) -> Stat:
    kind: Kind = "file" if stat.S_ISREG(status.st_mode) else "dir" if stat.S_ISDIR(status.st_mode) else "other"
    return Stat(kind, status.st_size, status.st_ino, status.st_nlink, status.st_mtime, status.st_blocks * 512)
