"""Removing a directory tree of which nothing may stay open: file by file, each only when nobody else has it."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from layercache.store._disk import Dir, Disk, File
from layercache.store._layout import BLOBS, FENCE, KEY
from layercache.store._receipts import Proof

__all__ = ["Found", "erase"]

_NO_LEASE = frozenset((errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK))


@dataclass(slots=True)
class Found:
    """What one walk removed, and what it could not."""

    entries: int = 0
    blobs: int = 0
    bytes: int = 0
    elsewhere: int = 0
    held: set[int] = field(default_factory=set)
    """Inodes that somebody has open."""
    failed: Counter[str] = field(default_factory=Counter)
    proof: Proof = "lease"
    cut: bool = False
    """Stopped early: there may be more of everything."""

    def add(self, other: Found) -> None:
        """Take in what another walk found."""
        self.entries += other.entries
        self.blobs += other.blobs
        self.bytes += other.bytes
        self.elsewhere += other.elsewhere
        self.held |= other.held
        self.failed += other.failed
        self.cut |= other.cut
        if other.proof == "scan":
            self.proof = "scan"


def erase(
    disk: Disk, at: Dir, name: str, *, due: Callable[[], bool] = lambda: False, free_blocks: bool = False
) -> Found:
    """Remove a directory with all that is below it and nobody has open; go on past whatever resists.

    Stops early once ``due`` says so. With ``free_blocks`` the blocks of each file are free when this returns, also on
    a filesystem that frees those of an unlinked file later.
    """
    walk = _Walk(disk, due, free_blocks=free_blocks)
    with _noted(walk.found):
        walk.remove_tree(at, name, top=True)
    return walk.found


class _Walk:
    def __init__(self, disk: Disk, due: Callable[[], bool], *, free_blocks: bool) -> None:
        self._disk = disk
        self._due = due
        self._free_blocks = free_blocks
        self._openers: dict[int, frozenset[int]] | None = None
        self.found = Found()

    def remove_tree(self, at: Dir, name: str, *, top: bool = False, blobs: bool = False) -> None:
        disk = self._disk
        try:
            folder = disk.dir(at, name)
        except FileNotFoundError:
            return
        try:
            # Last of all what leads to the key, and while anything else is here it stays: who goes on needs it, and
            # whoever has it open has the key.
            for child in sorted(disk.names(folder), key=lambda child: top and child == KEY):
                if self._due():
                    self.found.cut = True
                    return
                if top and child == KEY and disk.names(folder) != [KEY]:
                    return
                with _noted(self.found):
                    self._remove(folder, child, word=top and child == FENCE, blobs=blobs or (top and child == BLOBS))
        finally:
            disk.close(folder)
        try:
            # The proof: this fails while anything is in it, and after it nobody can put anything there, not even
            # somebody who has it open.
            disk.remove_dir(at, name)
            self.found.entries += 1
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def _remove(self, folder: Dir, name: str, *, word: bool, blobs: bool) -> None:
        disk, found = self._disk, self.found
        status = disk.stat(folder, name)
        if status is None:
            return
        if status.kind == "dir":
            self.remove_tree(folder, name, blobs=blobs)
            return
        file: File | None = None
        try:
            if status.kind == "file" and status.links == 1 and not word:
                # The word is mapped by every process that has the generation open, and holds nothing but that it ended.
                file = disk.create(folder, name, exist_ok=True) if self._free_blocks else disk.open(folder, name)
                if not self._nobody_has(file, status.inode):
                    found.held.add(status.inode)
                    return
                if self._free_blocks:
                    disk.truncate(file, 0)
            # Under the lease: nobody can come to have it open between the question and this.
            disk.remove(folder, name)
        finally:
            if file is not None:
                disk.close(file)
        found.entries += 1
        found.blobs += blobs
        found.bytes += status.size
        found.elsewhere += status.kind == "file" and status.links > 1

    def _nobody_has(self, file: File, inode: int) -> bool:
        try:
            return self._disk.lease(file)
        except OSError as error:
            if error.errno not in _NO_LEASE:
                raise
        # No lease to be had here: everybody who works with this library has a lock on the file, others show in /proc.
        self.found.proof = "scan"
        if not self._disk.lock(file, exclusive=True):
            return False
        if self._openers is None:
            # Once a walk; whoever opens a file later runs into our lock.
            self._openers = self._disk.openers(but=file)
        return inode not in self._openers


@contextmanager
def _noted(found: Found) -> Iterator[None]:
    """Let what resists delay only itself."""
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        found.failed[errno.errorcode.get(error.errno or 0, "EIO")] += 1
