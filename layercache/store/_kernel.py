"""What Python's ``os`` does not offer of the kernel: calls on descriptors, each with the error that it may end in."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Callable

__all__ = ["allocate", "filesystem_of", "read_cached", "rename_noreplace", "start_writeback", "trim", "write_lease"]

_libc = ctypes.CDLL(None, use_errno=True)
_holding = ctypes.PyDLL(None)  # whose calls keep the GIL
_RENAME_NOREPLACE = 1
_FALLOC_FL_KEEP_SIZE = 1
_SYNC_FILE_RANGE_WRITE = 2
_F_SETSIG = 10
_RWF_NOWAIT = 8
_MOST = 2 << 20
_FITRIM = 0xC0185879
_XFS_IOC_FREE_EOFBLOCKS = 0x8080583A
_TRIMMED = frozenset(("ext4", "xfs"))
_REFUSED = frozenset((errno.EAGAIN, errno.EBUSY))


def allocate(fd: int, size: int) -> None:
    """Take the blocks for ``size`` bytes of a file; its size stays. Nothing where the filesystem cannot."""
    code = _errno_of(_libc.fallocate, fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size))
    if code not in (0, errno.EOPNOTSUPP, errno.ENOSYS):  # writing then finds out
        raise OSError(code, os.strerror(code))


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Begin writing a range back. Promises nothing."""
    _libc.sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(length), _SYNC_FILE_RANGE_WRITE)


def read_cached(fd: int, into: memoryview, offset: int) -> int:
    """Read what is in the page cache, up to the first byte that is not; return the count. Never waits, not for the GIL.

    Beside a busy thread of the host a call that drops the GIL gets it back 5 ms later, which is longer than this takes.
    """
    done = 0
    while _preadv2 is not None and done < len(into):
        piece = into[done : done + _MOST]
        vector = _Vector(ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece))
        count = _preadv2(fd, ctypes.byref(vector), 1, offset + done, _RWF_NOWAIT)
        if count <= 0:  # whatever it is: who reads the rest finds out
            break
        done += count
    return done


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_preadv2 = getattr(_holding, "preadv2", None)  # an older C library has none
if _preadv2 is not None:
    _preadv2.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    _preadv2.restype = ctypes.c_ssize_t


def rename_noreplace(at: int, name: str, to: int, new: str) -> bool:
    """Rename, never over something; false where the filesystem has no such call."""
    code = _errno_of(_libc.renameat2, at, os.fsencode(name), to, os.fsencode(new), _RENAME_NOREPLACE)
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    if code:
        raise OSError(code, os.strerror(code), new)
    return True


def write_lease(fd: int) -> bool:
    """Take a write lease: true when nobody else has the file open or mapped, for as long as ``fd`` stays open."""
    # Whoever opens the file meanwhile makes the kernel tell us. By default with SIGIO, which kills a process that does
    # not expect it; SIGURG is ignored by those. The kernel forgets this choice whenever a lease ends.
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in _REFUSED:
            return False
        raise
    return True


def filesystem_of(fd: int) -> tuple[str, frozenset[str]]:
    """Return the kind of the filesystem behind ``fd`` and its mount options; empty where nobody says."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted and len(fields := after.split()) >= 3:
                return fields[0], frozenset(fields[2].split(","))
    return "", frozenset()


def trim(fd: int) -> int:
    """Hand every free block of the filesystem behind ``fd`` to its device; return how many bytes that were.

    :raises OSError: when that is not permitted or not possible, or when it would leave some out: on another filesystem
        than ext4 and xfs, with data in the journal, on a device that discards in larger pieces than blocks.
    """
    kind, options = filesystem_of(fd)
    if kind not in _TRIMMED or "data=journal" in options:
        raise OSError(errno.EOPNOTSUPP, "not every byte of a file is in its blocks on this filesystem")
    block = os.fstatvfs(fd).f_frsize
    if not 0 < _discard_granularity(fd) <= block:
        raise OSError(errno.EOPNOTSUPP, "the device does not discard single blocks")
    if kind == "xfs":
        # xfs frees the blocks of an unlinked file some time later; this call waits for that.
        fcntl.ioctl(fd, _XFS_IOC_FREE_EOFBLOCKS, struct.pack("=IIIIIIQ", 1, 1, 0, 0, 0, 0, 0).ljust(128, b"\0"))
    wanted = struct.pack("=QQQ", 0, (1 << 64) - 1, 0)
    length: int = struct.unpack("=QQQ", fcntl.ioctl(fd, _FITRIM, wanted))[1]
    return length


def _discard_granularity(fd: int) -> int:
    device = os.fstat(fd).st_dev
    place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{place}/queue", f"{place}/../queue"):  # a partition has its disk's
        try:
            with open(f"{queue}/discard_granularity", encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return 0


def _errno_of(function: Callable[..., int], *args: object) -> int:
    """Return the error number of a call of the C library, 0 for none. Goes on after a signal, as Python's calls do."""
    while function(*args) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0
