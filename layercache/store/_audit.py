"""What the slots of a root say has ended, held against its receipts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from layercache.store._layout import Slot, generation_name
from layercache.store._purge import Place
from layercache.store._receipts import Receipt
from layercache.store._slots import Slots

__all__ = ["unaccounted"]


def unaccounted(place: Place, slots: Slots, receipts: Iterable[Receipt]) -> Iterator[str]:
    """Yield which generations have ended, as their slots say, and what their receipts lack."""
    last: dict[tuple[Slot, int], Receipt] = {}
    for receipt in receipts:
        last[receipt.slot, receipt.generation] = receipt
    for slot in slots.names():
        state = slots.state_of(slot)
        if state is None:
            continue
        for number in range(1, state.generation + (state.state == "dead")):
            found = last.get((slot, number))
            hidden = place.disk.stat(place.trash, generation_name(slot, number)) is not None
            if found is None:
                yield f"generation {number} of {slot} has ended without a receipt"
            elif not found.ends and not hidden and not _just_ended(place, slot, number):
                yield f"generation {number} of {slot} is gone and no receipt says so; purge --resume adds it"
            elif found.ends and hidden:
                yield f"generation {number} of {slot} is not gone, and a receipt says so"


def _just_ended(place: Place, slot: Slot, generation: int) -> bool:
    """Tell whether somebody is about to record that a generation is gone, or has done so just now."""
    slot_dir = place.disk.dir(place.slots, slot)
    try:
        if not place.disk.lock(slot_dir, exclusive=False):
            return True
    finally:
        place.disk.close(slot_dir)
    return any(one.ends and (one.slot, one.generation) == (slot, generation) for one in place.chain.read())
