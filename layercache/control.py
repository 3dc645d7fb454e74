"""One deadline, one cancel and one progress callback that travel through every call of an operation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from layercache.errors import CancelledError, DeadlineError
from layercache.oci import Digest

__all__ = ["Control", "Progress"]

Stage = Literal["queued", "waiting", "fetching", "hit", "miss", "bypass"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where one blob of a pull stands: ``done`` of ``size`` bytes. ``hit``, ``miss`` and ``bypass`` are final."""

    digest: Digest
    size: int
    done: int
    stage: Stage


class Control:
    """The caller's wishes about one operation; every loop of it calls :meth:`checkpoint` between chunks.

    ``timeout`` is in seconds from now, for the whole operation. ``cancel`` is the caller's event.
    ``progress`` is called from worker threads; what it raises ends the operation.
    """

    __slots__ = ("_cancel", "_deadline", "_progress", "_stopped", "_whole")

    def __init__(
        self,
        *,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._cancel = cancel
        self._progress = progress
        self._stopped = threading.Event()
        self._whole: Control | None = None

    def part(self) -> Control:
        """Return the control of a part of the operation: it ends with the whole, and can be stopped alone."""
        part = Control()
        part._whole, part._deadline = self, self._deadline
        return part

    def checkpoint(self) -> None:
        """Raise :class:`CancelledError` or :class:`DeadlineError` if the operation must end now."""
        if self._whole is not None:
            self._whole.checkpoint()
        if self._stopped.is_set() or (self._cancel is not None and self._cancel.is_set()):
            raise CancelledError("cancelled by the caller")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineError("the time given for this operation is over", hint="give it a longer timeout")

    def stop(self) -> None:
        """End the operation's other threads at their next checkpoint (one of them failed)."""
        self._stopped.set()

    def remaining(self, most: float) -> float:
        """Seconds a single wait may take: ``most``, or less where the deadline is nearer. Never below zero."""
        if self._deadline is None:
            return most
        return max(0.0, min(most, self._deadline - time.monotonic()))

    @contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """Hold a lock within the block; the wait for it ends with an error on cancel, stop or deadline."""
        while not lock.acquire(timeout=0.05):
            self.checkpoint()
        try:
            yield
        finally:
            lock.release()

    def wait(self, seconds: float) -> None:
        """Sleep for ``seconds``, ending early with an error on cancel, stop or deadline."""
        end = time.monotonic() + seconds
        while True:
            self.checkpoint()
            left = end - time.monotonic()
            if left <= 0:
                return
            # Short steps: a cancel must take effect at once, and the caller's event cannot be waited on with ours.
            self._stopped.wait(self.remaining(min(left, 0.05)))

    def report(self, progress: Progress) -> None:
        """Tell the caller where a blob stands."""
        if self._progress is not None:
            self._progress(progress)
