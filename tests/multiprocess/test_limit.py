"""Processes at the limit of a budget."""

from __future__ import annotations

import pytest

from tests.crash import sweeps


@pytest.mark.timeout(14400 if sweeps.SOAK else 240)
def test_eight_processes_at_the_limit_pass_it_never_and_lose_nothing_that_must_stay(record_property):
    """What is open or pinned stays, what is on disk is within the budget and the count, and both agree at the end."""
    operations = "100000" if sweeps.SOAK else "1600"
    sweeps.finish(
        [sweeps.start("tests.multiprocess.limit", "--operations", operations, "--seed", sweeps.seed())], record_property
    )
