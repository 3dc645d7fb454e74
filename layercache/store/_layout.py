"""Names on disk, both ways, and the two small records (format and meta). docs/format.md is the same in prose."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import struct
from dataclasses import dataclass
from typing import Any

import xxhash

from layercache.errors import FormatError, InvalidNamespaceError, LayerCacheError
from layercache.integrity import SUM_SIZE, chunk_count
from layercache.oci import Descriptor, DiffID, Digest, MediaType, Platform, Reference

__all__ = [
    "ASIDE",
    "BALLAST",
    "BLOBS",
    "BUDGET",
    "DATA",
    "EVICT_LOCK",
    "FENCE",
    "FENCE_SIZE",
    "FORMAT",
    "GRANTS",
    "HINTS",
    "IN",
    "JANITOR_LOCK",
    "KEY",
    "LOCKS",
    "LOCK_NAMES",
    "META",
    "NAME",
    "PARTS",
    "PINS",
    "POLICY",
    "PUBLIC",
    "QUARANTINE",
    "QUOTA",
    "RECEIPTS",
    "REFS",
    "ROOT_KEY",
    "ROOT_LOCK",
    "SCRUB_LOCK",
    "SEAL",
    "SLOTS",
    "SLOT_LOCK",
    "SPACE",
    "TRASH",
    "Meta",
    "NamespaceName",
    "Partial",
    "Ref",
    "Slot",
    "SlotState",
    "blob_name",
    "discarded_name",
    "format_record",
    "generation_name",
    "is_discarded",
    "is_slot",
    "is_temporary",
    "lock_name",
    "next_generation",
    "pack_record",
    "parse_blob_name",
    "parse_discarded",
    "parse_format",
    "parse_generation_name",
    "parse_key",
    "pin_name",
    "ref_name",
    "shard",
    "slot_name",
    "temporary_name",
    "unpack_record",
]

FORMAT, ROOT_LOCK, ROOT_KEY = "FORMAT", "root.lock", "root.key"
JANITOR_LOCK, SCRUB_LOCK, BALLAST = "janitor.lock", "scrub.lock", "ballast"
SPACE, BUDGET, EVICT_LOCK, POLICY = "space", "budget", "evict.lock", "policy"
SLOTS, DATA, TRASH, RECEIPTS, ASIDE = "slots", "data", "trash", "receipts", "aside"
SLOT_LOCK = "lock"
BLOBS, META, IN, REFS, PINS, LOCKS, QUARANTINE, FENCE, NAME = (
    "blobs",
    "meta",
    "in",
    "refs",
    "pins",
    "locks",
    "bad",
    "fence",
    "name",
)

PARTS = (IN, BLOBS, META, REFS, LOCKS, QUARANTINE)
"""The directories that every generation has."""

HINTS, QUOTA = "hints", "quota"
"""In a generation: the uses since the policy looked last, and what its namespace may take."""

GRANTS = "grants"
"""In a generation: which blobs of the public namespace its tenant may read."""

KEY = "key"
"""In a generation: what is known of its key; there where it is sealed."""

SEAL = "seal"
"""The feature of a root that has, or had, a sealed namespace."""

FENCE_SIZE = 8

_KEY_SIZE = 32
_VERSION = 1
_FEATURES = frozenset((SEAL,))
_HEX_NAME = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{64})?")
_SLOT = re.compile(r"[0-9a-f]{40}")
_GENERATION = re.compile(r"([0-9a-f]{40})\.([1-9][0-9]{0,17})")
_DISCARDED = re.compile(r"([0-9a-f]{40})\.[1-9][0-9]{0,17}\.[0-9a-f]{1,32}")
_TEMPORARY = re.compile(r"tmp\.([0-9a-f]{1,32})\.[0-9a-f]{1,32}")
_STATE = re.compile(r"(live|purging|dead)\.([1-9][0-9]{0,17})")
_PARTIAL = re.compile(r"([0-9a-f.]+)\.([0-9a-f]{1,32})\.(?:part|sums)")


@dataclass(frozen=True, slots=True)
class NamespaceName:
    """A tenant's name for a namespace: any non-empty text of at most 255 bytes. It never becomes part of a path."""

    text: str

    def __post_init__(self) -> None:
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError:
            raise InvalidNamespaceError("a namespace name must be text that UTF-8 can encode") from None
        if not 0 < size <= 255:
            raise InvalidNamespaceError(f"a namespace name has 1 to 255 bytes, not {size}")

    @property
    def raw(self) -> bytes:
        """The name as it is hashed and written down."""
        return self.text.encode(errors="surrogateescape")

    def __repr__(self) -> str:
        return "NamespaceName(...)"  # a tenant's name does not belong in logs


def _reserved(raw: bytes) -> NamespaceName:
    """Return a name that no tenant can have: it is not UTF-8."""
    name = object.__new__(NamespaceName)
    object.__setattr__(name, "text", raw.decode(errors="surrogateescape"))
    return name


PUBLIC = _reserved(b"\xffpublic")
"""The namespace of what all may read that were granted it."""

Slot = str
"""Keyed hash of a namespace name: what stands for it on disk."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """The one fact about a namespace: which generation it is in, and whether that lives."""

    state: str
    generation: int

    def __str__(self) -> str:
        return f"{self.state}.{self.generation}"

    @staticmethod
    def parse(name: str) -> SlotState | None:
        """Return the state that a name in a slot stands for; ``None`` for any other name."""
        match = _STATE.fullmatch(name)
        return SlotState(match[1], int(match[2])) if match else None


def next_generation(state: SlotState | None) -> int:
    """Return the number of the generation after the one that a slot is in."""
    return 1 if state is None else state.generation + 1


def slot_name(key: bytes, name: NamespaceName) -> Slot:
    """Return the slot of a namespace: HMAC-SHA256 under the root's key, cut to 160 bits."""
    return hmac.new(key, name.raw, hashlib.sha256).hexdigest()[:40]


def is_slot(name: str) -> bool:
    """Tell whether a name in ``slots/`` can be one of ours."""
    return _SLOT.fullmatch(name) is not None


def generation_name(slot: Slot, generation: int) -> str:
    """Return the directory of one generation of one namespace."""
    return f"{slot}.{generation}"


def parse_generation_name(name: str) -> tuple[Slot, int] | None:
    """Undo :func:`generation_name`; ``None`` for any other name."""
    match = _GENERATION.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def discarded_name(folder: str, token: str) -> str:
    """Return the name in ``trash/`` of a generation's directory that never lived, so that no receipt speaks of it."""
    return f"{folder}.{token}"


def parse_discarded(name: str) -> Slot | None:
    """Return the slot of a :func:`discarded_name`; ``None`` for any other name."""
    match = _DISCARDED.fullmatch(name)
    return match[1] if match else None


def is_discarded(name: str, folder: str) -> bool:
    """Tell whether a name is a :func:`discarded_name` of that generation's directory."""
    return parse_discarded(name) is not None and name.startswith(f"{folder}.")


def blob_name(digest: Digest) -> str:
    """Return the file name of a blob: the encoded part of its digest. Its length tells the algorithm."""
    return digest.encoded


def parse_blob_name(name: str) -> Digest | None:
    """Undo :func:`blob_name`; ``None`` for any other name."""
    if not _HEX_NAME.fullmatch(name):
        return None
    return Digest.parse(f"{'sha256' if len(name) == 64 else 'sha512'}:{name}")


def lock_name(name: str) -> str:
    """Return the file whose lock guards a blob's or reference's ``name``: one of :data:`LOCK_NAMES`."""
    return name[0]


LOCK_NAMES = "0123456789abcdef"
"""Made with the generation and never unlinked: a lock that comes and goes guards nothing, and a full disk cannot make
one when a blob must go."""


def shard(name: str) -> str:
    """Return the directory that a blob's name is kept in."""
    return name[:2]


@dataclass(frozen=True, slots=True)
class Partial:
    """The name of an unfinished write.

    Its ``stem`` binds it to what it will be, ``boot`` to the boot in which its bytes can be trusted.
    """

    stem: str
    boot: str

    @property
    def data(self) -> str:
        """Name of the bytes so far. Its lock is the right to write it."""
        return f"{self.stem}.{self.boot}.part"

    @property
    def sums(self) -> str:
        """Name of the sums of the whole chunks so far."""
        return f"{self.stem}.{self.boot}.sums"

    @staticmethod
    def parse(name: str, *, stem: re.Pattern[str]) -> Partial | None:
        """Undo :attr:`data` and :attr:`sums`; ``None`` for any other name, or one of another stem."""
        match = _PARTIAL.fullmatch(name)
        return Partial(match[1], match[2]) if match and stem.fullmatch(match[1]) else None


def temporary_name(boot: str, token: str) -> str:
    """Return the name in ``in/`` of a record on its way to its place."""
    return f"tmp.{boot}.{token}"


def is_temporary(name: str) -> bool:
    """Tell whether a name is a :func:`temporary_name`."""
    return _TEMPORARY.fullmatch(name) is not None


def format_record(features: frozenset[str] = frozenset()) -> bytes:
    """Return the content of ``FORMAT``."""
    return json.dumps({"layercache": _VERSION, "features": sorted(features)}).encode() + b"\n"


def parse_format(raw: bytes) -> frozenset[str]:
    """Check that this version reads and writes a root with this ``FORMAT``, and return the features it uses.

    :raises FormatError: for another version, or a feature this version does not know.
    """
    try:
        record = json.loads(raw)
        version, features = record["layercache"], set(record["features"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError("the FORMAT file is damaged", hint="restore it, or start with an empty root") from error
    if version != _VERSION:
        raise FormatError(f"the root has format {version!r}, not {_VERSION}", hint="use the version that made it")
    if unknown := features - _FEATURES:
        names = ", ".join(sorted(map(str, unknown)))
        raise FormatError(f"the root uses features this version lacks: {names}", hint="use a newer version")
    return frozenset(features)


def parse_key(raw: bytes) -> bytes:
    """Return the root's key.

    :raises FormatError: when it is not whole: every namespace would be looked for, and made, under another slot.
    """
    if len(raw) != _KEY_SIZE:
        raise FormatError("root.key is damaged", hint="restore it, or start with an empty root")
    return raw


def pin_name(name: str) -> str:
    """Return the file name of a pin's record."""
    return hashlib.sha256(b"pin\0" + name.encode()).hexdigest()


def ref_name(reference: Reference) -> str:
    """Return the file name of a reference's record. References hold ``/`` and may be longer than a name can be."""
    return hashlib.sha256(str(reference).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Ref:
    """What a reference last resolved to: ``descriptor``, and in it the ``manifest`` for ``platform``.

    ``resolved`` is in seconds since the epoch.
    """

    reference: Reference
    descriptor: Descriptor
    manifest: Digest
    platform: Platform
    resolved: float

    def pack(self) -> bytes:
        """Return the record as stored: JSON, then its XXH3-128, as ``meta``."""
        fields = {
            "reference": str(self.reference),
            "descriptor": {
                "mediaType": str(self.descriptor.media_type),
                "digest": str(self.descriptor.digest),
                "size": self.descriptor.size,
            },
            "manifest": str(self.manifest),
            "platform": str(self.platform),
            "resolved": self.resolved,
        }
        return _pack(_REF_MAGIC, fields, b"")

    @staticmethod
    def unpack(raw: bytes) -> Ref:
        """Undo :meth:`pack`.

        :raises FormatError: when the record is not whole or not sensible.
        """
        fields, _ = _unpack(_REF_MAGIC, raw)
        try:
            return Ref(
                reference=Reference.parse(_text(fields["reference"])),
                descriptor=Descriptor.parse(fields["descriptor"]),
                manifest=Digest.parse(_text(fields["manifest"])),
                platform=Platform.parse(_text(fields["platform"])),
                resolved=float(fields["resolved"]),
            )
        except (LayerCacheError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError("a reference record is damaged") from error


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of a published blob. ``created`` is in seconds since the epoch, ``origin`` says where from."""

    digest: Digest
    size: int
    media_type: MediaType
    diff_id: DiffID | None
    origin: str
    created: float
    sums: bytes

    def pack(self) -> bytes:
        """Return the record as stored: magic, length, JSON, chunk sums, XXH3-128 of all that."""
        fields = {
            "digest": str(self.digest),
            "size": self.size,
            "media_type": str(self.media_type),
            "diff_id": None if self.diff_id is None else str(self.diff_id),
            "origin": self.origin,
            "created": self.created,
        }
        return _pack(_META_MAGIC, fields, self.sums)

    @staticmethod
    def unpack(raw: bytes) -> Meta:
        """Undo :meth:`pack`.

        :raises FormatError: when the record is not whole or not sensible.
        """
        fields, sums = _unpack(_META_MAGIC, raw)
        try:
            size = fields["size"]
            if type(size) is not int or size < 0 or len(sums) != chunk_count(size) * SUM_SIZE:
                raise FormatError("a meta record has the wrong number of chunk sums")
            diff_id = fields["diff_id"]
            return Meta(
                digest=Digest.parse(_text(fields["digest"])),
                size=size,
                media_type=MediaType.parse(_text(fields["media_type"])),
                diff_id=None if diff_id is None else DiffID(Digest.parse(_text(diff_id))),
                origin=_text(fields["origin"]),
                created=float(fields["created"]),
                sums=sums,
            )
        except FormatError:
            raise
        except (LayerCacheError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError("a meta record is damaged") from error


_META_MAGIC, _REF_MAGIC = b"LCmeta1\n", b"LCref_1\n"
_HEAD = struct.Struct(">8sI")

_parse_json = json.JSONDecoder().raw_decode  # without the guesses of `json.loads`, which every hit would pay for


def pack_record(magic: bytes, fields: dict[str, Any]) -> bytes:
    """Return a record of JSON alone: magic, length, JSON, XXH3-128 of all that."""
    return _pack(magic, fields, b"")


def unpack_record(magic: bytes, raw: bytes) -> dict[str, Any]:
    """Undo :func:`pack_record`.

    :raises FormatError: when it is not whole.
    """
    return _unpack(magic, raw)[0]


def _pack(magic: bytes, fields: dict[str, Any], tail: bytes) -> bytes:
    body = json.dumps(fields, separators=(",", ":")).encode()
    raw = _HEAD.pack(magic, len(body)) + body + tail
    return raw + xxhash.xxh3_128_digest(raw)


def _unpack(magic: bytes, raw: bytes) -> tuple[dict[str, Any], bytes]:
    if len(raw) < _HEAD.size + SUM_SIZE or xxhash.xxh3_128_digest(raw[:-SUM_SIZE]) != raw[-SUM_SIZE:]:
        raise FormatError("a record does not match its own checksum")
    found, length = _HEAD.unpack_from(raw)
    tail = _HEAD.size + length
    if found != magic or tail > len(raw) - SUM_SIZE:
        raise FormatError("a record is of another kind")
    try:
        text = str(raw[_HEAD.size : tail], "utf-8")
        fields, end = _parse_json(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("a record does not parse") from error
    if not isinstance(fields, dict) or end != len(text):
        raise FormatError("a record is not an object")
    return fields, raw[tail:-SUM_SIZE]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
