"""A policy that is called LRU, FIFO or SIEVE misses exactly what libcachesim's misses, request by request."""

from __future__ import annotations

import csv
import io
import random

import pytest

pytest.importorskip("libcachesim", reason="needs the PyPI package libcachesim")

from bench.eviction import ours, parse, theirs
from bench.workloads import WORKLOADS, Request

NAMES = {"lru": "LRU", "fifo": "FIFO", "sieve": "Sieve"}


def asked(seed: int, *, deletes: bool) -> list[Request]:
    """Requests for objects of many sizes, some of them larger than the smallest cache; with ``deletes`` some go."""
    rng = random.Random(seed)
    sizes = [int(rng.lognormvariate(8, 2)) + 1 for _ in range(400)]
    found = []
    for start in range(6000):
        number = min(int(rng.expovariate(0.01)), 399)
        op = "delete" if deletes and rng.random() < 0.03 else "get"
        found.append(Request("a", str(number), sizes[number], start=start, op=op))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("deletes", [False, True])
def test_the_counts_are_exactly_those_of_libcachesim(name: str, share: float, deletes: bool) -> None:
    """Objects, bytes, cost and starts missed, at three capacities, on requests that are no benchmark's."""
    for seed in range(3):
        requests = asked(seed, deletes=deletes)
        capacity = int(share * sum({request.object: request.size for request in requests}.values()))
        assert ours(name, requests, capacity) == theirs(NAMES[name], requests, capacity)


@pytest.mark.parametrize("name", NAMES)
def test_the_counts_are_the_same_on_starts_of_images(name: str) -> None:
    """Layers that are asked for together, again and again, by a cluster."""
    requests = WORKLOADS["bursts"](5)[:8000]
    assert ours(name, requests, 1 << 30) == theirs(NAMES[name], requests, 1 << 30)


def test_a_trace_is_read_with_what_went_and_what_belongs_together() -> None:
    """The column ``op`` may be missing; what a namespace asks for at one time is one image."""
    lines = ("1,a,x,10,get", "1,a,y,20,", "1,b,x,10,get", "2,a,x,10,delete", "3,a,y,20,get", "3,a,x,10,get")
    text = "\n".join(("time,namespace,object,size,op", *lines))
    found = list(parse(csv.DictReader(io.StringIO(text))))

    assert [(one.object, one.start, one.op) for one in found] == [
        ("x", 0, "get"),
        ("y", 0, "get"),
        ("x", 1, "get"),
        ("x", 2, "delete"),
        ("y", 3, "get"),
        ("x", 3, "get"),
    ]
    assert found[0].image == found[1].image == found[4].image != found[2].image
    assert [one.op for one in parse(csv.DictReader(io.StringIO("time,namespace,object,size\n1,a,x,10\n")))] == ["get"]
    with pytest.raises(KeyError):
        list(parse(csv.DictReader(io.StringIO("time,namespace,object,size,op\n1,a,x,10,evict\n"))))


def test_what_was_deleted_is_missed_the_next_time() -> None:
    """It is forgotten by ours, too."""
    requests = [Request("a", "x", 10, start=n, op=op) for n, op in enumerate(("get", "get", "delete", "get"))]
    for name in ("default", "lru", "greedy-dual"):
        assert ours(name, requests, 100)[0] == 2 / 3
