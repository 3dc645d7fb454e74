"""Size, digest and chunk sums of a stream."""

import hashlib
import itertools
import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from layercache.errors import IntegrityError
from layercache.integrity import (
    CHUNK,
    FIRST,
    SUM_SIZE,
    ChunkSums,
    Verifier,
    chunk_count,
    chunk_index,
    chunk_range,
    chunk_sum,
)
from layercache.oci import Digest

SIZES = [0, 1, FIRST - 1, FIRST, FIRST + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7]


@pytest.mark.parametrize("size", SIZES)
def test_chunks_cover_a_blob_without_gap_or_overlap(size):
    """Chunk ranges follow one another from the first byte to the last."""
    position = 0
    for index in range(chunk_count(size)):
        start, end = chunk_range(index, size)

        assert start == position
        assert end > start
        assert chunk_index(start) == chunk_index(end - 1) == index
        position = end
    assert position == size


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_a_stream_are_the_sums_of_its_chunks(size):
    """However a stream is cut into pieces, its sums are those of its chunks."""
    data = random.Random(size).randbytes(size)
    expected = b"".join(chunk_sum(data[slice(*chunk_range(i, size))]) for i in range(chunk_count(size)))
    for step in (1 << 16, 70_001, CHUNK, 5 * CHUNK):
        sums = ChunkSums()
        for start in range(0, size, step):
            sums.feed(data[start : start + step])

        assert sums.finish() == expected
    assert len(expected) == chunk_count(size) * SUM_SIZE


def test_a_chunk_sum_is_xxh3_128():
    """The sum in slices is the plain XXH3-128, so that others can check it."""
    data = bytes(range(256)) * 4096

    assert chunk_sum(data) == xxhash.xxh3_128_digest(data)


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_verifier_accepts_the_content_in_any_pieces(data, cuts):
    """A stream with the right size and digest passes, however it is cut."""
    verifier = Verifier(Digest.of(data), len(data))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        verifier.feed(data[start:end])

    verifier.finish()
    assert verifier.taken == len(data)


def test_verifier_refuses_the_byte_after_the_size():
    """Too many bytes are refused when they come, not at the end."""
    verifier = Verifier(Digest.of(b"abc"), 3)
    verifier.feed(b"abc")

    with pytest.raises(IntegrityError) as caught:
        verifier.feed(b"d")
    assert caught.value.expected == "3"


def test_verifier_compares_size_before_digest():
    """A short stream is named as such."""
    verifier = Verifier(Digest.of(b"abc"), 3)
    verifier.feed(b"ab")

    with pytest.raises(IntegrityError, match="wrong size"):
        verifier.finish()


def test_verifier_refuses_other_content_of_the_same_size():
    """The digest decides, and the error names both."""
    wanted = Digest.of(b"abc")
    verifier = Verifier(wanted, 3)
    verifier.feed(b"abd")

    with pytest.raises(IntegrityError) as caught:
        verifier.finish()
    assert caught.value.digest == str(wanted)
    assert caught.value.actual == f"sha256:{hashlib.sha256(b'abd').hexdigest()}"


def test_verifier_knows_sha512():
    """The algorithm is the digest's own."""
    verifier = Verifier(Digest.of(b"abc", algorithm="sha512"), 3)
    verifier.feed(b"abc")

    verifier.finish()
