"""What the cache tells about what it did and what it holds: values with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from layercache.oci import DiffID, Digest, MediaType, Platform, Reference

__all__ = [
    "BlobInfo",
    "BlobReport",
    "Check",
    "Finding",
    "Housekeeping",
    "ImageInfo",
    "NamespaceInfo",
    "NamespaceUsage",
    "PinInfo",
    "Pruned",
    "PullReport",
    "ReceiptsReport",
    "Source",
    "Usage",
]

Source = Literal["hit", "miss", "bypass"]
State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class BlobReport:
    """How a pull came by one blob.

    ``hit``: it was here. ``miss``: it was fetched and is here now. ``bypass``: the store could not take it for
    ``reason``; it is read from ``origin`` when it is asked for. ``origin`` is empty for a hit. ``public`` is true where
    it lies in the public namespace, ``worker`` where a worker process fetched it; a large ``miss`` with a ``reason``
    was fetched on a thread of this process, because there was none to be had.
    """

    digest: Digest
    media_type: MediaType
    size: int
    source: Source
    origin: str = ""
    reason: str = ""
    public: bool = False
    worker: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "digest": str(self.digest),
            "media_type": str(self.media_type),
            "size": self.size,
            "source": self.source,
            "origin": self.origin,
            "reason": self.reason,
            "public": self.public,
            "worker": self.worker,
        }


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull did. ``digest`` is what the reference resolved to, ``manifest`` the image chosen from it.

    ``stale`` is true where the registry could not be asked and the digest is the one the tag had last time.
    ``bytes_by_source`` counts body bytes by host; ``stages`` are seconds, of threads that ran side by side.
    """

    reference: Reference
    digest: Digest
    manifest: Digest
    platform: Platform
    stale: bool
    blobs: tuple[BlobReport, ...]
    bytes_fetched: int
    bytes_by_source: Mapping[str, int]
    requests: int
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "reference": str(self.reference),
            "digest": str(self.digest),
            "manifest": str(self.manifest),
            "platform": str(self.platform),
            "stale": self.stale,
            "blobs": [blob.to_json() for blob in self.blobs],
            "bytes_fetched": self.bytes_fetched,
            "bytes_by_source": dict(self.bytes_by_source),
            "requests": self.requests,
            "seconds": round(self.seconds, 6),
            "stages": dict(self.stages),
        }


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob of a namespace. ``created`` and ``verified`` are seconds since the epoch.

    ``public`` is true for one that lies in the public namespace: ``created`` is when it was granted, ``verified`` no
    earlier time than that.
    """

    digest: Digest
    size: int
    media_type: MediaType
    diff_id: DiffID | None
    origin: str
    created: float
    verified: float
    public: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the blob as JSON values."""
        return {
            "digest": str(self.digest),
            "size": self.size,
            "media_type": str(self.media_type),
            "diff_id": None if self.diff_id is None else str(self.diff_id),
            "origin": self.origin,
            "created": self.created,
            "verified": self.verified,
            "public": self.public,
        }


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One reference of a namespace: what it resolved to last, and whether every blob of that is here.

    ``size`` is of the blobs that are known to belong to it, each counted once. ``blobs`` are their digests, ``missing``
    those that are not here. ``resolved`` is in seconds since the epoch.
    """

    reference: Reference
    digest: Digest
    manifest: Digest
    platform: Platform
    size: int
    resolved: float
    blobs: tuple[Digest, ...]
    missing: tuple[Digest, ...]

    @property
    def complete(self) -> bool:
        """True when a pull of the digest needs no network."""
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        """Return the image as JSON values."""
        return {
            "reference": str(self.reference),
            "digest": str(self.digest),
            "manifest": str(self.manifest),
            "platform": str(self.platform),
            "size": self.size,
            "resolved": self.resolved,
            "complete": self.complete,
            "blobs": [str(digest) for digest in self.blobs],
            "missing": [str(digest) for digest in self.missing],
        }


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """One namespace of a root. ``name`` is ``None`` where it cannot be told; ``slot`` stands for it on disk.

    ``seal`` is how it is sealed, ``ephemeral`` or ``kms``; ``None`` where it is in clear. ``public`` is true for the
    public namespace, which has no name. What a tenant borrows from that is not counted as the tenant's.
    """

    name: str | None
    slot: str
    generation: int
    state: str
    blobs: int
    bytes: int
    seal: str | None = None
    public: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the namespace as JSON values."""
        return {
            "name": self.name,
            "slot": self.slot,
            "generation": self.generation,
            "state": self.state,
            "blobs": self.blobs,
            "bytes": self.bytes,
            "seal": self.seal,
            "public": self.public,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """One step of a diagnosis: what a pull meets there.

    ``state`` is ``ok``, ``warn`` (a pull goes on all the same) or ``fail`` (it does not). ``source`` is the host that
    was asked, empty for this machine itself. ``detail`` and ``hint`` are for people, and hold no secret.
    """

    step: str
    state: State
    detail: str
    source: str = ""
    hint: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        return {
            "step": self.step,
            "state": self.state,
            "source": self.source,
            "detail": self.detail,
            "hint": self.hint,
            "seconds": round(self.seconds, 6),
        }


@dataclass(frozen=True, slots=True)
class PinInfo:
    """A pin: the image that ``reference`` meant when it was ``created`` (seconds since the epoch).

    Its blobs are not evicted. ``missing`` are those that went all the same: removed by name, or damaged.
    """

    name: str
    reference: Reference
    digest: Digest
    blobs: tuple[Digest, ...]
    missing: tuple[Digest, ...]
    created: float

    def to_json(self) -> dict[str, Any]:
        """Return the pin as JSON values."""
        return {
            "name": self.name,
            "reference": str(self.reference),
            "digest": str(self.digest),
            "blobs": [str(digest) for digest in self.blobs],
            "missing": [str(digest) for digest in self.missing],
            "created": self.created,
        }


@dataclass(frozen=True, slots=True)
class NamespaceUsage:
    """What a namespace takes, in bytes on disk; ``reserved`` beyond those for what is being written.

    Of its blobs' bytes ``leased`` are open somewhere, ``pinned`` are pinned, and ``evictable`` are neither. ``name`` is
    ``None`` where it cannot be told, and for the public namespace (``public``).
    """

    name: str | None
    slot: str
    blobs: int
    bytes: int
    reserved: int
    evictable: int
    pinned: int
    leased: int
    public: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "name": self.name,
            "slot": self.slot,
            "blobs": self.blobs,
            "bytes": self.bytes,
            "reserved": self.reserved,
            "evictable": self.evictable,
            "pinned": self.pinned,
            "leased": self.leased,
            "public": self.public,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """What a root takes: ``bytes`` on disk and ``reserved`` ones beyond, of ``budget``.

    ``free`` is what the filesystem has left, ``keep_free`` what of that is not for the cache.
    """

    budget: int
    bytes: int
    reserved: int
    free: int
    keep_free: int
    namespaces: tuple[NamespaceUsage, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "budget": self.budget,
            "bytes": self.bytes,
            "reserved": self.reserved,
            "free": self.free,
            "keep_free": self.keep_free,
            "namespaces": [one.to_json() for one in self.namespaces],
        }


@dataclass(frozen=True, slots=True)
class Pruned:
    """A blob that was evicted, or would be: ``why`` is ``quota``, ``image`` or ``value``, as the policy has it.

    ``blob`` is its name on disk: the encoded part of its digest, but for a sealed namespace. ``used`` is when it was
    of use last, in seconds since the epoch. ``name`` is ``None`` where it cannot be told, and for the public namespace
    (``public``).
    """

    name: str | None
    slot: str
    blob: str
    bytes: int
    why: str
    used: float
    public: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "name": self.name,
            "slot": self.slot,
            "blob": self.blob,
            "bytes": self.bytes,
            "why": self.why,
            "used": self.used,
            "public": self.public,
        }


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    ``kind`` is one word: ``content`` (the bytes do not match), ``record`` (what is known of a blob is missing or
    damaged), ``missing`` (asked for by name and not here) or ``unknown`` (an entry that is not ours).
    ``digest`` names the blob, where it is one; ``detail`` says more. ``repaired`` is true where it is right again.
    """

    kind: str
    digest: Digest | None
    detail: str
    repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "kind": self.kind,
            "digest": None if self.digest is None else str(self.digest),
            "detail": self.detail,
            "repaired": self.repaired,
        }


@dataclass(frozen=True, slots=True)
class ReceiptsReport:
    """The chain of receipts, examined: how many there are, the SHA-256 of the last, and what is wrong, in words."""

    count: int
    last: str
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"count": self.count, "last": self.last, "problems": list(self.problems)}


@dataclass(frozen=True, slots=True)
class Housekeeping:
    """What one round of housekeeping did: ``swept`` leftovers of crashes, ``evicted`` bytes, ``findings`` of the scrub.

    ``swept`` is ``None`` where it was not this one's to sweep. ``complete`` is false where time ran out before every
    blob that was due had been compared; the next round goes on there.
    """

    swept: int | None
    evicted: int
    findings: tuple[Finding, ...]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "swept": self.swept,
            "evicted": self.evicted,
            "findings": [finding.to_json() for finding in self.findings],
            "complete": self.complete,
        }
