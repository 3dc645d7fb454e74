"""Recovery: what crashes left behind is swept, by one process at a time, while all others go on.

Reads are right without it: a crash leaves nothing visible that is not whole. What it leaves is in the way: unfinished
writes of another boot, records without blobs, generations that never lived, and whatever somebody else put there. Each
entry is judged alone, under the lock that guards it, so that one that resists hinders no other; and all of it may be
cut short anywhere and done again.
"""

from __future__ import annotations

from collections.abc import Callable

from layercache.errors import InUseError, NamespacePurgedError
from layercache.store._disk import Dir, Disk
from layercache.store._files import NEW
from layercache.store._layout import (
    ASIDE,
    BALLAST,
    BUDGET,
    DATA,
    EVICT_LOCK,
    FORMAT,
    JANITOR_LOCK,
    PARTS,
    POLICY,
    RECEIPTS,
    ROOT_KEY,
    ROOT_LOCK,
    SCRUB_LOCK,
    SLOT_LOCK,
    SLOTS,
    SPACE,
    TRASH,
    Slot,
    SlotState,
    generation_name,
    is_slot,
    is_temporary,
    parse_discarded,
    parse_generation_name,
)
from layercache.store._leftovers import Leftover, Leftovers
from layercache.store._slots import Slots
from layercache.store._sweep import Sweep

__all__ = ["recover"]

_LOCKS = (ROOT_LOCK, JANITOR_LOCK, SCRUB_LOCK, EVICT_LOCK, SPACE)
_ROOT = frozenset(
    (FORMAT, ROOT_KEY, BALLAST, BUDGET, POLICY, SLOTS, DATA, TRASH, RECEIPTS, ASIDE, "lost+found", *_LOCKS)
)
_KNOWN: dict[str, Callable[[str], bool]] = {
    SLOTS: is_slot,
    TRASH: lambda name: parse_generation_name(name) is not None or parse_discarded(name) is not None,
    DATA: lambda name: parse_generation_name(name) is not None,
    RECEIPTS: lambda name: name == "lock" or name.startswith("segment."),
}
_PATIENCE = 0.1


def recover(disk: Disk, slots: Slots, *, folders: dict[str, Dir]) -> tuple[Leftover, ...]:
    """Sweep a root and return what was found; a second time finds nothing but what failed.

    ``folders`` are the root's open directories by name.

    :raises InUseError: when another process is sweeping.
    """
    lock = disk.create(disk.root, JANITOR_LOCK, exist_ok=True)
    try:
        if not disk.lock(lock, exclusive=True):
            raise InUseError("another process sweeps this root", hint="try again later")
        leftovers = Leftovers(disk)
        _Janitor(disk, slots, folders, leftovers).run()
        return tuple(leftovers.found)
    finally:
        disk.close(lock)


class _Janitor:
    def __init__(self, disk: Disk, slots: Slots, folders: dict[str, Dir], leftovers: Leftovers) -> None:
        self._disk = disk
        self._slots = slots
        self._folders = folders
        self._leftovers = leftovers

    def run(self) -> None:
        alone = self._leftovers.alone
        self._slots.resume()
        with alone(RECEIPTS):
            self._slots.end_receipts()
        with alone("."):
            self._root()
        for name in _KNOWN:
            with alone(name):
                self._unknown(name)
        folders = [parsed for name in self._disk.names(self._folders[DATA]) if (parsed := parse_generation_name(name))]
        for slot in sorted({*self._slots.names(), *(slot for slot, _ in folders)}):
            with alone(f"{SLOTS}/{slot}"):
                living = self._slot(slot)
                if living:
                    self._generation(slot, living)
        with alone("keys"):
            self._slots.sweep_keys()

    def _root(self) -> None:
        disk = self._disk
        for name in sorted(set(disk.names(disk.root)) - _ROOT):
            if is_temporary(name):
                self._temporary(name)
            elif name in (FORMAT + NEW, ROOT_KEY + NEW):
                # Left by a root that was being made when the power went; it is made now, so nobody is at it.
                status = disk.stat(disk.root, name)
                disk.remove(disk.root, name)
                disk.sync(disk.root)
                self._leftovers.note("temporary", name, status)
            else:
                self._leftovers.note("unknown", name, disk.stat(disk.root, name), "left where it is")

    def _temporary(self, name: str) -> None:
        """Remove a FORMAT that never came to its place, unless somebody is at it."""
        disk = self._disk
        file = disk.open(disk.root, name)
        try:
            if disk.lock(file, exclusive=True) and (status := disk.stat(disk.root, name)) is not None:
                disk.remove(disk.root, name)
                self._leftovers.note("temporary", name, status)
        finally:
            disk.close(file)

    def _unknown(self, folder: str) -> None:
        """Move aside what cannot be ours in one of the root's directories."""
        disk, at = self._disk, self._folders[folder]
        for name in sorted(disk.names(at)):
            if _KNOWN[folder](name):
                continue
            with self._leftovers.alone(f"{folder}/{name}"):
                self._aside(at, name, f"{folder}/{name}")

    def _aside(self, at: Dir, name: str, place: str) -> None:
        disk = self._disk
        if disk.stat(disk.root, ASIDE) is None:
            disk.make_dir(disk.root, ASIDE)
        disk.sync(disk.root)
        target = disk.dir(disk.root, ASIDE)
        try:
            self._leftovers.move_aside("unknown", at, name, place, to=target)
        finally:
            disk.close(target)

    def _slot(self, slot: Slot) -> int:
        """Put a slot in order and return the generation that lives in it, 0 for none."""
        disk, data = self._disk, self._folders[DATA]
        with self._slots.locked(slot, create=True, patience=_PATIENCE) as slot_dir:
            state = self._slots.state(slot_dir)
            for name in sorted(disk.names(slot_dir)):
                if name != SLOT_LOCK and (state is None or name != str(state)):
                    self._aside(slot_dir, name, f"{SLOTS}/{slot}/{name}")
            living = state.generation if state is not None and state.state == "live" else 0
            if living and disk.stat(data, generation_name(slot, living)) is None:
                self._slots.purge(slot, slot_dir, living)
                self._leftovers.note("generation", f"{SLOTS}/{slot}/{state}", detail="its directory is missing; ended")
                living = 0
            elif living and self._fenced(slot):
                # Whoever purged it died between the word and the rename: nothing of it is given out, and nothing went.
                self._slots.purge(slot, slot_dir, living)
                self._leftovers.note("generation", f"{SLOTS}/{slot}/{state}", detail="its purge had begun; ended")
                living = 0
            elif living and self._slots.end_lost(slot, slot_dir):
                self._leftovers.note("generation", f"{SLOTS}/{slot}/{state}", detail="its key is gone; ended")
                living = 0
            for name in sorted(disk.names(data)):
                parsed = parse_generation_name(name)
                if parsed is None or parsed[0] != slot or parsed[1] == living:
                    continue
                if state == SlotState("purging", parsed[1]):
                    continue  # its purge could not be finished just now
                with self._leftovers.alone(f"{DATA}/{name}"):
                    self._slots.discard(name)
                    self._leftovers.note("generation", f"{DATA}/{name}", detail="it does not live; removed")
        return living

    def _fenced(self, slot: Slot) -> bool:
        generation = self._slots.live(slot, keyless=True)
        if generation is None:
            return False
        generation.close()
        return generation.fenced

    def _generation(self, slot: Slot, number: int) -> None:
        disk = self._disk
        name = generation_name(slot, number)
        place = f"{DATA}/{name}"
        folder = disk.dir(self._folders[DATA], name)
        opened = [folder]
        try:
            self._mend(folder, place)
            parts: dict[str, Dir] = {}
            for part in PARTS:
                parts[part] = disk.dir(folder, part)
                opened.append(parts[part])
            generation = self._slots.live(slot, keyless=True)
            if generation is None:
                return  # purged since
            try:
                if generation.generation == number:
                    Sweep(disk, generation, self._leftovers, folder=folder, parts=parts, place=place).run()
            except NamespacePurgedError:
                return
            finally:
                generation.close()
        finally:
            for handle in opened:
                disk.close(handle)

    def _mend(self, folder: Dir, place: str) -> None:
        """Make again what every generation has and this one has lost."""
        disk = self._disk
        missing = sorted(set(PARTS) - set(disk.names(folder)))
        for name in missing:
            disk.make_dir(folder, name)
            self._leftovers.note("generation", f"{place}/{name}", detail="it was missing; made again")
        if missing:
            disk.sync(folder)
