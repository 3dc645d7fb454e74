"""Bounded decoding of plain, gzip and zstd streams."""

from __future__ import annotations

import gc
import hashlib
import struct
import subprocess
import sys
import textwrap
import weakref
import zlib
from collections.abc import Callable

import pytest
import zstandard

from layercache.codec import PIECE, RATIO_FLOOR, Limits, _gzip, decoder, sniff
from layercache.errors import CorruptStreamError, IntegrityError, LayerCacheError, LimitError, UnsupportedError
from layercache.oci import Compression
from tests.compressed import (
    COMPRESSED,
    EMPTY_GZIP,
    RESERVED,
    RLE,
    ZSTD_MAGIC,
    block,
    decode,
    frame,
    gzip,
    pieces,
    raw,
    rle,
    skippable,
    zstd,
)

NOISE = hashlib.shake_128(b"noise").digest(700)
TEXT = b"".join(b"line %d of a text that repeats itself\n" % number for number in range(60))
MIB = 1 << 20

# One of each: skippable first, between and last, empty ones among them; empty frames; with and without checksum,
# content size and single segment; raw, RLE and compressed blocks.
FRAMES = [
    skippable(b"before"),
    zstd(TEXT),
    skippable(b"", number=15),
    zstd(b""),
    zstd(NOISE, sized=False),
    zstd(b"", sized=False, checksum=False),
    zstd(TEXT, checksum=False),
    frame(raw(b"ab"), raw(b""), rle(300), raw(b"cd", last=True)),
    skippable(b"between"),
    zstd(b"x"),
    skippable(b"after", number=3),
    skippable(b""),
]
ZSTD = b"".join(FRAMES)
ZSTD_CONTENT = TEXT + NOISE + TEXT + b"ab" + b"z" * 300 + b"cd" + b"x"

MEMBERS = [
    gzip(TEXT, name=b"layer.tar", comment=b"why not", extra=b"ab\x04\x00data", crc=True),
    EMPTY_GZIP,
    gzip(NOISE),
    gzip(b"x"),
]
GZIP = b"".join(MEMBERS)
GZIP_CONTENT = TEXT + NOISE + b"x"

MAKE: dict[Compression, Callable[[bytes], bytes]] = {"none": bytes, "gzip": gzip, "zstd": zstd}


def edges(parts):
    """Every offset at which one of the parts ends."""
    return {sum(map(len, parts[:count])) for count in range(1, len(parts) + 1)}


def run_alone(program):
    """Run a program in an interpreter of its own and return what it prints."""
    head = """
        import os, re, sys
        from layercache.codec import Limits, decoder
        from layercache.errors import *
        from tests.compressed import *

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
    """
    code = textwrap.dedent(head) + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=["zlib_ng", "zlib_ng without its own class", "zlib"])
def binding(request, monkeypatch):
    """Each way there is to inflate."""
    if request.param == "zlib":
        monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    else:
        zlib_ng = pytest.importorskip("zlib_ng.zlib_ng")
        if request.param != "zlib_ng":
            monkeypatch.delattr(zlib_ng, "_ZlibDecompressor")
    _gzip._binding.cache_clear()
    yield
    _gzip._binding.cache_clear()


# Which


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (GZIP, "gzip"),
        (zstd(b"x"), "zstd"),
        (skippable(b"", number=0), "zstd"),
        (skippable(b"", number=15), "zstd"),
        (ZSTD_MAGIC, "zstd"),
        (b"\x60\x2a\x4d\x18", "none"),
        (ZSTD_MAGIC[:3], "none"),
        (b"\x1f\x8b\x07", "none"),
        (b"PK\x03\x04", "none"),
        (b"", "none"),
        (bytes(512), "none"),
    ],
)
def test_sniff_knows_the_magic_numbers(head, expected):
    """Gzip, zstd and all sixteen skippable frames are told from anything else."""
    assert sniff(head) == expected


def test_an_unknown_compression_is_unsupported():
    """A compression that is not one of the three is refused by its name."""
    with pytest.raises(UnsupportedError, match="lz4"):
        decoder("lz4")  # type: ignore[arg-type]


def test_importing_loads_no_binding():
    """Importing the rooms does not load zstandard or zlib_ng; making a decoder does."""
    code = "import sys, layercache.codec, layercache.stream; print({'zstandard', 'zlib_ng'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Streams that are right


@pytest.mark.parametrize(
    ("compression", "stream", "content"),
    [("none", TEXT, TEXT), ("gzip", GZIP, GZIP_CONTENT), ("zstd", ZSTD, ZSTD_CONTENT)],
)
def test_a_split_at_any_byte_gives_the_same(compression, stream, content):
    """Where the input is cut into feeds makes no difference to the output."""
    for at in range(len(stream) + 1):
        assert decode(compression, stream[:at], stream[at:]) == content
    for step in (1, 2, 3, 7, 100):
        assert decode(compression, *(stream[at : at + step] for at in range(0, len(stream), step))) == content


@pytest.mark.parametrize("make", [bytearray, memoryview, lambda data: memoryview(bytearray(data))])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_input_may_be_any_buffer_and_may_be_reused(compression, make):
    """Once a feed is read to its end, nothing refers to its buffer any more."""
    stream = {"none": TEXT, "gzip": GZIP, "zstd": ZSTD}[compression]
    content = {"none": TEXT, "gzip": GZIP_CONTENT, "zstd": ZSTD_CONTENT}[compression]
    stage, out = decoder(compression), []
    for start in range(0, len(stream), 50):
        data = make(bytearray(stream[start : start + 50]))
        out += [bytes(piece) for piece in stage.feed(data)]
        if not memoryview(data).readonly:
            memoryview(data)[:] = b"\xff" * len(data)
    stage.finish()

    assert b"".join(out) == content


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_pieces_are_bounded_and_worth_handing_on(compression):
    """Eight mebibytes come in pieces of at most one, and not in thousands."""
    content = b"".join(hashlib.sha256(b"%d" % number).digest() * 8 for number in range(8 * MIB // 256))
    stream = MAKE[compression](content)
    sizes = [len(piece) for piece in pieces(decoder(compression), [stream])]

    assert sum(sizes) == len(content)
    assert max(sizes) <= MIB
    assert len(sizes) <= 2 + 1.25 * len(content) // PIECE


@pytest.mark.parametrize(("compression", "part"), [("gzip", gzip(TEXT)), ("zstd", zstd(TEXT))])
def test_thousands_of_small_parts_come_in_few_pieces(compression, part):
    """Twenty thousand frames or members are read to their end, and their output is put together."""
    sizes = [len(piece) for piece in pieces(decoder(compression), [part * 20_000])]

    assert sum(sizes) == 20_000 * len(TEXT)
    assert max(sizes) <= MIB
    assert len(sizes) <= 2 + sum(sizes) // (PIECE // 2)


def test_frames_of_every_encoder_setting_decode():
    """Windows, levels, long mode and frames without a content size are all read."""
    content = TEXT * 3000
    streams = [zstd(content, level=level, sized=sized) for level in (-5, 1, 9, 19) for sized in (True, False)]
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    streams.append(zstandard.ZstdCompressor(compression_params=parameters).compress(content))

    for stream in streams:
        assert decode("zstd", stream) == content


@pytest.mark.parametrize(
    ("descriptor", "fields"),
    [
        (0x20, b"\x04"),  # single segment, content size in 1 byte
        (0x60, b"\x04\x01"),  # in 2 bytes, from 256
        (0xA0, b"\x04\x00\x00\x00"),
        (0xE0, b"\x04\x00\x00\x00\x00\x00\x00\x00"),
        (0x00, b"\x00"),  # window only
        (0x40, b"\x00\x04\x01"),
        (0x80, b"\x07\x04\x00\x00\x00"),
        (0xC0, b"\x58\x04\x00\x00\x00\x00\x00\x00\x00"),
        (0x21, b"\x00\x04"),  # a dictionary of number 0 is none
        (0x03, b"\x58\x00\x00\x00\x00"),
        (0x10, b"\x58"),  # the bit that a decoder must not look at
    ],
)
def test_every_form_of_a_frame_header_is_read(descriptor, fields):
    """The fields of a header are found whatever their lengths are."""
    size = 0x104 + 256 if descriptor in (0x60, 0x40) else 4
    stream = frame(rle(size, last=True), descriptor=descriptor, fields=fields)

    assert decode("zstd", stream + stream) == b"z" * size * 2


def test_nul_padding_after_gzip_is_accepted():
    """Zeros after the last member, in any cut, are padding."""
    assert decode("gzip", GZIP + bytes(1000)) == GZIP_CONTENT
    assert decode("gzip", GZIP, bytes(3), bytes(600_000)) == GZIP_CONTENT


def test_each_gzip_binding_reads_the_same(binding):
    """Members, padding and large output come out the same with and without zlib_ng."""
    large = TEXT * 2000
    stream = GZIP + gzip(large) + bytes(5)

    assert decode("gzip", stream) == GZIP_CONTENT + large
    assert decode("gzip", *(stream[at : at + 11] for at in range(0, len(stream), 11))) == GZIP_CONTENT + large
    assert max(map(len, pieces(decoder("gzip"), [stream]))) <= MIB


# Streams that are wrong


def test_a_zstd_cut_anywhere_but_between_frames_is_an_error():
    """A stream cut in a header, a block, a checksum or a skippable frame is cut; whole frames are a stream."""
    whole = edges(FRAMES)
    for at in range(len(ZSTD)):
        stage = decoder("zstd")
        list(stage.feed(ZSTD[:at]))
        if at in whole:
            stage.finish()
        else:
            with pytest.raises(CorruptStreamError, match="the stream is"):
                stage.finish()


def test_a_gzip_cut_anywhere_but_between_members_is_an_error():
    """A stream cut in any field of a header, in the data or in the trailer is cut."""
    whole = edges(MEMBERS)
    for at in range(len(GZIP)):
        stage = decoder("gzip")
        list(stage.feed(GZIP[:at]))
        if at in whole:
            stage.finish()
        else:
            with pytest.raises(CorruptStreamError, match="the stream is"):
                stage.finish()


def test_each_gzip_binding_sees_damage(binding):
    """Cut, flipped and followed by garbage: an error with and without zlib_ng."""
    for stream in (GZIP[:-1], GZIP + b"x", GZIP[:-5] + b"\xff" + GZIP[-4:], GZIP[1:]):
        with pytest.raises(CorruptStreamError):
            decode("gzip", stream)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_an_empty_stream_is_cut(compression):
    """No byte at all is no gzip or zstd stream."""
    with pytest.raises(CorruptStreamError, match="empty"):
        decode(compression)
    with pytest.raises(CorruptStreamError, match="empty"):
        decode(compression, b"", b"")


def test_no_compression_has_no_wrong_streams():
    """Any bytes are the content, none included."""
    assert decode("none") == b""
    assert decode("none", b"a", b"", b"b") == b"ab"


@pytest.mark.parametrize(
    "tail", [b"x", b"\0", bytes(100), GZIP, b"\x28\xb5\x2f", b"\x60\x2a\x4d\x18\0\0\0\0", b"garbage"]
)
def test_garbage_after_zstd_is_an_error(tail):
    """Whatever follows the last frame and is no frame is refused, zeros too."""
    with pytest.raises(CorruptStreamError):
        decode("zstd", ZSTD + tail)


@pytest.mark.parametrize("tail", [b"x", b"\x1f", b"garbage", bytes(4) + b"x", bytes(4) + GZIP, ZSTD])
@pytest.mark.parametrize("apart", [False, True])
def test_garbage_after_gzip_is_an_error(tail, apart):
    """Whatever follows the last member is refused, but for zeros to the end."""
    with pytest.raises(CorruptStreamError):
        decode("gzip", *((GZIP, tail) if apart else (GZIP + tail,)))


@pytest.mark.parametrize("feeds", [[bytes(4)], [bytes(4), GZIP], [bytes(4) + GZIP], [GZIP, bytes(4), GZIP]])
def test_padding_before_a_gzip_member_is_an_error(feeds):
    """Zeros are padding at the end only."""
    with pytest.raises(CorruptStreamError):
        decode("gzip", *feeds)


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(frame(rle(3, last=True), descriptor=0x08), id="reserved bit"),
        pytest.param(frame(block(RESERVED, 1, b"x", last=True)), id="reserved block type"),
        pytest.param(frame(raw(b"a"), block(RESERVED, 1, b"x", last=True)), id="reserved type of a later block"),
        pytest.param(frame(rle((128 << 10) + 1, last=True)), id="RLE block over 128 KiB"),
        pytest.param(frame(raw(bytes((128 << 10) + 1), last=True)), id="raw block over 128 KiB"),
        pytest.param(frame(block(COMPRESSED, (128 << 10) + 1, bytes(200_000), last=True)), id="compressed block too"),
        pytest.param(frame(rle(1025, last=True), fields=b"\x00"), id="block over the window"),
        pytest.param(frame(rle(5, last=True), descriptor=0x20, fields=b"\x04"), id="block over a single segment"),
        pytest.param(frame(rle(3, last=True), descriptor=0x20, fields=b"\x04"), id="less than the content size"),
        pytest.param(frame(block(COMPRESSED, 3, b"\xff\xff\xff", last=True)), id="block that does not decode"),
        pytest.param(frame(raw(b"abc", last=True), b"\0\0\0\0", descriptor=0x04), id="wrong checksum"),
        pytest.param(b"not zstd at all", id="no frame"),
    ],
)
def test_a_malformed_zstd_frame_is_an_error(stream):
    """Each way to be wrong raises, in one feed and byte by byte, after frames that are right."""
    with pytest.raises(CorruptStreamError):
        decode("zstd", stream)
    with pytest.raises(CorruptStreamError):
        decode("zstd", zstd(TEXT), *(stream[at : at + 1] for at in range(min(len(stream), 300))), stream[300:])


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(frame(rle(3, last=True), descriptor=0x08), id="reserved bit"),
        pytest.param(frame(block(RESERVED, 1, b"x", last=True)), id="reserved block type"),
        pytest.param(frame(raw(bytes(1025), last=True), fields=b"\x00"), id="block over the window"),
        pytest.param(zstd(b"x") + b"garbage", id="no frame"),
    ],
)
def test_what_the_outline_refuses_never_reaches_the_binding(stream):
    """The walk over headers finds it and says where; the binding would say it in its own words."""
    with pytest.raises(CorruptStreamError, match=r"at bytes \d+") as caught:
        decode("zstd", stream)

    assert caught.value.__cause__ is None
    assert caught.value.offset is not None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda s: s[:-8] + bytes([s[-8] ^ 1]) + s[-7:], id="CRC"),
        pytest.param(lambda s: s[:-1] + bytes([s[-1] ^ 1]), id="length"),
        pytest.param(lambda s: b"\x1f\x8b\x07" + s[3:], id="method"),
        pytest.param(lambda s: s[:3] + b"\xe0" + s[4:], id="reserved flags"),
        pytest.param(lambda s: s[:10] + b"\xff" + s[11:], id="block type"),
    ],
)
def test_a_malformed_gzip_member_is_an_error(damage):
    """Each way to be wrong raises, with the binding's own error as its cause."""
    with pytest.raises(CorruptStreamError) as caught:
        decode("gzip", gzip(b"content"), damage(gzip(b"content")))

    assert caught.value.__cause__ is not None


def test_a_wrong_sum_of_a_gzip_header_is_an_error():
    """The optional CRC of a header is compared."""
    member = gzip(b"content", crc=True)
    with pytest.raises(CorruptStreamError):
        decode("gzip", member[:10] + bytes([member[10] ^ 1]) + member[11:])


def test_errors_name_the_blob():
    """The digest given to the decoder is in the error, as a field where the error has one."""
    for stream in (b"not zstd", frame(fields=b"\xff") + b"\0\0\0", frame(fields=b"\x01\x58", descriptor=1) + b"\0\0\0"):
        with pytest.raises(LayerCacheError, match="sha256:abc"):
            list(decoder("zstd", digest="sha256:abc").feed(stream))
    with pytest.raises(IntegrityError) as caught:
        decoder("gzip", digest="sha256:abc").finish()
    assert caught.value.digest == "sha256:abc"
    with pytest.raises(LimitError, match="sha256:abc"):
        list(decoder("none", digest="sha256:abc", limits=Limits(output=1)).feed(b"abc"))


# Order of calls


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_decoder_is_freed_at_once(compression):
    """Its window, up to 128 MiB, does not wait for the garbage collector."""
    stage = decoder(compression)
    list(stage.feed(MAKE[compression](TEXT)))
    alive = weakref.ref(stage)
    gc.disable()
    try:
        del stage
        assert alive() is None
    finally:
        gc.enable()


def test_an_error_stays():
    """After an error no later call looks as if all were well."""
    stage = decoder("zstd")
    with pytest.raises(CorruptStreamError) as first:
        # The outline is whole; only the checksum, which the binding compares, is wrong.
        list(stage.feed(frame(raw(b"abc", last=True), b"\0\0\0\0", descriptor=0x04)))
    with pytest.raises(CorruptStreamError) as second:
        stage.feed(zstd(b"x"))
    with pytest.raises(CorruptStreamError) as third:
        stage.finish()

    assert first.value is second.value is third.value


def test_a_cut_stays_cut():
    """A stream that was found to be cut cannot be gone on with."""
    stage = decoder("gzip")
    list(stage.feed(GZIP[:20]))
    with pytest.raises(CorruptStreamError, match="cut"):
        stage.finish()
    with pytest.raises(CorruptStreamError, match="cut"):
        stage.feed(GZIP[20:])


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_feed_left_half_read_is_an_error(compression):
    """Output that nobody took cannot be passed over."""
    content = bytes(3 * MIB)
    stream = MAKE[compression](content)

    for read in (lambda feed: None, next, lambda feed: (next(feed), feed.close())):
        stage = decoder(compression)
        feed = stage.feed(stream)
        read(feed)
        with pytest.raises(CorruptStreamError, match="half way"):
            stage.finish()
        with pytest.raises(CorruptStreamError, match="half way"):
            stage.feed(b"")


# Limits


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_output_over_the_limit_is_not_given_out(compression):
    """As much as the limit is read; with a byte more, no more than the limit was given out before the error."""
    content = bytes(3 * MIB)
    stream = MAKE[compression](content)
    out = 0

    assert len(decode(compression, stream, limits=Limits(output=len(content)))) == len(content)
    with pytest.raises(LimitError, match=r"Limits\.output"):  # noqa: PT012 - what came before is asserted below
        for piece in decoder(compression, limits=Limits(output=len(content) - 1)).feed(stream):
            out += len(piece)
    assert out < len(content)


def test_a_zstd_bomb_ends_by_its_ratio():
    """32 KiB that say 1 GiB are refused once they have given what a small file of zeros may."""
    bomb = frame(*[rle(128 << 10)] * 8191, rle(128 << 10, last=True))
    out = 0

    assert len(bomb) < 33_000
    with pytest.raises(LimitError, match="for each compressed one"):  # noqa: PT012 - what came before is asserted below
        for piece in decoder("zstd").feed(bomb):
            out += len(piece)
    assert RATIO_FLOOR - PIECE <= out <= RATIO_FLOOR


def test_a_zstd_bomb_costs_no_memory():
    """32 KiB that say 1 GiB, in one feed, cost less than 4 MiB of memory, even when the limits let them pass."""
    out = run_alone(
        """
        bomb = frame(*[rle(128 << 10)] * 8191, rle(128 << 10, last=True))
        list(decoder("zstd").feed(frame(rle(1, last=True))))  # the binding is loaded
        before = peak()
        stage = decoder("zstd", limits=Limits(ratio=1 << 20))
        print(sum(len(piece) for piece in stage.feed(bomb)))
        stage.finish()
        print(peak() - before)
        """
    ).splitlines()

    assert int(out[0]) == 1 << 30
    assert int(out[1]) < 4 * MIB


def test_a_gzip_bomb_is_read_in_bounded_memory():
    """The best that gzip can do is below the default ratio; its output comes in pieces all the same."""
    out = run_alone(
        """
        bomb = gzip(bytes(16 << 20)) * 20
        list(decoder("gzip").feed(EMPTY_GZIP))
        before = peak()
        stage = decoder("gzip")
        print(sum(len(piece) for piece in stage.feed(bomb)))
        stage.finish()
        print(peak() - before)
        stage = decoder("gzip", limits=Limits(ratio=1000))
        try:
            print(sum(len(piece) for piece in stage.feed(bomb)))
        except LimitError as error:
            print(error)
        """
    ).splitlines()

    assert int(out[0]) == 320 * MIB > RATIO_FLOOR
    assert int(out[1]) < 4 * MIB
    assert "more than 1000 bytes for each" in out[2]


@pytest.mark.parametrize(
    ("descriptor", "fields", "window"),
    [
        (0x00, b"\x89", (128 << 20) // 8 * 9),
        (0x00, b"\xa8", 1 << 31),
        (0x00, b"\xff", 15 << 38),
        (0xA0, b"\x01\x00\x00\x08", (128 << 20) + 1),
        (0xE0, b"\xff" * 8, (1 << 64) - 1),
    ],
)
def test_a_window_over_the_limit_is_refused(descriptor, fields, window):
    """The window a frame asks for is compared with the limit before a byte of it is decoded."""
    stream = frame(raw(b"a", last=True), descriptor=descriptor, fields=fields)
    header = stream[: 5 + len(fields)]
    for feeds in ([stream], [header], [header[:-1], header[-1:]]):
        with pytest.raises(LimitError, match=rf"window of {window} bytes is over the limit of {128 << 20}"):
            decode("zstd", *feeds)


def test_a_window_at_the_limit_is_read():
    """128 MiB by default, and whatever the caller says, are allowed."""
    stream = frame(raw(b"a", last=True), fields=b"\x88")

    assert decode("zstd", stream) == b"a"
    assert decode("zstd", frame(raw(b"a", last=True), fields=b"\x89"), limits=Limits(window=256 << 20)) == b"a"
    assert decode("zstd", frame(raw(b"a", last=True), fields=b"\x00"), limits=Limits(window=1024)) == b"a"
    with pytest.raises(LimitError):
        decode("zstd", frame(raw(b"a", last=True), fields=b"\x00"), limits=Limits(window=1023))
    with pytest.raises(LimitError):
        decode("zstd", stream, limits=Limits(window=(128 << 20) - 1))


def test_no_memory_for_a_window_is_a_memory_error():
    """A stream is not called corrupt because the process has no memory left for it."""
    assert "MemoryError" in run_alone(
        """
        import resource
        list(decoder("zstd").feed(frame(raw(b"a", last=True))))
        used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
        try:
            list(decoder("zstd").feed(frame(raw(b"a", last=True), fields=b"\\x88")))
        except MemoryError:
            print("MemoryError")
        """
    )


@pytest.mark.parametrize(
    ("descriptor", "fields"),
    [(0x01, b"\x58\x05"), (0x02, b"\x58\x00\x01"), (0x03, b"\x58\x00\x00\x00\x01"), (0x21, b"\x07\x01")],
)
def test_a_dictionary_is_unsupported(descriptor, fields):
    """A frame that names a dictionary, in any length of the field, is not read without it."""
    with pytest.raises(UnsupportedError, match="dictionary"):
        decode("zstd", frame(raw(b"a", last=True), descriptor=descriptor, fields=fields))


def test_a_frame_made_with_a_real_dictionary_is_unsupported():
    """What the encoder makes with a dictionary is recognised as such."""
    words = zstandard.train_dictionary(2048, [b"sample %d of some text to learn" % (n % 97) * 3 for n in range(2000)])
    stream = zstandard.ZstdCompressor(dict_data=words).compress(b"sample 5 of some text to learn")

    with pytest.raises(UnsupportedError, match=str(words.dict_id())):
        decode("zstd", stream)


def test_the_two_extremes_of_a_skippable_frame():
    """Its length is four bytes, little endian: 4 GiB less one are skipped without being held."""
    stage = decoder("zstd")
    assert list(stage.feed(struct.pack("<II", 0x184D2A5F, 0xFFFFFFFF) + bytes(5000))) == []
    with pytest.raises(CorruptStreamError, match="cut"):
        stage.finish()


def test_hand_made_streams_are_what_the_tools_read():
    """The makers of this file are right: the real decoders agree with them."""
    reader = zstandard.ZstdDecompressor().stream_reader(ZSTD, read_across_frames=True)
    assert reader.read(1 << 20) == ZSTD_CONTENT
    assert b"".join(zlib.decompress(member, wbits=31) for member in MEMBERS) == GZIP_CONTENT
    assert block(RLE, 7, b"q") == b"\x3a\0\0q"
