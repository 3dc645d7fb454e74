"""Purges among stopped processes and holders."""

from __future__ import annotations

import pytest

from tests.crash import sweeps


@pytest.mark.timeout(7200 if sweeps.SOAK else 240)
def test_no_byte_is_given_out_after_a_purge_whoever_is_stopped_where(record_property):
    """A process stopped before any of its calls gets nothing when it goes on, and keeps no purge from its deadline."""
    rounds = "500" if sweeps.SOAK else "16"
    sweeps.finish(
        [sweeps.start("tests.multiprocess.stops", "--rounds", rounds, "--seed", sweeps.seed())], record_property
    )
