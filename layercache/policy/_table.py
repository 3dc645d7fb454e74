"""Blobs by small numbers: one column a fact, so that 10^5 of them stay small and are copied and saved quickly."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from copy import copy

__all__ = ["FIRST", "SCALE", "Table"]

FIRST = 3
"""The first slot of a blob; those below are the ends of linked lists."""

SCALE = 1 << 44
"""Prices are whole numbers, so that every machine and every restored state comes to the same decision."""


class Table:
    """What is known of each blob, here or gone, whichever way victims are chosen."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.keys: list[str | None] = [None] * FIRST
        self.namespaces: list[str] = [""] * FIRST
        self.size = array("q", [0] * FIRST)
        self.cost = array("d", [0.0] * FIRST)
        self.price = array("q", [0] * FIRST)
        self.seen = array("q", [0] * FIRST)
        self.left = array("q", [0] * FIRST)
        self.resident = bytearray(FIRST)
        self.free: list[int] = []
        self.clock = 0

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, namespace: str) -> int:
        """Return a fresh slot for ``key``. Orders must :meth:`grow` with it."""
        if self.free:
            slot = self.free.pop()
            self.keys[slot], self.namespaces[slot] = key, namespace
            self.left[slot] = 0
        else:
            slot = len(self.keys)
            self.keys.append(key)
            self.namespaces.append(namespace)
            for column in (self.size, self.price, self.seen, self.left):
                column.append(0)
            self.cost.append(0.0)
            self.resident.append(0)
        self.slots[key] = slot
        return slot

    def describe(self, slot: int, size: int, cost: float) -> None:
        """Set what ``slot`` weighs and what a miss of it takes."""
        self.size[slot], self.cost[slot] = size, cost
        self.price[slot] = min(max(1, int(cost / max(size, 1) * SCALE)), SCALE)

    def drop(self, slot: int) -> None:
        """Forget ``slot``: no column keeps its key."""
        key = self.keys[slot]
        if key is not None:
            del self.slots[key]
        self.keys[slot], self.namespaces[slot] = None, ""
        self.resident[slot] = 0
        self.free.append(slot)

    def known(self) -> Iterator[int]:
        """Every slot in use."""
        return (slot for slot in range(FIRST, len(self.keys)) if self.keys[slot] is not None)

    def copy(self) -> Table:
        """Return an independent table."""
        other = Table.__new__(Table)
        other.__dict__ = {name: copy(value) for name, value in self.__dict__.items()}
        return other
