"""Media types of the OCI image-spec and of Docker schema 2 (image-spec media-types.md, RFC 6838)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from layercache.errors import InvalidError

__all__ = [
    "DOCKER_CONFIG",
    "DOCKER_LAYER",
    "DOCKER_LAYER_GZIP",
    "DOCKER_LAYER_ZSTD",
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "EMPTY_JSON",
    "MANIFEST_TYPES",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_LAYER_GZIP",
    "OCI_LAYER_ZSTD",
    "OCI_MANIFEST",
    "OCTET_STREAM",
    "Compression",
    "MediaType",
]

Compression = Literal["none", "gzip", "zstd"]

_NAME = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_TYPE = re.compile(rf"({_NAME}/{_NAME})[ \t]*(?:;.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True, order=True)
class MediaType:
    """A ``type/subtype`` without parameters. Kept as written; ``==`` is exact, the questions below ignore case."""

    value: str

    def __post_init__(self) -> None:
        match = _TYPE.fullmatch(self.value) if isinstance(self.value, str) else None
        if match is None or match.end(1) != len(self.value):
            raise InvalidError("not a media type", value=self.value)

    @classmethod
    def parse(cls, text: str) -> MediaType:
        """Media type of a ``Content-Type`` or of a document's ``mediaType``; parameters are dropped.

        :raises InvalidError: if it is not ``type/subtype`` of RFC 6838.
        """
        if isinstance(text, str) and (known := _KNOWN.get(text)) is not None:
            return known
        match = _TYPE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InvalidError("not a media type", value=text)
        return cls(match.group(1))

    @property
    def compression(self) -> Compression | None:
        """Compression that the type of a layer states; ``None`` where the type does not say, or is not known here."""
        return _LAYERS.get(self.value.lower())

    @property
    def is_manifest(self) -> bool:
        """True for an OCI or Docker schema 2 image manifest."""
        return self.value.lower() in _MANIFESTS

    @property
    def is_index(self) -> bool:
        """True for an OCI index or a Docker manifest list."""
        return self.value.lower() in _INDEXES

    @property
    def is_layer(self) -> bool:
        """True for a file system layer of an image, in any compression known here."""
        return self.value.lower() in _LAYERS

    @property
    def is_config(self) -> bool:
        """True for the config of an image; configs of other types are opaque."""
        return self.value.lower() in _CONFIGS

    @property
    def is_schema1(self) -> bool:
        """True for a Docker schema 1 manifest, signed or not: known, but not read here."""
        return self.value.lower() in _SCHEMA1

    def __str__(self) -> str:
        return self.value


OCI_INDEX = MediaType("application/vnd.oci.image.index.v1+json")
OCI_MANIFEST = MediaType("application/vnd.oci.image.manifest.v1+json")
OCI_CONFIG = MediaType("application/vnd.oci.image.config.v1+json")
OCI_LAYER = MediaType("application/vnd.oci.image.layer.v1.tar")
OCI_LAYER_GZIP = MediaType("application/vnd.oci.image.layer.v1.tar+gzip")
OCI_LAYER_ZSTD = MediaType("application/vnd.oci.image.layer.v1.tar+zstd")
EMPTY_JSON = MediaType("application/vnd.oci.empty.v1+json")
DOCKER_LIST = MediaType("application/vnd.docker.distribution.manifest.list.v2+json")
DOCKER_MANIFEST = MediaType("application/vnd.docker.distribution.manifest.v2+json")
DOCKER_CONFIG = MediaType("application/vnd.docker.container.image.v1+json")
DOCKER_LAYER = MediaType("application/vnd.docker.image.rootfs.diff.tar")
DOCKER_LAYER_GZIP = MediaType("application/vnd.docker.image.rootfs.diff.tar.gzip")
DOCKER_LAYER_ZSTD = MediaType("application/vnd.docker.image.rootfs.diff.tar.zstd")
OCTET_STREAM = MediaType("application/octet-stream")

MANIFEST_TYPES = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)
"""What to send in ``Accept``, all of it every time: a registry that does not see the stored type there may convert the
document, which changes its digest."""

_INDEXES = frozenset({OCI_INDEX.value, DOCKER_LIST.value})
_MANIFESTS = frozenset({OCI_MANIFEST.value, DOCKER_MANIFEST.value})
_CONFIGS = frozenset({OCI_CONFIG.value, DOCKER_CONFIG.value})
_SCHEMA1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
_LAYERS: dict[str, Compression] = {
    OCI_LAYER.value: "none",
    OCI_LAYER_GZIP.value: "gzip",
    OCI_LAYER_ZSTD.value: "zstd",
    DOCKER_LAYER.value: "none",
    DOCKER_LAYER_GZIP.value: "gzip",
    DOCKER_LAYER_ZSTD.value: "zstd",
    # Deprecated, but still pushed: layers that their publisher did not want copied.
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}
_KNOWN = {
    text: MediaType(text) for text in (*_INDEXES, *_MANIFESTS, *_CONFIGS, *_SCHEMA1, *_LAYERS, OCTET_STREAM.value)
}
