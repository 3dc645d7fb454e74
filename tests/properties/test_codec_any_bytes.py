"""Whatever the bytes are, a decoder gives the content or one of our errors."""

from __future__ import annotations

import contextlib
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from layercache.codec import Limits, decoder
from layercache.errors import LayerCacheError
from layercache.oci import Compression
from tests.compressed import block, decode, frame, gzip, skippable, zstd

COMPRESSIONS: list[Compression] = ["none", "gzip", "zstd"]

contents = st.one_of(st.binary(max_size=300), st.binary(min_size=1, max_size=20).map(lambda data: data * 200))
blocks = st.tuples(st.integers(0, 3), st.integers(0, 400), st.binary(max_size=60)).map(lambda args: block(*args))
frames = st.one_of(
    st.builds(zstd, contents, checksum=st.booleans(), sized=st.booleans(), level=st.sampled_from([1, 3])),
    st.builds(skippable, st.binary(max_size=30), number=st.integers(0, 15)),
)
parts: dict[Compression, st.SearchStrategy[list[bytes]]] = {
    "none": st.lists(contents, max_size=4),
    "gzip": st.lists(st.builds(gzip, contents, crc=st.booleans()), min_size=1, max_size=4),
    "zstd": st.lists(frames, min_size=1, max_size=6),
}
wild = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda descriptor, fields, body: frame(*body, descriptor=descriptor, fields=fields),
        st.integers(0, 255),
        st.binary(max_size=14),
        st.lists(blocks, max_size=4),
    ),
)


def cuts(data, stream):
    """Feeds that together are ``stream``."""
    at = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6), label="cuts"))
    return [stream[start:end] for start, end in zip([0, *at], [*at, len(stream)], strict=True)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@given(data=st.data())
def test_cuts_make_no_difference(compression, data):
    """Any stream in any cut gives what another decoder gives for the whole."""
    made = data.draw(parts[compression], label="parts")
    stream = b"".join(made)
    content = {
        "none": lambda: stream,
        "gzip": lambda: b"".join(zlib.decompress(part, wbits=31) for part in made),
        "zstd": lambda: zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True).read(1 << 20),
    }[compression]()

    assert decode(compression, *cuts(data, stream)) == content


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@given(data=st.data())
def test_a_stream_may_end_at_the_end_of_a_part_only(compression, data):
    """A prefix is a whole stream exactly if it is a number of whole parts."""
    made = data.draw(parts[compression], label="parts")
    stream = b"".join(made)
    at = data.draw(st.integers(0, len(stream) - 1), label="cut")
    whole = at in {sum(map(len, made[:count])) for count in range(1, len(made) + 1)}
    with contextlib.nullcontext() if whole else pytest.raises(LayerCacheError):
        decode(compression, *cuts(data, stream[:at]))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@given(data=st.data())
def test_damage_is_found_or_does_no_harm(compression, data):
    """A stream with some bytes changed never raises a foreign error, and never anything after an error."""
    stream = bytearray(b"".join(data.draw(parts[compression], label="parts")))
    for at in data.draw(st.lists(st.integers(0, max(0, len(stream) - 1)), max_size=3), label="at"):
        stream[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
    survive(compression, cuts(data, bytes(stream)))


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@given(data=st.data())
def test_wild_bytes_raise_our_errors_only(compression, data):
    """Bytes from anywhere, and frames with any header and any blocks, are read or refused."""
    stream = data.draw(st.one_of(wild, st.lists(st.one_of(wild, frames), max_size=3).map(b"".join)), label="stream")
    survive(compression, cuts(data, stream))


@given(data=st.data())
def test_the_outline_and_the_binding_agree(data):
    """What both read, they read alike: a stream that is accepted is, to the binding, that content."""
    stream = data.draw(st.lists(st.one_of(wild, frames), min_size=1, max_size=3).map(b"".join), label="stream")
    with contextlib.suppress(LayerCacheError):
        content = decode("zstd", stream)
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(stream, read_across_frames=True)
        assert reader.read(len(content) + 1) == content


def survive(compression, feeds):
    """Feed it all; the only errors are ours, and after one there are only errors."""
    stage = decoder(compression, limits=Limits(window=1 << 20))
    failed = False
    for part in [*feeds, b"", b"more"]:
        try:
            for piece in stage.feed(part):
                assert not failed
                assert len(piece) <= 1 << 20
        except LayerCacheError:
            failed = True
        else:
            assert not failed
    with pytest.raises(LayerCacheError) if failed else contextlib.suppress(LayerCacheError):
        stage.finish()
