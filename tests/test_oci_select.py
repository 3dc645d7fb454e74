"""From an index to one manifest: the first best match, never by position alone, never without end."""

from __future__ import annotations

from typing import Any

import pytest

from layercache import oci
from layercache.errors import InvalidManifestError, LimitError, NotFoundError
from layercache.oci import Descriptor, Digest, Index, Manifest, MediaType, Platform, descend, select


def entry(name: str, platform: str | None, media_type: MediaType = oci.OCI_MANIFEST, **members: Any) -> Descriptor:
    """Entry of an index; ``name`` makes its digest."""
    found = Platform.parse(platform) if platform else None
    return Descriptor(media_type, Digest.of(name.encode()), len(name), platform=found, **members)


def index(*entries: Descriptor) -> Index:
    """Index of those entries."""
    return Index(oci.OCI_INDEX, entries, raw=b"")


def image(name: str) -> Manifest:
    """Manifest without layers."""
    return Manifest(oci.OCI_MANIFEST, entry("config", None, oci.OCI_CONFIG), (), raw=name.encode())


ATTESTATION = entry("attestation", "unknown/unknown")
REFERRER = entry("note", "linux/amd64", annotations={"vnd.docker.reference.type": "attestation-manifest"})
STRANGE = entry("strange", "linux/amd64", MediaType("application/x-strange"))
PLAIN = entry("plain", None)
EMPTY = Descriptor(oci.OCI_MANIFEST, Digest.of(b"empty"), 5, platform=Platform("", ""))
HALF = Descriptor(oci.OCI_MANIFEST, Digest.of(b"half"), 4, platform=Platform("linux", ""))
OTHER_HALF = Descriptor(oci.OCI_MANIFEST, Digest.of(b"other"), 5, platform=Platform("", "amd64"))
AMD = entry("amd", "linux/amd64")
AMD3 = entry("amd3", "linux/amd64/v3")
AMD_AGAIN = entry("again", "linux/amd64")
ARM = entry("arm", "linux/arm64/v8")
ARM5, ARM6, ARM7 = (entry(f"arm{v}", f"linux/arm/v{v}") for v in (5, 6, 7))
WINDOWS = entry("windows", "windows/amd64")
DOCKER = entry("docker", "linux/amd64", oci.DOCKER_MANIFEST)


@pytest.mark.parametrize(
    ("entries", "platform", "chosen"),
    [
        ([AMD], "linux/amd64", AMD),
        ([ARM, AMD], "linux/amd64", AMD),
        ([AMD, AMD_AGAIN], "linux/amd64", AMD),
        ([AMD_AGAIN, AMD], "linux/amd64", AMD_AGAIN),
        ([AMD, AMD3], "linux/amd64/v3", AMD3),
        ([AMD, AMD3], "linux/amd64", AMD),
        ([AMD3, AMD], "linux/amd64/v2", AMD),
        ([ARM5, ARM6, ARM7], "linux/arm/v7", ARM7),
        ([ARM5, ARM6, ARM7], "linux/arm/v6", ARM6),
        ([ARM5, WINDOWS], "linux/arm/v7", ARM5),
        ([ARM], "linux/arm64", ARM),
        ([ATTESTATION, REFERRER, STRANGE, AMD], "linux/amd64", AMD),
        ([PLAIN, AMD], "linux/amd64", AMD),
        ([PLAIN, ARM], "linux/amd64", PLAIN),
        ([EMPTY, ARM], "linux/amd64", EMPTY),
        ([ATTESTATION, PLAIN], "linux/amd64", PLAIN),
        ([DOCKER], "linux/amd64", DOCKER),
    ],
)
def test_first_best_match_is_chosen(entries: list[Descriptor], platform: str, chosen: Descriptor) -> None:
    """The best variant wins, then the first; strangers and attestations are passed over; no platform comes last."""
    assert select(index(*entries), Platform.parse(platform)) == chosen


@pytest.mark.parametrize(
    ("entries", "platform", "there"),
    [
        ([], "linux/amd64", "no image for any platform$"),
        ([HALF, OTHER_HALF], "linux/amd64", "linux/, /amd64$"),
        ([ARM, WINDOWS, ARM], "linux/amd64", "linux/arm64/v8, windows/amd64$"),
        ([AMD3], "linux/amd64", "linux/amd64/v3"),
        ([ATTESTATION, STRANGE, REFERRER], "linux/amd64", "no image"),
        ([ATTESTATION], "unknown/unknown", "no image"),
    ],
)
def test_absence_lists_what_is_there(entries: list[Descriptor], platform: str, there: str) -> None:
    """The error says what was asked for and each platform that could have been had, once."""
    with pytest.raises(NotFoundError, match=there) as caught:
        select(index(*entries), Platform.parse(platform))
    assert platform in str(caught.value)


def test_entry_without_platform_needs_permission() -> None:
    """A caller that cannot check the config refuses an image that does not say what it is for."""
    with pytest.raises(NotFoundError):
        select(index(PLAIN), Platform.parse("linux/amd64"), allow_unspecified=False)


def test_long_lists_are_cut_in_the_message() -> None:
    """A thousand platforms do not make a message of a thousand platforms."""
    many = [entry(str(n), f"linux/arch{n}") for n in range(1000)]
    with pytest.raises(NotFoundError, match="and 980 more") as caught:
        select(index(*many), Platform.parse("linux/amd64"))
    assert len(str(caught.value)) < 1000
    with pytest.raises(NotFoundError, match=r"linux/arch19$"):
        select(index(*many[:20]), Platform.parse("linux/amd64"))


# --- nested indexes ---

AMD64 = Platform.parse("linux/amd64")


class Shelf(dict[Digest, Manifest | Index]):
    """Documents by digest, and the order in which they were asked for."""

    def __init__(self, documents: dict[str, Manifest | Index]) -> None:
        super().__init__({Digest.of(name.encode()): document for name, document in documents.items()})
        self.asked: list[Digest] = []

    def load(self, descriptor: Descriptor) -> Manifest | Index:
        """Document of a descriptor."""
        self.asked.append(descriptor.digest)
        return self[descriptor.digest]


def nested(name: str) -> Descriptor:
    """Entry for an index."""
    return entry(name, None, oci.OCI_INDEX)


def test_descend_of_a_manifest_is_the_manifest() -> None:
    """Where there is no index there is nothing to choose."""
    shelf = Shelf({"amd": image("amd")})
    assert descend(AMD, AMD64, shelf.load) == (AMD, image("amd"))


def test_descend_goes_through_nested_indexes() -> None:
    """Three indexes inside each other are read, and only the documents on the way."""
    shelf = Shelf(
        {
            "a": index(ARM, nested("b")),
            "b": index(nested("c"), WINDOWS),
            "c": index(ARM, AMD),
            "amd": image("amd"),
        }
    )
    assert descend(nested("a"), AMD64, shelf.load) == (AMD, image("amd"))
    assert shelf.asked == [Digest.of(name) for name in (b"a", b"b", b"c", b"amd")]


def test_descend_prefers_a_match_to_a_nested_index() -> None:
    """An entry that names the platform comes before one that may hold it."""
    shelf = Shelf({"a": index(nested("b"), AMD), "amd": image("amd")})
    assert descend(nested("a"), AMD64, shelf.load, allow_unspecified=False)[0] == AMD


def test_descend_looks_into_the_next_index_when_one_has_nothing() -> None:
    """The first index is not the only one; one seen already is not asked for again."""
    shelf = Shelf(
        {"a": index(nested("b"), nested("b"), nested("c")), "b": index(ARM), "c": index(AMD), "amd": image("amd")}
    )
    assert descend(nested("a"), AMD64, shelf.load, allow_unspecified=False)[0] == AMD
    assert shelf.asked.count(Digest.of(b"b")) == 1


def test_descend_lists_what_all_indexes_hold() -> None:
    """Absence is told over all that was seen."""
    shelf = Shelf({"a": index(nested("b"), WINDOWS), "b": index(ARM)})
    with pytest.raises(NotFoundError, match="windows/amd64, linux/arm64/v8"):
        descend(nested("a"), AMD64, shelf.load)


def test_four_levels_are_too_many() -> None:
    """The fourth index is refused before it is asked for, or after where its descriptor hid what it is."""
    documents: dict[str, Manifest | Index] = {
        "a": index(nested("b")),
        "b": index(nested("c")),
        "c": index(nested("d")),
        "d": index(AMD),
    }
    shelf = Shelf(documents)
    with pytest.raises(LimitError, match="inside each other"):
        descend(nested("a"), AMD64, shelf.load)
    assert Digest.of(b"d") not in shelf.asked
    with pytest.raises(LimitError, match="inside each other"):
        descend(nested("a"), AMD64, Shelf({**documents, "c": index(entry("d", None))}).load)


@pytest.mark.parametrize("back", ["a", "b"])
def test_a_circle_is_refused(back: str) -> None:
    """An index that leads back to one above it, or to itself, is no way to a manifest."""
    shelf = Shelf({"a": index(nested("b")), "b": index(nested(back))})
    with pytest.raises(InvalidManifestError, match="back to itself"):
        descend(nested("a"), AMD64, shelf.load)
    assert len(shelf.asked) == 2


def test_descriptors_of_all_indexes_are_counted_together() -> None:
    """Ten thousand descriptors over all nested indexes, and no more."""
    wide = index(*[entry(f"x{n}", "linux/s390x") for n in range(6000)])
    shelf = Shelf({"a": index(nested("b"), nested("c")), "b": wide, "c": wide})
    with pytest.raises(LimitError, match="10000"):
        descend(nested("a"), AMD64, shelf.load)
    shelf = Shelf({"a": index(nested("b"), nested("c")), "b": index(*wide.manifests[:3998]), "c": wide})
    with pytest.raises(NotFoundError):
        descend(nested("a"), AMD64, shelf.load)


def test_a_walk_without_result_ends() -> None:
    """An index of thousands of indexes does not make thousands of requests."""
    names = [f"n{n}" for n in range(5000)]
    shelf = Shelf({"a": index(*map(nested, names)), **{name: index(ARM) for name in names}})
    with pytest.raises(LimitError, match="64"):
        descend(nested("a"), AMD64, shelf.load)
    assert len(shelf.asked) == 64
