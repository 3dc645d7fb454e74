"""What stands for a namespace in the root: its slot, which generation of it lives, how one ends and the next begins."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from layercache.control import Control
from layercache.errors import FormatError, KeyGoneError, LayerCacheError, StoreError
from layercache.store._disk import Dir
from layercache.store._erase import erase
from layercache.store._errand import Errand, Errands
from layercache.store._files import PATIENCE, lock_within
from layercache.store._form import Form, PlainForm
from layercache.store._furnish import furnish
from layercache.store._generation import Generation
from layercache.store._health import Health
from layercache.store._keys import KeyRecord, Keys
from layercache.store._layout import (
    SLOT_LOCK,
    NamespaceName,
    Slot,
    SlotState,
    discarded_name,
    generation_name,
    is_slot,
    next_generation,
    parse_discarded,
    parse_generation_name,
)
from layercache.store._purge import Place, Purge
from layercache.store._receipts import Receipt
from layercache.store._seal import Seal
from layercache.store._space import GENERATION, Space
from layercache.store._uses import Uses

__all__ = ["Slots"]

_log = logging.getLogger("layercache.store")

_BUDGET = 0.5
"""Seconds that beginning a generation spends on the one before."""

_Offer = tuple[str, KeyRecord, Form]
"""A key made beforehand: for which generation's directory."""


class Slots:
    """The slots of one root, with the directories that generations move between. Verbs raise ``OSError``."""

    def __init__(self, place: Place, *, health: Health, keys: Keys, space: Space, writable: bool) -> None:
        self._place = replace(place, forget_key=self._forget_key)
        self._disk = place.disk
        self._slots, self._data, self._trash = place.slots, place.data, place.trash
        self._errands = Errands(place.disk)
        self._health = health
        self._keys = keys
        self._space = space
        self._uses: dict[str, Uses] = {}
        self.writable = writable

    def names(self) -> list[Slot]:
        """Return the slots there are."""
        return sorted(name for name in self._disk.names(self._slots) if is_slot(name))

    def resume(self, *, budget: float = math.inf) -> None:
        """Finish what interrupted purges left, where no other process is at it. One that fails hinders no other.

        After ``budget`` seconds the rest goes on beside the caller.
        """
        end = self._disk.elapsed() + budget
        left = []
        for purge in self._unfinished(0.0):
            with self._failing_alone():
                if purge.empty(self._past(end)):
                    purge.record(purge.reached)
                    self._let_begin(purge)
                else:
                    left.append(purge)
            purge.close()
        for name in sorted(self._disk.names(self._trash)):
            if (owner := parse_discarded(name)) is not None:
                with self._failing_alone(), self.locked(owner, create=True, patience=0.0):
                    erase(self._disk, self._trash, name, due=self._past(end))
                    self._disk.sync(self._trash)
        if left:
            self._errands.leave(Errand(self._disk, left, wait=None, close=self._let_begin))

    def live(self, slot: Slot, *, keyless: bool = False, control: Control | None = None) -> Generation | None:
        """Return the live generation of a slot, opened; ``None`` where there is none.

        :param keyless: no key is needed: only names are looked at.
        :raises KeyGoneError: where it is sealed and its key is gone for good.
        """
        state = self.state_of(slot)
        if state is None or state.state != "live":
            return None
        form: Form | None = None
        try:
            form = self._form(generation_name(slot, state.generation), keyless=keyless, control=control)
            generation = Generation(
                self._disk,
                self._slots,
                self._data,
                slot,
                state.generation,
                form=form,
                health=self._health,
                space=self._space,
                uses=self._uses.setdefault(generation_name(slot, state.generation), Uses()),
                writable=self.writable,
            )
        except (OSError, StoreError) as error:
            if form is not None:
                form.close()
            if isinstance(error, FileNotFoundError | StoreError) and self.state_of(slot) != state:
                return None  # purged while we looked
            raise
        # Looked at again with its directory open: a purge may have slipped in between.
        try:
            if self.state_of(slot) == state:
                return generation
        except BaseException:
            generation.close()
            raise
        generation.close()
        return None

    def has(self, slot: Slot, *names: str) -> bool:
        """Tell whether the generation that lives in a slot has all these entries. It is not opened for that."""
        state = self.state_of(slot)
        if state is None or state.state != "live":
            return False
        try:
            folder = self._disk.dir(self._data, generation_name(slot, state.generation))
        except FileNotFoundError:
            return False  # purged just now
        try:
            return all(self._disk.stat(folder, name) is not None for name in names)
        finally:
            self._disk.close(folder)

    def begin(self, slot: Slot, name: NamespaceName, *, seal: Seal | None, control: Control) -> Form:
        """Make the next generation of a slot, unless one lives; return what has its key at hand until closed."""
        while True:
            offer: _Offer | None = None
            if seal == "kms":
                # Before the lock, which a purge needs: it must not wait for a service. Somebody may be faster.
                folder = generation_name(slot, next_generation(self.state_of(slot)))
                offer = (folder, *self._keys.make(folder, seal, control))
            form = None
            try:
                with self.locked(slot, create=True) as slot_dir:
                    form = self._begin(slot, slot_dir, name, seal=seal, offer=offer)
            finally:
                if offer is not None and form is not offer[2]:
                    offer[2].close()
            if form is not None:
                return form

    def _begin(
        self, slot: Slot, slot_dir: Dir, name: NamespaceName, *, seal: Seal | None, offer: _Offer | None
    ) -> Form | None:
        """Do as :meth:`begin`, the slot's lock in hand; ``None`` where the key on offer is of another generation."""
        disk = self._disk
        state = self.state(slot_dir)
        if state is not None and state.state == "live":
            return PlainForm()
        if state is not None and state.state == "purging":
            # Whoever purges it may be at it for long. What he has to do is done beside the new generation.
            self.purge(slot, slot_dir, state.generation, budget=_BUDGET)
        number = next_generation(state)
        folder = generation_name(slot, number)
        if offer is not None and offer[0] != folder:
            return None
        if disk.stat(self._data, folder) is not None:
            # Left by a creation that did not come to its end. Nothing was ever published in it.
            self.discard(folder)
        record: KeyRecord | None = None
        form: Form = PlainForm()
        if offer is not None:
            _, record, form = offer
        elif seal is not None:
            record, form = self._keys.make(folder, seal)
        try:
            with self._space.taking(lambda: GENERATION, "begin a namespace"):
                disk.make_dir(self._data, folder)
            furnish(disk, self._data, folder, name=name, record=record, form=form)
            live = str(SlotState("live", number))
            if state is None:
                disk.close(disk.create(slot_dir, live))
            else:
                disk.rename(slot_dir, str(SlotState("dead", state.generation)), slot_dir, live, replace=False)
            disk.sync(slot_dir)
        except BaseException:
            if offer is None:  # what is on offer is closed by who made it
                form.close()
            raise
        return form

    def end(self, slots: Sequence[Slot], *, wait: float, started: float, trim: bool) -> list[Receipt | None]:
        """End the live generation of each slot and finish what is left of earlier ones; return the last's receipts.

        All are fenced before anybody is waited for. ``None`` where there was nothing to purge. What hinders the fence
        of one is raised when the others are done.
        """
        purges: dict[Slot, list[Purge]] = {}
        hindered: OSError | StoreError | None = None
        for slot in slots:
            purges[slot] = [purge for purge in self._in_trash(trim=trim) if purge.slot == slot]
            if self._disk.stat(self._slots, slot) is None:
                continue
            try:
                purge = self._fenced(slot, started=started, trim=trim)
            except (OSError, StoreError) as error:
                hindered = hindered or error
                continue
            if purge is not None:
                purges[slot] = [other for other in purges[slot] if other.generation != purge.generation] + [purge]
        receipts = self._run(purges, wait)
        try:
            if hindered is not None:
                raise hindered
        finally:
            del hindered  # it leads to this frame: a ring that would keep what is mapped until the collector comes
        return receipts

    def _fenced(self, slot: Slot, *, started: float, trim: bool) -> Purge | None:
        with self.locked(slot, create=False) as slot_dir:
            state = self.state(slot_dir)
            if state is None or state.state == "dead":
                return None
            begun = state.state == "purging"
            purge = Purge(self._place, slot, state.generation, started=started, resumed=begun, trim=trim)
            purge.fence(slot_dir)
            return purge

    def end_left(self, *, wait: float | None) -> list[Receipt]:
        """Go on with every purge of the root that is not at its end; return what each has reached.

        Where nobody waits (``None``) there is nothing to return, and nothing is recorded but an end.
        """
        if wait is None:
            self.resume(budget=0.0)
            return []
        left = self._unfinished(PATIENCE)
        receipts = self._errands.run(Errand(self._disk, left, wait=wait, close=self._let_begin)) if left else []
        self.end_receipts()
        return receipts

    def purge(self, slot: Slot, slot_dir: Dir, generation: int, *, budget: float = math.inf) -> Receipt:
        """End a generation of a slot whose lock is held, as far as nobody has it open; the rest is left in trash."""
        purge = self._purge_of(slot, generation)
        try:
            purge.fence(slot_dir)
            purge.hide()
            gone = purge.empty(self._past(self._disk.elapsed() + budget))
            if purge.held:
                purge.name_holders(self._disk.openers())
            receipt = purge.record(purge.reached if gone else "fenced")
            purge.close_slot(slot_dir)
        finally:
            purge.close()
        if not gone:
            self._errands.leave(Errand(self._disk, [purge], wait=None, close=self._let_begin))
        return receipt

    def note_uses(self) -> None:
        """Write down what was used in this process, for whoever evicts next. What cannot be written now waits."""
        for folder, uses in list(self._uses.items()):
            parsed = parse_generation_name(folder)
            with suppress(OSError, LayerCacheError):
                generation = self.live(parsed[0], keyless=True) if uses and parsed is not None else None
                if generation is not None:
                    try:
                        if generation.uses is uses:
                            generation.note_uses()
                    finally:
                        generation.close()
                elif uses:
                    self._uses.pop(folder, None)

    def stop(self) -> None:
        """End what goes on beside the callers."""
        self._errands.stop()

    def end_lost(self, slot: Slot, slot_dir: Dir) -> bool:
        """End the generation that lives in a slot, whose lock is held, if its key is gone; tell whether it was."""
        state = self.state(slot_dir)
        if state is None or state.state != "live":
            return False
        record = self.key_record(generation_name(slot, state.generation))
        if record is None or not self._keys.lost(record):
            return False
        self.purge(slot, slot_dir, state.generation)
        return True

    def key_record(self, folder: str) -> KeyRecord | None:
        """Return what is known of a generation's key; ``None`` where it is not sealed, or not there."""
        for at in (self._data, self._trash):
            try:
                opened = self._disk.dir(at, folder)
            except FileNotFoundError:
                continue
            try:
                return KeyRecord.read(self._disk, opened)
            finally:
                self._disk.close(opened)
        return None

    def _form(self, folder: str, *, keyless: bool, control: Control | None) -> Form:
        opened = self._disk.dir(self._data, folder)
        try:
            record = KeyRecord.read(self._disk, opened)
            if record is None:
                return PlainForm()
            if keyless:
                return self._keys.keyless(record, folder)
            form = self._keys.load(opened, record, folder, control)
        finally:
            self._disk.close(opened)
        if form is None:
            raise KeyGoneError("the key of a sealed namespace is gone", hint="use it again to begin anew")
        return form

    def sweep_keys(self) -> int:
        """Remove the key files that no generation of this root needs any more; return how many."""
        return self._keys.sweep(self._key_records)

    def _key_records(self) -> Iterator[KeyRecord]:
        for at in (self._data, self._trash):
            for name in self._disk.names(at):
                if parse_generation_name(name) is not None:
                    with suppress(FileNotFoundError, FormatError):
                        folder = self._disk.dir(at, name)
                        try:
                            record = KeyRecord.read(self._disk, folder)
                        finally:
                            self._disk.close(folder)
                        if record is not None:
                            yield record

    def _forget_key(self, folder: str) -> Callable[[], None] | None:
        """Step 3 of a purge: no process can get the key any more, this one has no copy of it left."""
        with self._failing_alone():
            record = self.key_record(folder)
            if record is not None:
                return self._keys.forget(record, folder)
        return None

    def end_receipts(self) -> None:
        """Append what a process could not say that died between the last unlink of a generation and its receipt."""
        open_ends: dict[tuple[Slot, int], Receipt] = {}
        chain = self._place.chain
        chain.settle()
        for receipt in chain.read():
            key = (receipt.slot, receipt.generation)
            if receipt.ends:
                open_ends.pop(key, None)
            else:
                open_ends[key] = receipt
        for slot, generation in open_ends:
            with self._failing_alone(), self.locked(slot, create=True, patience=0.0):
                if self._disk.stat(self._trash, generation_name(slot, generation)) is None:
                    purge = self._purge_of(slot, generation)
                    try:
                        if purge.empty():
                            purge.record("unlinked")
                    finally:
                        purge.close()

    def discard(self, folder: str) -> None:
        """Remove the directory of a generation that does not live, of a slot whose lock is held. Without a receipt."""
        disk = self._disk
        name = discarded_name(folder, disk.token())
        disk.rename(self._data, folder, self._trash, name, replace=False)
        disk.sync(self._trash)
        disk.sync(self._data)
        erase(disk, self._trash, name)
        disk.sync(self._trash)

    def _purge_of(self, slot: Slot, generation: int, *, trim: bool = False) -> Purge:
        """Return the purge of a generation that somebody else began."""
        return Purge(self._place, slot, generation, started=self._disk.now(), resumed=True, trim=trim)

    def _in_trash(self, *, trim: bool = False) -> list[Purge]:
        """Return the purges whose generation is hidden and not gone."""
        # In order: what is done must not depend on how a listing happens to be laid out.
        parsed = map(parse_generation_name, sorted(self._disk.names(self._trash)))
        return [self._purge_of(*found, trim=trim) for found in parsed if found is not None]

    def _unfinished(self, patience: float) -> list[Purge]:
        """Return every purge that is not at its end, hidden: also one of which only the receipt is missing."""
        begun: dict[tuple[Slot, int], Purge] = {}
        for slot in self.names():
            with self._failing_alone():
                state = self.state_of(slot)
                if state is not None and state.state == "purging":
                    with self.locked(slot, create=False, patience=patience) as slot_dir:
                        state = self.state(slot_dir)
                        if state is not None and state.state == "purging":
                            purge = self._purge_of(slot, state.generation)
                            purge.fence(slot_dir)
                            purge.hide()
                            begun[slot, purge.generation] = purge
        return [
            *begun.values(),
            *(purge for purge in self._in_trash() if (purge.slot, purge.generation) not in begun),
        ]

    def _run(self, purges: dict[Slot, list[Purge]], wait: float) -> list[Receipt | None]:
        everything = [purge for some in purges.values() for purge in some]
        if not everything:
            return [None] * len(purges)
        errand = Errand(self._disk, everything, wait=wait, close=self._let_begin)
        receipts = dict(zip(everything, self._errands.run(errand), strict=True))
        return [receipts[some[-1]] if some else None for some in purges.values()]

    def _let_begin(self, purge: Purge) -> None:
        """Let a purged namespace begin anew. Not being able to is no failure of the purge: who comes next does it."""
        with self._failing_alone(), suppress(FileNotFoundError), self.locked(purge.slot, create=False) as slot_dir:
            purge.close_slot(slot_dir)

    def _past(self, end: float) -> Callable[[], bool]:
        return lambda: self._disk.elapsed() >= end

    @contextmanager
    def locked(self, slot: Slot, *, create: bool, patience: float = PATIENCE) -> Iterator[Dir]:
        """Open a slot and hold its lock: creating, purging and recovering a namespace exclude one another."""
        disk = self._disk
        if create and disk.stat(self._slots, slot) is None:
            with suppress(FileExistsError):
                disk.make_dir(self._slots, slot)
        if create:
            disk.sync(self._slots)
        slot_dir = disk.dir(self._slots, slot)
        try:
            lock = self._place.ballast.spared(lambda: disk.create(slot_dir, SLOT_LOCK, exist_ok=True))
            try:
                lock_within(disk, lock, patience=patience)
                yield slot_dir
            finally:
                disk.close(lock)
        finally:
            disk.close(slot_dir)

    def state_of(self, slot: Slot) -> SlotState | None:
        """Return the state of a slot; ``None`` where it has none."""
        if not is_slot(slot):
            return None
        try:
            slot_dir = self._disk.dir(self._slots, slot)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return self.state(slot_dir)
        finally:
            self._disk.close(slot_dir)

    def state(self, slot_dir: Dir) -> SlotState | None:
        """Return the state of an open slot; ``None`` where it has none."""
        states = [state for name in self._disk.names(slot_dir) if (state := SlotState.parse(name)) is not None]
        # A listing may show a name before and after its rename; the later generation and the later state win.
        order = {"live": 0, "purging": 1, "dead": 2}
        return max(states, key=lambda state: (state.generation, order[state.state]), default=None)

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        try:
            yield
        except (OSError, StoreError) as error:
            _log.warning("a purge could not be finished now: %s", error)
