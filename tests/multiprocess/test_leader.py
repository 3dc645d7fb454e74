"""One download for all processes, whatever happens to the one that does it."""

from __future__ import annotations

import pytest

from tests.crash import sweeps
from tests.multiprocess import forks, rounds

WHY_NOT = rounds.unavailable()
SOAK = sweeps.SOAK


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.timeout(3600 if SOAK else 300)
def test_a_killed_leader_is_replaced_and_a_stopped_one_is_not_robbed(record_property):
    """Sixteen processes make one transfer (two if the leader is killed), within 2 s, and all of them get the bytes."""
    number = "1000" if SOAK else "200"
    sweep = sweeps.start("tests.multiprocess.rounds", "--rounds", number, "--seed", sweeps.seed())
    sweeps.finish([sweep], record_property)


def test_a_fork_neither_releases_nor_prolongs_a_lock(record_property):
    """A lease, a writer's right and a namespace's lock end with the process that took them, whoever it forked."""
    sweeps.finish([sweeps.start("tests.multiprocess.forks", "--rounds", "1000" if SOAK else "100")], record_property)


def test_the_forks_are_played_on_every_lock():
    """The list of what is held across a fork names every kind of lock there is."""
    assert {"blob", "ingest", "slot", "root"} == set(forks.HELD)
