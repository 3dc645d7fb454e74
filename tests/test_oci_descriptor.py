"""Descriptors: every member has its type, and embedded data is what its digest says."""

from __future__ import annotations

import base64
import pickle
import tracemalloc
from typing import Any

import pytest

from layercache import oci
from layercache.errors import IntegrityError, InvalidDescriptorError, LimitError, UnsupportedError
from layercache.oci import Descriptor, Digest, MediaType, Platform

EMPTY = Digest.of(b"")
LAYER = {"mediaType": str(oci.OCI_LAYER_GZIP), "digest": str(Digest.of(b"layer")), "size": 5}


def changed(**members: Any) -> dict[str, Any]:
    """The good descriptor with some members replaced; ``...`` takes one away."""
    found = {**LAYER, **members}
    return {name: value for name, value in found.items() if value is not ...}


def test_parse_reads_every_member() -> None:
    """All members of the specification, and none that it does not know."""
    value = changed(
        platform={"os": "linux", "architecture": "arm64", "variant": "v8", "os.features": ["x"]},
        annotations={"k": "v"},
        urls=["https://example.com/blob"],
        data=base64.b64encode(b"layer").decode(),
        artifactType="application/x-model",
        future={"a": [1]},
    )
    found = Descriptor.parse(value)
    assert found.media_type == oci.OCI_LAYER_GZIP
    assert found.digest == Digest.of(b"layer")
    assert found.size == 5
    assert found.platform == Platform("linux", "arm64", "v8", os_features=frozenset({"x"}))
    assert found.annotations == {"k": "v"}
    assert found.urls == ("https://example.com/blob",)
    assert found.data == b"layer"
    assert found.artifact_type == MediaType("application/x-model")
    del value["future"]
    assert found.to_json() == value
    assert Descriptor.parse(found.to_json()) == found


@pytest.mark.parametrize("size", [0, 1, 1 << 40, 2**63 - 1])
def test_sizes_from_zero_to_the_largest_are_kept(size: int) -> None:
    """Zero is a size like any other, not a size that is unknown."""
    assert Descriptor.parse(changed(size=size)).size == size


@pytest.mark.parametrize("size", [True, False, -1, 1.0, "5", None, 2**63, 10**30, [5], ..., float("nan")])
def test_other_sizes_are_refused(size: object) -> None:
    """Bool, float, text, negative, beyond 63 bits, missing: all refused, by the parser and by the constructor."""
    with pytest.raises(InvalidDescriptorError, match="size"):
        Descriptor.parse(changed(size=size))
    with pytest.raises(InvalidDescriptorError, match="size"):
        Descriptor(oci.OCI_LAYER, EMPTY, size)  # type: ignore[arg-type]


def test_a_huge_claim_allocates_nothing() -> None:
    """A size is a promise to check, never a number to allocate."""
    value = changed(size=1 << 40)
    tracemalloc.start()
    try:
        Descriptor.parse(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "members",
    [
        {"mediaType": ...},
        {"mediaType": None},
        {"mediaType": 5},
        {"mediaType": "no type"},
        {"digest": ...},
        {"digest": 5},
        {"digest": "sha256:../../../x"},
        {"digest": "sha256:" + "A" * 64},
        {"platform": "linux/amd64"},
        {"platform": {"os": 5, "architecture": "amd64"}},
        {"platform": {"os": "linux\x1b[2J", "architecture": "amd64"}},
        {"platform": {"os": "linux", "architecture": "amd64", "os.features": "x"}},
        {"annotations": []},
        {"annotations": {"k": 1}},
        {"annotations": {"k": None}},
        {"annotations": {1: "v"}},
        {"urls": "https://example.com"},
        {"urls": [1]},
        {"data": 5},
        {"data": "not base64!"},
        {"data": "bGF5ZXI"},
        {"data": "bGF5 ZXI="},
        {"data": "\u00e9"},
        {"artifactType": 5},
        {"artifactType": "x"},
    ],
)
def test_wrong_members_are_refused(members: dict[str, Any]) -> None:
    """A member that is missing, of the wrong type or malformed makes no descriptor."""
    with pytest.raises(InvalidDescriptorError):
        Descriptor.parse(changed(**members))


@pytest.mark.parametrize("value", [None, [], "x", 5, {1: 2}])
def test_only_an_object_is_a_descriptor(value: object) -> None:
    """Anything that is not a JSON object is refused."""
    with pytest.raises(InvalidDescriptorError):
        Descriptor.parse(value)


def test_error_names_the_place() -> None:
    """In a manifest of many layers, the error says which one."""
    with pytest.raises(InvalidDescriptorError, match=r"layers\[3\]"):
        Descriptor.parse(changed(size=-1), where="layers[3]")


def test_unknown_algorithm_is_unsupported() -> None:
    """A descriptor of an algorithm we lack is not malformed, and not accepted."""
    with pytest.raises(UnsupportedError):
        Descriptor.parse(changed(digest="blake3:" + "a" * 64))


def test_json_holds_no_empty_members() -> None:
    """What a descriptor does not say is left out, as other tools write it."""
    assert Descriptor.parse(LAYER).to_json() == LAYER
    bare = Descriptor(oci.OCI_MANIFEST, EMPTY, 0, platform=Platform("linux", "amd64"))
    assert bare.to_json()["platform"] == {"architecture": "amd64", "os": "linux"}


@pytest.mark.parametrize(
    ("data", "why"), [(b"laye", "wrong size"), (b"layer!", "wrong size"), (b"", "wrong size"), (b"LAYER", "wrong data")]
)
def test_data_that_is_not_the_blob_is_an_integrity_error(data: bytes, why: str) -> None:
    """Wrong length, then wrong hash, are errors; the embedded bytes are never silently passed over."""
    with pytest.raises(IntegrityError, match=why):
        Descriptor.parse(changed(data=base64.b64encode(data).decode()))


def test_data_is_hashed_with_its_own_algorithm() -> None:
    """Data under a sha512 digest is checked with sha512."""
    digest = Digest.of(b"layer", algorithm="sha512")
    assert Descriptor.parse(changed(digest=str(digest), data="bGF5ZXI=")).data == b"layer"


def test_data_is_capped() -> None:
    """Four mebibytes inside a descriptor are read, five are refused before they are decoded."""
    for size in (4 << 20, 5 << 20):
        data = bytes(size)
        value = changed(size=size, digest=str(Digest.of(data)), data=base64.b64encode(data).decode())
        if size == 4 << 20:
            assert Descriptor.parse(value).data == data
        else:
            with pytest.raises(LimitError, match="data of descriptor"):
                Descriptor.parse(value)


def test_empty_blobs_are_ordinary() -> None:
    """The zero-byte blob and the empty JSON object, with their bytes in the descriptor or without."""
    nothing = {"mediaType": "application/octet-stream", "digest": str(EMPTY), "size": 0}
    assert Descriptor.parse(nothing).data is None
    assert Descriptor.parse({**nothing, "data": ""}).data == b""
    braces = {"mediaType": str(oci.EMPTY_JSON), "digest": str(Digest.of(b"{}")), "size": 2, "data": "e30="}
    assert Descriptor.parse(braces).data == b"{}"
    assert braces["digest"] == "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("name", ["platform", "annotations", "urls", "data", "artifactType"])
def test_null_is_absent(name: str) -> None:
    """Optional members that a writer left as null are the same as members left out."""
    assert Descriptor.parse(changed(**{name: None})) == Descriptor.parse(LAYER)


def test_descriptor_is_a_value() -> None:
    """It has a hash, does not change when its parts do, and survives a trip to another process."""
    annotations = {"k": "v"}
    found = Descriptor(oci.OCI_LAYER, EMPTY, 0, annotations=annotations)
    same = Descriptor(oci.OCI_LAYER, EMPTY, 0, annotations=dict(annotations))
    annotations["k"] = "other"
    assert found.annotations["k"] == "v"
    assert {found, same} == {pickle.loads(pickle.dumps(found))}
    assert "k" in repr(found)
    with pytest.raises(AttributeError):
        found.size = 1  # type: ignore[misc]
