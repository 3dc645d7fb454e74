"""The purge of one generation, in steps that any process can take up where another stopped.

    fence      write the mapped word, rename live.g to purging.g, fsync: from here nothing of it is given out
    hide       rename the generation's directory into trash/, fsync both parents
    forget     the key of a sealed namespace
    empty      unlink every file nobody has open (the kernel says so: a write lease)
    prove      rmdir bottom-up; a directory that is not empty had a late writer: empty it again
    record     append the receipt, durable, then rename purging.g to dead.g
    trim       where asked for: hand the free blocks to the device, and record that

Fencing and the state's renames act under the slot's lock; emptying under a lock of the slot's directory, so that a new
generation can begin meanwhile. No step relies on the one who took the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from layercache.errors import StoreError
from layercache.store._ballast import Ballast
from layercache.store._chain import Chain
from layercache.store._disk import Dir, Disk
from layercache.store._erase import Found, erase
from layercache.store._layout import FENCE, FENCE_SIZE, KEY, Slot, SlotState, generation_name, is_discarded
from layercache.store._receipts import Level, Proof, Receipt

__all__ = ["Place", "Purge"]

_FENCED = (1).to_bytes(FENCE_SIZE, "little")


@dataclass(frozen=True, slots=True)
class Place:
    """The root's directories that generations move between, and what every purge of it needs."""

    disk: Disk
    slots: Dir
    data: Dir
    trash: Dir
    chain: Chain
    ballast: Ballast
    forget_key: Callable[[str], Callable[[], None] | None] = lambda _: None
    """Destroys the key of a sealed generation, known by its directory. Where no copy of it was ever elsewhere than in
    memory, it returns what is to be called once a receipt says so."""


class Purge:
    """One generation on its way out.

    :param resumed: what it removes is not all: somebody else began, and may have died.
    :param trim: hand the blocks to the device when they are free.
    """

    def __init__(
        self, place: Place, slot: Slot, generation: int, *, started: float, resumed: bool, trim: bool = False
    ) -> None:
        self._place = place
        self._disk = place.disk
        self.slot, self.generation = slot, generation
        self.trim = trim
        self._name = generation_name(slot, generation)
        self._started = started
        self._resumed = resumed
        self._blobs = self._bytes = self._elsewhere = 0
        self._proof: Proof = "lease"
        self._erased: Callable[[], None] | None = None
        self._last = Found()
        self._holders: dict[int, frozenset[int]] = {}
        self._guard: Dir | None = None
        self.busy = False
        """True while somebody else is emptying it."""

    @property
    def held(self) -> bool:
        """True when the last look found files that somebody has open, or that could not be removed."""
        return bool(self._last.held or self._last.failed)

    @property
    def stuck(self) -> bool:
        """True when the last look removed nothing."""
        return self.busy or not self._last.entries

    def fence(self, slot_dir: Dir) -> None:
        """End the generation for every process. Durable when it returns. The slot's lock is held."""
        disk = self._disk
        live, purging = (str(SlotState(state, self.generation)) for state in ("live", "purging"))
        # The word first: it takes effect at once in every process that has the generation open. Should we die before
        # the rename, the next to open the namespace sees the word and purges it.
        self._set_word()
        if disk.stat(slot_dir, live) is not None:
            self._place.ballast.spared(lambda: disk.rename(slot_dir, live, slot_dir, purging, replace=False))
        disk.sync(slot_dir)

    def hide(self) -> None:
        """Move the directory to where no name of a namespace leads. Durable when it returns."""
        disk, place = self._disk, self._place
        if disk.stat(place.data, self._name) is not None:
            with suppress(FileNotFoundError):  # somebody else who finishes it was faster
                place.ballast.spared(
                    lambda: disk.rename(place.data, self._name, place.trash, self._name, replace=False)
                )
        disk.sync(place.trash)
        disk.sync(place.data)

    def empty(self, due: Callable[[], bool] = lambda: False) -> bool:
        """Remove what nobody has open now; true when nothing is left, and that is durable.

        Stops early once ``due`` says so. Then, and while somebody else is at it, false.
        """
        disk, place = self._disk, self._place
        # Two at once would take one another for holders, and each would count a part. Kept until the end is recorded:
        # who comes when all is gone then finds the record of it.
        if self._guard is None:
            self._guard = self._slot_dir()
        self.busy = not disk.lock(self._guard, exclusive=True)
        if self.busy:
            return False
        gone = False
        try:
            # Before the first file goes: what leads to the key is one of them, and the last. So whoever has the key
            # keeps that one, and while he does, nothing here is gone.
            if self._leads_to_key():
                self._erased = place.forget_key(self._name)
            found = erase(disk, place.trash, self._name, due=due, free_blocks=self.trim)
            # A beginning of it that failed may have left its directory, with the namespace's name in it.
            for name in self._beginnings():
                found.add(erase(disk, place.trash, name, due=due, free_blocks=self.trim))
            if found.cut:  # what it did not come to is as it was
                found.held |= self._last.held
                found.failed |= self._last.failed
            self._last = found
            self._blobs += found.blobs
            self._bytes += found.bytes
            self._elsewhere += found.elsewhere
            if found.proof == "scan":
                self._proof = "scan"
            if disk.stat(place.trash, self._name) is None and not self._beginnings():
                gone = self._gone()
            return gone
        finally:
            if not gone:
                self.close()

    @property
    def reached(self) -> Level:
        """What can be said once nothing is left."""
        return "unlinked" if self._erased is None else "crypto-erased"

    @property
    def unnamed(self) -> bool:
        """True when somebody has a file open and it is not known who."""
        return bool(self._last.held - self._holders.keys())

    def name_holders(self, openers: Mapping[int, frozenset[int]], *, quick: bool = False) -> None:
        """Learn who has which files open. After a ``quick`` look what an earlier one found of other files stays."""
        known = {**self._holders, **openers} if quick else openers
        self._holders = {inode: known[inode] for inode in self._last.held & known.keys()}

    def receipt(self, level: Level, *, trimmed: int = 0) -> Receipt:
        """Return what is reached, not recorded."""
        left = level == "fenced"
        return Receipt(
            slot=self.slot,
            generation=self.generation,
            level=level,
            blobs=self._blobs,
            bytes=self._bytes,
            pending=tuple(sorted(frozenset[int]().union(*self._holders.values()))) if left else (),
            unseen=len(self._last.held - self._holders.keys()) if left else 0,
            failed=dict(sorted(self._last.failed.items())) if left else {},
            elsewhere=self._elsewhere,
            resumed=self._resumed,
            proof="" if left else self._proof,
            trimmed=trimmed,
            started=self._started,
            finished=self._disk.now(),
        )

    def record(self, level: Level, *, trimmed: int = 0) -> Receipt:
        """Append what is reached to the chain, durable, and return it."""
        receipt = self._place.chain.append(self.receipt(level, trimmed=trimmed))
        self.close()
        if level != "fenced" and self._erased is not None:
            with suppress(OSError, StoreError):  # swept later: nothing of the key is in it
                self._erased()
        return receipt

    def close_slot(self, slot_dir: Dir) -> None:
        """Let the namespace begin anew: its next generation is the one after this. The slot's lock is held."""
        disk = self._disk
        purging, dead = (str(SlotState(state, self.generation)) for state in ("purging", "dead"))
        if disk.stat(slot_dir, purging) is not None:
            # After the receipt, never before: a generation that is called dead has one.
            self._place.ballast.spared(lambda: disk.rename(slot_dir, purging, slot_dir, dead, replace=False))
        disk.sync(slot_dir)

    def close(self) -> None:
        """Let others go on with it."""
        if self._guard is not None:
            self._disk.close(self._guard)
            self._guard = None

    def _slot_dir(self) -> Dir:
        """Return what is there before, while and after the generation is emptied, opened."""
        disk, place = self._disk, self._place
        try:
            return disk.dir(place.slots, self.slot)
        except FileNotFoundError:
            with suppress(FileExistsError):
                disk.make_dir(place.slots, self.slot)
            return disk.dir(place.slots, self.slot)

    def _beginnings(self) -> list[str]:
        return [name for name in sorted(self._disk.names(self._place.trash)) if is_discarded(name, self._name)]

    def _leads_to_key(self) -> bool:
        try:
            folder = self._disk.dir(self._place.trash, self._name)
        except FileNotFoundError:
            return False
        try:
            return self._disk.stat(folder, KEY) is not None
        finally:
            self._disk.close(folder)

    def _gone(self) -> bool:
        # Also where somebody else removed it: he may have died before his fsync.
        self._disk.sync(self._place.trash)
        self._last = Found()
        self._holders = {}
        return True

    def _set_word(self) -> None:
        disk = self._disk
        try:
            folder = disk.dir(self._place.data, self._name)
        except FileNotFoundError:
            return  # hidden already
        with suppress(FileNotFoundError):  # and, just now, removed, by somebody else who finishes this purge
            self._write_word(folder)

    def _write_word(self, folder: Dir) -> None:
        disk = self._disk
        try:
            file = disk.create(folder, FENCE, exist_ok=True)
            try:
                # Written, not stored through a mapping: that would kill this process where the page needs a block and
                # the disk has none left.
                self._place.ballast.spared(lambda: disk.write(file, _FENCED, 0))
            finally:
                disk.close(file)
        finally:
            disk.close(folder)
