"""Law: in a bare replay LRU, FIFO and SIEVE evict what a plain list does; every policy keeps the same promises."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.policy import POLICIES, Policy, Quota

SIZES = [1, 2, 3, 5, 8, 13, 21, 34, 60, 120]

requests = st.lists(st.integers(0, 30), max_size=200)


@dataclass
class Plain:
    """The published algorithm on a list, newest first."""

    name: str
    capacity: int
    queue: list[int] = field(default_factory=list)
    visited: set[int] = field(default_factory=set)
    hand: int | None = None

    def get(self, key: int) -> bool:
        if key in self.queue:
            if self.name == "lru":
                self.queue.remove(key)
                self.queue.insert(0, key)
            self.visited.add(key)
            return True
        if size(key) <= self.capacity:
            while sum(map(size, self.queue)) + size(key) > self.capacity:
                self.evict()
            self.queue.insert(0, key)
            self.visited.discard(key)
        return False

    def evict(self) -> None:
        if self.name != "sieve":
            self.queue.pop()
            return
        at = len(self.queue) - 1 if self.hand is None else self.queue.index(self.hand)
        while self.queue[at] in self.visited:
            self.visited.discard(self.queue[at])
            at = (at or len(self.queue)) - 1
        self.hand = self.queue[at - 1] if at else None
        del self.queue[at]


def size(key: int) -> int:
    return SIZES[key % len(SIZES)]


def get(policy: Policy, key: int) -> bool:
    if policy.hit(str(key)):
        return True
    if size(key) <= policy.capacity:
        for victim in policy.victims(policy.used + size(key) - policy.capacity):
            policy.evict(victim.key)
        policy.insert(str(key), size(key), namespace=f"n{key % 3}")
    return False


@pytest.mark.parametrize("name", ["lru", "fifo", "sieve"])
@given(keys=requests, capacity=st.integers(20, 200))
def test_a_bare_replay_is_the_published_algorithm(name: str, keys: list[int], capacity: int) -> None:
    policy, plain = Policy(name, capacity=capacity), Plain(name, capacity)
    for key in keys:
        assert get(policy, key) == plain.get(key)
        assert sorted(policy.keys()) == sorted(map(str, plain.queue))


calls = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 30)),
        st.tuples(st.just("evict"), st.integers(0, 30)),
        st.tuples(st.just("forget"), st.integers(0, 30)),
        st.tuples(st.just("image"), st.lists(st.integers(0, 30), max_size=5)),
        st.tuples(st.just("victims"), st.integers(0, 100)),
        st.tuples(st.just("purge"), st.integers(0, 2)),
        st.tuples(st.just("resize"), st.integers(30, 200)),
    ),
    max_size=80,
)


def play(policy: Policy, script: Iterable[tuple[str, Any]]) -> list[object]:
    told: list[object] = []
    for verb, what in script:
        if verb == "get":
            told.append(get(policy, what))
        elif verb == "evict":
            policy.evict(str(what))
        elif verb == "forget":
            policy.forget(str(what))
        elif verb == "image":
            policy.image(str(what), [str(key) for key in what if str(key) in policy], namespace="n0")
        elif verb == "victims":
            victims = policy.victims(what, skip={"7", "8"}, quotas={"n1": Quota(50, 20), "n2": Quota(floor=30)})
            told.append(victims)
            for victim in victims[::2]:
                policy.evict(victim.key)
        elif verb == "purge":
            policy.remove_namespace(f"n{what}")
        else:
            policy.resize(what)
        told.append((policy.used, len(policy), policy.leader))
    return told


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(before=calls, after=calls)
def test_a_restored_state_and_a_copy_decide_as_the_original(name: str, before: Any, after: Any) -> None:
    policy = Policy(name, capacity=150)
    play(policy, before)
    restored = Policy.restore(json.loads(json.dumps(policy.state())))
    copy = policy.copy()
    expected = play(policy, after)
    assert play(restored, after) == expected
    assert play(copy, after) == expected


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(
    script=calls,
    need=st.integers(0, 400),
    kept=st.sets(st.integers(0, 30).map(str)),
    limits=st.lists(st.none() | st.integers(0, 200), min_size=3, max_size=3),
    floors=st.lists(st.integers(0, 100), min_size=3, max_size=3),
)
def test_victims_are_here_once_may_go_and_are_enough_where_that_can_be(
    name: str, *, script: Any, need: int, kept: set[str], limits: list[int | None], floors: list[int]
) -> None:
    policy = Policy(name, capacity=150)
    play(policy, script)
    quotas = {f"n{i}": Quota(limits[i], floors[i]) for i in range(3)}
    over = {ns for ns, quota in quotas.items() if quota.limit is not None and policy.usage(ns) > quota.limit}
    victims = policy.victims(need, skip=kept, quotas=quotas)
    keys = [victim.key for victim in victims]
    assert len(set(keys)) == len(keys)
    assert all(key in policy and key not in kept for key in keys)
    assert sum(v.size for v in victims[:-1]) < need or not victims
    left = {ns: policy.usage(ns) - sum(v.size for v in victims if v.namespace == ns) for ns in quotas}
    assert all(left[ns] >= min(quotas[ns].floor, policy.usage(ns)) for ns in quotas)
    if sum(v.size for v in victims) < need:  # then nothing that may go is left
        for key in set(policy.keys()) - set(keys) - kept:
            namespace = f"n{int(key) % 3}"
            assert left[namespace] - size(int(key)) < quotas[namespace].floor
    paying = [v.why == "quota" for v in victims]
    assert paying == sorted(paying, reverse=True)
    assert all(v.namespace in over for v in victims if v.why == "quota")
