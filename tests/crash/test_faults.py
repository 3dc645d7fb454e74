"""Faults and kills at every system call."""

from __future__ import annotations

import pytest

from tests.crash import faults, sweeps

WHY_NOT = faults.unavailable()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(7200 if sweeps.SOAK else 300)]

_LANES = 2


def test_every_call_may_fail_or_be_the_last(record_property):
    """No fault makes a wrong byte, a visible partial or an error without a type; the next process finds order."""
    everything = ["--all"] if sweeps.SOAK else []
    lanes = [
        sweeps.start(
            "tests.crash.faults", "--shard", sweeps.shard(sweeps.FAULT_DAYS, part=lane, parts=_LANES), *everything
        )
        for lane in range(_LANES)
    ]
    sweeps.finish(lanes, record_property)


def test_what_is_injected_into_is_what_the_store_calls():
    """A call that the C library makes under another name would be looked for in vain, and never fail."""
    seen = {call.name for scenario in ("get", "put", "purge") for call in faults.trace(scenario)}
    assert {"openat", "preadv2", "pwrite64", "fsync", "renameat2", "unlinkat", "flock", "close"} <= seen


@pytest.mark.parametrize("finish", ["same", "cli"])
def test_whoever_comes_finishes_a_purge(finish, record_property):
    """Also the process that met the fault, when it tries again, and the command: the receipts are then whole."""
    everything = ["--all"] if sweeps.SOAK else []
    share = sweeps.shard(4 * sweeps.FAULT_DAYS)
    sweeps.finish(
        [sweeps.start("tests.crash.faults", "--only", "purge", "--finish", finish, "--shard", share, *everything)],
        record_property,
    )
