"""Real images built from files on this machine: OCI and Docker schema 2, single and multi-platform, as layouts.

    tar = layer_tar([Path(json.__file__).parent], under="usr/lib/python3")
    image = build_image([tar, build_layer(tar, "zstd", frames=20)], platform="linux/amd64")
    write_layout(image, Path("layout"), "1.0")          # skopeo copy oci:layout:1.0 ...

The same files give the same digests, with the same versions of zlib and zstandard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from layercache.oci import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Compression,
    Descriptor,
    DiffID,
    Digest,
    MediaType,
    Platform,
)
from layercache.testing._content import Content
from layercache.testing._layers import BuiltLayer, build_layer, compress, layer_tar, synthetic_layer

__all__ = [
    "BuiltImage",
    "BuiltIndex",
    "BuiltLayer",
    "Content",
    "Style",
    "build_image",
    "build_index",
    "build_layer",
    "compress",
    "layer_tar",
    "synthetic_layer",
    "write_layout",
]

Style = Literal["oci", "docker"]

_LAYER_TYPES: Mapping[tuple[Style, Compression], MediaType] = {
    ("oci", "none"): OCI_LAYER,
    ("oci", "gzip"): OCI_LAYER_GZIP,
    ("oci", "zstd"): OCI_LAYER_ZSTD,
    ("docker", "none"): DOCKER_LAYER,
    ("docker", "gzip"): DOCKER_LAYER_GZIP,
    ("docker", "zstd"): DOCKER_LAYER_ZSTD,
}


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """One image: its manifest's exact bytes and everything the manifest names.

    ``blobs`` holds config and layers, each once. ``descriptor`` is what an index would say of it.
    """

    descriptor: Descriptor
    manifest: bytes
    config: bytes
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[DiffID, ...]
    blobs: Mapping[Digest, Content] = field(repr=False)

    @property
    def digest(self) -> Digest:
        """Digest of the manifest."""
        return self.descriptor.digest

    @property
    def media_type(self) -> MediaType:
        """Media type of the manifest."""
        return self.descriptor.media_type


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """An index (or Docker manifest list) with the images it names, in order."""

    descriptor: Descriptor
    manifest: bytes
    images: tuple[BuiltImage | BuiltIndex, ...]

    @property
    def digest(self) -> Digest:
        """Digest of the index."""
        return self.descriptor.digest

    @property
    def media_type(self) -> MediaType:
        """Media type of the index."""
        return self.descriptor.media_type


def build_image(
    layers: Iterable[bytes | BuiltLayer],
    *,
    style: Style = "oci",
    platform: Platform | str | None = None,
    compression: Compression = "gzip",
    config: Mapping[str, Any] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> BuiltImage:
    """Return the image of ``layers``, lowest first.

    A layer is a tar, which is compressed with ``compression``, or a :class:`BuiltLayer`, which is taken as it is. The
    platform is this host's unless given. ``config`` adds to the config document, ``annotations`` to the manifest.
    """
    built = [layer if isinstance(layer, BuiltLayer) else build_layer(layer, compression) for layer in layers]
    if platform is None:
        platform = Platform.host()
    elif isinstance(platform, str):
        platform = Platform.parse(platform)
    document = _json(
        {
            "created": "1970-01-01T00:00:00Z",
            "architecture": platform.architecture,
            "os": platform.os,
            **({"variant": platform.variant} if platform.variant else {}),
            "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer in built]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": f"layer {n}"} for n, _ in enumerate(built)],
            **(config or {}),
        }
    )
    described = _describe(document, DOCKER_CONFIG if style == "docker" else OCI_CONFIG)
    descriptors = tuple(
        Descriptor(media_type=_LAYER_TYPES[style, layer.compression], digest=layer.digest, size=layer.size)
        for layer in built
    )
    media_type = DOCKER_MANIFEST if style == "docker" else OCI_MANIFEST
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": str(media_type),
            "config": described.to_json(),
            "layers": [descriptor.to_json() for descriptor in descriptors],
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )
    return BuiltImage(
        descriptor=replace(_describe(manifest, media_type), platform=platform),
        manifest=manifest,
        config=document,
        layers=descriptors,
        diff_ids=tuple(layer.diff_id for layer in built),
        blobs={described.digest: document} | {layer.digest: layer.content for layer in built},
    )


def build_index(
    images: Iterable[BuiltImage | BuiltIndex], *, style: Style = "oci", annotations: Mapping[str, str] | None = None
) -> BuiltIndex:
    """Return the index that names ``images`` in this order, each under the platform it was built for."""
    images = tuple(images)
    media_type = DOCKER_LIST if style == "docker" else OCI_INDEX
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": str(media_type),
            "manifests": [image.descriptor.to_json() for image in images],
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )
    return BuiltIndex(_describe(manifest, media_type), manifest, images)


def write_layout(image: BuiltImage | BuiltIndex, directory: Path, tag: str) -> None:
    """Put ``image`` into the OCI image layout at ``directory`` under ``tag``, beside what is there already.

    The directory is made if need be; a tag that exists moves. skopeo opens an image of OCI style there as
    ``oci:DIRECTORY:TAG``; its 1.9 does not find manifests of Docker's types in a layout, though they are allowed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for digest, content in _everything(image):
        path = directory / "blobs" / digest.algorithm / digest.encoded
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
    (directory / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    index = directory / "index.json"
    entry = image.descriptor.to_json() | {"annotations": {"org.opencontainers.image.ref.name": tag}}
    held = json.loads(index.read_bytes())["manifests"] if index.exists() else []
    held = [other for other in held if other.get("annotations") != entry["annotations"]]
    index.write_bytes(_json({"schemaVersion": 2, "mediaType": str(OCI_INDEX), "manifests": [*held, entry]}))


def _everything(image: BuiltImage | BuiltIndex) -> Iterator[tuple[Digest, Content]]:
    if isinstance(image, BuiltIndex):
        for child in image.images:
            yield from _everything(child)
    else:
        yield from image.blobs.items()
    yield image.digest, image.manifest


def _describe(document: bytes, media_type: MediaType) -> Descriptor:
    return Descriptor(media_type=media_type, digest=Digest.of(document), size=len(document))


def _json(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
