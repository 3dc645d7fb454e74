"""Fuzz target of the OCI parsers: digests, references, platforms, media types, descriptors, manifests, configs."""

from __future__ import annotations

import json
from collections.abc import Callable

from layercache import oci
from layercache.errors import IntegrityError, InvalidError, LimitError, UnsupportedError

__all__ = ["SEEDS", "TOKENS", "one"]

_REFUSALS = (InvalidError, UnsupportedError, LimitError, IntegrityError)

_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
_ENTRY = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": _DIGEST, "size": 2, "data": "e30="}
_DOCUMENTS = [
    {
        "schemaVersion": 2,
        "mediaType": str(oci.OCI_MANIFEST),
        "config": {**_ENTRY, "mediaType": str(oci.OCI_CONFIG)},
        "layers": [{**_ENTRY, "mediaType": str(oci.OCI_LAYER_ZSTD), "urls": ["https://example.com/x"]}],
        "subject": _ENTRY,
        "artifactType": "application/x-model",
        "annotations": {"k": "v\u00e9\U0001f600"},
    },
    {
        "schemaVersion": 2,
        "manifests": [
            {**_ENTRY, "platform": {"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["x"]}},
            {**_ENTRY, "platform": {"os": "windows", "architecture": "amd64", "os.version": "10.0.17763.1"}},
            {**_ENTRY, "platform": {"os": "unknown", "architecture": "unknown"}},
        ],
    },
    {"schemaVersion": 1, "fsLayers": [{"blobSum": _DIGEST}]},
    {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [_DIGEST]}, "history": [{}]},
]

_TEXT = [
    "127.0.0.1:5000/demo/serving:1.0",
    "alpine",
    f"docker://ghcr.io/org/app:v1@{_DIGEST}",
    "[2001:db8::1]:443/a__b/c-d.e:_x",
    "123456789012.dkr.ecr.us-west-2.amazonaws.com/lmi:0.30",
    _DIGEST,
    "sha512:" + "0" * 128,
    "blake3:" + "0" * 64,
    "linux/arm64/v8",
    "windows(10.0.17763+win32k)/amd64",
    "application/vnd.oci.image.index.v1+json; charset=utf-8",
]

# The first byte of an input chooses how it is read: as text, or as a document under one of the types.
_TYPES = (None, *oci.MANIFEST_TYPES)
SEEDS = [b"t" + text.encode() for text in _TEXT]
SEEDS += [bytes([number]) + json.dumps(document).encode() for number, document in enumerate(_DOCUMENTS)]
SEEDS += [b"\0" + b"[" * 70 + b"]" * 70, b'\1{"a":1,"a":NaN,"b":1e999}', b'\2"\\ud800"']

TOKENS = [b"sha256:", b"sha512:", b"@", b":", b"/", b"..", b"[::1]", b"localhost", b"%2e", b"\0", b"\\ud800", b"\xff"]
TOKENS += [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 30, b"2.0"]
TOKENS += [f'"{name}":'.encode() for name in ("manifests", "layers", "config", "mediaType", "size", "digest", "data")]

_TEXT_PARSERS: tuple[Callable[[str], object], ...] = (
    oci.Digest.parse,
    oci.Reference.parse,
    oci.Repository.parse,
    oci.Platform.parse,
    oci.MediaType.parse,
    oci.parse_tag,
)


def one(data: bytes) -> None:
    """Parse one input; raise on anything but a value that reads back as itself, or a typed refusal."""
    kind, body = data[:1], data[1:]
    if kind == b"t":
        text = body.decode("utf-8", "surrogateescape")
        for parse in _TEXT_PARSERS:
            _text(parse, text)
    else:
        _document(body, kind[0] % len(_TYPES) if kind else 0)


def _text(parse: Callable[[str], object], text: str) -> None:
    try:
        value = parse(text)
    except _REFUSALS:
        return
    written = str(value)
    if parse(written) != value or not written.isascii() or not written.isprintable():
        raise AssertionError(f"{text!r} was read as {value!r}, written as {written!r}")


def _document(body: bytes, number: int) -> None:
    expected = _TYPES[number]
    try:
        found = oci.parse_document(body, expected=expected)
    except _REFUSALS:
        pass
    else:
        if found.raw != body or isinstance(found, oci.Index) != found.media_type.is_index:
            raise AssertionError(f"{body!r} was read as {found!r}")
        entries = found.manifests if isinstance(found, oci.Index) else (found.config, *found.layers)
        for entry in entries:
            if oci.Descriptor.parse(entry.to_json()) != entry:
                raise AssertionError(f"{entry!r} does not read back")
    try:
        config = oci.Config.parse(body)
    except _REFUSALS:
        return
    if oci.Platform.of(config.platform.to_json()) != config.platform:
        raise AssertionError(f"{config.platform!r} does not read back")
