"""Long histories of a few processes, shrunk to the steps that matter where one breaks a promise."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from layercache.testing.machine import StoreMachine
from tests.crash import sweeps

# Hypothesis remembers each history of a run, some 2 MB of it: many runs are long without growing.
_RUNS, _HISTORIES = (20, 100) if sweeps.SOAK else (1, 20)


@pytest.mark.timeout(14400 if sweeps.SOAK else 300)
@pytest.mark.parametrize("_run", range(_RUNS))
def test_no_history_breaks_a_promise(_run):
    """Sixty steps each, every law of the store held after every step and at the end."""
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=_HISTORIES,
            stateful_step_count=60,
            deadline=None,
            derandomize=not sweeps.SOAK,
            suppress_health_check=list(HealthCheck),
        ),
    )
