"""Real filesystems on loop devices that lose power on command, and leave nothing behind however this process ends.

The image lives in memory, the loop device ends with its last user, and it is mounted in a mount namespace of this
process alone: when the process dies, even by SIGKILL, the kernel unmounts and detaches all of it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Self

__all__ = ["CUT", "FILESYSTEMS", "FLUSH_LOG", "Image", "cut_power", "enter_private_mounts", "trim", "unavailable"]

FILESYSTEMS = {"ext4": 32 << 20, "xfs": 300 << 20}
"""Bytes of an image; xfs refuses smaller ones."""

FLUSH_LOG, CUT = 1, 2
"""What is lost in a power cut: data that was not flushed, or the journal's tail as well."""

_SHUTDOWN, _FITRIM = 0x8004587D, 0xC0185879
_LOOP_CTL_GET_FREE, _LOOP_CLR_FD, _LOOP_CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C01, 0x4C0A, 4
_BLKFLSBUF = 0x1261
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 0x40000, 2
_MS_RDONLY, _MS_REMOUNT = 1, 32
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_BLOCK = 64 << 10
_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}

_libc = ctypes.CDLL(None, use_errno=True)


def unavailable(filesystem: str) -> str:
    """Say why such images cannot be used here; empty when they can."""
    if os.geteuid() != 0:
        return "loop devices need root"
    if not Path("/dev/loop-control").exists():
        return "no loop devices here"
    if shutil.which(_MKFS[filesystem][0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        return f"needs {_MKFS[filesystem][0]}"
    try:
        fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_CTL_GET_FREE)
        finally:
            os.close(fd)
    except OSError as error:
        return f"no loop device to be had: {error.strerror}"
    known = Path("/proc/filesystems").read_text(encoding="ascii").split()
    if filesystem not in known and not _modprobe(filesystem):
        return f"this kernel has no {filesystem}"
    return ""


def enter_private_mounts() -> Path:
    """Give this process mounts of its own; return an empty directory, in memory, that only it sees.

    The process ends with its parent, and what is mounted or written there ends with the process.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl")
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "make the mounts private")
    place = Path("/mnt")
    _check(_libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"mode=700"), "mount a tmpfs")
    return place


def cut_power(fd: int, mode: int) -> None:
    """Make the filesystem of ``fd`` forget what did not reach the disk. Nothing on it works afterwards."""
    fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", mode))


def trim(place: Path) -> int:
    """Give the free blocks of the filesystem at ``place`` back to its device; return how many bytes that were."""
    span = bytearray(struct.pack("QQQ", 0, (1 << 64) - 1, 0))
    fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _FITRIM, span)
    finally:
        os.close(fd)
    return int(struct.unpack("QQQ", span)[1])


class Image:
    """A new filesystem in memory behind a loop device, mounted at ``place`` on demand."""

    def __init__(self, filesystem: str, place: Path, *, size: int | None = None) -> None:
        self.filesystem = filesystem
        self.place = place
        self._size = FILESYSTEMS[filesystem] if size is None else size
        self._memory = os.memfd_create(f"layercache-{filesystem}", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, self._size)
        self.device, self._loop = self._attach()
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        subprocess.run([*_MKFS[filesystem], self.device], check=True, env=environment, stdout=subprocess.DEVNULL)
        place.mkdir(exist_ok=True)

    def mount(self, *, errors: str = "") -> None:
        """Mount it; this replays the journal. ``errors`` is what ext4 does after an error of its own."""
        options = f"errors={errors}".encode() if errors else None
        _check(
            _libc.mount(self.device.encode(), os.fsencode(self.place), self.filesystem.encode(), 0, options),
            f"mount {self.filesystem}",
        )

    def remount(self, *, read_only: bool) -> None:
        """Change what may be done with it while it is mounted."""
        flags = _MS_REMOUNT | (_MS_RDONLY if read_only else 0)
        _check(_libc.mount(self.device.encode(), os.fsencode(self.place), None, flags, None), "remount")

    def unmount(self) -> None:
        """Unmount it, and drop what the kernel remembers of the device."""
        _check(_libc.umount2(os.fsencode(self.place), 0), "unmount")
        fcntl.ioctl(self._loop, _BLKFLSBUF)

    def flush(self) -> int:
        """Write all there is to the device, mounted or not; return the file that is the device."""
        if os.path.ismount(self.place):
            fd = os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _check(_libc.syncfs(fd), "syncfs")
            finally:
                os.close(fd)
        os.fsync(self._loop)
        return self._memory

    def save(self) -> list[tuple[int, bytes]]:
        """Return the content of the unmounted image, without what is zero."""
        os.fsync(self._loop)
        extents: list[tuple[int, bytes]] = []
        offset = 0
        while True:
            try:
                offset = os.lseek(self._memory, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return extents
                raise
            end = os.lseek(self._memory, offset, os.SEEK_HOLE)
            while offset < end:
                block = os.pread(self._memory, min(_BLOCK, end - offset), offset)
                if block.count(0) != len(block):
                    extents.append((offset, block))
                offset += len(block)

    def restore(self, extents: list[tuple[int, bytes]]) -> None:
        """Make the unmounted image what it was at :meth:`save`."""
        os.ftruncate(self._memory, 0)
        os.ftruncate(self._memory, self._size)
        for offset, block in extents:
            os.pwrite(self._memory, block, offset)
        fcntl.ioctl(self._loop, _BLKFLSBUF)

    def close(self) -> None:
        """Let it all go."""
        _libc.umount2(os.fsencode(self.place), _MNT_DETACH)
        os.close(self._loop)
        os.close(self._memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _attach(self) -> tuple[str, int]:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
                fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
                # struct loop_config: fd, block_size, loop_info64 (flags at byte 52 of it), reserved
                config = bytearray(4 + 4 + 232 + 64)
                struct.pack_into("=II", config, 0, self._memory, 0)
                struct.pack_into("=I", config, 8 + 52, _AUTOCLEAR)
                try:
                    fcntl.ioctl(fd, _LOOP_CONFIGURE, bytes(config))
                except OSError as error:
                    os.close(fd)
                    if error.errno == errno.EBUSY:  # somebody else was faster
                        continue
                    raise
                return name, fd
        finally:
            os.close(control)


def _modprobe(name: str) -> bool:
    program = shutil.which("modprobe", path="/usr/sbin:/sbin")
    return program is not None and subprocess.run([program, "-q", name], check=False).returncode == 0


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
