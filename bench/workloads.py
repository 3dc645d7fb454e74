"""Seeded requests for layers: model serving, a registry, small web objects, bursts of starts."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable
from itertools import accumulate, count
from typing import NamedTuple

__all__ = ["WORKLOADS", "Request"]


class Request(NamedTuple):
    """One line of a trace. Requests of one ``start`` come together: they are what ``image`` consists of.

    ``op`` is ``get``, or ``delete`` for an object that its owner removed.
    """

    namespace: str
    object: str
    size: int
    image: str = ""
    start: int = 0
    op: str = "get"


_MB, _GB = 1 << 20, 1 << 30


class _Chance(random.Random):
    def size(self, middle: float, spread: float, least: int, most: int) -> int:
        return int(min(most, max(least, middle * math.exp(self.gauss(0, spread)))))


def _zipf(number: int, power: float) -> list[float]:
    return list(accumulate(1 / (rank + 1) ** power for rank in range(number)))


def _pick(chance: random.Random, sums: list[float]) -> int:
    return bisect(sums, chance.random() * sums[-1])


def serving(seed: int, *, own: bool = False) -> list[Request]:
    """Starts of model servers: shared bases and runtimes, weights of gigabytes; with ``own`` nothing is shared."""
    chance, ids = _Chance(seed), count()
    bases = [[(next(ids), chance.size(60 * _MB, 0.8, 5 * _MB, 400 * _MB)) for _ in range(3)] for _ in range(4)]
    runtimes = [(next(ids), int(chance.uniform(0.8, 4) * _GB)) for _ in range(12)]
    ranks = _zipf(12, 1.0)

    def app() -> tuple[int, list[tuple[int, int]]]:
        runtime = _pick(chance, ranks)
        shards = chance.randint(1, 4) if chance.random() < 0.7 else 0
        weights = [(next(ids), int(chance.uniform(0.5, 4) * _GB)) for _ in range(shards)]
        small = [(next(ids), chance.size(200e3, 2, 300, 50 * _MB)) for _ in range(chance.randint(1, 4))]
        return chance.randrange(40), [*bases[runtime % 4], runtimes[runtime], *weights, *small]

    apps, popular, recent = [app() for _ in range(260)], _zipf(260, 0.9), [0]
    found: list[Request] = []
    for start in range(4000):
        if chance.random() < 0.02:
            apps[chance.randrange(260)] = app()
        number = chance.choice(recent) if chance.random() < 0.35 else _pick(chance, popular)
        recent = [*recent, number][-6:]
        tenant, layers = apps[number]
        found += [
            Request(str(tenant), f"{tenant}/{layer}" if own else str(layer), size, str(number), start)
            for layer, size in layers
        ]
    return found


def per_namespace(seed: int) -> list[Request]:
    """The same, where tenants share nothing."""
    return serving(seed, own=True)


def registry(seed: int) -> list[Request]:
    """Pulls from a registry: many small layers, few large ones, new versions on old bases."""
    chance, ids = _Chance(seed), count()

    def layers(number: int) -> list[tuple[int, int]]:
        return [(next(ids), chance.size(600e3, 2.6, 120, 3 * _GB)) for _ in range(number)]

    bases = [layers(4) for _ in range(25)]
    ranks, popular = _zipf(25, 1.1), _zipf(600, 0.95)
    found: list[Request] = []
    images = [bases[_pick(chance, ranks)] + layers(chance.randint(1, 10)) for _ in range(600)]
    for start in range(5000):
        number = _pick(chance, popular)
        if chance.random() < 0.06:
            images[number] = images[number][: chance.randint(4, len(images[number]))] + layers(chance.randint(1, 4))
        found += [Request(str(number % 30), str(layer), size, str(number), start) for layer, size in images[number]]
    return found


def web(seed: int) -> list[Request]:
    """Small objects, many of them asked for once."""
    chance = _Chance(seed)
    sizes = [chance.size(9e3, 1.9, 60, 4_000_000) for _ in range(100_000)]
    popular = _zipf(40_000, 0.75)
    picks = (40_000 + n if chance.random() < 0.12 else _pick(chance, popular) for n in range(60_000))
    return [Request("web", str(n), sizes[n], start=start) for start, n in enumerate(picks)]


def bursts(seed: int) -> list[Request]:
    """A whole cluster starts one image."""
    chance, ids = _Chance(seed), count()
    bases = [[(next(ids), chance.size(30 * _MB, 1, _MB, 300 * _MB)) for _ in range(5)] for _ in range(5)]
    images = [
        chance.choice(bases) + [(next(ids), chance.size(5 * _MB, 2.5, 30, 3 * _GB)) for _ in range(8)]
        for _ in range(70)
    ]
    popular = _zipf(70, 0.7)
    picks = ((_pick(chance, popular), chance.choice([1, 4, 8, 16])) for _ in range(500))
    starts = enumerate(number for number, nodes in picks for _ in range(nodes))
    return [
        Request("cluster", str(layer), size, str(number), start)
        for start, number in starts
        for layer, size in images[number]
    ]


WORKLOADS: dict[str, Callable[[int], list[Request]]] = {
    "serving": serving,
    "per-namespace": per_namespace,
    "registry": registry,
    "web": web,
    "bursts": bursts,
}
