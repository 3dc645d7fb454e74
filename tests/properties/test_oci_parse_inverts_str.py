"""Law: what a value writes, its parser reads back; what a parser accepts, it writes in one form."""

from __future__ import annotations

import string
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from layercache import oci
from layercache.oci import Descriptor, Digest, MediaType, Platform, Reference, Repository, parse_tag

HEX = "0123456789abcdef"
ALNUM = string.ascii_lowercase + string.digits

digests = st.one_of(
    st.text(HEX, min_size=64, max_size=64).map(lambda h: Digest("sha256", h)),
    st.text(HEX, min_size=128, max_size=128).map(lambda h: Digest("sha512", h)),
)
words = st.text(ALNUM, min_size=1, max_size=8)


def joined(separators: list[str]) -> st.SearchStrategy[str]:
    """Words with one of the separators between each two."""
    pairs = st.lists(st.tuples(st.sampled_from(separators), words), max_size=3)
    return st.tuples(words, pairs).map(lambda p: p[0] + "".join(s + w for s, w in p[1]))


components = joined([".", "_", "__", "-", "----"])
names = st.lists(components, min_size=1, max_size=4).map("/".join)
ports = st.none() | st.integers(1, 65535)
host_names = st.one_of(
    st.lists(joined(["-", "--"]), min_size=2, max_size=4).map(".".join),
    st.just("localhost"),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
hosts = st.tuples(host_names, ports).map(lambda p: p[0] if p[1] is None else f"{p[0]}:{p[1]}")
tags = st.tuples(
    st.sampled_from(string.ascii_letters + string.digits + "_"),
    st.text(string.ascii_letters + string.digits + "._-", max_size=127),
).map("".join)
repositories = st.tuples(hosts, names).filter(lambda p: len("/".join(p)) <= 255).map(lambda p: Repository(*p))
references = st.builds(Reference, repositories, tags.map(parse_tag), st.none() | digests) | st.builds(
    Reference, repositories, st.none(), digests
)
tokens = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=12).filter(lambda t: t[0].isalnum())
platform_texts = st.builds(
    lambda system, version, features, architecture, variant: (
        system
        + (f"({'+'.join([version, *features])})" if version or features else "")
        + f"/{architecture}"
        + (f"/{variant}" if variant else "")
    ),
    tokens,
    st.just("") | tokens,
    st.lists(tokens, max_size=3),
    tokens | st.sampled_from(["amd64", "x86_64", "arm", "arm64", "aarch64", "armhf"]),
    st.just("") | tokens | st.sampled_from(["v7", "v8", "8"]),
)
subtypes = st.text(string.ascii_letters + string.digits + "!#$&-^_.+", min_size=1, max_size=127).filter(
    lambda t: t[0].isalnum()
)
media_types = st.tuples(subtypes, subtypes).map(lambda p: MediaType("/".join(p)))
printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
platforms = st.builds(
    Platform.of, st.fixed_dictionaries({"os": printable, "architecture": printable, "variant": printable})
)


@given(digests)
def test_digest(digest: Digest) -> None:
    """A digest reads back as itself."""
    assert Digest.parse(str(digest)) == digest


@given(references)
def test_reference(reference: Reference) -> None:
    """A reference reads back as itself, with its transport too."""
    assert Reference.parse(str(reference)) == reference
    assert Reference.parse(f"docker://{reference}") == reference


@given(repositories)
def test_repository(repository: Repository) -> None:
    """A repository reads back as itself, and as the one of a reference."""
    assert Repository.parse(str(repository)) == repository
    assert Reference.parse(str(repository)).repository == repository


@given(platform_texts)
def test_platform(text: str) -> None:
    """What was read once reads the same ever after."""
    platform = Platform.parse(text)
    assert Platform.parse(str(platform)) == platform
    assert Platform.of(platform.to_json()) == platform


@given(media_types)
def test_media_type(media_type: MediaType) -> None:
    """A media type reads back as itself, with parameters too."""
    assert MediaType.parse(str(media_type)) == media_type
    assert MediaType.parse(f"{media_type}; charset=utf-8") == media_type


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "platform": platforms,
            "annotations": st.dictionaries(st.text(), st.text(), max_size=3),
            "urls": st.lists(st.text(), max_size=2).map(tuple),
            "artifact_type": media_types,
        },
    ),
    media_types,
    st.binary(max_size=64),
    st.booleans(),
)
def test_descriptor(members: dict[str, Any], media_type: MediaType, content: bytes, embedded: bool) -> None:
    """A descriptor reads back as itself from its JSON."""
    data = content if embedded else None
    descriptor = Descriptor(media_type, Digest.of(content), len(content), data=data, **members)
    assert Descriptor.parse(descriptor.to_json()) == descriptor


@given(st.binary(), st.sampled_from(["sha256", "sha512"]))
def test_digest_of_pieces_is_digest_of_whole(content: bytes, algorithm: str) -> None:
    """Hashing in two pieces is hashing at once."""
    digest = Digest.of(content, algorithm=algorithm)
    state = digest.hasher()
    state.update(content[: len(content) // 2])
    state.update(content[len(content) // 2 :])
    assert state.hexdigest() == digest.encoded
    assert oci.Digest.parse(str(digest)) == digest
