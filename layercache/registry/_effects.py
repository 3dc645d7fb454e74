"""What a conversation may ask for: the vocabulary between the pure flows and whoever runs them.

A flow is a generator that yields one effect, gets its answer by ``send`` (or a :class:`LostError` by ``throw``) and
returns its result. It holds at most one open reply: a ``Send`` that was answered is followed by ``Receive`` and ended
by ``Release``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from layercache.oci import Digest
from layercache.registry._url import Url, Zone
from layercache.registry._wire import Challenge, Headers

__all__ = [
    "Authorise",
    "Deliver",
    "Effect",
    "Flow",
    "Grant",
    "Head",
    "LostError",
    "Pause",
    "Recall",
    "Receive",
    "Release",
    "Remember",
    "Send",
    "Site",
    "Target",
]


@dataclass(frozen=True, slots=True)
class Site:
    """The registry of a conversation: ``host`` as people write it, ``base`` where its API is.

    Of a mirror, ``ns`` is the registry that is meant, ``prefix`` the path of its API; ``headers`` go to it alone.
    """

    host: str
    base: Url
    ns: str = ""
    prefix: str = "/v2"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def at(self, path: str) -> Url:
        """URL of a path of its API."""
        url = self.base.at(f"{self.prefix}/{path}")
        return url.asking([("ns", self.ns)]) if self.ns else url

    @property
    def authority(self) -> str:
        """Host and port that requests go to."""
        return self.base.authority


class Grant:
    """Proof to show to a registry, sealed: only the transport asks for the header, and nothing prints it."""

    __slots__ = ("_header", "_secrets", "scheme", "source")

    def __init__(self, scheme: str, header: str, *, secrets: tuple[str, ...] = (), source: str = "") -> None:
        self.scheme = scheme
        self.source = source
        self._header = header
        self._secrets = tuple(secret for secret in (*secrets, header.partition(" ")[2]) if len(secret) > 3)

    def header(self) -> str:
        """Value of the ``Authorization`` field."""
        return self._header

    def hide(self, text: str) -> str:
        """``text`` with the secrets taken out, should a server have sent them back."""
        for secret in self._secrets:
            text = text.replace(secret, "...")
        return text

    def __repr__(self) -> str:
        return f"Grant({self.scheme})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a grant is not to be written down")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; the answer is its :class:`Head`.

    ``reach`` bounds the addresses the name may resolve to; ``None`` is no bound, for the registry itself.
    ``form`` is a secret body of a POST.
    """

    method: str
    url: Url
    headers: Mapping[str, str]
    reach: Zone | None = None
    grant: Grant | None = None
    form: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Head:
    """Status and fields of a reply; ``zone`` is that of the address it came from, ``at`` Unix time of its receipt."""

    status: int
    headers: Headers
    zone: Zone | None
    at: float


@dataclass(frozen=True, slots=True)
class Receive:
    """The next bytes of the open reply, ``most`` at most, fewer only before its end; ``b""`` is the end."""

    most: int


@dataclass(frozen=True, slots=True)
class Release:
    """Done with the open reply: keep its connection if that is cheap, else close it."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait before try ``attempt``, at least ``least`` seconds; ``shut`` keeps everybody else from that host as well.

    The answer is False, without a wait, if the host's budget of repetitions or the caller's time does not allow it.
    """

    host: str
    attempt: int
    least: float = 0.0
    shut: bool = False


@dataclass(frozen=True, slots=True)
class Authorise:
    """A :class:`Grant` for pulling from ``repository``, or ``None`` where nothing is known to be needed.

    ``challenges`` are those of a refusal, ``refused`` what was shown, ``zone`` where the refusal came from. Answering a
    refusal takes credentials and raises where there are none.
    """

    site: Site
    repository: str
    challenges: tuple[Challenge, ...] | None = None
    refused: Grant | None = None
    zone: Zone | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a registry sent a request for a blob: the URL, which is a secret, and how near it may lie."""

    url: Url
    reach: Zone | None


@dataclass(frozen=True, slots=True)
class Recall:
    """The :class:`Target` remembered for a blob of ``repository``, or ``None``."""

    repository: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep ``target`` for a blob for ``life`` seconds; ``None`` forgets."""

    repository: str
    digest: Digest
    target: Target | None
    life: float = 0.0


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand bytes to the caller."""

    data: bytes = field(repr=False)


Effect = Send | Receive | Release | Pause | Authorise | Recall | Remember | Deliver
T = TypeVar("T")
Flow = Generator[Effect, Any, T]


class LostError(Exception):
    """No answer, or no more of it.

    ``tries`` bounds how often it is worth asking: once where a certificate is wrong, a few times where nobody listens.

    Stays inside this package: a flow tries again or raises an error of :mod:`layercache.errors`.
    """

    def __init__(self, reason: str, *, tries: int = 100) -> None:
        super().__init__(reason)
        self.reason = reason
        self.tries = tries
