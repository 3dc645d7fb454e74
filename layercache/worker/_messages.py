"""What goes over the pipe between a process and its workers: values and errors as lines of JSON. Pure.

Where they go, and what they mean:

    to the worker       config (first), job, end (of a job: cancelled, or its blob is open elsewhere), answer
    from the worker     ready (first), ask (for a credential), progress, done, failed, log
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from layercache import errors
from layercache.errors import LayerCacheError
from layercache.oci import Descriptor, DiffID, Digest, MediaType, Repository, Tag
from layercache.store import Budget

if TYPE_CHECKING:
    from layercache.registry import Mirror, Tls

__all__ = ["DIALECT", "Config", "Job", "Message", "pack", "pack_error", "unpack", "unpack_error"]

DIALECT = 1
"""Raised when what is said changes: the library may be upgraded on disk under a process that runs."""

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """Return a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def unpack(line: bytes) -> Message:
    """Undo :func:`pack`.

    :raises ValueError: when it is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a message")  # noqa: TRY004 - one error for all that is none
    return message


def pack_error(error: LayerCacheError) -> Message:
    """Return an error with its type and fields."""
    return {"type": type(error).__name__, "text": str(error), "fields": dict(vars(error))}


def unpack_error(message: Message) -> LayerCacheError:
    """Undo :func:`pack_error`."""
    kind = getattr(errors, message["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, LayerCacheError)):
        kind = LayerCacheError
    error = kind.__new__(kind)
    Exception.__init__(error, message["text"])
    for name, value in message["fields"].items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    return error


@dataclass(frozen=True, slots=True)
class Config:
    """What a worker needs to know of the cache it works for."""

    root: str
    budget: Budget
    hosts_dir: str | None
    tls: Tls | None
    idle: float
    """Seconds without work after which it ends."""

    def to_json(self) -> Message:
        """Return it as JSON values."""
        return {
            "root": self.root,
            "budget": asdict(self.budget),
            "hosts_dir": self.hosts_dir,
            "tls": None if self.tls is None else asdict(self.tls),
            "idle": self.idle,
        }

    @staticmethod
    def from_json(values: Message) -> Config:
        """Undo :meth:`to_json`."""
        return Config(
            values["root"],
            Budget(**values["budget"]),
            values["hosts_dir"],
            None if values["tls"] is None else _tls(values["tls"]),
            values["idle"],
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One blob to fetch into one generation: of the tenant's namespace, or of the public one, for the tenant's pull."""

    tenant: str = field(repr=False)
    slot: str
    generation: int
    descriptor: Descriptor
    diff_id: DiffID | None
    repository: Repository
    parent: Digest | Tag | None
    plain_http: bool | None
    mirrors: tuple[Mirror, ...]
    timeout: float

    def to_json(self) -> Message:
        """Return it as JSON values."""
        what = self.descriptor
        return {
            "tenant": self.tenant,
            "slot": self.slot,
            "generation": self.generation,
            "descriptor": [str(what.media_type), str(what.digest), what.size],
            "diff_id": None if self.diff_id is None else str(self.diff_id),
            "repository": [self.repository.host, self.repository.name],
            "parent": None if self.parent is None else [isinstance(self.parent, Digest), str(self.parent)],
            "plain_http": self.plain_http,
            "mirrors": [asdict(one) for one in self.mirrors],
            "timeout": None if math.isinf(self.timeout) else self.timeout,
        }

    @staticmethod
    def from_json(values: Message) -> Job:
        """Undo :meth:`to_json`."""
        media_type, digest, size = values["descriptor"]
        parent: Digest | Tag | None = None
        if values["parent"] is not None:
            by_digest, text = values["parent"]
            parent = Digest.parse(text) if by_digest else Tag(text)
        return Job(
            values["tenant"],
            values["slot"],
            values["generation"],
            Descriptor(MediaType(media_type), Digest.parse(digest), size),
            None if values["diff_id"] is None else DiffID(Digest.parse(values["diff_id"])),
            Repository(*values["repository"]),
            parent,
            values["plain_http"],
            tuple(map(_mirror, values["mirrors"])),
            math.inf if values["timeout"] is None else values["timeout"],
        )


def _tls(values: Message) -> Tls:
    from layercache.registry import Tls  # noqa: PLC0415 - in the worker only

    return Tls(**{**values, "ca": tuple(values["ca"])})


def _mirror(values: Message) -> Mirror:
    from layercache.registry import Mirror  # noqa: PLC0415

    headers = tuple((name, value) for name, value in values["headers"])
    return Mirror(**{**values, "headers": headers, "tls": _tls(values["tls"])})
