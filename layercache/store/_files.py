"""Small files, written whole and read with care, and locks that are not waited for without an end."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from layercache.errors import StoreError, UnsafeRootError
from layercache.store._disk import Dir, Disk, File
from layercache.store._layout import temporary_name

__all__ = [
    "NEW",
    "PATIENCE",
    "check_flock",
    "fresh",
    "lock_within",
    "read_record",
    "read_small",
    "temporary",
    "write_small",
]

NEW = ".new"
"""Ends the name of a small file that is not whole yet."""

PATIENCE = 5.0
"""Seconds that a lock of the store is waited for: whoever holds it makes a few system calls, or was stopped."""

_STEP = 0.002
_RECORD_MOST = 64 << 20  # the chunk sums of a blob of 4 TiB
_NO_RECORD = frozenset((errno.ENOENT, errno.ELOOP, errno.EMEDIUMTYPE, errno.ENXIO, errno.EISDIR))


def fresh(disk: Disk) -> bytes:
    """Return 32 bytes that nobody can guess."""
    return bytes.fromhex("".join(disk.token() for _ in range(4)))


def lock_within(disk: Disk, file: File, *, exclusive: bool = True, patience: float = PATIENCE) -> None:
    """Take the lock of a file, waiting at most ``patience`` seconds.

    :raises StoreError: when somebody else kept it for so long.
    """
    waited = 0.0
    while not disk.lock(file, exclusive=exclusive):
        if waited >= patience:
            raise StoreError("another process keeps a lock of the store", hint="look for a stopped process")
        disk.pause(_STEP)
        waited += _STEP


def check_flock(disk: Disk, name: str) -> None:
    """Refuse a filesystem where flock lets everybody in: a lock that is held shared must not be had exclusively.

    :param name: the file in the root whose lock this process holds.
    :raises UnsafeRootError: then.
    """
    other = disk.open(disk.root, name)
    try:
        if disk.lock(other, exclusive=True):
            raise UnsafeRootError(
                "locks do not exclude on the root's filesystem", hint="use a local filesystem (ext4, xfs, btrfs)"
            )
    finally:
        disk.close(other)


def read_small(disk: Disk, at: Dir, name: str) -> bytes:
    """Return the content of a small file, at most 64 KiB of it."""
    file = disk.open(at, name)
    try:
        raw = bytearray(min(disk.fstat(file).size, 1 << 16))
        return bytes(raw[: disk.read(file, raw, 0)])
    finally:
        disk.close(file)


def read_record(disk: Disk, at: Dir, name: str) -> bytes | None:
    """Return the content of a record, not checked; ``None`` where there is none, or nothing that can be read."""
    try:
        file = disk.open(at, name)
    except OSError as error:
        if error.errno in _NO_RECORD:
            return None
        raise
    try:
        if file.size > _RECORD_MOST:
            return None
        raw = bytearray(file.size)  # one that is in its place does not change any more
        try:
            return bytes(raw[: disk.read(file, raw, 0)])
        except OSError as error:
            if error.errno == errno.EIO:
                return None  # unreadable is as good as damaged
            raise
    finally:
        disk.close(file)


def write_small(disk: Disk, at: Dir, name: str, raw: bytes) -> None:
    """Write a small file whole and durable under a name that is not there yet, or was left half made.

    Its name is durable with the next flush of ``at``.
    """
    temporary = f"{name}{NEW}"
    file = disk.create(at, temporary, exist_ok=True)
    try:
        disk.truncate(file, 0)
        disk.write(file, raw, 0)
        disk.sync(file)
    finally:
        disk.close(file)
    disk.rename(at, temporary, at, name, replace=True)


@contextmanager
def temporary(disk: Disk, at: Dir, raw: bytes) -> Iterator[str]:
    """Write a durable file of a fresh name into ``at`` and yield the name, to be moved within the block.

    Its lock tells the sweeper that somebody is at it.
    """
    name, file = _new_temporary(disk, at)
    try:
        disk.write(file, raw, 0)
        disk.sync(file)
        yield name
    finally:
        with suppress(OSError):
            if disk.stat(at, name) is not None:
                disk.remove(at, name)
        disk.close(file)


def _new_temporary(disk: Disk, at: Dir) -> tuple[str, File]:
    while True:
        name = temporary_name(disk.boot, disk.token())
        file = disk.create(at, name)
        try:
            if disk.lock(file, exclusive=True) and disk.stat(at, name) is not None:
                return name, file
        except BaseException:
            with suppress(OSError):
                disk.remove(at, name)
            disk.close(file)
            raise
        disk.close(file)  # the sweeper came between the two calls and took it for a leftover
