"""The purge of one generation, in steps that any process can take up where another stopped.

    fence      set the mapped word, rename live.g to purging.g, fsync: from here nothing of it is given out or published
    hide       rename the generation's directory into trash/, fsync both parents
    empty      unlink every file nobody has open, wait for the others until the caller's deadline
    prove      rmdir bottom-up; a directory that is not empty had a late writer: empty it again
    record     append the receipt, then rename purging.g to dead.g

What is left in trash/ after the deadline is finished by the next open of the root, or by the next purge.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from layercache.store._disk import Dir, Disk
from layercache.store._layout import BLOBS, FENCE, FENCE_SIZE, SlotState, generation_name
from layercache.store._receipts import Chain, Receipt

__all__ = ["Purge", "discard"]

_PASSES = 1000
_STEP = 0.01


@dataclass(slots=True)
class _Found:
    """What one walk removed, and what it could not."""

    entries: int = 0
    blobs: int = 0
    bytes: int = 0
    held: set[int] = field(default_factory=set)
    failed: list[OSError] = field(default_factory=list)


class Purge:
    """One generation on its way out. The caller holds the slot's lock."""

    def __init__(
        self, disk: Disk, *, slots: Dir, data: Dir, trash: Dir, chain: Chain, slot: str, generation: int
    ) -> None:
        self._disk = disk
        self._slots, self._data, self._trash = slots, data, trash
        self._chain = chain
        self._slot, self._generation = slot, generation
        self._name = generation_name(slot, generation)

    def fence(self, slot_dir: Dir) -> None:
        """End the generation for every process. Durable when it returns."""
        disk = self._disk
        live, purging = (str(SlotState(state, self._generation)) for state in ("live", "purging"))
        # The word first: it takes effect at once in every process that has the generation open. Should we die before
        # the rename, the next to open the namespace sees the word and purges it.
        self._set_word()
        if disk.stat(slot_dir, live) is not None:
            disk.rename(slot_dir, live, slot_dir, purging, replace=False)
        disk.sync(slot_dir)

    def hide(self) -> None:
        """Move the directory to where no name of a namespace leads."""
        disk = self._disk
        if disk.stat(self._data, self._name) is not None:
            disk.rename(self._data, self._name, self._trash, self._name, replace=False)
        disk.sync(self._trash)
        disk.sync(self._data)

    def finish(self, *, wait: float, started: float, record_pending: bool = True) -> Receipt:
        """Empty the directory, remove it, append the receipt. Waits at most ``wait`` seconds for open readers.

        Without ``record_pending`` a receipt is appended only when nothing is left.
        """
        disk = self._disk
        total = _Found()
        waited = 0.0
        for _ in range(_PASSES):
            found = discard(disk, self._trash, self._name)
            total.blobs += found.blobs
            total.bytes += found.bytes
            if disk.stat(self._trash, self._name) is None:
                break
            if found.entries and not found.held and not found.failed:
                continue  # a late writer; he finds no directory any more once ours is gone
            if waited >= wait:
                break
            disk.pause(_STEP)
            waited += _STEP
        disk.sync(self._trash)
        gone = disk.stat(self._trash, self._name) is None
        receipt = Receipt(
            slot=self._slot,
            generation=self._generation,
            level="unlinked" if gone else "fenced",
            blobs=total.blobs,
            bytes=total.bytes,
            pending=() if gone else disk.holders(frozenset(found.held)),
            started=started,
            finished=disk.now(),
            previous="",
        )
        if not gone and not record_pending:
            return receipt
        return self._chain.append(receipt)

    def close_slot(self, slot_dir: Dir) -> None:
        """Let the namespace begin anew: its next generation is the one after this."""
        disk = self._disk
        purging, dead = (str(SlotState(state, self._generation)) for state in ("purging", "dead"))
        if disk.stat(slot_dir, purging) is not None:
            disk.rename(slot_dir, purging, slot_dir, dead, replace=False)
        disk.sync(slot_dir)

    def _set_word(self) -> None:
        disk = self._disk
        try:
            folder = disk.dir(self._data, self._name)
        except FileNotFoundError:
            return  # hidden already
        try:
            file = disk.create(folder, FENCE, exist_ok=True)
            try:
                if disk.fstat(file).size < FENCE_SIZE:
                    disk.truncate(file, FENCE_SIZE)  # damaged; a word must not be mapped beyond the end
                disk.word(file).set(1)
            finally:
                disk.close(file)
        finally:
            disk.close(folder)


def discard(disk: Disk, at: Dir, name: str) -> _Found:
    """Remove a directory with all that is below it and not held; go on past whatever resists."""
    found = _Found()
    try:
        folder = disk.dir(at, name)
    except FileNotFoundError:
        return found
    try:
        _empty(disk, folder, found, blobs=False)
    except OSError as error:
        found.failed.append(error)
    finally:
        disk.close(folder)
    _remove_dir(disk, at, name, found)
    return found


def _empty(disk: Disk, folder: Dir, found: _Found, *, blobs: bool) -> None:
    for name in disk.names(folder):
        try:
            status = disk.stat(folder, name)
            if status is None:
                continue
            if status.kind == "dir":
                child = disk.dir(folder, name)
                try:
                    _empty(disk, child, found, blobs=blobs or name == BLOBS)
                finally:
                    disk.close(child)
                _remove_dir(disk, folder, name, found)
            elif status.kind == "file" and status.links == 1 and not _unheld(disk, folder, name):
                found.held.add(status.inode)
            else:
                disk.remove(folder, name)
                found.entries += 1
                found.blobs += blobs
                found.bytes += status.size
        except FileNotFoundError:
            continue
        except OSError as error:
            found.failed.append(error)


def _unheld(disk: Disk, folder: Dir, name: str) -> bool:
    """Tell whether nobody holds a lock on the file: readers and writers of this library all do."""
    file = disk.open(folder, name)
    try:
        return disk.lock(file, exclusive=True)
    finally:
        disk.close(file)


def _remove_dir(disk: Disk, at: Dir, name: str, found: _Found) -> None:
    try:
        disk.remove_dir(at, name)
        found.entries += 1
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            found.failed.append(error)
