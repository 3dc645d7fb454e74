"""A directory that is in memory for sure, for keys that must never reach a disk."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from layercache.errors import SealError, StoreError, UnsafeRootError
from layercache.store._disk import PosixDisk

__all__ = ["open_memory", "refuse_swap", "swapped_out", "usual_place"]

_TMPFS_MAGIC = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)


def usual_place() -> str:
    """Return where this user's keys are kept: ``LAYERCACHE_KEYS``, else below ``/run`` or ``/dev/shm``."""
    if named := os.environ.get("LAYERCACHE_KEYS"):
        return named
    user = os.geteuid()
    runtime = "/run" if user == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and _on_tmpfs(runtime):  # in a container it often is not
        return f"{runtime}/layercache"
    return f"/dev/shm/layercache-{user}"  # noqa: S108 - owner and mode are checked


def _on_tmpfs(at: str | int) -> bool:
    status = (ctypes.c_long * 32)()
    if isinstance(at, int):
        failed = _libc.fstatfs(at, ctypes.byref(status))
    else:
        failed = _libc.statfs(os.fsencode(at), ctypes.byref(status))
    return failed == 0 and status[0] == _TMPFS_MAGIC


def open_memory(place: str, *, create: bool) -> PosixDisk | None:
    """Return the directory, made (0700) where ``create`` says so; ``None`` where it is not there.

    :raises SealError: when it is not on a tmpfs, not this user's, or others can write to it.
    """
    path = Path(place)
    hint = "set LAYERCACHE_KEYS to a directory of yours (0700) on a tmpfs"
    try:
        if path.is_symlink():
            raise SealError("the directory for keys is a link", hint=hint)
        if not create and not path.is_dir():
            return None
        disk = PosixDisk.open_root(place)
    except (UnsafeRootError, StoreError) as error:
        raise SealError(f"the directory for keys cannot be used: {error.what}", hint=hint) from error
    mode = os.fstat(disk.root.fd)
    if not _on_tmpfs(disk.root.fd):
        disk.close(disk.root)
        raise SealError("the directory for keys is not on a tmpfs", hint=hint)
    # Root may empty a directory of another user, but never trusts one with a new key: anybody can have made it.
    if mode.st_mode & 0o077 or (create and mode.st_uid != os.geteuid()):
        disk.close(disk.root)
        raise SealError("others may enter the directory for keys", hint=hint)
    return disk


def refuse_swap(swaps: str = "/proc/swaps") -> None:
    """Refuse a host that may write memory to a disk.

    :raises SealError: where swap is on.
    """
    with open(swaps, encoding="utf-8") as file:
        if len(file.read().splitlines()) > 1:
            raise SealError("swap is on, so a key in memory may reach a disk", hint="turn it off (swapoff -a)")


def swapped_out(counters: str = "/proc/vmstat") -> int:
    """Return how many pages this machine has written to swap since it booted; -1 where it does not say."""
    try:
        with open(counters, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("pswpout ")), -1)
    except (OSError, ValueError):
        return -1
