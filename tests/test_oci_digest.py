"""Digests: only valid ones exist, and their text is safe everywhere."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest

from layercache.errors import InvalidDigestError, UnsupportedError
from layercache.oci import Digest

SHA256 = "sha256:" + hashlib.sha256(b"layer").hexdigest()
SHA512 = "sha512:" + hashlib.sha512(b"layer").hexdigest()


@pytest.mark.parametrize("text", [SHA256, SHA512])
def test_parse_keeps_a_good_digest(text: str) -> None:
    """Both algorithms of the specification are read, and written as they were read."""
    digest = Digest.parse(text)
    assert str(digest) == text
    assert f"{digest.algorithm}:{digest.encoded}" == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        ":" + "a" * 64,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "SHA256:" + "a" * 64,
        "sha256:" + "g" * 64,
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 64 + "\n",
        " sha256:" + "a" * 64,
        "sha256:" + "a" * 63 + "\0",
        "sha256:" + "a" * 63 + "@",
        "sha256:" + "/" * 64,
        "sha256:../../../x",
        "sha256:%2e%2e%2f" + "a" * 55,
        "sha256:" + "\u0661" * 64,  # digits, but not ours
        "sha256::" + "a" * 64,
        "sha256+:" + "a" * 64,
        "blake3:" + "a" * 63,
        "blake3:" + "A" * 64,
        "a" * 1_000_000,
        "a+" * 500_000 + ":" + "a",
    ],
)
def test_parse_refuses_what_is_no_digest(text: str) -> None:
    """Wrong length, case, alphabet or shape: refused before it reaches a path or a URL."""
    with pytest.raises(InvalidDigestError):
        Digest.parse(text)


@pytest.mark.parametrize("value", [None, 5, b"sha256:" + b"a" * 64, ["sha256"]])
def test_parse_refuses_what_is_no_text(value: object) -> None:
    """A value of another type gives the same typed error."""
    with pytest.raises(InvalidDigestError):
        Digest.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["blake3:" + "a" * 64, "multihash+base58:QmRZxt2b1FVZPNqd8hsiykDL3TdBDeTSPX9Kv46HmX4Gx8", "md5:d41d8cd9"]
)
def test_other_algorithms_are_unsupported_not_invalid(text: str) -> None:
    """A well-formed digest of an algorithm we lack is neither accepted nor called malformed."""
    with pytest.raises(UnsupportedError):
        Digest.parse(text)


@pytest.mark.parametrize(("algorithm", "encoded"), [("sha256", "a" * 63), ("sha256:" + "a" * 64, ""), ("", "a" * 64)])
def test_constructor_checks_like_the_parser(algorithm: str, encoded: str) -> None:
    """No invalid value can be built around the parser."""
    with pytest.raises(InvalidDigestError):
        Digest(algorithm, encoded)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_of_and_hasher_agree_with_hashlib(algorithm: str) -> None:
    """Hashing at once and in pieces gives what the standard library gives."""
    digest = Digest.of(b"some bytes", algorithm=algorithm)
    assert digest.encoded == hashlib.new(algorithm, b"some bytes").hexdigest()
    state = digest.hasher()
    for piece in (b"some ", bytearray(b"by"), memoryview(b"tes")):
        state.update(piece)
    assert state.hexdigest() == digest.encoded
    assert digest.hasher() is not state


def test_of_names_an_unknown_algorithm() -> None:
    """Asking for a hash we lack is a typed error."""
    with pytest.raises(UnsupportedError, match="blake3"):
        Digest.of(b"", algorithm="blake3")


def test_digest_is_a_value() -> None:
    """Equal texts are one key; values do not change, sort by text and survive a trip to another process."""
    one, two = Digest.parse(SHA256), Digest.parse(SHA256)
    assert one == two
    assert len({one, two, Digest.parse(SHA512)}) == 2
    assert min(Digest.parse(SHA512), one) == one
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    with pytest.raises(AttributeError):
        one.encoded = "x"  # type: ignore[misc]


def test_error_shortens_what_it_quotes() -> None:
    """A million characters of input do not become a million characters of log."""
    with pytest.raises(InvalidDigestError) as caught:
        Digest.parse("x" * 1_000_000)
    assert len(str(caught.value)) < 400
