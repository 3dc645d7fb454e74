"""Purges brought to their end: until a deadline for who waits for them, then beside him on a thread of this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from layercache.errors import StoreError
from layercache.store._disk import Disk
from layercache.store._purge import Purge
from layercache.store._receipts import Receipt

__all__ = ["Errand", "Errands"]

_log = logging.getLogger("layercache.store")

_GRACE = 0.04
"""Seconds after the deadline in which work that waits for nobody may still come to its end."""

_TOLD = 0.09
"""Seconds after the deadline at which the caller goes, whatever a system call is taking."""

_STEP, _LONGEST_STEP = 0.01, 5.0
_QUICK = 0.02


class Errand:
    """Some purges that are fenced, on their way to the end.

    :param wait: seconds from now until what is reached is recorded and the caller goes; ``None``: nobody waits.
    :param close: called with each purge once it has a receipt, to let its namespace begin anew.
    """

    def __init__(
        self, disk: Disk, purges: Sequence[Purge], *, wait: float | None, close: Callable[[Purge], None]
    ) -> None:
        self._disk = disk
        self._purges = list(purges)
        self._open = list(purges)
        self._untrimmed: list[Purge] = []
        self._close = close
        self._wait = wait
        self._deadline = disk.elapsed() + (wait or 0.0)
        self._reported = wait is None
        self._beside = False
        self._done = threading.Event()
        self._stop = threading.Event()
        self._errors: list[OSError | StoreError] = []
        self._receipts: dict[Purge, Receipt] = {}
        self._looked = self._look_took = 0.0

    def wait(self) -> None:
        """Wait for the end or the deadline, whichever comes first."""
        if self._wait is not None:
            self._done.wait(max(0.0, self._deadline + _TOLD - self._disk.elapsed()))

    def receipts(self) -> list[Receipt]:
        """Return what each purge has reached, in their order.

        One whose step takes too long just now has a receipt that is not in the chain yet.

        :raises StoreError: (or ``OSError``) what hindered one of them.
        """
        if self._errors:
            raise self._errors[0]
        return [self._receipts.get(purge) or purge.receipt("fenced") for purge in self._purges]

    def stop(self) -> None:
        """Let it end after the step that it is at. What is left is for who comes next."""
        self._stop.set()

    def run(self, *, beside: bool) -> None:
        """Work; ``beside`` a caller also after the deadline, until nothing is left."""
        self._beside = beside
        try:
            for purge in self._purges:
                with self._alone(purge):
                    purge.hide()
            self._empty()
            self._trim()
        finally:
            self._done.set()
            for purge in self._purges:
                purge.close()

    def _empty(self) -> None:
        disk, step = self._disk, _STEP
        while True:
            for purge in list(self._open):
                with self._alone(purge):
                    if purge.empty(self._due):
                        self._end(purge)
            now = disk.elapsed()
            if not self._open or self._stop.is_set():
                return
            waiting = all(purge.held for purge in self._open)
            if not self._reported:
                if now >= self._deadline + (0.0 if waiting else _GRACE):
                    self._report()
                    continue
                if waiting and not self._looked:
                    self._look()
                    self._look_everywhere()  # before it is needed: it may take longer than the deadline lets it
            elif not self._beside:
                return
            if self._reported:
                self._trim()  # after the deadline: it may take long, and must not wait for whoever holds the others
            if any(purge.stuck for purge in self._open):
                left = self._deadline + (0.0 if waiting else _GRACE) - now
                self._pause(step if self._reported else max(0.001, min(step, left)))
                if self._reported:
                    step = min(1.5 * step, _LONGEST_STEP)

    def _pause(self, seconds: float) -> None:
        if self._beside:
            self._stop.wait(seconds)
        else:
            self._disk.pause(seconds)

    def _due(self) -> bool:
        # Once the caller is gone there is no hurry: what is recorded then says more.
        late = 0.0 if self._reported else self._disk.elapsed() - self._deadline
        return self._stop.is_set() or _GRACE <= late < _TOLD

    def _end(self, purge: Purge) -> None:
        self._receipts[purge] = purge.record(purge.reached)
        self._close(purge)
        self._open.remove(purge)
        if purge.trim:
            self._untrimmed.append(purge)

    def _report(self) -> None:
        """Record what is reached at the deadline, and let the caller go."""
        self._reported = True
        self._look()
        if self._look_took < _QUICK if self._looked else any(purge.unnamed for purge in self._open):
            self._look_everywhere()
        for purge in list(self._open):
            with self._alone(purge):
                self._receipts[purge] = purge.record("fenced")
                self._close(purge)
        self._done.set()

    def _look(self) -> None:
        """Find out who of those who work with this library has the files open that had to stay. Takes no time."""
        if any(purge.held for purge in self._open):
            lockers = self._disk.openers(quick=True)
            for purge in self._open:
                purge.name_holders(lockers, quick=True)

    def _look_everywhere(self) -> None:
        """Find out who has them open, whoever it is."""
        if any(purge.held for purge in self._open):
            began = self._disk.elapsed()
            openers = self._disk.openers()
            self._looked = self._disk.elapsed()
            self._look_took = self._looked - began
            for purge in self._open:
                purge.name_holders(openers)

    def _trim(self) -> None:
        """Hand the blocks to the device of those that have ended and ask for it: once for all."""
        ended, self._untrimmed = self._untrimmed, []
        if not ended or self._stop.is_set():
            return
        try:
            trimmed = self._disk.trim()
        except OSError as error:
            _log.warning("the blocks of a purge could not be handed to the device: %s", error)
            return
        for purge in ended:
            with self._alone(purge):
                level = "discarded" if purge.reached == "unlinked" else purge.reached
                self._receipts[purge] = purge.record(level, trimmed=trimmed)

    @contextmanager
    def _alone(self, purge: Purge) -> Iterator[None]:
        """Let a failure within the block end this purge only. The next to come goes on with it."""
        try:
            yield
        except (OSError, StoreError) as error:
            self._errors.append(error)
            with suppress(ValueError):
                self._open.remove(purge)
            if self._done.is_set() or self._wait is None:
                _log.warning("a purge could not be finished now: %s", error)


class Errands:
    """The errands that one process is at."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self._running: dict[Errand, Callable[[], None]] = {}

    def run(self, errand: Errand) -> list[Receipt]:
        """Run an errand until it ends or its deadline has come; the rest goes on beside the caller, where it can."""
        if self._start(errand):
            errand.wait()
        else:
            errand.run(beside=False)
        return errand.receipts()

    def leave(self, errand: Errand) -> None:
        """Run an errand that nobody waits for beside the caller; where that cannot be, it is for who comes next."""
        self._start(errand)

    def stop(self) -> None:
        """End them all after the step that each is at, and wait for that."""
        with self._lock:
            running = dict(self._running)
        for errand in running:
            errand.stop()
        for join in running.values():
            join()

    def _start(self, errand: Errand) -> bool:
        with self._lock:
            join = self._disk.background(lambda: self._run(errand))
            if join is not None:
                self._running[errand] = join
        return join is not None

    def _run(self, errand: Errand) -> None:
        try:
            errand.run(beside=True)
        finally:
            with self._lock:
                del self._running[errand]
