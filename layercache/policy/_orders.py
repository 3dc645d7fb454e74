"""Ways to order blobs by what they are worth, each on contents of its own: caches of metadata.

Each has ``used`` bytes of blobs it would hold, and the same few verbs. A slot is *in* an order while ``holds`` says so.
"""

from __future__ import annotations

from array import array
from copy import copy
from heapq import heapify, heappop, heappush, heapreplace
from typing import ClassVar, Self

from layercache.policy._table import FIRST, Table

__all__ = ["Fifo", "GreedyDual", "Lru", "Order", "S3Fifo", "Sieve"]

_REBASE = 1 << 60


class Order:
    """The verbs. ``columns`` are what it knows of each slot and ``registers`` the rest: together its whole state."""

    columns: ClassVar[tuple[str, ...]] = ()
    registers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, table: Table, capacity: int) -> None:
        self.table, self.capacity, self.used = table, capacity, 0
        self.inside = bytearray(len(table))

    def grow(self) -> None:
        """Make room for the table's next slot."""
        self.inside.append(0)

    def holds(self, slot: int) -> bool:
        """Whether the blob would be here, had this order decided from the start."""
        return bool(self.inside[slot])

    def hit(self, slot: int) -> None:
        """Note a use of a slot it holds."""

    def insert(self, slot: int) -> None:
        """Take a slot it does not hold; there must be room."""
        raise NotImplementedError

    def remove(self, slot: int) -> None:
        """Let go of a slot that it holds or remembers, without remembering it."""
        raise NotImplementedError

    def evict(self) -> int:
        """Let go of what is worth least and return it; it must hold something."""
        raise NotImplementedError

    def rank(self, slot: int) -> tuple[int, int]:
        """Sorts what it holds by worth, least first; nearly the order of :meth:`evict`, and it changes nothing."""
        raise NotImplementedError

    def resize(self, capacity: int) -> None:
        """Hold at most ``capacity`` bytes from now on."""
        self.capacity = capacity

    def relink(self) -> None:
        """Rebuild from the columns what is not a column."""

    def copy(self, table: Table) -> Self:
        """Return an independent order on ``table``, a copy of this one's."""
        other = object.__new__(type(self))
        other.__dict__ = {name: copy(value) for name, value in self.__dict__.items() if name != "table"}
        other.table = table
        return other


class Fifo(Order):
    """First in, first out: a linked list through two columns. Slot 0 is both ends: ``older[0]`` is the newest."""

    columns: ClassVar[tuple[str, ...]] = ("inside", "at")
    registers: ClassVar[tuple[str, ...]] = ("tick",)

    def __init__(self, table: Table, capacity: int) -> None:
        super().__init__(table, capacity)
        self.older = array("i", range(len(table)))
        self.newer = array("i", range(len(table)))
        self.at = array("q", [0] * len(table))
        self.tick = 0

    def grow(self) -> None:
        super().grow()
        self.older.append(0)
        self.newer.append(0)
        self.at.append(0)

    def insert(self, slot: int) -> None:
        self._link(slot, 0)
        self.inside[slot] = 1
        self.used += self.table.size[slot]

    def remove(self, slot: int) -> None:
        if self.inside[slot]:
            self._unlink(slot)
            self.inside[slot] = 0
            self.used -= self.table.size[slot]

    def evict(self) -> int:
        slot = self.newer[0]
        self.remove(slot)
        return slot

    def rank(self, slot: int) -> tuple[int, int]:
        return 0, self.at[slot]

    def relink(self) -> None:
        for end in range(FIRST):
            self.older[end] = self.newer[end] = end
        for slot in sorted((s for s in range(FIRST, len(self.inside)) if self.inside[s]), key=self.at.__getitem__):
            self._enlist(slot, 0)

    def _link(self, slot: int, end: int) -> None:
        self.tick += 1
        self.at[slot] = self.tick
        self._enlist(slot, end)

    def _enlist(self, slot: int, end: int) -> None:
        newest = self.older[end]
        self.older[end], self.newer[slot] = slot, end
        self.older[slot], self.newer[newest] = newest, slot

    def _unlink(self, slot: int) -> None:
        older, newer = self.older[slot], self.newer[slot]
        self.newer[older], self.older[newer] = newer, older


class Lru(Fifo):
    """Least recently used first."""

    def hit(self, slot: int) -> None:
        self._unlink(slot)
        self._link(slot, 0)


class Sieve(Fifo):
    """SIEVE (Zhang et al., NSDI 2024): a hand goes from old to new and takes the first not used since it passed."""

    columns = ("inside", "at", "visited")
    registers = ("tick", "hand_at")

    def __init__(self, table: Table, capacity: int) -> None:
        super().__init__(table, capacity)
        self.visited = bytearray(len(table))
        self.hand = 0

    def grow(self) -> None:
        super().grow()
        self.visited.append(0)

    def hit(self, slot: int) -> None:
        self.visited[slot] = 1

    def insert(self, slot: int) -> None:
        super().insert(slot)
        self.visited[slot] = 0

    def remove(self, slot: int) -> None:
        if self.hand == slot:
            self.hand = self.newer[slot]
        super().remove(slot)

    def evict(self) -> int:
        slot = self.hand or self.newer[0]
        while self.visited[slot]:
            self.visited[slot] = 0
            slot = self.newer[slot] or self.newer[0]
        self.hand = slot
        self.remove(slot)
        return slot

    def rank(self, slot: int) -> tuple[int, int]:
        passed = self.hand != 0 and self.at[slot] < self.at[self.hand]
        return self.visited[slot] * 2 + passed, self.at[slot]

    @property
    def hand_at(self) -> int:
        """Where the hand stands, as a time of insertion; 0: at the oldest."""
        return self.at[self.hand] if self.hand else 0

    @hand_at.setter
    def hand_at(self, at: int) -> None:
        slot = self.newer[0] if at else 0
        while slot and self.at[slot] < at:
            slot = self.newer[slot]
        self.hand = slot


class S3Fifo(Fifo):
    """S3-FIFO (Yang et al., SOSP 2023): a tenth of the bytes on probation, the rest for what came back.

    One blob can be larger than the probation; it goes to the main queue, where the paper's cache, made for small
    objects, would empty the probation for it. List 0 is the probation, 1 the main queue, 2 remembers what has gone.
    """

    columns = ("inside", "at", "queue", "uses")
    registers = ("tick", "evicted")

    def __init__(self, table: Table, capacity: int) -> None:
        super().__init__(table, capacity)
        self.queue = bytearray(len(table))  # 0 none, else the list and one
        self.uses = bytearray(len(table))
        self.bytes = [0, 0, 0]
        self.evicted = False

    def grow(self) -> None:
        super().grow()
        self.queue.append(0)
        self.uses.append(0)

    def hit(self, slot: int) -> None:
        if self.uses[slot] < 3:
            self.uses[slot] += 1

    def insert(self, slot: int) -> None:
        size, small = self.table.size[slot], self.capacity // 10
        if self.queue[slot]:
            self._take(slot)
            end = 1
        else:
            end = int(size >= small or (not self.evicted and self.bytes[0] >= small))
        self._put(slot, end)
        self.inside[slot], self.uses[slot] = 1, 0
        self.used += size

    def remove(self, slot: int) -> None:
        if self.queue[slot]:
            self._take(slot)
        if self.inside[slot]:
            self.inside[slot] = 0
            self.used -= self.table.size[slot]

    def evict(self) -> int:
        self.evicted = True
        while True:
            probation = self.newer[0] != 0 and self.bytes[1] <= self.capacity - self.capacity // 10
            slot = self.newer[0 if probation else 1]
            self._take(slot)
            if self.uses[slot] >= (2 if probation else 1):
                if not probation:
                    self.uses[slot] -= 1
                self._put(slot, 1)
                continue
            self.inside[slot] = 0
            self.used -= self.table.size[slot]
            if probation:
                self._remember(slot)
            return slot

    def rank(self, slot: int) -> tuple[int, int]:
        probation = self.queue[slot] == 1
        return (0 if probation and self.uses[slot] < 2 else 1 + self.uses[slot]), self.at[slot]

    def relink(self) -> None:
        for end in range(FIRST):
            self.older[end] = self.newer[end] = end
        self.bytes = [0, 0, 0]
        for slot in sorted((s for s in range(FIRST, len(self.queue)) if self.queue[s]), key=self.at.__getitem__):
            self._enlist(slot, self.queue[slot] - 1)
            self.bytes[self.queue[slot] - 1] += self.table.size[slot]

    def _remember(self, slot: int) -> None:
        size, most = self.table.size[slot], self.capacity * 9 // 10
        if size <= most:
            while self.bytes[2] + size > most:
                self._take(self.newer[2])
            self._put(slot, 2)

    def _put(self, slot: int, end: int) -> None:
        self._link(slot, end)
        self.queue[slot] = end + 1
        self.bytes[end] += self.table.size[slot]

    def _take(self, slot: int) -> None:
        self._unlink(slot)
        self.bytes[self.queue[slot] - 1] -= self.table.size[slot]
        self.queue[slot] = 0


class GreedyDual(Order):
    """GreedyDual by the cost of a miss a byte, times uses up to ``most`` (Cao and Irani, USITS 1997; Cherkasova 1998).

    A blob's worth is ``floor + uses * cost / size`` at its last use; ``floor`` is the worth of the last victim, so that
    what is not used ages. With ``remembers``, half of its uses are its own again when a blob comes back.

    The heap has an entry for each blob that is at most its worth (a use only raises it), corrected when it comes up:
    a hit costs no heap operation. An entry is one whole number: worth, time of last use, slot.
    """

    columns = ("inside", "worth", "uses")
    registers = ("floor",)

    def __init__(self, table: Table, capacity: int, *, most: int = 8, remembers: bool = False) -> None:
        super().__init__(table, capacity)
        self.worth = array("q", [0] * len(table))
        self.uses = bytearray(len(table))
        self.heap: list[int] = []
        self.floor, self.most, self.remembers = 0, most, remembers
        self.stale = 0

    def grow(self) -> None:
        super().grow()
        self.worth.append(0)
        self.uses.append(0)

    def hit(self, slot: int) -> None:
        uses = self.uses[slot]
        if uses < self.most:
            uses += 1
            self.uses[slot] = uses
        self.worth[slot] = self.floor + uses * self.table.price[slot]

    def insert(self, slot: int) -> None:
        self.hit(slot)
        self.inside[slot] = 1
        self.used += self.table.size[slot]
        heappush(self.heap, self._entry(slot))

    def remove(self, slot: int) -> None:
        if self.inside[slot]:
            self._let_go(slot)
            self.stale += 1
            if self.stale > 64 + len(self.heap) // 2:
                self.relink()
        self.uses[slot] = 0

    def evict(self) -> int:
        heap = self.heap
        while True:
            entry = heap[0]
            slot = entry & 0xFFFFFF
            now = self._entry(slot) if self.inside[slot] else -1
            if entry < now:
                heapreplace(heap, now)
                continue
            heappop(heap)
            if entry == now:
                break
        self.floor = self.worth[slot]
        self._let_go(slot)
        if self.floor > _REBASE:  # what counts are differences
            for other in range(FIRST, len(self.worth)):
                self.worth[other] = max(0, self.worth[other] - self.floor)
            self.floor = 0
            self.relink()
        self.uses[slot] = self.uses[slot] // 2 if self.remembers else 0
        return slot

    def rank(self, slot: int) -> tuple[int, int]:
        return self.worth[slot], self.table.seen[slot]

    def relink(self) -> None:
        self.heap = [self._entry(slot) for slot in range(FIRST, len(self.inside)) if self.inside[slot]]
        heapify(self.heap)
        self.stale = 0

    def _let_go(self, slot: int) -> None:
        self.inside[slot] = 0
        self.used -= self.table.size[slot]

    def _entry(self, slot: int) -> int:
        return (self.worth[slot] << 64) | (self.table.seen[slot] << 24) | slot
