"""One request, through redirects, to a reply; small bodies within a cap; refusals as typed errors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layercache.errors import (
    DeniedError,
    IntegrityError,
    LayerCacheError,
    LimitError,
    NotFoundError,
    PolicyError,
    RateLimitedError,
    RegistryError,
    UnauthorizedError,
)
from layercache.oci import Digest
from layercache.registry._effects import Flow, Grant, Head, LostError, Receive, Release, Send
from layercache.registry._url import Url, UrlError, Zone
from layercache.registry._wire import Problem, parse_date, parse_problem, parse_retry_after

__all__ = ["ERROR_CAP", "PIECE", "Hop", "coding", "delay_of", "follow", "problem_of", "refusal", "small_body"]

PIECE = 1 << 20
"""Bytes asked for at a time."""

ERROR_CAP = 1 << 20
"""Bytes of an error or token body; a longer one is not read on."""

_HOPS = 10


@dataclass(frozen=True, slots=True)
class Hop:
    """Where a request ended: its open reply, the URL that gave it and its reach, whether that is beyond the origin."""

    head: Head
    url: Url
    left: bool
    reach: Zone | None = None


def follow(
    method: str,
    url: Url,
    headers: Mapping[str, str],
    *,
    home: Url,
    reach: Zone | None,
    grant: Grant | None,
    form: bytes | None = None,
    own: Mapping[str, str] | None = None,
) -> Flow[Hop]:
    """Open reply to a request, after at most ten redirects.

    The grant, and the fields ``own``, go to the first origin only, and no more once another one was visited. Each hop
    may lead to the zone of the hosts before it, or further out; the origin of ``home``, the registry's own, is always
    allowed.

    :raises PolicyError: if a redirect leads from https to http or to what is no URL of a host.
    :raises LostError: if there was no answer.
    """
    first = url
    left = False
    for _ in range(_HOPS + 1):
        head: Head = yield Send(
            method,
            url,
            {**headers, **own} if own and not left else headers,
            reach=None if url.origin == home.origin else reach,
            grant=None if left else grant,
            form=form,
        )
        if head.status not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
            return Hop(head, url, left, reach)
        locations = head.headers.all("location")
        yield Release()
        if len(locations) != 1:
            raise RegistryError(
                f"{url.authority} redirects without saying where", host=url.authority, status=head.status
            )
        try:
            target = url.join(locations[0])
        except UrlError as error:
            raise PolicyError(f"redirect of {url.authority} refused: {error}", host=url.authority) from None
        if url.scheme == "https" and target.scheme == "http":
            raise PolicyError(f"redirect of {url.authority} refused: it leads from https to http", host=url.authority)
        # From now on nothing nearer to this machine than any host on the way (rule of least trust).
        reach = head.zone if reach is None or head.zone is None else min(reach, head.zone)
        reach = Zone.PUBLIC if reach is None else reach
        left = left or target.origin != first.origin
        url = target
    raise RegistryError(f"{first.authority} redirects more than {_HOPS} times", host=first.authority)


def small_body(head: Head, *, cap: int, what: str, digest: Digest | None = None) -> Flow[bytes]:
    """Whole body of an open reply, which is then released.

    :raises LimitError: if it is longer than ``cap``; at most one byte more is read.
    :raises IntegrityError: instead, if ``cap`` is the size that belongs to ``digest``.
    """
    declared = head.headers.size()
    if declared is not None and declared > cap:
        yield Release()
        raise _too_long(what, cap, digest)
    parts: list[bytes] = []
    total = 0
    while data := (yield Receive(min(PIECE, cap + 1 - total))):
        parts.append(data)
        total += len(data)
        if total > cap:
            yield Release()
            raise _too_long(what, cap, digest)
    yield Release()
    return b"".join(parts)


def _too_long(what: str, cap: int, digest: Digest | None) -> LayerCacheError:
    if digest is None:
        return LimitError(f"{what} is longer than {cap} bytes")
    return IntegrityError("too many bytes", digest=digest, expected=cap, actual=f"at least {cap + 1}")


def problem_of(method: str, hop: Hop) -> Flow[Problem]:
    """What a refusal says of itself; the reply is released. A body that is too long or breaks off says nothing."""
    if method == "HEAD":
        yield Release()
        return parse_problem(b"", hop.head.headers)
    try:
        body = yield from small_body(hop.head, cap=ERROR_CAP, what="the error text")
    except (LimitError, LostError):
        yield Release()
        body = b""
    return parse_problem(body, hop.head.headers)


def delay_of(head: Head) -> float:
    """Seconds that ``Retry-After`` asks for, 0.0 where it does not."""
    date = parse_date(head.headers.get("date"))
    return parse_retry_after(head.headers.get("retry-after"), now=head.at if date is None else date) or 0.0


def coding(head: Head) -> str:
    """Content coding of a reply, empty where the bytes are as they are stored."""
    text = ", ".join(head.headers.all("content-encoding")).strip().lower()
    return "" if text == "identity" else text


def refusal(what: str, hop: Hop, problem: Problem, *, grant: Grant | None = None, hint: str = "") -> LayerCacheError:
    """Typed error for a reply that is not what was asked for."""
    host, status = hop.url.authority, hop.head.status
    text = f"{what}: {host} answered {status}"
    if problem.code:
        text += f" {problem.code}"
    if problem.message and problem.message != problem.code:
        text += f": {problem.message}"
    if problem.request_id:
        text += f" (request {problem.request_id})"
    if grant is not None:
        text = grant.hide(text)
    if status == 404:
        return NotFoundError(text, hint=hint)
    if status == 429:
        return RateLimitedError(text, host=host, code=problem.code, retry_after=delay_of(hop.head) or None)
    kind = {401: UnauthorizedError, 403: DeniedError}.get(status, RegistryError)
    return kind(text, host=host, status=status, code=problem.code, hint=hint)
