"""The other side of a registry flow, scripted: no socket, no clock, no chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from layercache.oci import OCTET_STREAM, Descriptor, Digest, Reference
from layercache.registry._effects import (
    Authorise,
    Deliver,
    Effect,
    Flow,
    Grant,
    Head,
    LostError,
    Pause,
    Recall,
    Receive,
    Release,
    Remember,
    Send,
    Site,
    Target,
)
from layercache.registry._url import Url, Zone
from layercache.registry._wire import Headers

T = TypeVar("T")

SITE = Site("reg.example", Url.parse("https://reg.example/"))
REFERENCE = Reference.parse("reg.example/demo/x:1")
REPOSITORY = REFERENCE.repository
NOW = 1_700_000_000.0


@dataclass
class Reply:
    """One reply. ``body`` is bytes, or pieces of it, with a :class:`LostError` where the connection breaks."""

    status: int = 200
    headers: dict[str, str] | list[tuple[str, str]] = field(default_factory=dict)
    body: bytes | Iterable[bytes | LostError] = b""
    zone: Zone | None = Zone.PUBLIC


Scripted = Reply | LostError | Callable[[Send], "Reply | LostError"]


class Script:
    """Answers the requests of a flow in order (the last answer is repeated), and notes what the flow did."""

    def __init__(
        self, *replies: Scripted, grants: Iterable[Grant | None] = (), patience: int = 1000, repeat: bool = False
    ) -> None:
        self.sent: list[Send] = []
        self.delivered: list[bytes] = []
        self.pauses: list[Pause] = []
        self.asked: list[Authorise] = []
        self.remembered: dict[tuple[str, Digest], Target] = {}
        self.lives: list[float] = []
        self.received = 0
        self._replies = list(replies)
        self._grants = list(grants)
        self._patience = patience
        self._repeat = repeat
        self._open = False
        self._rest = b""
        self._pieces: Iterator[bytes | LostError] = iter(())

    @property
    def data(self) -> bytes:
        """Everything delivered."""
        return b"".join(self.delivered)

    @property
    def paths(self) -> list[str]:
        """Method and target of every request."""
        return [f"{send.method} {send.url.target}" for send in self.sent]

    def run(self, flow: Flow[T]) -> T:
        """Play to the end; the flow's result."""
        answer: object = None
        error: LostError | None = None
        try:
            while True:
                effect = flow.throw(error) if error else flow.send(answer)
                answer, error = None, None
                try:
                    answer = self._play(effect)
                except LostError as lost:
                    error = lost
        except StopIteration as end:
            assert not self._open, "the flow left a reply open"
            result: T = end.value
            return result

    def _play(self, effect: Effect) -> object:
        if isinstance(effect, Send):
            assert not self._open, "the flow sent while a reply was open"
            self.sent.append(effect)
            scripted = self._replies[0] if self._repeat and len(self._replies) == 1 else self._replies.pop(0)
            reply = scripted(effect) if callable(scripted) else scripted
            if isinstance(reply, LostError):
                raise reply
            items = reply.headers.items() if isinstance(reply.headers, dict) else reply.headers
            self._open = True
            body = [reply.body] if isinstance(reply.body, bytes) else reply.body
            self._pieces = iter([piece for piece in body if piece != b""])
            self._rest = b""
            return Head(reply.status, Headers(items), reply.zone, NOW)
        if isinstance(effect, Receive):
            assert self._open, "the flow received without a reply"
            return self._receive(effect.most)
        if isinstance(effect, Release):
            self._open = False
        elif isinstance(effect, Deliver):
            assert effect.data
            self.delivered.append(effect.data)
        elif isinstance(effect, Pause):
            assert not self._open, "the flow waited while a reply was open"
            self.pauses.append(effect)
            return len(self.pauses) <= self._patience
        elif isinstance(effect, Recall):
            assert not self._open
            return self.remembered.get((effect.repository, effect.digest))
        elif isinstance(effect, Remember):
            key = (effect.repository, effect.digest)
            self.remembered.pop(key, None)
            if effect.target is not None:
                self.remembered[key] = effect.target
                self.lives.append(effect.life)
        elif isinstance(effect, Authorise):
            self.asked.append(effect)
            return self._grants.pop(0) if self._grants else None
        return None

    def _receive(self, most: int) -> bytes:
        assert most > 0
        while not self._rest:
            piece = next(self._pieces, b"")
            if isinstance(piece, LostError):
                raise piece
            if not piece:
                return b""
            self._rest = piece
        data, self._rest = self._rest[:most], self._rest[most:]
        self.received += len(data)
        return data


def blob(data: bytes) -> Descriptor:
    """Descriptor of ``data``."""
    return Descriptor(media_type=OCTET_STREAM, digest=Digest.of(data), size=len(data))


def partial(data: bytes, first: int, last: int | None = None, *, put: dict[str, str] | None = None) -> Reply:
    """A right 206 for ``first`` to ``last``."""
    last = len(data) - 1 if last is None else last
    return Reply(206, {"Content-Range": f"bytes {first}-{last}/{len(data)}", **(put or {})}, data[first : last + 1])


def asked_range(send: Send) -> tuple[int, int] | None:
    """First and last byte that a request asks for."""
    text = send.headers.get("Range")
    if text is None:
        return None
    unit, _, spec = text.partition("=")
    assert unit == "bytes"
    first, _, last = spec.partition("-")
    return int(first), int(last)  # open-ended or suffix ranges are not asked for: this would fail
