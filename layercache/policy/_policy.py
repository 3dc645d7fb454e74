"""What is here, what each order would hold in its place, and whom to follow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import closing
from copy import copy
from functools import partial
from types import MappingProxyType
from typing import Any

from layercache.errors import InvalidError
from layercache.policy import _state
from layercache.policy._choice import Choice
from layercache.policy._images import Images
from layercache.policy._orders import Fifo, GreedyDual, Lru, Order, S3Fifo, Sieve
from layercache.policy._regret import Regret
from layercache.policy._table import Table
from layercache.policy._values import Quota, Source, Victim

__all__ = ["POLICIES", "Policy"]

Skip = Container[str] | Callable[[str], bool]

_ORDERS: dict[str, dict[str, Callable[[Table, int], Order]]] = {
    "default": {
        "lru": Lru,
        "greedy-dual-1": partial(GreedyDual, most=1),
        "greedy-dual-8": partial(GreedyDual, remembers=True),
        "sieve": Sieve,
    },
    "lru": {"lru": Lru},
    "fifo": {"fifo": Fifo},
    "sieve": {"sieve": Sieve},
    "s3-fifo": {"s3-fifo": S3Fifo},
    "greedy-dual": {"greedy-dual": GreedyDual},
}

POLICIES = tuple(_ORDERS)
"""The names a policy can be chosen by."""

_GHOSTS = 4096
_PASSED = 64
_NO_QUOTAS: Mapping[str, Quota] = MappingProxyType({})


class Policy:
    """What to evict from a cache that the caller keeps; it knows what it is told and does nothing itself.

    ``capacity`` is what the cache holds after an eviction, in bytes. Keys are unique over all namespaces. Every use of
    a blob is told once, by :meth:`hit` or, where it was fetched, by :meth:`insert`. Decisions depend on nothing but the
    calls. Not for several threads at once.

    What has gone is remembered as far as the orders need it: at most twice as many blobs as are here, or 4096.

    :raises InvalidError: if there is no policy of that ``name``.
    """

    def __init__(self, name: str = "default", *, capacity: int) -> None:
        if name not in _ORDERS:
            raise InvalidError("not an eviction policy", value=name, hint=f"one of {', '.join(POLICIES)}")
        self.name, self.capacity, self.used = name, max(0, capacity), 0
        self._table = Table()
        self._orders = [make(self._table, self.capacity) for make in _ORDERS[name].values()]
        self._regret = Regret(len(self._orders))
        self._images = Images()
        self._usage: dict[str, int] = {}
        self._count = 0
        # Here, and no longer held by the order that is followed; first out first.
        self._outside: OrderedDict[int, None] = OrderedDict()
        self._tick = 0
        # Sorted by rank some time ago, worth least last; an entry is good while its blob was not used since.
        self._ahead: dict[str | None, list[tuple[int, int]]] = {}

    # What happens in the cache.

    def insert(self, key: str, size: int, *, namespace: str, source: Source | None = None) -> None:
        """Note that a blob was fetched from ``source`` and is here now."""
        table = self._table
        slot = table.slots.get(key)
        if slot is not None and (table.size[slot] != size or (key in self and table.namespaces[slot] != namespace)):
            self.forget(key)
            slot = None
        if slot is None:
            slot = table.add(key, namespace)
            if slot == len(table) - 1:
                for order in self._orders:
                    while len(order.inside) <= slot:
                        order.grow()
        table.namespaces[slot] = namespace
        table.describe(slot, size, (source or Source()).cost(size))
        self._use(slot)
        if not table.resident[slot]:
            table.resident[slot] = 1
            self.used += size
            self._count += 1
            self._usage[namespace] = self._usage.get(namespace, 0) + size
        if not self._orders[self._regret.leader].holds(slot):
            self._put_outside(slot)
        self._bound()

    def hit(self, key: str) -> bool:
        """Note a use of a blob that is here; False if it is not, as far as is known."""
        slot = self._table.slots.get(key)
        if slot is None or not self._table.resident[slot]:
            return False
        self._use(slot)
        return True

    def image(self, name: str, keys: Iterable[str], *, namespace: str) -> None:
        """Note that blobs are used together: those of an image, in a pull that has just told of each.

        Once one of them has gone, the rest is worth less, but for blobs that other whole images need.
        """
        slots = self._table.slots
        self._images.note(name, namespace, [slots[key] for key in keys if key in slots])

    def evict(self, key: str) -> None:
        """Note that a blob went to make room. It may be remembered."""
        slot = self._table.slots.get(key)
        if slot is not None and self._table.resident[slot]:
            self._depart(slot)
            self._images.broke(slot, self._table)

    def forget(self, key: str) -> None:
        """Note that a blob went for good, or drop what is remembered of it: no trace of its key is left."""
        slot = self._table.slots.get(key)
        if slot is not None:
            self._erase(slot)

    def remove_namespace(self, namespace: str) -> None:
        """Forget every blob and image of a namespace, also those that went before."""
        for slot in [slot for slot in self._table.known() if self._table.namespaces[slot] == namespace]:
            self._erase(slot)
        self._images.remove_namespace(namespace)
        self._usage.pop(namespace, None)
        self._ahead.pop(namespace, None)

    def resize(self, capacity: int) -> None:
        """Hold ``capacity`` bytes from now on. Nothing goes until :meth:`victims` are asked for."""
        self.capacity = max(0, capacity)
        for order in self._orders:
            order.resize(self.capacity)
        for number, order in enumerate(self._orders):
            self._trim(order, self.capacity, leads=number == self._regret.leader)

    # What is here.

    def __contains__(self, key: object) -> bool:
        slot = self._table.slots.get(key)  # type: ignore[call-overload]
        return slot is not None and bool(self._table.resident[slot])

    def __len__(self) -> int:
        return self._count

    def keys(self) -> Iterator[str]:
        """The blobs that are here."""
        table = self._table
        return (key for key, slot in table.slots.items() if table.resident[slot])

    def usage(self, namespace: str) -> int:
        """Bytes that a namespace takes."""
        return self._usage.get(namespace, 0)

    @property
    def remembered(self) -> int:
        """How many blobs that have gone are remembered."""
        return len(self._table.slots) - self._count

    @property
    def leader(self) -> str:
        """The order that is followed now."""
        return list(_ORDERS[self.name])[self._regret.leader]

    # What to evict.

    def victims(
        self,
        need: int,
        *,
        skip: Skip = (),
        quotas: Mapping[str, Quota] = _NO_QUOTAS,
        namespace: str | None = None,
    ) -> list[Victim]:
        """Blobs to evict, in order: together at least ``need`` bytes, or all that may go.

        ``skip`` says of a key that its blob must stay (leased, pinned). A namespace over its limit pays first, down to
        its limit; none is taken below its floor. With ``namespace`` only its blobs are considered.

        Nothing goes before :meth:`evict` says so, but hands advance as if it did: ask a :meth:`copy` for what would be.
        """
        kept = skip if callable(skip) else skip.__contains__
        choice = Choice(self._table, self._images, usage=self._usage, need=need, kept=kept, quotas=quotas)
        taken = choice.taken
        over = ((self.usage(name) - quota.limit, name) for name, quota in quotas.items() if quota.limit is not None)
        for excess, name in sorted(over, reverse=True):
            if excess > 0 and namespace in {None, name}:
                self._take(choice, self._ranked(name, taken), "quota", most=excess)
        if namespace is not None:
            self._take(choice, self._ranked(namespace, taken), "value")
        elif choice.freed < need:
            self._take(choice, self._images.rest(self._table), "image")
            self._take(choice, self._outsiders(taken, self.used - need), "value")
            self._take(choice, self._ranked(None, taken), "value")
        return choice.victims

    def copy(self) -> Policy:
        """Return an independent policy in the same state."""
        other = Policy(self.name, capacity=self.capacity)
        for name, value in self.__dict__.items():
            setattr(other, name, copy(value))
        other._table = self._table.copy()
        other._orders = [order.copy(other._table) for order in self._orders]
        other._regret = self._regret.copy()
        other._images = self._images.copy()
        other._ahead = {name: list(entries) for name, entries in self._ahead.items()}
        return other

    # What is kept.

    def state(self) -> dict[str, Any]:
        """Everything known, as JSON values; ``["namespaces"][namespace]`` alone names keys, those of that namespace."""
        self._ahead.clear()  # so that this policy and the restored one go on alike
        self._images.settle()
        return {
            "format": _state.FORMAT,
            "policy": self.name,
            "capacity": self.capacity,
            "regret": self._regret.state(),
            **_state.dump(self._table, self._orders, self._images),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Policy:
        """Return the policy that gave ``state``. A namespace missing from it is not known any more.

        :raises FormatError: if it is not a state that this version reads.
        """
        with _state.reading():
            if state["format"] != _state.FORMAT:
                raise ValueError(state["format"])
            policy = cls(state["policy"], capacity=state["capacity"])
            policy._regret.restore(state["regret"])
            _state.load(state, policy._table, policy._orders, policy._images)
            policy._recount()
        return policy

    def _recount(self) -> None:
        table, leader = self._table, self._orders[self._regret.leader]
        here = [slot for slot in table.known() if table.resident[slot]]
        for slot in here:
            name, size = table.namespaces[slot], table.size[slot]
            self._usage[name] = self._usage.get(name, 0) + size
            self.used += size
        self._count = len(here)
        outside = sorted((slot for slot in here if not leader.holds(slot)), key=table.left.__getitem__)
        self._outside = OrderedDict.fromkeys(outside)
        self._tick = max(map(table.left.__getitem__, outside), default=0)

    # Uses, and what each order makes of them.

    def _use(self, slot: int) -> None:
        table, regret = self._table, self._regret
        table.clock += 1
        table.seen[slot] = table.clock
        size, missed = table.size[slot], []
        for number, order in enumerate(self._orders):
            if order.inside[slot]:
                order.hit(slot)
                continue
            missed.append(number)
            if size <= order.capacity:
                self._trim(order, order.capacity - size, leads=number == regret.leader)
                order.insert(slot)
        if 0 < len(missed) < len(self._orders) and regret.judge(missed, table.cost[slot]):
            self._follow()

    def _trim(self, order: Order, most: int, *, leads: bool) -> None:
        while order.used > most:
            if leads:
                self._let_go(order)
            else:
                order.evict()

    def _let_go(self, leader: Order) -> None:
        slot = leader.evict()
        if self._table.resident[slot]:
            self._put_outside(slot)

    def _follow(self) -> None:
        table, leader = self._table, self._orders[self._regret.leader]
        outside = [slot for slot in table.known() if table.resident[slot] and not leader.holds(slot)]
        self._outside.clear()
        self._ahead.clear()
        for slot in sorted(outside, key=table.seen.__getitem__):
            self._put_outside(slot)

    def _put_outside(self, slot: int) -> None:
        self._tick += 1
        self._table.left[slot] = self._tick
        self._outside[slot] = None
        self._outside.move_to_end(slot)

    def _erase(self, slot: int) -> None:
        if self._table.resident[slot]:
            self._depart(slot)
        for order in self._orders:
            order.remove(slot)
        self._images.erase(slot)
        self._outside.pop(slot, None)
        self._table.drop(slot)

    def _depart(self, slot: int) -> None:
        table = self._table
        table.resident[slot] = 0
        size, namespace = table.size[slot], table.namespaces[slot]
        self.used -= size
        self._count -= 1
        self._usage[namespace] -= size

    def _bound(self) -> None:
        most = max(_GHOSTS, 2 * self._count)
        if self.remembered > most:
            table = self._table
            ghosts = sorted((s for s in table.known() if not table.resident[s]), key=table.seen.__getitem__)
            for slot in ghosts[: len(ghosts) - most // 2]:
                self._erase(slot)

    # Ways to go through what is here. Each leaves what it went through in its place, but where so much of it must stay
    # that going through it again in every call would cost too much.

    def _take(self, choice: Choice, walk: Iterator[int], why: str, *, most: int | None = None) -> None:
        end = choice.need if most is None else min(choice.need, choice.freed + most)
        with closing(walk):  # type: ignore[type-var]
            while choice.freed < end and (slot := next(walk, None)) is not None:
                choice.consider(slot, why)

    def _outsiders(self, taken: Container[int], target: int) -> Iterator[int]:
        leader, resident, outside = self._orders[self._regret.leader], self._table.resident, self._outside
        seen: list[int] = []
        try:
            while True:
                # The leader makes the room now that it would make for what is coming.
                while not outside and leader.used > max(0, target):
                    self._let_go(leader)
                if not outside:
                    break
                slot, _ = outside.popitem(last=False)
                if resident[slot] and not leader.holds(slot):
                    seen.append(slot)
                    yield slot
        finally:
            stay = [slot for slot in seen if slot not in taken]
            rotated = set(stay) if len(stay) > _PASSED else ()
            for slot in reversed(seen):
                if slot not in rotated:
                    outside[slot] = None
                    outside.move_to_end(slot, last=False)
            for slot in stay if rotated else ():
                self._put_outside(slot)

    def _ranked(self, namespace: str | None, taken: Container[int]) -> Iterator[int]:
        table = self._table
        for fresh in (False, True):
            if fresh:
                self._ahead[namespace] = self._rank(namespace)
            ahead = self._ahead.get(namespace, [])
            keep, seen = 64 + len(ahead) // 16, []
            try:
                while ahead:
                    slot, use = entry = ahead.pop()
                    if table.resident[slot] and table.seen[slot] == use:
                        seen.append(entry)
                        yield slot
            finally:
                stay = sum(slot not in taken for slot, _ in seen)
                ahead.extend(entry for entry in reversed(seen) if entry[0] in taken or stay <= _PASSED)
                if fresh:
                    del ahead[:-keep]

    def _rank(self, namespace: str | None) -> list[tuple[int, int]]:
        table, leader = self._table, self._orders[self._regret.leader]
        found = [
            (leader.rank(slot) if leader.holds(slot) else (-1, table.left[slot]), slot)
            for slot in table.known()
            if table.resident[slot] and namespace in (None, table.namespaces[slot])
        ]
        found.sort(reverse=True)
        return [(slot, table.seen[slot]) for _, slot in found]
