"""Runs a flow: performs its effects one after the other, blocking, under the caller's control."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

from layercache.control import Control
from layercache.errors import RegistryError
from layercache.metrics import Ledger
from layercache.oci import Digest
from layercache.registry._authority import Authority
from layercache.registry._effects import (
    Authorise,
    Deliver,
    Effect,
    Flow,
    Grant,
    LostError,
    Pause,
    Recall,
    Receive,
    Release,
    Remember,
    Send,
    Target,
)
from layercache.registry._pace import Pace
from layercache.registry._wire import Headers, parse_warnings

if TYPE_CHECKING:
    from layercache.registry._transport import Reply, Transport  # imports urllib3

__all__ = ["Driver", "Session"]

T = TypeVar("T")

_log = logging.getLogger("layercache.registry")
_MOST_TARGETS = 1024
_NO_RANGES = 60.0  # seconds that a registry is not asked for parts after it gave all of a blob instead of one
_MOST_WARNINGS = 4096  # characters of warnings that a registry may put into our log


class Session:
    """What the operations on one registry share within one process."""

    def __init__(self, pid: int, transport: Transport, authority: Authority, pace: Pace) -> None:
        self.pid = pid
        self.transport = transport
        self.authority = authority
        self.pace = pace
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._targets: dict[tuple[str, Digest], tuple[Target, float]] = {}
        self._characters = 0
        self._ranges_from = 0.0

    @property
    def ranges(self) -> bool:
        """Whether parts of blobs may be asked for: it was not found lately that the registry ignores that."""
        return self.pace.now() >= self._ranges_from

    def give_up_ranges(self) -> None:
        """Ask for whole blobs for a while. A pull-through cache answers ranges once it has the blob."""
        self._ranges_from = self.pace.now() + _NO_RANGES

    def recall(self, ask: Recall) -> Target | None:
        """Where the registry sent the last request for a blob, if that may still be used."""
        with self._lock:
            target, until = self._targets.get((ask.repository, ask.digest), (None, 0.0))
        return target if self.pace.now() < until else None

    def remember(self, what: Remember) -> None:
        """Keep, or forget, where the registry sent a request to."""
        key, now = (what.repository, what.digest), self.pace.now()
        with self._lock:
            if what.target is None:
                self._targets.pop(key, None)
                return
            if len(self._targets) >= _MOST_TARGETS:
                self._targets = {k: kept for k, kept in self._targets.items() if kept[1] > now}
            if len(self._targets) >= _MOST_TARGETS:
                self._targets.clear()
            self._targets[key] = (what.target, now + what.life)

    def note_warnings(self, host: str, headers: Headers) -> None:
        """Log the warnings of a reply (distribution-spec, "Warnings"), each text once."""
        for text in parse_warnings(headers.all("warning")):
            with self._lock:
                if text in self._warned or self._characters + len(text) > _MOST_WARNINGS:
                    continue
                self._warned.add(text)
                self._characters += len(text)
            _log.warning("%s warns: %s", host, text)


class Driver:
    """Runs flows of one operation. ``stage`` is where the ledger counts the time on the wire."""

    def __init__(self, session: Session, control: Control, ledger: Ledger, stage: str) -> None:
        self._session = session
        self._control = control
        self._ledger = ledger
        self._stage = stage

    def run(self, flow: Flow[T]) -> T:
        """Result of a flow that delivers nothing."""
        steps = self.stream(flow)
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        raise AssertionError("a flow that delivers was run, not streamed")

    def stream(self, flow: Flow[T]) -> Generator[bytes, None, T]:
        """The bytes a flow delivers, as it delivers them, and its result. Closing it gives the connection back."""
        turn = _Turn(self._session, self._control, self._ledger, self._stage)
        answer: object = None
        lost: LostError | None = None
        try:
            while True:
                try:
                    effect = flow.send(answer) if lost is None else flow.throw(lost)
                except StopIteration as end:
                    result: T = end.value
                    return result
                answer = lost = None
                if isinstance(effect, Deliver):
                    yield effect.data
                    continue
                try:
                    answer = turn.perform(effect)
                except LostError as error:
                    lost = error
        finally:
            flow.close()
            turn.release()


class _Turn:
    """The open reply of a running flow, and what its effects do."""

    def __init__(self, session: Session, control: Control, ledger: Ledger, stage: str) -> None:
        self._session = session
        self._control = control
        self._ledger = ledger
        self._stage = stage
        self._reply: Reply | None = None
        self._host = ""
        self._line = ""  # the host that a connection of the budget is taken for
        self._entered = 0.0

    def perform(self, effect: Effect) -> object:
        if self._session.pid != os.getpid():
            raise RegistryError("this transfer belongs to the parent of this process", hint="start it anew")
        if isinstance(effect, Receive):
            return self._receive(effect)
        if isinstance(effect, Send):
            return self._send(effect)
        if isinstance(effect, Release):
            self.release()
            return None
        if isinstance(effect, Pause):
            return self._pause(effect)
        if isinstance(effect, Recall):
            return self._session.recall(effect)
        if isinstance(effect, Remember):
            self._session.remember(effect)
            return None
        if isinstance(effect, Authorise):
            return self._authorise(effect)
        raise AssertionError(f"unknown effect {type(effect).__name__}")

    def release(self) -> None:
        reply, self._reply = self._reply, None
        try:
            if reply is not None:
                reply.release()
        finally:
            line, self._line = self._line, ""
            if line and self._session.pid == os.getpid():  # else it is the parent's
                self._session.pace.lines.give(line, self._session)

    def _send(self, request: Send) -> object:
        self.release()
        host = self._host = request.url.authority
        pace = self._session.pace
        if pace.is_shut(host):
            with self._ledger.span("wait"):
                pace.enter(host, self._control)
        if not pace.lines.take_now(host, self._session):
            with self._ledger.span("wait"):
                pace.lines.take(host, self._session, self._control)
        self._line = host
        self._entered = pace.now()
        self._ledger.request()
        try:
            with self._ledger.span(self._stage):
                self._reply = self._session.transport.send(request, self._control)
        except BaseException:
            self.release()
            raise
        head = self._reply.head
        if head.status < 400:
            pace.served(host)
        self._session.note_warnings(host, head.headers)
        return head

    def _receive(self, effect: Receive) -> bytes:
        if self._reply is None:
            raise AssertionError("no reply is open")
        with self._ledger.span(self._stage):
            data = self._reply.read(effect.most)
        if data:
            self._ledger.received(self._host, len(data))
        return data

    def _pause(self, effect: Pause) -> bool:
        self.release()
        pace = self._session.pace
        delay = max(effect.least, pace.jittered(effect.attempt))
        if self._control.remaining(delay) < delay or not pace.repeat(effect.host):
            return False
        if effect.shut:  # the next request to that host waits at its gate, as do those of everybody else
            pace.shut(effect.host, effect.least, self._entered)
            return True
        with self._ledger.span("wait"):
            self._control.wait(delay)
        return True

    def _authorise(self, ask: Authorise) -> Grant | None:
        self.release()
        exchange = Driver(self._session, self._control, self._ledger, "auth")
        return self._session.authority.grant(ask, exchange.run, self._control)
