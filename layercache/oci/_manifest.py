"""Manifests, indexes and configs (image-spec manifest.md, image-index.md, config.md; Docker schema 2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from layercache.errors import InvalidDigestError, InvalidError, InvalidManifestError, LimitError, UnsupportedError
from layercache.oci import _ijson
from layercache.oci._descriptor import Annotations, Descriptor, media_type
from layercache.oci._digest import DiffID, Digest
from layercache.oci._media import OCI_INDEX, OCI_MANIFEST, OCTET_STREAM, MediaType
from layercache.oci._platform import Platform

__all__ = ["MAX_DESCRIPTORS", "Config", "Index", "Manifest", "parse_document"]

MAX_DESCRIPTORS = 10_000
"""Layers of a manifest, entries of an index, DiffIDs of a config."""

_UNTYPED = frozenset({"text/plain", "application/json", OCTET_STREAM.value})


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image or artifact: its config and its layers, in order, with repetitions. ``raw`` is what was received."""

    media_type: MediaType
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = field(default=None, kw_only=True)
    artifact_type: MediaType | None = field(default=None, kw_only=True)
    annotations: Annotations = field(default_factory=Annotations, kw_only=True)
    raw: bytes = field(kw_only=True, repr=False)

    @classmethod
    def parse(cls, raw: bytes, *, content_type: str | None = None, expected: MediaType | None = None) -> Manifest:
        """Manifest in ``raw``; like :func:`parse_document`, but an index is refused too."""
        found = parse_document(raw, content_type=content_type, expected=expected)
        if not isinstance(found, cls):
            raise InvalidManifestError("an index where a manifest should be")
        return found


@dataclass(frozen=True, slots=True)
class Index:
    """Several manifests, for a client to choose from by platform. ``raw`` is what was received."""

    media_type: MediaType
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = field(default=None, kw_only=True)
    artifact_type: MediaType | None = field(default=None, kw_only=True)
    annotations: Annotations = field(default_factory=Annotations, kw_only=True)
    raw: bytes = field(kw_only=True, repr=False)

    @classmethod
    def parse(cls, raw: bytes, *, content_type: str | None = None, expected: MediaType | None = None) -> Index:
        """Index in ``raw``; like :func:`parse_document`, but a manifest is refused too."""
        found = parse_document(raw, content_type=content_type, expected=expected)
        if not isinstance(found, cls):
            raise InvalidManifestError("a manifest where an index should be")
        return found


@dataclass(frozen=True, slots=True)
class Config:
    """Of an image's config: the platform it is for, and the digest of each layer when uncompressed."""

    platform: Platform
    diff_ids: tuple[DiffID, ...]
    raw: bytes = field(kw_only=True, repr=False)

    @classmethod
    def parse(cls, raw: bytes) -> Config:
        """Config in ``raw``. Only for the media types of an image's config: configs of other types are opaque.

        :raises InvalidManifestError: if it is not one.
        :raises UnsupportedError: if a DiffID is of another algorithm than sha256 and sha512.
        :raises LimitError: over 4 MiB or 10,000 DiffIDs.
        """
        error = InvalidManifestError
        fields = _ijson.members(_ijson.loads(raw, "config"), "config", error)
        rootfs = _ijson.members(fields.get("rootfs"), "rootfs of the config", error)
        if rootfs.get("type", "layers") != "layers":
            raise error("unknown rootfs type in the config", value=rootfs.get("type"))
        diff_ids = _bounded(rootfs.get("diff_ids"), "diff_ids of the config")
        try:
            found = tuple(DiffID(Digest.parse(item)) for item in diff_ids)  # type: ignore[arg-type]  # it checks
        except InvalidDigestError as reason:
            raise error(f"diff_ids of the config: {reason}") from reason
        try:
            platform = Platform.of(fields)
        except InvalidError as reason:
            raise error(f"platform of the config: {reason}") from reason
        return cls(platform, found, raw=raw)


def parse_document(
    raw: bytes, *, content_type: str | None = None, expected: MediaType | None = None
) -> Manifest | Index:
    """Manifest or index in ``raw``, which must be verified already where its digest is known.

    ``content_type`` is the header it came with, parameters and all; missing and untyped ones are derived from the
    document. ``expected`` is the type in the descriptor that led here: once the digest matched, it outranks the header
    (image-spec media-types.md, "Media Type Conflicts"). Members that are not known are ignored.

    :raises InvalidManifestError: if it is not I-JSON, is a manifest and an index at once, contradicts its type, or a
        member is missing or wrong.
    :raises InvalidDescriptorError: if a descriptor in it is wrong.
    :raises UnsupportedError: for Docker schema 1, types that are neither manifest nor index, and unknown digests.
    :raises LimitError: over 4 MiB or 10,000 descriptors.
    """
    header = _header(content_type)
    if header is not None and header.is_schema1:
        raise _schema1()
    fields = _ijson.members(_ijson.loads(raw, "manifest"), "the manifest", InvalidManifestError)
    version = fields.get("schemaVersion")
    if (type(version) is int and version == 1) or "fsLayers" in fields:
        raise _schema1()
    if type(version) is not int or version != 2:  # a float or a bool is not a version
        raise InvalidManifestError("schemaVersion is not 2", value=version)
    kind = _kind(fields, header, expected)
    subject = fields.get("subject")
    subject = None if subject is None else Descriptor.parse(subject, where="subject")
    artifact_type = media_type(fields.get("artifactType"), "artifactType", InvalidManifestError)
    annotations = Annotations.parse(fields.get("annotations"), "annotations", InvalidManifestError)
    if kind.is_index:
        return Index(
            kind,
            _descriptors(fields, "manifests"),
            subject=subject,
            artifact_type=artifact_type,
            annotations=annotations,
            raw=raw,
        )
    return Manifest(
        kind,
        Descriptor.parse(fields.get("config"), where="config"),
        _descriptors(fields, "layers"),
        subject=subject,
        artifact_type=artifact_type,
        annotations=annotations,
        raw=raw,
    )


def _header(content_type: str | None) -> MediaType | None:
    # A header that says nothing, or nothing legible, leaves the word to the document.
    try:
        found = MediaType.parse(content_type or "")
    except InvalidError:
        return None
    return None if found.value.lower() in _UNTYPED else found


def _kind(fields: dict[str, object], header: MediaType | None, expected: MediaType | None) -> MediaType:
    stated = media_type(fields.get("mediaType"), "mediaType", InvalidManifestError)
    if stated is not None and stated.is_schema1:
        raise _schema1()
    # The same bytes must not be a manifest to one client and an index to another (CVE-2021-41190).
    index, image = "manifests" in fields, "layers" in fields or "config" in fields
    if index and image:
        raise InvalidManifestError("the manifest has members of an index and of an image")
    structure = OCI_INDEX if index else OCI_MANIFEST if image else None
    kind = expected or header or stated or structure
    if kind is None:
        raise InvalidManifestError("the document has neither manifests nor layers")
    if not (kind.is_index or kind.is_manifest):
        raise UnsupportedError(f"a document of type {kind}", hint="only image manifests and indexes are read")
    if stated is not None and expected is None and stated.value.lower() != kind.value.lower():
        raise InvalidManifestError(f"the registry sent it as {kind}, but its mediaType differs", value=str(stated))
    if stated is not None and (stated.is_index, stated.is_manifest) != (kind.is_index, kind.is_manifest):
        raise InvalidManifestError(f"it should be {kind}, but its mediaType differs", value=str(stated))
    if structure is None or structure.is_index != kind.is_index:
        raise InvalidManifestError(f"it should be {kind}, but has not its members")
    return kind


def _descriptors(fields: dict[str, object], name: str) -> tuple[Descriptor, ...]:
    if name not in fields:
        raise InvalidManifestError(f"the manifest has no {name}")
    found = enumerate(_bounded(fields[name], name))
    return tuple(Descriptor.parse(item, where=f"{name}[{number}]") for number, item in found)


def _bounded(value: object, where: str) -> list[object]:
    found = _ijson.sequence(value, where, InvalidManifestError)
    if len(found) > MAX_DESCRIPTORS:
        raise LimitError(f"more than {MAX_DESCRIPTORS} {where}")
    return found


def _schema1() -> UnsupportedError:
    return UnsupportedError("a Docker schema 1 manifest", hint="push the image again with a current tool")
