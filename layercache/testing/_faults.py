"""The faults a scripted registry knows: each turns the right reply into a wrong (or merely odd) one.

``at`` counts bytes of the reply's body; a negative one counts from its end.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, repeat
from threading import Event
from typing import ClassVar, Literal

from layercache.testing._content import PIECE, Content, pieces, size_of
from layercache.testing._reply import Drop, Reply, Step, Wait, cut, error

__all__ = [
    "Chunked",
    "Delay",
    "Disconnect",
    "Drip",
    "Encoded",
    "Endless",
    "Fault",
    "Headers",
    "Hold",
    "IgnoreRange",
    "Multipart",
    "Raw",
    "Redirect",
    "Reset",
    "Stall",
    "Status",
    "Substitute",
    "Truncate",
    "WrongBytes",
    "WrongContentRange",
    "WrongLength",
]

ContentRangeFault = Literal[
    "missing", "garbage", "unit", "twice", "later", "longer", "shorter", "reversed", "total", "unsatisfied", "length"
]


class Fault:
    """One way to misbehave. Subclass it to add your own: a frozen value with :meth:`apply`.

    ``needs`` says which requests can show it; one that cannot does not use up a turn.
    """

    __slots__ = ()

    needs: ClassVar[Literal["any", "body", "range"]] = "any"

    def apply(self, reply: Reply) -> Reply:
        """Return what is sent in place of ``reply``."""
        raise NotImplementedError


class BodyFault(Fault):
    """A fault of the body, which a HEAD cannot show."""

    __slots__ = ()

    needs = "body"


class RangeFault(Fault):
    """A fault of partial content, which only a GET of a range can show."""

    __slots__ = ()

    needs = "range"


@dataclass(frozen=True, slots=True)
class WrongBytes(BodyFault):
    """``count`` bytes from ``at`` on have a bit flipped; size and headers stay right."""

    at: int = 0
    count: int = 1

    def apply(self, reply: Reply) -> Reply:
        """Return the reply with damaged bytes."""
        start = _position(self.at, reply)
        return replace(reply, steps=self._damage(reply.steps, start, start + self.count))

    def _damage(self, steps: Iterable[Step], start: int, end: int) -> Iterator[Step]:
        passed = 0
        for step in steps:
            if isinstance(step, bytes):
                first, last = max(start - passed, 0), min(end - passed, len(step))
                passed += len(step)
                if first < last:
                    middle = bytes(byte ^ 1 for byte in step[first:last])
                    yield step[:first] + middle + step[last:]
                    continue
            yield step


@dataclass(frozen=True, slots=True)
class Substitute(Fault):
    """Other content altogether, with headers that agree with it: a lie that only the asked-for digest finds.

    ``content_type`` and ``digest`` (of the digest header) are those of the other content unless given.
    """

    content: Content = field(repr=False)
    content_type: str | None = None
    digest: str | None = None

    def apply(self, reply: Reply) -> Reply:
        """Return a 200 with the other content."""
        size = size_of(self.content)
        hasher = sha256()
        for piece in pieces(self.content):
            hasher.update(piece)
        digest = self.digest or f"sha256:{hasher.hexdigest()}"
        content_type = self.content_type or reply.header("Content-Type") or "application/octet-stream"
        headers = (("Content-Type", content_type), ("Docker-Content-Digest", digest), ("ETag", f'"{digest}"'))
        return Reply(200, (*headers, ("Content-Length", str(size))), pieces(self.content), size)


@dataclass(frozen=True, slots=True)
class Truncate(BodyFault):
    """The promised length, but only ``at`` bytes; then the connection closes in order."""

    at: int

    def apply(self, reply: Reply) -> Reply:
        """Return the cut reply."""
        return replace(reply, steps=chain(cut(reply.steps, _position(self.at, reply)), (Drop(),)))


@dataclass(frozen=True, slots=True)
class Reset(BodyFault):
    """``at`` bytes, which all arrive; then the connection is reset."""

    at: int = 0

    def apply(self, reply: Reply) -> Reply:
        """Return the reply that ends in a reset."""
        return replace(reply, steps=chain(cut(reply.steps, _position(self.at, reply)), (Drop(reset=True),)))


@dataclass(frozen=True, slots=True)
class Disconnect(Fault):
    """No reply at all: the connection closes (or is reset) where the status line should come."""

    reset: bool = False

    def apply(self, reply: Reply) -> Reply:
        """Return a reply that sends nothing."""
        return replace(reply, before=(*reply.before, Drop(reset=self.reset)))


@dataclass(frozen=True, slots=True)
class Stall(BodyFault):
    """``at`` bytes, then silence: for ``seconds``, until ``gate`` is set, or until the client goes; then the rest."""

    at: int = 0
    seconds: float | None = None
    gate: Event | None = None

    def apply(self, reply: Reply) -> Reply:
        """Return the reply with a silence in it."""
        return replace(reply, steps=self._pause(reply.steps, _position(self.at, reply)))

    def _pause(self, steps: Iterable[Step], at: int) -> Iterator[Step]:
        steps = iter(steps)
        for step in steps:
            if not isinstance(step, bytes) or len(step) < at:
                at -= len(step) if isinstance(step, bytes) else 0
                yield step
                continue
            yield step[:at]
            yield Wait(self.seconds, self.gate)
            yield step[at:]
            break
        yield from steps


@dataclass(frozen=True, slots=True)
class Delay(Fault):
    """Nothing for ``seconds``, then the right reply: late headers."""

    seconds: float

    def apply(self, reply: Reply) -> Reply:
        """Return the late reply."""
        return replace(reply, before=(*reply.before, Wait(self.seconds)))


@dataclass(frozen=True, slots=True)
class Hold(Fault):
    """Nothing until ``gate`` is set, then the right reply: several requests can be brought to wait together."""

    gate: Event

    def apply(self, reply: Reply) -> Reply:
        """Return the held reply."""
        return replace(reply, before=(*reply.before, Wait(None, self.gate)))


@dataclass(frozen=True, slots=True)
class Drip(BodyFault):
    """The right body, slowly: ``size`` bytes at a time, ``rate`` bytes a second."""

    rate: float
    size: int = 1

    def apply(self, reply: Reply) -> Reply:
        """Return the slow reply."""
        return replace(reply, steps=self._slow(reply.steps))

    def _slow(self, steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            if not isinstance(step, bytes):
                yield step
                continue
            for start in range(0, len(step), self.size):
                piece = step[start : start + self.size]
                yield piece
                yield Wait(len(piece) / self.rate)


@dataclass(frozen=True, slots=True)
class Endless(BodyFault):
    """The right body and then zeros until the client goes. Without a length, or (``chunked``) in chunks."""

    chunked: bool = False

    def apply(self, reply: Reply) -> Reply:
        """Return the reply without an end."""
        endless = chain(reply.steps, repeat(bytes(PIECE)))
        return replace(reply.without("Content-Length"), steps=endless, chunked=self.chunked)


@dataclass(frozen=True, slots=True)
class Chunked(BodyFault):
    """The right body in chunks, without a Content-Length. Not a fault, but a thing registries do."""

    def apply(self, reply: Reply) -> Reply:
        """Return the reply of unknown length."""
        return replace(reply.without("Content-Length"), chunked=True)


@dataclass(frozen=True, slots=True)
class WrongLength(Fault):
    """A Content-Length that is ``by`` bytes off. The connection closes after the body."""

    by: int = 1

    def apply(self, reply: Reply) -> Reply:
        """Return the reply with the wrong length."""
        return reply.put(("Content-Length", str(max(0, int(reply.header("Content-Length") or 0) + self.by))))


@dataclass(frozen=True, slots=True)
class Headers(Fault):
    """Headers left out (``drop``) or put in their place (``put``; a name given twice is sent twice)."""

    drop: tuple[str, ...] = ()
    put: tuple[tuple[str, str], ...] = ()

    def apply(self, reply: Reply) -> Reply:
        """Return the reply with other headers."""
        return reply.without(*self.drop).put(*self.put)


@dataclass(frozen=True, slots=True)
class Encoded(BodyFault):
    """The body under a gzip content-coding, as proxies add: other bytes on the wire, the same content."""

    def apply(self, reply: Reply) -> Reply:
        """Return the encoded reply. The whole body passes through memory."""
        body = gzip.compress(b"".join(step for step in reply.steps if isinstance(step, bytes)), mtime=0)
        encoded = reply.put(("Content-Encoding", "gzip"), ("Content-Length", str(len(body))))
        return replace(encoded, steps=(body,), size=len(body))


@dataclass(frozen=True, slots=True)
class IgnoreRange(RangeFault):
    """The whole content and a 200, though a range was asked for."""

    def apply(self, reply: Reply) -> Reply:
        """Return the whole."""
        return reply.origin.whole or reply


@dataclass(frozen=True, slots=True)
class Multipart(RangeFault):
    """The range as the one part of a ``multipart/byteranges`` body."""

    def apply(self, reply: Reply) -> Reply:
        """Return the wrapped part."""
        head = f"--part\r\nContent-Range: {reply.header('Content-Range')}\r\n\r\n".encode()
        tail = b"\r\n--part--\r\n"
        size = len(head) + reply.size + len(tail)
        wrapped = reply.without("Content-Range").put(
            ("Content-Type", "multipart/byteranges; boundary=part"), ("Content-Length", str(size))
        )
        return replace(wrapped, steps=chain((head,), reply.steps, (tail,)), size=size)


@dataclass(frozen=True, slots=True)
class WrongContentRange(RangeFault):
    """A 206 whose Content-Range is not what was asked for.

    ``missing``, ``garbage``, ``unit``, ``twice``, ``reversed``, ``unsatisfied``
        the header is absent, not a range, in another unit, there two times, has its last byte before its first, or
        is the one of a 416; the bytes are those asked for.
    ``later``, ``longer``, ``shorter``
        another range is sent than was asked for, and said so honestly.
    ``total``
        the total is one byte off.
    ``length``
        Content-Length is not the length of the range.
    """

    kind: ContentRangeFault

    def apply(self, reply: Reply) -> Reply:
        """Return the reply with the wrong range; one without a range is left alone."""
        content, served = reply.origin.content, reply.origin.served
        if content is None or served is None:
            return reply
        start, end = served
        total = size_of(content)
        honest = f"bytes {start}-{end - 1}/{total}"
        texts: Mapping[ContentRangeFault, tuple[str, ...]] = {
            "missing": (),
            "garbage": ("bytes what",),
            "unit": (f"octets {start}-{end - 1}/{total}",),
            "twice": (honest, honest),
            "reversed": (f"bytes {end}-{start}/{total}",),
            "total": (f"bytes {start}-{end - 1}/{total + 1}",),
            "unsatisfied": (f"bytes */{total}",),
        }
        if self.kind == "length":
            return reply.put(("Content-Length", str(reply.size + 1)))
        if self.kind in texts:
            return reply.without("Content-Range").put(*(("Content-Range", text) for text in texts[self.kind]))
        if self.kind == "later":
            start, end = start + 1, min(end + 1, total)
        else:
            end += 1 if self.kind == "longer" else -1
        honest = f"bytes {start}-{end - 1}/{total}"
        other = reply.put(("Content-Range", honest), ("Content-Length", str(end - start)))
        # Past the end of the content there are no bytes to send, but the claim stands.
        return replace(other, steps=pieces(content, start, min(end, total)), size=end - start)


@dataclass(frozen=True, slots=True)
class Status(Fault):
    """An error in place of the reply.

    The body is an error document of the distribution specification with ``code`` and ``message``, or ``body`` as it
    is (HTML, XML, empty). ``retry_after`` goes out as it stands: seconds, an HTTP date, or nonsense. ``challenges``
    become WWW-Authenticate headers, one each.
    """

    status: int
    body: bytes | None = None
    content_type: str = "text/html"
    code: str = ""
    message: str = "scripted"
    retry_after: str | int | None = None
    challenges: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def apply(self, reply: Reply) -> Reply:
        """Return the error."""
        answer = error(self.status, self.code or _CODES.get(self.status, "UNKNOWN"), self.message)
        if self.body is not None:
            answer = replace(answer, steps=(self.body,), size=len(self.body))
            answer = answer.put(("Content-Type", self.content_type), ("Content-Length", str(len(self.body))))
        extra = tuple(("WWW-Authenticate", challenge) for challenge in self.challenges) + self.headers
        if self.retry_after is not None:
            extra += (("Retry-After", str(self.retry_after)),)
        return replace(answer.put(*extra), before=reply.before)


@dataclass(frozen=True, slots=True)
class Redirect(Fault):
    """A redirect: to the registry's own storage (strict as S3 is, on another port), or to ``to`` as it stands.

    A storage URL lives for ``expires`` seconds (0 or less: it has expired already) and is good for the method it was
    made for. One of a ``session`` answers 400 ``ExpiredToken`` when it is over, any other 403 ``AccessDenied``.
    """

    to: str | None = None
    status: int = 307
    expires: float = 3600
    session: bool = False

    def apply(self, reply: Reply) -> Reply:
        """Return the redirect; what does not exist is not redirected to storage."""
        if self.to is None and reply.status >= 400:
            return reply
        location = reply.origin.sign(self.expires, session=self.session) if self.to is None else self.to
        body = b'<a href="elsewhere">moved</a>\n'
        headers = (("Location", location), ("Content-Type", "text/html"), ("Content-Length", str(len(body))))
        return Reply(self.status, headers, (body,), len(body), before=reply.before)


@dataclass(frozen=True, slots=True)
class Raw(Fault):
    """These bytes in place of a reply, whatever they are; then the connection closes."""

    data: bytes

    def apply(self, reply: Reply) -> Reply:
        """Return the raw reply."""
        return replace(reply, raw=self.data)


_CODES = {
    400: "NAME_INVALID",
    401: "UNAUTHORIZED",
    403: "DENIED",
    404: "NOT_FOUND",
    405: "UNSUPPORTED",
    429: "TOOMANYREQUESTS",
    503: "UNAVAILABLE",
}


def _position(at: int, reply: Reply) -> int:
    return at if at >= 0 else max(0, reply.size + at)
