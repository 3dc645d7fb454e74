"""Long histories of a few processes, shrunk to the steps that matter where one breaks a promise."""

from hypothesis import HealthCheck, settings

from layercache.testing.machine import StoreMachine
from tests.crash import sweeps

StoreMachine.TestCase.settings = settings(
    max_examples=2000 if sweeps.SOAK else 12,
    stateful_step_count=60,
    deadline=None,
    derandomize=not sweeps.SOAK,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
