"""The eviction policy by example: what may go, who pays first, what is remembered, what a state is."""

from __future__ import annotations

import json
import random

import pytest

from layercache.errors import FormatError, InvalidError
from layercache.policy import POLICIES, Policy, Quota, Source, Victim


def filled(name: str = "lru", count: int = 10, size: int = 10, capacity: int = 1000) -> Policy:
    policy = Policy(name, capacity=capacity)
    for number in range(count):
        policy.insert(f"k{number}", size, namespace=f"n{number % 2}")
    return policy


def names(victims: list[Victim]) -> list[str]:
    return [victim.key for victim in victims]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidError, match="default, lru, fifo, sieve, s3-fifo, greedy-dual"):
        Policy("lfu", capacity=1)


def test_lru_takes_what_was_used_longest_ago_and_only_as_much_as_is_needed() -> None:
    policy = filled()
    assert policy.hit("k0")
    assert names(policy.victims(15)) == ["k1", "k2"]
    assert policy.victims(0) == []


def test_a_hit_of_what_is_not_here_says_so_and_changes_nothing() -> None:
    policy = filled()
    before = policy.state()
    policy.evict("k3")
    assert not policy.hit("k3")
    assert not policy.hit("never")
    assert before != policy.state()
    assert "k3" not in policy
    assert len(policy) == 9
    assert policy.used == 90
    assert sorted(policy.keys()) == [f"k{n}" for n in range(10) if n != 3]


@pytest.mark.parametrize("name", POLICIES)
def test_what_must_stay_is_never_a_victim_whether_by_set_or_by_predicate(name: str) -> None:
    policy = filled(name, capacity=100)
    kept = {"k0", "k1", "k7"}
    by_set = names(policy.copy().victims(10**6, skip=kept))
    by_predicate = names(policy.victims(10**6, skip=lambda key: key in kept))
    assert by_set == by_predicate
    assert set(by_set) == {f"k{n}" for n in range(10)} - kept


@pytest.mark.parametrize("name", POLICIES)
def test_much_that_must_stay_is_passed_again_and_again_without_being_taken(name: str) -> None:
    policy = filled(name, count=400, capacity=4000)
    kept = {f"k{n}" for n in range(300)}
    gone = set()
    for _ in range(100):
        (victim,) = policy.victims(10, skip=kept)
        policy.evict(victim.key)
        gone.add(victim.key)
    assert gone == {f"k{n}" for n in range(300, 400)}
    assert policy.victims(10, skip=kept) == []
    assert len(policy.victims(10)) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_asking_twice_without_evicting_gives_the_same(name: str) -> None:
    policy = filled(name, capacity=60)
    assert policy.victims(25) == policy.victims(25)


@pytest.mark.parametrize("name", POLICIES)
def test_a_namespace_over_its_limit_pays_first_and_only_down_to_it(name: str) -> None:
    policy = filled(name)
    victims = policy.victims(40, quotas={"n1": Quota(limit=30)})
    assert [(v.namespace, v.why) for v in victims[:2]] == [("n1", "quota")] * 2
    assert len(victims) == 4
    assert [v.why for v in victims[2:]] == ["value"] * 2


def test_the_one_most_over_its_limit_pays_before_the_other() -> None:
    policy = filled()
    victims = policy.victims(20, quotas={"n0": Quota(limit=40), "n1": Quota(limit=10)})
    assert [v.namespace for v in victims] == ["n1", "n1"]


@pytest.mark.parametrize("name", POLICIES)
def test_no_victim_takes_a_namespace_below_its_floor(name: str) -> None:
    policy = filled(name)
    victims = policy.victims(10**6, quotas={"n0": Quota(floor=25), "n1": Quota(floor=50)})
    assert {v.namespace for v in victims} == {"n0"}
    assert sum(v.size for v in victims) == 20


@pytest.mark.parametrize("name", POLICIES)
def test_with_a_namespace_only_its_blobs_go(name: str) -> None:
    policy = filled(name)
    assert {v.namespace for v in policy.victims(10**6, namespace="n1")} == {"n1"}
    assert policy.usage("n1") == 50


def test_when_a_blob_of_an_image_goes_the_rest_follows_but_for_what_whole_images_need() -> None:
    policy = Policy("lru", capacity=1000)
    for key in ("a1", "base", "a2", "x", "b1"):
        policy.insert(key, 10, namespace="n")
    policy.image("a", ["a1", "base", "a2"], namespace="n")
    policy.image("b", ["base", "b1"], namespace="n")
    victims = policy.victims(20)
    assert [(v.key, v.why) for v in victims] == [("a1", "value"), ("a2", "image")]
    policy.evict("a1")
    assert names(policy.victims(10)) == ["a2"]  # remembered, over the next in order
    policy.insert("a1", 10, namespace="n")
    policy.image("a", ["a1", "base", "a2"], namespace="n")
    assert names(policy.victims(10)) == ["base"]  # whole again: the plain order


def test_what_costs_more_or_less_by_the_byte_than_what_went_of_its_image_stays_in_its_place() -> None:
    policy = Policy("lru", capacity=10**9)
    for key, size in (("large", 10**8), ("small", 10**3), ("like", 10**8), ("x", 10**8)):
        policy.insert(key, size, namespace="n")
    policy.image("a", ["large", "small", "like"], namespace="n")
    assert [(v.key, v.why) for v in policy.victims(3 * 10**8)][:2] == [("large", "value"), ("like", "image")]
    policy.evict("large")
    assert names(policy.victims(2 * 10**8)) == ["like", "small", "x"]
    for key in ("large", "small"):
        policy.insert(key, 10**8 if key == "large" else 10**3, namespace="n")
    policy.image("a", ["large", "small", "like"], namespace="n")
    policy.evict("small")
    assert names(policy.victims(10**8)) == ["like"]  # the oldest, whatever became of the small one
    assert policy.victims(10**8)[0].why == "value"


def test_the_rest_of_an_image_that_was_used_since_is_spared() -> None:
    policy = Policy("lru", capacity=1000)
    for key in ("a1", "a2", "x"):
        policy.insert(key, 10, namespace="n")
    policy.image("a", ["a1", "a2"], namespace="n")
    policy.evict("a1")
    assert policy.hit("a2")
    assert names(policy.victims(10)) == ["x"]


@pytest.mark.parametrize("name", POLICIES)
def test_a_removed_namespace_leaves_no_trace_of_its_keys_here_or_gone(name: str) -> None:
    policy = Policy(name, capacity=300)
    for number in range(100):
        policy.insert(f"{'secret' if number % 2 else 'other'}{number}", 10, namespace=f"n{number % 2}")
        for victim in policy.victims(policy.used - 300):
            policy.evict(victim.key)
    policy.image("secret-image", ["secret99"], namespace="n1")
    assert "secret1" in json.dumps(policy.state())
    policy.remove_namespace("n1")
    assert "secret" not in json.dumps(policy.state())
    assert "n1" not in policy.state()["namespaces"]
    assert not any("secret" in repr(value) for value in _reachable(policy))
    assert policy.usage("n1") == 0
    assert policy.used == policy.usage("n0")


def test_forgetting_leaves_no_trace_of_a_blob_that_went_before() -> None:
    policy = filled(capacity=50)
    policy.evict("k0")
    assert '"k0"' in json.dumps(policy.state())
    policy.forget("k0")
    assert '"k0"' not in json.dumps(policy.state())
    policy.forget("never")


def test_what_is_remembered_of_the_gone_is_bounded() -> None:
    policy = Policy(capacity=100)
    for number in range(20_000):
        policy.insert(f"k{number}", 10, namespace="n")
        for victim in policy.victims(policy.used - 100):
            policy.evict(victim.key)
    assert len(policy) == 10
    assert 0 < policy.remembered <= 4096


def test_a_smaller_capacity_takes_nothing_by_itself() -> None:
    policy = filled("default", capacity=100)
    policy.resize(50)
    assert len(policy) == 10
    assert len(policy.victims(policy.used - policy.capacity)) == 5


def test_dear_bytes_outlive_cheap_ones_of_the_same_age() -> None:
    policy = Policy("greedy-dual", capacity=10**7)
    policy.insert("far", 10**6, namespace="n", source=Source(rtt=2.0, bandwidth=1e6))
    policy.insert("near", 10**6, namespace="n", source=Source(rtt=0.001, bandwidth=1e9))
    assert names(policy.victims(1)) == ["near"]


def test_a_source_is_measured_by_large_bodies_and_waits() -> None:
    source = Source(rtt=0.1, bandwidth=100e6)
    assert source.cost(100_000_000) == pytest.approx(1.1)
    assert source.measured(100, wait=0.2, seconds=5) == Source(0.1 + 0.2 * (0.2 - 0.1), 100e6)
    assert source.measured(10**9, wait=0.1, seconds=5).bandwidth == pytest.approx(120e6)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"policy": "lfu"},
        {"capacity": "x"},
        {"regret": {}},
        {"orders": []},
        {"namespaces": {"n0": {"keys": ["a", "a"]}}},
        {"namespaces": []},
    ],
)
def test_a_damaged_state_is_a_format_error(damage: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        Policy.restore(filled("default").state() | damage)


def test_a_namespace_whose_part_was_lost_is_not_known_and_the_rest_goes_on() -> None:
    state = filled("default").state()
    del state["namespaces"]["n1"]
    policy = Policy.restore(state)
    assert policy.usage("n1") == 0
    assert len(policy.victims(10**6)) == 5


def test_the_default_follows_whichever_order_costs_least() -> None:
    """Small blobs come back, large ones never do: recency loses the small ones."""
    policy = Policy(capacity=60)
    assert policy.leader == "lru"
    for number in range(2000):
        key, size = (f"small{number % 40}", 1) if number % 2 else (f"large{number}", 30)
        if not policy.hit(key):
            for victim in policy.victims(policy.used + size - 60):
                policy.evict(victim.key)
            policy.insert(key, size, namespace="n")
    assert policy.leader != "lru"


@pytest.mark.parametrize("name", POLICIES)
def test_a_copy_goes_its_own_way(name: str) -> None:
    policy = filled(name, capacity=60)
    policy.image("i", ["k8", "k9"], namespace="n0")
    before = json.dumps(policy.state())
    copy = policy.copy()
    for victim in copy.victims(50):
        copy.evict(victim.key)
    copy.remove_namespace("n1")
    copy.insert("new", 10, namespace="n0")
    assert json.dumps(policy.state()) == before


@pytest.mark.parametrize("name", POLICIES)
def test_blobs_are_evicted_one_by_one_and_all_at_once_alike(name: str) -> None:
    chance = random.Random(5)
    policy = Policy(name, capacity=10**6)
    for number in range(1000):
        policy.insert(f"k{number}", chance.randrange(1, 2000), namespace="n")
        policy.hit(f"k{chance.randrange(number + 1)}")
    other = policy.copy()
    once = names(policy.victims(policy.used))
    single = []
    while found := other.victims(1):
        single += names(found)
        other.evict(found[0].key)
    assert sorted(single) == sorted(once)
    assert other.used == 0


def _reachable(policy: Policy) -> list[object]:
    found: list[object] = []
    todo: list[object] = [policy]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            todo += value
        elif type(value).__module__.startswith("layercache.policy"):
            todo.append(value.__dict__)
    return found
