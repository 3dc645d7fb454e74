"""The store's own code on a disk that forgets, under a scheduler that steps several processes."""

from __future__ import annotations

import os

import pytest

from tests.crash import sweeps

_SEEDS = int(os.environ.get("LAYERCACHE_SEEDS", "10000"))
_SHARES = 10

pytestmark = pytest.mark.timeout(14400 if sweeps.SOAK else 400)


def test_no_seed_breaks_a_promise(record_property):
    """Crashes, faults, kills and lies, in worlds of two to six processes; more of them when soaking."""
    half = _SEEDS // 2
    lanes = [
        sweeps.start("layercache.testing.simulation", "--seeds", f"{start}:{end}")
        for start, end in ((0, half), (half, _SEEDS))
    ]
    sweeps.finish(lanes, record_property)


def test_no_place_breaks_a_promise(record_property):
    """Cut, killed or failing at every call of every scenario, and two processes in every order: today's share of it."""
    share = ["--shard", sweeps.shard(_SHARES)] + ([] if sweeps.SOAK else ["--most", "1500"])
    sweeps.finish([sweeps.start("tests.simulation.points", "--seed", sweeps.seed(), *share)], record_property)
