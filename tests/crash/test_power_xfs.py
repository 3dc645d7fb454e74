"""Power cuts and full disks on a real xfs."""

from __future__ import annotations

import pytest

from tests.crash import loopfs, sweeps

WHY_NOT = loopfs.unavailable("xfs")
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(3600 if sweeps.SOAK else 300)]


def test_no_power_cut_loses_or_damages_anything(record_property):
    """What was published stays bit for bit, what was not is nowhere, one recovery leaves nothing unaccounted for."""
    sweeps.finish([sweeps.start("tests.crash.power", "xfs", *sweeps.power_share())], record_property)


def test_a_full_disk_still_lets_go(record_property):
    """With the last byte taken puts are refused whole, reads go on, and removal, recovery and purge work."""
    sweeps.finish([sweeps.start("tests.crash.fulldisk", "xfs", "--cycles", sweeps.cycles())], record_property)


def test_a_read_only_filesystem_is_read_from_and_written_to_when_it_can_be(record_property):
    """A store opened on a read-only mount refuses to write with a typed error, and goes on writing by itself later."""
    sweeps.finish([sweeps.start("tests.crash.readonly", "xfs")], record_property)


@pytest.mark.parametrize("finish", ["same", "cli"])
def test_a_purge_that_a_power_cut_ended_is_finished(finish, record_property):
    """By its own process once the disk is back, or by the command: nothing is left, the chain of receipts is whole."""
    share = ["--shard", sweeps.shard(4 * sweeps.POWER_DAYS), "--nested", "1" if sweeps.SOAK else "0"]
    sweeps.finish(
        [sweeps.start("tests.crash.power", "xfs", "--only", "purge", "--finish", finish, *share)], record_property
    )
