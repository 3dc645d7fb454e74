"""Manifests, indexes and configs: what is read, and what is not the same thing to everybody and so refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layercache import oci
from layercache.errors import (
    InvalidDescriptorError,
    InvalidError,
    InvalidManifestError,
    LimitError,
    UnsupportedError,
)
from layercache.oci import MAX_BYTES, Config, Digest, Index, Manifest, MediaType, Platform, parse_document

OCI_MANIFEST, OCI_INDEX = str(oci.OCI_MANIFEST), str(oci.OCI_INDEX)
DOCKER_MANIFEST, DOCKER_LIST = str(oci.DOCKER_MANIFEST), str(oci.DOCKER_LIST)


def blob(content: bytes, media_type: object = oci.OCI_LAYER_GZIP, **members: Any) -> dict[str, Any]:
    """Descriptor of ``content``."""
    return {"mediaType": str(media_type), "digest": str(Digest.of(content)), "size": len(content), **members}


IMAGE = {
    "schemaVersion": 2,
    "mediaType": OCI_MANIFEST,
    "config": blob(b"{}", oci.OCI_CONFIG),
    "layers": [blob(b"one"), blob(b"two"), blob(b"one")],
}
INDEX = {
    "schemaVersion": 2,
    "mediaType": OCI_INDEX,
    "manifests": [blob(b"m", oci.OCI_MANIFEST, platform={"os": "linux", "architecture": "amd64"})],
}


def raw(document: dict[str, Any], **members: Any) -> bytes:
    """JSON of ``document`` with some members replaced; ``...`` takes one away."""
    found = {**document, **members}
    return json.dumps({name: value for name, value in found.items() if value is not ...}).encode()


def test_image_manifest_is_read_whole() -> None:
    """Config, layers in order, and the bytes as received."""
    found = Manifest.parse(raw(IMAGE))
    assert found.media_type == oci.OCI_MANIFEST
    assert found.config.digest == Digest.of(b"{}")
    assert found.raw == raw(IMAGE)
    assert found.subject is None
    assert found.annotations == {}


def test_repeated_layers_are_all_kept() -> None:
    """The same digest twice is two layers: their order is the image."""
    assert [layer.digest for layer in Manifest.parse(raw(IMAGE)).layers] == [
        Digest.of(b"one"),
        Digest.of(b"two"),
        Digest.of(b"one"),
    ]


def test_index_is_read_whole() -> None:
    """Its entries with their platforms."""
    found = Index.parse(raw(INDEX, annotations={"a": "b"}, subject=blob(b"s", OCI_MANIFEST)))
    assert found.media_type == oci.OCI_INDEX
    assert [entry.platform for entry in found.manifests] == [Platform("linux", "amd64")]
    assert found.annotations == {"a": "b"}
    assert found.subject is not None


def test_docker_schema_2_is_read() -> None:
    """Docker's manifest and list are the same shapes under other types."""
    image = Manifest.parse(
        raw(IMAGE, mediaType=DOCKER_MANIFEST, config=blob(b"{}", oci.DOCKER_CONFIG)), content_type=DOCKER_MANIFEST
    )
    assert image.media_type == oci.DOCKER_MANIFEST
    assert image.config.media_type.is_config
    assert Index.parse(raw(INDEX, mediaType=DOCKER_LIST), content_type=DOCKER_LIST).media_type == oci.DOCKER_LIST


def test_descriptors_are_independent() -> None:
    """A manifest may mix digest algorithms and media types."""
    layer = {**blob(b"x", "application/x-tensor"), "digest": str(Digest.of(b"x", algorithm="sha512"))}
    found = Manifest.parse(raw(IMAGE, layers=[layer, blob(b"y", oci.OCI_LAYER_ZSTD)]))
    assert [layer.digest.algorithm for layer in found.layers] == ["sha512", "sha256"]
    assert found.config.digest.algorithm == "sha256"


@pytest.mark.parametrize("where", ["config", "layers", "subject"])
def test_digest_of_an_unknown_algorithm_is_unsupported(where: str) -> None:
    """It is not called malformed, and the document is not read without it."""
    bad = {**blob(b"x"), "digest": "blake3:" + "a" * 64}
    with pytest.raises(UnsupportedError):
        parse_document(raw(IMAGE, **{where: [bad] if where == "layers" else bad}))


@pytest.mark.parametrize("digest", ["sha256:../../../x", "sha256:" + "/" * 64, "sha256:" + "a" * 63 + "\0", "@", ""])
@pytest.mark.parametrize("where", ["config", "layers", "subject", "manifests"])
def test_bad_digests_are_refused_wherever_they_stand(where: str, digest: str) -> None:
    """No digest of a document reaches a path or a URL unchecked."""
    bad: Any = {**blob(b"x"), "digest": digest}
    document = INDEX if where == "manifests" else IMAGE
    with pytest.raises(InvalidDescriptorError, match=where):
        parse_document(raw(document, **{where: [bad] if where in ("layers", "manifests") else bad}))


# --- types ---


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain; charset=utf-8",
        "application/octet-stream",
        "application/json",
        "APPLICATION/JSON",
        "not a type",
        "application/vnd.oci.image.manifest.v1+json; charset=utf-8",
        "Application/Vnd.oci.image.manifest.v1+json",
    ],
)
@pytest.mark.parametrize("stated", [..., OCI_MANIFEST])
def test_type_is_derived_when_the_header_does_not_say(content_type: str | None, stated: object) -> None:
    """From mediaType, else from the structure; parameters of the header are ignored."""
    found = parse_document(raw(IMAGE, mediaType=stated), content_type=content_type)
    assert isinstance(found, Manifest)
    assert str(found.media_type).lower() == OCI_MANIFEST


def test_index_is_known_by_its_structure() -> None:
    """Entries without any type around them are an index."""
    assert parse_document(raw(INDEX, mediaType=...)).media_type == oci.OCI_INDEX


def test_header_decides_where_the_document_is_silent() -> None:
    """Docker's type in the header stands when the body names none."""
    assert parse_document(raw(IMAGE, mediaType=...), content_type=DOCKER_MANIFEST).media_type == oci.DOCKER_MANIFEST


def test_header_and_document_must_agree_for_a_tag() -> None:
    """Without a descriptor to say what is right, two answers are none."""
    with pytest.raises(InvalidManifestError, match="mediaType differs"):
        parse_document(raw(IMAGE), content_type=DOCKER_MANIFEST)
    with pytest.raises(InvalidManifestError, match="mediaType differs"):
        parse_document(raw(IMAGE, mediaType="application/x-foo"), content_type=OCI_MANIFEST)


@pytest.mark.parametrize("content_type", [DOCKER_MANIFEST, OCI_INDEX, "text/html", None])
def test_expected_type_outranks_the_header(content_type: str | None) -> None:
    """A descriptor said what it is and its digest matched: the header of the reply no longer matters."""
    found = parse_document(raw(IMAGE), content_type=content_type, expected=oci.OCI_MANIFEST)
    assert found.media_type == oci.OCI_MANIFEST
    kept = parse_document(raw(IMAGE), content_type=content_type, expected=oci.DOCKER_MANIFEST)
    assert kept.media_type == oci.DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("document", "content_type", "expected"),
    [
        (raw(IMAGE), None, oci.OCI_INDEX),
        (raw(INDEX), None, oci.OCI_MANIFEST),
        (raw(IMAGE, mediaType=...), OCI_INDEX, None),
        (raw(INDEX, mediaType=...), OCI_MANIFEST, None),
        (raw(INDEX, mediaType=...), OCI_MANIFEST, oci.DOCKER_MANIFEST),
        (raw(IMAGE, mediaType=OCI_INDEX), None, None),
        (raw(IMAGE, mediaType=OCI_INDEX), OCI_MANIFEST, oci.OCI_MANIFEST),
        (raw(INDEX, mediaType=OCI_MANIFEST), OCI_MANIFEST, oci.OCI_INDEX),
        (raw(IMAGE, config=..., layers=...), OCI_MANIFEST, None),
        (raw(IMAGE, config=..., layers=..., mediaType=...), None, None),
    ],
)
def test_a_manifest_is_never_an_index(document: bytes, content_type: str | None, expected: MediaType | None) -> None:
    """Header, descriptor, mediaType and structure must not tell different stories about the kind."""
    with pytest.raises(InvalidManifestError):
        parse_document(document, content_type=content_type, expected=expected)


@pytest.mark.parametrize("content_type", [None, OCI_MANIFEST, OCI_INDEX, DOCKER_LIST])
@pytest.mark.parametrize("expected", [None, oci.OCI_MANIFEST, oci.OCI_INDEX])
@pytest.mark.parametrize("both", [{"layers": []}, {"config": blob(b"{}")}, {"layers": None}])
def test_both_at_once_is_refused(content_type: str | None, expected: MediaType | None, both: dict[str, Any]) -> None:
    """Entries of an index beside layers or a config: under whatever type it is served (CVE-2021-41190)."""
    with pytest.raises(InvalidManifestError, match="an index and of an image"):
        parse_document(raw(INDEX, mediaType=..., **both), content_type=content_type, expected=expected)


def test_wrong_kind_is_refused_by_the_narrow_parsers() -> None:
    """Asking for a manifest never gives an index, nor the other way round."""
    with pytest.raises(InvalidManifestError, match="an index"):
        Manifest.parse(raw(INDEX))
    with pytest.raises(InvalidManifestError, match="a manifest"):
        Index.parse(raw(IMAGE))


@pytest.mark.parametrize(
    ("document", "content_type"),
    [
        (b"anything", "application/vnd.docker.distribution.manifest.v1+json"),
        (b"", "application/vnd.docker.distribution.manifest.v1+prettyjws; charset=utf-8"),
        (raw({"schemaVersion": 1, "name": "x", "fsLayers": [{"blobSum": "sha256:a"}]}), None),
        (raw({"schemaVersion": 1}), "application/json"),
        (raw(IMAGE, fsLayers=[]), None),
        (raw(IMAGE, mediaType="application/vnd.docker.distribution.manifest.v1+json"), None),
    ],
)
def test_schema_1_is_named(document: bytes, content_type: str | None) -> None:
    """The old format is recognised by header or content and gets an error of its own."""
    with pytest.raises(UnsupportedError, match="schema 1"):
        parse_document(document, content_type=content_type)


@pytest.mark.parametrize("kind", ["application/vnd.oci.artifact.manifest.v1+json", "application/x-foo"])
def test_other_documents_are_unsupported(kind: str) -> None:
    """A type that is neither manifest nor index is well formed, but nothing we read."""
    for content_type, expected in [(kind, None), (None, MediaType(kind))]:
        with pytest.raises(UnsupportedError, match="only image manifests"):
            parse_document(raw(IMAGE, mediaType=...), content_type=content_type, expected=expected)
    with pytest.raises(UnsupportedError):
        parse_document(raw(IMAGE, mediaType=kind))


# --- leniency where the specification asks for it ---


@pytest.mark.parametrize(
    "document",
    [
        raw(IMAGE, config=blob(b"{}", "application/vnd.cncf.helm.config.v1+json")),
        raw(IMAGE, config=blob(b"{}", oci.EMPTY_JSON), artifactType="application/x-model", layers=[blob(b"w", "a/b")]),
        raw(IMAGE, config=blob(b"?", "application/x-foo"), annotations={"x": "", "": "y"}),
        raw(IMAGE, future=[{"a": 1}], layers=[blob(b"x", "application/x-new", future=True)]),
        raw(IMAGE, layers=[]),
        raw(IMAGE, layers=None, annotations=None, subject=None, artifactType=""),
        raw(INDEX, manifests=[blob(b"x", "application/x-unknown", artifactType="a/b")]),
        raw(INDEX, manifests=None),
    ],
)
def test_unknown_things_are_kept(document: bytes) -> None:
    """Helm charts, model artifacts, new members and types: none of them stops a copy."""
    assert parse_document(document).raw == document


def test_length_of_a_reply_is_no_part_of_a_document() -> None:
    """Only the bytes count: white space around them changes nothing but the digest."""
    spaced = b"\n " + raw(IMAGE) + b"\r\n"
    assert Manifest.parse(spaced).layers == Manifest.parse(raw(IMAGE)).layers


# --- refusals ---


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        raw(IMAGE)[:-1],
        raw(IMAGE) + b"{}",
        raw(IMAGE, schemaVersion=...),
        raw(IMAGE, schemaVersion="2"),
        raw(IMAGE, schemaVersion=2.0),
        raw(IMAGE, schemaVersion=True),
        raw(IMAGE, schemaVersion=3),
        raw(IMAGE, mediaType=5),
        raw(IMAGE, mediaType="x"),
        raw(IMAGE, layers=...),
        raw(IMAGE, layers={}),
        raw(IMAGE, layers="x"),
        raw(IMAGE, layers=[None]),
        raw(IMAGE, layers=[[]]),
        raw(IMAGE, config=...),
        raw(IMAGE, config=None),
        raw(IMAGE, config=[]),
        raw(IMAGE, annotations={"a": 1}),
        raw(IMAGE, annotations=[]),
        raw(IMAGE, artifactType=1),
        raw(IMAGE, artifactType="x"),
        raw(IMAGE, subject=5),
        raw(INDEX, manifests={}),
        raw(INDEX, manifests=[5]),
    ],
)
def test_malformed_documents_are_refused(document: bytes) -> None:
    """Every wrong or missing member gives the error of wrong input."""
    with pytest.raises((InvalidManifestError, InvalidDescriptorError)) as caught:
        parse_document(document)
    assert isinstance(caught.value, InvalidError)


@pytest.mark.parametrize("number", ["-1", "1e3", "9223372036854775808", "1" * 1000, "NaN", "true", '"5"', "null"])
def test_wrong_sizes_in_a_document_are_refused(number: str) -> None:
    """Whatever JSON can write for a size, only an integer of 63 bits is one."""
    document = raw(IMAGE).replace(b'"size": 3', b'"size": ' + number.encode())
    with pytest.raises(InvalidError):
        parse_document(document)


def test_two_layer_lists_are_refused() -> None:
    """A repeated name is an ambiguity between parsers: what was verified must be what is used (CVE-2014-8179)."""
    document = raw(IMAGE)[:-1] + b', "layers": []}'
    with pytest.raises(InvalidManifestError, match="twice"):
        parse_document(document)


def test_documents_are_capped_before_parsing() -> None:
    """4 MiB and a byte is refused, however well it is formed."""
    padding = MAX_BYTES - len(raw(IMAGE))
    assert parse_document(raw(IMAGE) + b" " * padding)
    with pytest.raises(LimitError):
        parse_document(raw(IMAGE) + b" " * (padding + 1))


def test_descriptors_are_counted() -> None:
    """Ten thousand entries are read, one more is refused, and so is a million within the cap of bytes."""
    entry = b'{"mediaType":"a/b","digest":"' + str(Digest.of(b"")).encode() + b'","size":0}'
    head = b'{"schemaVersion":2,"manifests":['
    assert len(Index.parse(head + b",".join([entry] * 10_000) + b"]}").manifests) == 10_000
    with pytest.raises(LimitError, match="10000"):
        parse_document(head + b",".join([entry] * 10_001) + b"]}")
    with pytest.raises(LimitError):
        parse_document(head + b",".join([b"{}"] * 1_000_000) + b"]}")
    with pytest.raises(LimitError):
        parse_document(head + b",".join([b"0"] * 1_000_000) + b"]}")


# --- configs ---

CONFIG: dict[str, Any] = {
    "os": "linux",
    "architecture": "amd64",
    "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(b"one")), str(Digest.of(b"two"))]},
    "config": {"Env": ["PATH=/bin"], "Labels": None},
    "history": [{"created_by": "x", "empty_layer": True}],
}


def test_config_gives_platform_and_diff_ids() -> None:
    """What a reader of layers needs, in order; the rest stays in the bytes."""
    found = Config.parse(raw(CONFIG, variant="v3"))
    assert found.platform == Platform("linux", "amd64", "v3")
    assert found.diff_ids == (Digest.of(b"one"), Digest.of(b"two"))
    assert found.raw == raw(CONFIG, variant="v3")


def test_config_of_an_image_without_layers_is_read() -> None:
    """An empty list of DiffIDs may be written as null."""
    assert Config.parse(raw(CONFIG, rootfs={"type": "layers", "diff_ids": None})).diff_ids == ()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        raw(CONFIG, rootfs=...),
        raw(CONFIG, rootfs=[]),
        raw(CONFIG, rootfs={"type": "other", "diff_ids": []}),
        raw(CONFIG, rootfs={"type": "layers", "diff_ids": "x"}),
        raw(CONFIG, rootfs={"type": "layers", "diff_ids": [5]}),
        raw(CONFIG, rootfs={"type": "layers", "diff_ids": ["sha256:../../../x"]}),
        raw(CONFIG, os=5),
        raw(CONFIG, architecture="\x1b"),
        raw(CONFIG)[:-1] + b', "rootfs": {}}',
    ],
)
def test_malformed_configs_are_refused(document: bytes) -> None:
    """The same strictness as for manifests."""
    with pytest.raises(InvalidManifestError):
        Config.parse(document)


def test_config_limits() -> None:
    """Bytes and DiffIDs are bounded; a DiffID of an unknown algorithm is unsupported."""
    with pytest.raises(LimitError):
        Config.parse(b" " * (MAX_BYTES + 1))
    with pytest.raises(LimitError):
        Config.parse(raw(CONFIG, rootfs={"type": "layers", "diff_ids": ["x"] * 10_001}))
    with pytest.raises(UnsupportedError):
        Config.parse(raw(CONFIG, rootfs={"type": "layers", "diff_ids": ["blake3:" + "a" * 64]}))


def test_documents_are_values() -> None:
    """The same bytes give equal documents that can be keys."""
    assert len({Manifest.parse(raw(IMAGE)), Manifest.parse(raw(IMAGE))}) == 1
    assert len({Index.parse(raw(INDEX)), Index.parse(raw(INDEX))}) == 1
    assert len({Config.parse(raw(CONFIG)), Config.parse(raw(CONFIG))}) == 1
