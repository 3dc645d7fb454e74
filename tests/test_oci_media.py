"""Media types: what a type says about a blob, and what it does not."""

from __future__ import annotations

import pytest

from layercache import oci
from layercache.errors import InvalidError
from layercache.oci import MediaType


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.manifest.v1+json"),
        ("application/vnd.oci.image.manifest.v1+json; charset=utf-8", "application/vnd.oci.image.manifest.v1+json"),
        ("text/plain;charset=utf-8;x=y", "text/plain"),
        ("application/x-foo", "application/x-foo"),
        ("a/" + "b" * 127, "a/" + "b" * 127),
    ],
)
def test_parse_drops_parameters(text: str, value: str) -> None:
    """Parameters say nothing about the format: they are ignored."""
    assert str(MediaType.parse(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "json",
        "/json",
        "application/",
        "a b/c",
        "a/b/c",
        "application/\u00e9",
        "a/b\n",
        "a/" + "b" * 128,
        "a/b c",
        ";a/b",
    ],
)
def test_parse_refuses_what_is_no_type(text: str) -> None:
    """Only type/subtype of RFC 6838 is a media type."""
    with pytest.raises(InvalidError):
        MediaType.parse(text)


@pytest.mark.parametrize("value", [None, 5, b"a/b"])
def test_parse_refuses_what_is_no_text(value: object) -> None:
    """A value of another type gives the same typed error."""
    with pytest.raises(InvalidError):
        MediaType.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a/b; charset=utf-8", "a/b ", "x", 5])
def test_constructor_takes_no_parameters(value: object) -> None:
    """A value holds the bare type only."""
    with pytest.raises(InvalidError):
        MediaType(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("media_type", "compression"),
    [
        (oci.OCI_LAYER, "none"),
        (oci.OCI_LAYER_GZIP, "gzip"),
        (oci.OCI_LAYER_ZSTD, "zstd"),
        (oci.DOCKER_LAYER, "none"),
        (oci.DOCKER_LAYER_GZIP, "gzip"),
        (oci.DOCKER_LAYER_ZSTD, "zstd"),
        (MediaType("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"), "zstd"),
        (MediaType("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "gzip"),
        (MediaType("Application/VND.oci.image.layer.v1.TAR+gzip"), "gzip"),
    ],
)
def test_layers_state_their_compression(media_type: MediaType, compression: str) -> None:
    """The types of layers, also the deprecated ones and in any case, say how to decode them."""
    assert media_type.compression == compression
    assert media_type.is_layer


@pytest.mark.parametrize(
    "media_type", [oci.OCTET_STREAM, oci.OCI_CONFIG, oci.EMPTY_JSON, MediaType("application/x-model+gzip")]
)
def test_other_types_do_not_say_how_to_decode(media_type: MediaType) -> None:
    """No compression is guessed from a type that is not a layer's."""
    assert media_type.compression is None
    assert not media_type.is_layer


def test_documents_are_told_apart() -> None:
    """Each document type of both families answers to exactly one question."""
    questions = ("is_manifest", "is_index", "is_config", "is_schema1", "is_layer")
    schema1 = MediaType("application/vnd.docker.distribution.manifest.v1+prettyjws")
    for media_type, question in [
        (oci.OCI_MANIFEST, "is_manifest"),
        (oci.DOCKER_MANIFEST, "is_manifest"),
        (oci.OCI_INDEX, "is_index"),
        (oci.DOCKER_LIST, "is_index"),
        (oci.OCI_CONFIG, "is_config"),
        (oci.DOCKER_CONFIG, "is_config"),
        (schema1, "is_schema1"),
    ]:
        assert [q for q in questions if getattr(media_type, q)] == [question]


def test_accept_holds_every_manifest_type() -> None:
    """The four types a client must offer together, so that no registry converts what it stores."""
    assert [str(t) for t in oci.MANIFEST_TYPES] == [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
