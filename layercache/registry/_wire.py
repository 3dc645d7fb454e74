"""What registries write into headers and small bodies, read without trust and without raising.

Pure: bytes and text in, values out. What a stranger wrote comes out short, without control characters and without the
query of any URL in it.
"""

from __future__ import annotations

import base64
import binascii
import email.utils
import json
import math
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

__all__ = [
    "Challenge",
    "ContentRange",
    "Headers",
    "Problem",
    "Token",
    "backoff",
    "life_of",
    "parse_challenges",
    "parse_content_range",
    "parse_problem",
    "parse_retry_after",
    "parse_scopes",
    "parse_token",
    "parse_warnings",
    "plain",
]


class Headers:
    """Header fields in the order they came; names ignore case, a repeated field keeps all its values."""

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[tuple[str, str]] = ()) -> None:
        self._items = tuple((name.lower(), value) for name, value in items)

    def all(self, name: str) -> list[str]:
        """Every value of a field, in order."""
        name = name.lower()
        return [value for key, value in self._items if key == name]

    def get(self, name: str) -> str:
        """First value of a field without surrounding blanks; empty where it is absent."""
        return next(iter(self.all(name)), "").strip()

    def size(self) -> int | None:
        """``Content-Length``, where there is exactly one and it is a number."""
        values = set(self.all("content-length"))
        text = values.pop().strip() if len(values) == 1 else ""
        return int(text) if _DIGITS.fullmatch(text) else None

    def __repr__(self) -> str:
        return f"Headers({[name for name, _ in self._items]})"  # values may be signed URLs or cookies


_DIGITS = re.compile(r"[0-9]{1,18}")


# --- WWW-Authenticate (RFC 9110 section 11.6.1) ---


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: ``scheme`` and the names of ``parameters`` are lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)(?:"|\\?\Z)', re.DOTALL)
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)")
_BLANK = re.compile(r"[ \t,]*")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Every challenge of every ``WWW-Authenticate`` field, in order.

    Garbage is skipped; the first of two equal parameters counts.
    """
    return [challenge for value in values for challenge in _challenges(value[:8192])]


def _challenges(text: str) -> Iterator[Challenge]:
    scheme = ""
    parameters: dict[str, str] = {}
    at = 0
    while True:
        at = _end(_BLANK.match(text, at), at)
        if at >= len(text):
            break
        token = _TOKEN.match(text, at)
        if token is None:
            quoted = _QUOTED.match(text, at)  # a stray string is skipped whole: commas inside it mean nothing
            at = quoted.end() if quoted else at + 1
            continue
        equals = _EQUALS.match(text, token.end())
        if equals is not None and scheme:
            value, at = _value(text, equals.end())
            parameters.setdefault(token[0].lower(), value)
            continue
        if scheme:
            yield Challenge(scheme, parameters)
        scheme, parameters = token[0].lower(), {}
        at = token.end()
        if text[at : at + 1] in (" ", "\t"):
            at = _end(re.compile(r"[ \t]+").match(text, at), at)
            token68 = _TOKEN68.match(text, at)
            bare = _TOKEN.match(text, at)
            # "Negotiate YII=" carries data; in 'Bearer realm="x"' a parameter follows, in "Basic, Bearer" nothing.
            if token68 is not None and not (
                bare and _EQUALS.match(text, bare.end()) and token68[0].rstrip(" \t")[-1] != "="
            ):
                at = token68.end()
    if scheme:
        yield Challenge(scheme, parameters)


def _value(text: str, at: int) -> tuple[str, int]:
    quoted = _QUOTED.match(text, at)
    if quoted is not None:
        return re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL), quoted.end()
    end = at
    while end < len(text) and text[end] not in ", \t":
        end += 1
    return text[at:end], end


def _end(match: re.Match[str] | None, otherwise: int) -> int:
    return otherwise if match is None else match.end()


def parse_scopes(text: str) -> tuple[str, ...]:
    """Scopes of a challenge, sorted, with the actions of one resource merged (distribution token spec)."""
    actions: dict[str, set[str]] = {}
    for scope in text.split():
        resource, colon, wanted = scope.rpartition(":")
        if colon and ":" in resource:
            actions.setdefault(resource + ":", set()).update(filter(None, wanted.split(",")))
        else:
            actions.setdefault(scope, set())
    return tuple(sorted(resource + ",".join(sorted(wanted)) for resource, wanted in actions.items()))


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token and the seconds it lives from its receipt."""

    value: str = field(repr=False)
    lifetime: float


def parse_token(body: bytes) -> Token | None:
    """Token of a token endpoint's reply, ``None`` if there is none. A missing or short life is 60 seconds."""
    reply = _json(body)
    if not isinstance(reply, dict):
        return None
    value = next((v for v in (reply.get("token"), reply.get("access_token")) if isinstance(v, str) and v), "")
    # What goes into a header must not be able to end it.
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        return None
    life = reply.get("expires_in")
    if isinstance(life, str) and _DIGITS.fullmatch(life):
        life = int(life)
    seconds = float(life) if isinstance(life, int | float) and not isinstance(life, bool) and 0 < life < 1e9 else 60.0
    return Token(value, min(max(seconds, 60.0), 24 * 3600.0))


# --- retry hints ---


def parse_retry_after(value: str, *, now: float) -> float | None:
    """Seconds to wait, from either form of ``Retry-After``; ``None`` for a past date and for what is neither.

    ``now`` is Unix time, best taken from the ``Date`` of the same reply: then clocks need not agree.
    """
    value = value.strip()
    if _DIGITS.fullmatch(value):
        return float(value)
    date = parse_date(value)
    if date is None or date <= now:
        return None
    return date - now


# --- signed URLs ---


_LONGEST_LIFE = 300.0  # as long as an answer of a credential helper: a right that was taken away ends with it
_UNKNOWN_LIFE = 60.0
_LIFE_MARGIN = 30.0
_STAMP = "%Y%m%dT%H%M%SZ"


def life_of(query: str, now: float) -> float:
    """Seconds from ``now`` (Unix time) for which a URL with this query may be used again; not above 0 where it is over.

    Read are the forms of Amazon (also CloudFront's ``Expires``), Google and Azure. One that does not say when it ends
    is taken to be good for a minute: who signed it will refuse it, which costs one request.
    """
    asked = {name.lower(): value for name, value in urllib.parse.parse_qsl(query)}
    end: float | None = None
    try:
        for vendor in ("x-amz", "x-goog"):
            if f"{vendor}-expires" in asked:
                signed = datetime.strptime(asked[f"{vendor}-date"], _STAMP).replace(tzinfo=UTC)
                end = signed.timestamp() + float(asked[f"{vendor}-expires"])
        if end is None and "expires" in asked:
            end = float(asked["expires"])
        elif end is None and "se" in asked:
            end = datetime.fromisoformat(asked["se"]).timestamp()
    except (KeyError, ValueError, OverflowError):
        return 0.0
    if end is None:
        return _UNKNOWN_LIFE
    return min(_LONGEST_LIFE, end - now - _LIFE_MARGIN) if math.isfinite(end) else 0.0


def parse_date(value: str) -> float | None:
    """Unix time of an HTTP date, ``None`` for what is none."""
    try:
        return email.utils.parsedate_to_datetime(value.strip()[:64]).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None


def backoff(attempt: int, jitter: float, *, first: float = 0.2) -> float:
    """Seconds to wait before try ``attempt`` (1 is the first repetition): ``first`` doubled each time, at most 30 s.

    ``jitter`` in [0, 1) spreads it over the upper half, so that many clients do not come back together.
    """
    return min(30.0, first * 2.0 ** min(attempt - 1, 10)) * (0.5 + 0.5 * jitter)


# --- ranges ---


@dataclass(frozen=True, slots=True)
class ContentRange:
    """``bytes first-last/total``; ``total`` is ``None`` for ``*``."""

    first: int
    last: int
    total: int | None


_RANGE = re.compile(r"bytes[ \t]+([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.IGNORECASE)


def parse_content_range(values: Sequence[str]) -> ContentRange | None:
    """The range a 206 says it carries (RFC 9110 section 14.4); ``None`` unless it is exactly one, whole and sane."""
    match = _RANGE.fullmatch(values[0].strip()) if len(values) == 1 else None
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < first or (total is not None and last >= total):
        return None
    return ContentRange(first, last, total)


# --- error bodies ---


@dataclass(frozen=True, slots=True)
class Problem:
    """What an error reply says of itself: OCI error code, text for people, the server's id of the request."""

    code: str = ""
    message: str = ""
    request_id: str = ""


_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_XML_FIELD = {name: re.compile(rf"<{name}>([^<]{{1,2000}})</{name}>") for name in ("Code", "Message", "RequestId")}
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,2000})</title>", re.IGNORECASE)
_REQUEST_IDS = ("x-amz-request-id", "x-amzn-requestid", "x-request-id", "x-github-request-id", "cf-ray")


def parse_problem(body: bytes, headers: Headers) -> Problem:
    """Code, message and request id of an error body, whether it is OCI JSON, another JSON, XML, HTML, text or empty."""
    request_id = next(filter(None, (headers.get(name) for name in _REQUEST_IDS)), "")
    code = message = ""
    reply = _json(body)
    if reply is not None:
        code, message = _problem_of(reply)
    else:
        text = body[:65536].decode("utf-8", "replace").strip()
        fields = {name: m[1] for name, pattern in _XML_FIELD.items() if (m := pattern.search(text))}
        if "Code" in fields or "Message" in fields:
            code, message = fields.get("Code", ""), fields.get("Message", "")
            request_id = request_id or fields.get("RequestId", "")
        elif title := _TITLE.search(text):
            message = title[1]
        elif not text.startswith("<"):
            message = text.splitlines()[0] if text else ""
    return Problem(code if _CODE.fullmatch(code) else "", plain(message), plain(request_id, most=80))


def _problem_of(reply: object) -> tuple[str, str]:
    if isinstance(reply, dict):
        errors = reply.get("errors")
        if isinstance(errors, list) and errors and isinstance(errors[0], dict):
            reply = errors[0]
        code = _text(reply, "code", "error", "__type")
        return code, _text(reply, "message", "error_description", "details", "detail", "Message") or code
    return "", reply if isinstance(reply, str) else ""


def _text(reply: Mapping[str, object], *names: str) -> str:
    return next((value for name in names if isinstance(value := reply.get(name), str) and value), "")


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


_URL = re.compile(r"(https?://)([^\s\"'<>]*)", re.IGNORECASE)
_PARAMETER = re.compile(
    r"\b(X-Amz-[A-Za-z-]+|[A-Za-z-]*Signature|AWSAccessKeyId|Key-Pair-Id|sig|[a-z_-]*token|[a-z_-]*password|Authorization)"
    r"(\s*[=:]\s*)((?:Bearer|Basic)\s+)?[^\s&,;\"'<>]+",
    re.IGNORECASE,
)


def plain(text: str, *, most: int = 300) -> str:
    """A stranger's text made fit for an error message: one line, no control characters, short, no query of a URL."""
    text = _URL.sub(_without_query, text[: most * 8])
    text = _PARAMETER.sub(r"\1\2...", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[:most] + "..."


def _without_query(match: re.Match[str]) -> str:
    rest = match[2]
    start = rest.split("/", 1)[0]
    if "@" in start:
        rest = rest[start.rindex("@") + 1 :]
    bare = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{match[1]}{bare}{'?...' if bare != rest else ''}"


_WARNING = re.compile(r'299[ \t]+\S+[ \t]+"((?:[^"\\]|\\.)*)"')


def parse_warnings(values: Iterable[str]) -> list[str]:
    """Texts of the ``Warning: 299 - "..."`` fields of a reply (distribution-spec, "Warnings")."""
    return [
        plain(re.sub(r"\\(.)", r"\1", m[1]), most=1024) for value in values for m in _WARNING.finditer(value[:16384])
    ]


def basic(username: str, password: str) -> str:
    """Value of an ``Authorization`` field for HTTP Basic (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode("ascii")


def parse_basic(text: str) -> tuple[str, str] | None:
    """User and password of a docker config's ``auth``, split at the first colon; ``None`` for what is none."""
    try:
        user, colon, password = base64.b64decode(text.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (user, password.rstrip("\x00")) if colon and user else None
