"""Values of the scripted registry: a request as it came, the reply as it will go, and what a range asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from threading import Event
from typing import Protocol

from layercache.testing._content import Content, pieces, size_of

__all__ = [
    "Drop",
    "Origin",
    "Reply",
    "Request",
    "Step",
    "Wait",
    "asked_range",
    "cut",
    "deliver",
    "error",
    "reason",
]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the registry saw it, and how far its reply has come.

    ``resource`` is what was asked for, without the repository: ``ping``, ``manifests/REFERENCE``, ``blobs/DIGEST``,
    ``tags/list``, ``token``, ``storage/DIGEST``, or else the path. Names of ``headers`` are lower case. ``sent`` counts
    the body's bytes handed to the socket. ``status`` is 0 until the reply begins (and stays 0 where there is none).
    ``connection`` tells connections apart.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    resource: str
    repository: str
    listener: str
    connection: int
    body: bytes = b""
    status: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """A step of a reply that sends nothing: until ``seconds`` passed, ``gate`` is set, or the client has gone."""

    seconds: float | None = None
    gate: Event | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """A step of a reply that ends its connection: in order, or with a reset."""

    reset: bool = False


Step = bytes | Wait | Drop
"""What a reply does next: send bytes, wait, or drop the connection."""


class Sign(Protocol):
    """Makes a storage URL that lives for ``seconds``, of a session or not."""

    def __call__(self, seconds: float, *, session: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """What a reply was made from, for the faults that make another one of it.

    ``content`` is all there is behind the reply. ``served`` is the first byte and the one after the last, where a
    range is served, and ``whole`` the reply without a range. ``sign`` makes the URL of the same thing in storage.
    """

    content: Content | None = None
    served: tuple[int, int] | None = None
    whole: Reply | None = None
    sign: Sign = field(default=lambda seconds, *, session: "")  # noqa: ARG005


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply before it is sent. ``steps`` is run through once; ``size`` is the number of bytes the body should have.

    ``before`` is done ahead of the status line. ``chunked`` frames the body in chunks; without it and without
    a Content-Length the end of the connection is the end of the body. ``raw`` replaces everything.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    steps: Iterable[Step] = ()
    size: int = 0
    before: tuple[Step, ...] = ()
    chunked: bool = False
    raw: bytes | None = None
    origin: Origin = Origin()

    def header(self, name: str) -> str | None:
        """Value of the first header called ``name``, in any case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def without(self, *names: str) -> Reply:
        """Return the same reply without the headers ``names``."""
        gone = {name.lower() for name in names}
        return replace(self, headers=tuple(pair for pair in self.headers if pair[0].lower() not in gone))

    def put(self, *pairs: tuple[str, str]) -> Reply:
        """Return the same reply with these headers in place of those of the same names."""
        kept = self.without(*(name for name, _ in pairs))
        return replace(kept, headers=kept.headers + pairs)


def deliver(content: Content, headers: Iterable[tuple[str, str]], request: Request, *, ranges: bool = True) -> Reply:
    """Return the reply that serves ``content`` to ``request``, whole or the single range it asks for."""
    size = size_of(content)
    headers = (*headers, ("Accept-Ranges", "bytes")) if ranges else tuple(headers)
    length = ("Content-Length", str(size))
    whole = Reply(200, (*headers, length), pieces(content), size, origin=Origin(content))
    etag = whole.header("ETag")
    if etag is not None and request.headers.get("if-none-match") == etag:
        return Reply(304, headers)
    # A range under a condition that does not hold is answered with the whole (RFC 9110 13.1.5).
    current = request.headers.get("if-range", etag) == etag
    asked = asked_range(request.headers.get("range", ""), size) if ranges and current else None
    if asked is None:
        return whole
    start, end = asked
    if start >= end:
        reply = error(416, "RANGE_INVALID", "no byte of the range exists").put(("Content-Range", f"bytes */{size}"))
        return replace(reply, origin=Origin(content, whole=whole))
    part = (("Content-Range", f"bytes {start}-{end - 1}/{size}"), ("Content-Length", str(end - start)))
    origin = Origin(content, asked, whole)
    return Reply(206, (*headers, *part), pieces(content, start, end), end - start, origin=origin)


def asked_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte, and the byte after the last, of a single range of ``size`` bytes.

    ``None`` where the header asks for nothing this server has to honour (RFC 9110 14.2 lets it answer with the whole).
    An empty range is one that cannot be satisfied.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def error(status: int, code: str, message: str) -> Reply:
    """Return the error reply of the distribution specification."""
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    headers = (("Content-Type", "application/json; charset=utf-8"), ("Content-Length", str(len(body))))
    return Reply(status, headers, (body,), len(body))


def reason(status: int) -> str:
    """The reason phrase of ``status``, empty for a status nobody has named."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def cut(steps: Iterable[Step], at: int) -> Iterator[Step]:
    """The steps up to byte ``at`` of the body."""
    for step in steps:
        if isinstance(step, bytes):
            if len(step) >= at:
                yield step[:at]
                return
            at -= len(step)
        yield step
