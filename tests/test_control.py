"""Deadline, cancel and progress."""

import threading
import time

import pytest

from layercache.control import Control, Progress
from layercache.errors import CancelledError, DeadlineError
from layercache.oci import Digest


def test_checkpoint_passes_while_nothing_is_wrong():
    """Without timeout and cancel nothing ends an operation."""
    Control().checkpoint()


def test_checkpoint_raises_after_cancel():
    """The caller's event ends the operation."""
    cancel = threading.Event()
    control = Control(cancel=cancel)
    control.checkpoint()
    cancel.set()

    with pytest.raises(CancelledError):
        control.checkpoint()


def test_checkpoint_raises_after_the_deadline():
    """The time given is for the whole operation, and the error is a TimeoutError too."""
    control = Control(timeout=0.0)

    with pytest.raises(DeadlineError):
        control.checkpoint()
    assert issubclass(DeadlineError, TimeoutError)


def test_stop_ends_the_other_threads():
    """A failure in one thread ends the others at their next checkpoint."""
    control = Control()
    control.stop()

    with pytest.raises(CancelledError):
        control.checkpoint()


def test_wait_ends_early_on_cancel():
    """A wait does not outlast a cancel."""
    cancel = threading.Event()
    control = Control(cancel=cancel)
    threading.Timer(0.05, cancel.set).start()
    start = time.monotonic()

    with pytest.raises(CancelledError):
        control.wait(30)
    assert time.monotonic() - start < 5


def test_remaining_never_passes_the_deadline():
    """A single wait is cut by the deadline, and never negative."""
    assert Control().remaining(30) == 30
    assert 0 <= Control(timeout=1).remaining(30) <= 1
    assert Control(timeout=0).remaining(30) == 0


def test_progress_reaches_the_caller():
    """What is reported is what the caller's function gets."""
    seen: list[Progress] = []
    step = Progress(Digest.of(b""), 10, 3, "fetching")
    Control(progress=seen.append).report(step)

    assert seen == [step]
