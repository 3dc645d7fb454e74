"""What ``/proc`` shows of this machine: its boot, and who has which files open, as far as this process may see."""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["boot_id", "lockers", "openers"]


def lockers(device: int) -> dict[int, frozenset[int]]:
    """Return the inodes of a device that some process has locked (flock), each with the ids of those processes.

    Locks from another pid namespace are not seen, and none where a filesystem gives its files another device than
    itself (btrfs).
    """
    found: dict[int, set[int]] = {}
    with open("/proc/locks", encoding="ascii") as lines:
        for line in lines:
            # number: kind how mode pid major:minor:inode start end; who waits for a lock has an arrow before the kind
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[4]) > 0:
                major, minor, inode = fields[5].split(":")
                # The taker may have died and left the lock to a child, which only a look at every process finds.
                if os.makedev(int(major, 16), int(minor, 16)) == device and os.path.exists(f"/proc/{fields[4]}"):
                    found.setdefault(int(inode), set()).add(int(fields[4]))
    return {inode: frozenset(pids) for inode, pids in found.items()}


def openers(device: int, *, but: int = -1) -> dict[int, frozenset[int]]:
    """Return the inodes of a device that some process has open or mapped, each with the ids of those processes.

    ``but`` is a descriptor of this process that does not count. Processes of other users, of another pid namespace and
    the kernel itself are not seen.
    """
    found: dict[int, set[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        for inode in _inodes(pid, device, but if pid == os.getpid() else -1):
            found.setdefault(inode, set()).add(pid)
    return {inode: frozenset(pids) for inode, pids in found.items()}


def _inodes(pid: int, device: int, but: int) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # gone, or not ours to look at
        return
    for name in names:
        try:
            status = os.stat(f"{folder}/{name}")
        except OSError:
            continue
        if status.st_dev == device and int(name) != but:
            yield status.st_ino
    yield from _mapped(pid, device)


def _mapped(pid: int, device: int) -> Iterator[int]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                # address perms offset dev inode path
                fields = line.split(maxsplit=5)
                if len(fields) > 5 and fields[4] != "0":
                    major, _, minor = fields[3].partition(":")
                    if os.makedev(int(major, 16), int(minor, 16)) == device:
                        yield int(fields[4])
    except OSError:
        return


def boot_id() -> str:
    """Return what tells this boot of the machine from every other."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip().replace("-", "")[:12]
