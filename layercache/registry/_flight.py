"""One doer, many waiters: work that several threads want at once is done once."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError

__all__ = ["Flights"]

T = TypeVar("T")


class Flights:
    """Single flight by key. A failure reaches those who waited for it and is not remembered.

    A doer that was cancelled, or ran out of its own time, hands over: one of the waiters does the work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, concurrent.futures.Future[Any]] = {}

    def once(self, key: Hashable, work: Callable[[], T], control: Control) -> T:
        """Result of ``work``, done here or by the thread that is at it already. Waits under ``control``."""
        while True:
            with self._lock:
                flight = self._running.get(key)
                if flight is None:
                    mine = self._running[key] = concurrent.futures.Future()
                    break
            done, _ = concurrent.futures.wait([flight], timeout=control.remaining(0.05))
            control.checkpoint()
            if done and not isinstance(flight.exception(), CancelledError | DeadlineError):
                return cast("T", flight.result())
        try:
            result = work()
        except BaseException as error:
            self._land(key)
            mine.set_exception(error)
            raise
        self._land(key)
        mine.set_result(result)
        return result

    def _land(self, key: Hashable) -> None:
        with self._lock:
            del self._running[key]
