"""A budget of connections: so many in all, so many to a host, fair between those who want one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable

from layercache.control import Control

__all__ = ["Lines"]

_IN_ALL = 128
_PER_HOST = 32
_PATIENCE = 30.0
_SLICE = 0.1


class _Waiter:
    __slots__ = ("granted", "host", "who")

    def __init__(self, host: str, who: Hashable) -> None:
        self.host = host
        self.who = who
        self.granted = threading.Event()


class Lines:
    """Connections in use, by host and by who uses them (a tenant's client). For many threads.

    One client gets half of a host's at most, whatever it transfers. Where there are no more, the next one that is given
    back goes to whoever waits and has the fewest there, of these to the one who came first: fifty small pulls are not
    kept waiting by one with hundreds of layers. A transfer whose reader does nothing holds its connection, so nobody
    waits for ever: after ``patience`` seconds one goes over the budget.
    """

    def __init__(self, *, in_all: int = _IN_ALL, per_host: int = _PER_HOST, patience: float = _PATIENCE) -> None:
        self._in_all = in_all
        self._per_host = per_host
        self._patience = patience
        self._lock = threading.Lock()
        self._hosts: Counter[str] = Counter()
        self._held: Counter[tuple[str, Hashable]] = Counter()
        self._waiting: list[_Waiter] = []

    @property
    def in_use(self) -> int:
        """Connections taken and not given back."""
        with self._lock:
            return self._hosts.total()

    def take_now(self, host: str, who: Hashable) -> bool:
        """Take one without a wait; False where the budget is used up, or others wait for the same."""
        with self._lock:
            if not self._room(host, who) or any(
                self._room(one.host, one.who) for one in self._waiting if one.host == host
            ):
                return False
            self._count(host, who, 1)
            return True

    def take(self, host: str, who: Hashable, control: Control) -> None:
        """Take one, waiting for a turn. It is to be given back by :meth:`give`.

        :raises CancelledError: on a cancel, as :class:`DeadlineError` at the deadline; then none is taken.
        """
        waiter = _Waiter(host, who)
        with self._lock:
            self._waiting.append(waiter)
            self._grant()
        until = time.monotonic() + self._patience
        try:
            while not waiter.granted.wait(control.remaining(_SLICE)):
                control.checkpoint()
                if time.monotonic() >= until:
                    break
        except BaseException:
            with self._lock:
                if waiter.granted.is_set():
                    self._count(host, who, -1)
                    self._grant()
                else:
                    self._waiting.remove(waiter)
            raise
        with self._lock:
            if not waiter.granted.is_set():
                self._waiting.remove(waiter)
                self._count(host, who, 1)

    def give(self, host: str, who: Hashable) -> None:
        """Give one back."""
        with self._lock:
            self._count(host, who, -1)
            self._grant()

    def _room(self, host: str, who: Hashable) -> bool:
        if self._hosts.total() >= self._in_all or self._hosts[host] >= self._per_host:
            return False
        return self._held[host, who] < max(1, self._per_host // 2)

    def _count(self, host: str, who: Hashable, step: int) -> None:
        self._hosts[host] += step
        self._held[host, who] += step
        if not self._hosts[host]:
            del self._hosts[host]
        if not self._held[host, who]:
            del self._held[host, who]

    def _grant(self) -> None:
        while True:
            able = [waiter for waiter in self._waiting if self._room(waiter.host, waiter.who)]
            if not able:
                return
            first = min(able, key=lambda waiter: self._held[waiter.host, waiter.who])  # of equals the first in the list
            self._waiting.remove(first)
            self._count(first.host, first.who, 1)
            first.granted.set()
