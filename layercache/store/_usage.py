"""What each namespace takes, and how much of that could go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from layercache.errors import LayerCacheError
from layercache.store._evict import generations, stored
from layercache.store._generation import Generation
from layercache.store._grants import kept
from layercache.store._layout import Slot
from layercache.store._slots import Slots
from layercache.store._space import Space

__all__ = ["Holding", "holdings"]

_log = logging.getLogger("layercache.store")


@dataclass(frozen=True, slots=True)
class Holding:
    """One living generation: ``bytes`` on disk, ``reserved`` beyond those for what is being written.

    Of the bytes of its blobs ``leased`` are open somewhere, ``pinned`` are pinned, ``evictable`` are neither.
    """

    slot: Slot
    blobs: int
    bytes: int
    reserved: int
    evictable: int
    pinned: int
    leased: int


def holdings(slots: Slots, space: Space, *, public: Slot) -> Iterator[Holding]:
    """Yield what each living generation holds. Looks at every blob; one that fails is passed over.

    :param public: the slot of the public namespace.
    """
    for generation in generations(slots):
        try:
            yield _holding(generation, space, kept(slots, generation, public))
        except LayerCacheError as error:
            _log.warning("a namespace could not be looked at: %s", error)


def _holding(generation: Generation, space: Space, held: frozenset[str] | None) -> Holding:
    taken, reserved = space.below(generation.folder)
    blobs = evictable = pin = leased = 0
    for name, _, size in stored(generation):
        blobs += 1
        is_pinned, is_leased = held is None or name in held, _leased(generation, name)
        pin += size * is_pinned
        leased += size * is_leased
        evictable += size * (not is_pinned and not is_leased)
    return Holding(generation.slot, blobs, taken, reserved, evictable, pin, leased)


def _leased(generation: Generation, name: str) -> bool:
    disk = generation.disk
    with generation.guarding("look for a lease"), generation.blobs.folder(name) as blobs:
        if blobs is None:
            return False
        try:
            file = disk.open(blobs, name)
        except FileNotFoundError:
            return False
        try:
            return not disk.lock(file, exclusive=True)
        finally:
            disk.close(file)
