"""How fast to come at a host: a gate for everybody where it said no, a budget of repetitions, one of connections."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from layercache.control import Control
from layercache.registry._lines import Lines
from layercache.registry._parts import spare_parts
from layercache.registry._wire import backoff

__all__ = ["Pace"]

_BUDGET = 32.0  # repetitions a host gets at once
_EARNED = 0.5  # repetitions that a good answer gives back
_REFILL = 1.0  # repetitions a second that time gives back


class _Host:
    __slots__ = ("budget", "opens", "refilled", "shut", "strikes")

    def __init__(self, now: float) -> None:
        self.budget = _BUDGET
        self.refilled = now
        self.opens = now
        self.shut = -1.0  # when the gate was last shut
        self.strikes = 0


class Pace:
    """Waits that hosts have asked for, kept by all threads. Seconds on a monotonic clock.

    ``lines`` is the budget of connections, ``spare`` that of parts in memory, which go with them: all are about hosts
    and hold for all tenants.
    """

    def __init__(
        self,
        *,
        first: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.lines = Lines()
        self.spare = spare_parts()
        self._first = first
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    def now(self) -> float:
        """Time on the clock of the gates."""
        return self._clock()

    def is_shut(self, host: str) -> bool:
        """Whether :meth:`enter` would wait."""
        state = self._hosts.get(host)
        return state is not None and state.opens > self._clock()

    def enter(self, host: str, control: Control) -> None:
        """Wait until the gate of ``host`` is open.

        Those who waited start spread over the time of one backoff: the first to be refused shuts the gate again before
        the others come.
        """
        while True:
            with self._lock:
                state = self._hosts.get(host)
                now = self._clock()
                if state is None or state.opens <= now:
                    return
                delay = state.opens - now + self._jitter() * min(2.0, self._backoff(state.strikes, 1.0))
            control.wait(delay)
            with self._lock:
                if state.opens <= self._clock():
                    return

    def shut(self, host: str, least: float, entered: float) -> None:
        """Shut the gate of ``host`` for everybody, for at least ``least`` seconds.

        ``entered`` is when the refused request went in: many refused at once are one strike.
        """
        with self._lock:
            state = self._state(host)
            now = self._clock()
            if entered >= state.shut:
                state.strikes += 1
                state.shut = now
            state.opens = max(state.opens, now + max(least, self._backoff(state.strikes, self._jitter())))

    def repeat(self, host: str) -> bool:
        """Take one repetition from the budget of ``host``; False if it is spent."""
        with self._lock:
            state = self._state(host)
            now = self._clock()
            state.budget = min(_BUDGET, state.budget + (now - state.refilled) * _REFILL)
            state.refilled = now
            if state.budget < 1.0:
                return False
            state.budget -= 1.0
            return True

    def served(self, host: str) -> None:
        """A good answer: the host is well again."""
        state = self._hosts.get(host)
        if state is not None:
            with self._lock:
                state.strikes = 0
                state.budget = min(_BUDGET, state.budget + _EARNED)

    def jittered(self, attempt: int) -> float:
        """Seconds to wait before try ``attempt``."""
        return self._backoff(attempt, self._jitter())

    def _backoff(self, attempt: int, jitter: float) -> float:
        return backoff(attempt, jitter, first=self._first)

    def _state(self, host: str) -> _Host:
        state = self._hosts.get(host)
        if state is None:
            if len(self._hosts) >= 256:
                self._hosts.clear()
            state = self._hosts[host] = _Host(self._clock())
        return state
