"""Law: a parser gives a value or a typed error, whatever the input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layercache import oci
from layercache.errors import (
    IntegrityError,
    InvalidDigestError,
    InvalidError,
    InvalidPlatformError,
    InvalidReferenceError,
    LimitError,
    UnsupportedError,
)
from layercache.oci import Config, Descriptor, Digest, Index, Manifest, MediaType, Platform, Reference, parse_document

DIGEST = str(Digest.of(b""))
FRAGMENTS = ["sha256:", "sha512:", DIGEST, "@", ":", "/", "//", "..", ".", "-", "_", "[::1]", "localhost", "docker.io"]
FRAGMENTS += ["docker://", "a", "A", "0", "65536", "%2e", "\0", "\n", " ", "\u00e9", "\ud800", "latest", "linux", "("]
texts = st.text(st.characters(), max_size=200) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*FRAGMENTS[:20], "a/b", "e30="])
MEMBERS = ["schemaVersion", "mediaType", "manifests", "layers", "config", "subject", "artifactType", "annotations"]
MEMBERS += ["fsLayers", "digest", "size", "platform", "os", "architecture", "variant", "os.version", "os.features"]
MEMBERS += ["urls", "data", "rootfs", "type", "diff_ids", "x"]
names = st.sampled_from(MEMBERS)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6), max_leaves=20
)


def descriptor(**members: Any) -> dict[str, Any]:
    return {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": DIGEST, "size": 0, **members}


GOOD: list[dict[str, Any]] = [
    {"schemaVersion": 2, "config": descriptor(), "layers": [descriptor()], "subject": descriptor()},
    {"schemaVersion": 2, "manifests": [descriptor(platform={"os": "linux", "architecture": "arm", "variant": "v7"})]},
    {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}},
]


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A good document with a part of it replaced, repeated or cut."""
    document = draw(st.sampled_from(GOOD)) | draw(st.dictionaries(names, values, max_size=2))
    raw = json.dumps(document).encode()
    start = draw(st.integers(0, len(raw)))
    end = draw(st.integers(start, min(len(raw), start + 8)))
    return raw[:start] + draw(st.just(raw[start:end]) | st.binary(max_size=4)) + raw[end:]


TEXT_PARSERS: list[tuple[Callable[[str], object], type[Exception]]] = [
    (Digest.parse, InvalidDigestError),
    (MediaType.parse, InvalidError),
    (Platform.parse, InvalidPlatformError),
    (Reference.parse, InvalidReferenceError),
    (oci.Repository.parse, InvalidReferenceError),
    (oci.parse_tag, InvalidReferenceError),
]


@pytest.mark.parametrize(("parse", "error"), TEXT_PARSERS, ids=lambda p: getattr(p, "__qualname__", ""))
@given(text=texts)
def test_text(parse: Callable[[str], object], error: type[Exception], text: str) -> None:
    """Any text: a value, whose own text parses to it again, or the error of that parser."""
    try:
        value = parse(text)
    except (error, UnsupportedError):
        return
    assert parse(str(value)) == value
    str(value).encode("ascii")


@given(st.binary(max_size=300) | documents(), st.none() | texts, st.sampled_from([None, *oci.MANIFEST_TYPES]))
@example(b"[" * 5000, None, None)
@example(b'{"schemaVersion":' + b"9" * 5000 + b"}", None, None)
def test_bytes(raw: bytes, content_type: str | None, expected: MediaType | None) -> None:
    """Any bytes under any header: a document that kept them, or a typed error."""
    refusals = (InvalidError, UnsupportedError, LimitError, IntegrityError)
    try:
        found = parse_document(raw, content_type=content_type, expected=expected)
    except refusals:
        pass
    else:
        assert found.raw == raw
        assert isinstance(found, Index) == found.media_type.is_index
        assert isinstance(found, Manifest) == found.media_type.is_manifest
        hash(found)
    with contextlib.suppress(*refusals):
        assert Config.parse(raw).raw == raw


@given(values)
def test_objects(value: object) -> None:
    """Any JSON value: a descriptor and a platform, or a typed error."""
    with contextlib.suppress(InvalidError, UnsupportedError, IntegrityError):
        Descriptor.parse(value)
    with contextlib.suppress(InvalidPlatformError):
        Platform.of(value)
