"""Streams handed to users: a file object, and ends that are reported only when they are right."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from layercache.codec import Buffer, Limits
from layercache.errors import CorruptStreamError, IntegrityError, LayerCacheError, LimitError
from layercache.oci import OCI_LAYER, Compression, Descriptor, DiffID, Digest
from layercache.stream import ByteStream, uncompressed, verified
from layercache.testing.images import layer_tar
from tests.compressed import gzip, skippable, zstd

MIB = 1 << 20
NOISE = hashlib.shake_128(b"stream").digest(MIB)
MAKE: dict[Compression, Callable[[bytes], bytes]] = {"none": bytes, "gzip": gzip, "zstd": zstd}
COMPRESSIONS: list[Compression] = ["none", "gzip", "zstd"]


def split(data, size=1000):
    """Parts of ``data``."""
    return [data[start : start + size] for start in range(0, len(data), size)]


def reused(data, size=1000):
    """Parts of ``data``, each put into the same memory, which is overwritten at the end too."""
    buffer = bytearray(size)
    for part in split(data, size):
        buffer[: len(part)] = part
        yield memoryview(buffer)[: len(part)]
    buffer[:] = b"\xee" * size


def failing(*parts, error):
    """Parts, then an error."""
    yield from parts
    raise error


class Source:
    """An iterator of parts that knows whether it was closed."""

    def __init__(self, parts):
        self.parts = iter(parts)
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.parts)

    def close(self):
        self.closed += 1


def generator(iterator: Iterator[Buffer]) -> Generator[Buffer, None, None]:
    """Return what is promised as an iterator as what it is, which can be closed."""
    assert isinstance(iterator, types.GeneratorType)
    return iterator


def run_alone(program):
    """Run a program in an interpreter of its own and return what it prints."""
    code = textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def descriptor_of(data, **fields):
    """Descriptor of ``data``, wrong in ``fields``."""
    digest = fields.get("digest", Digest.of(data))
    return Descriptor(media_type=OCI_LAYER, digest=digest, size=fields.get("size", len(data)))


def diff_id(data):
    """DiffID of ``data``."""
    return DiffID(Digest.of(data))


# Reading


@pytest.mark.parametrize("parts", [split, reused, lambda data: [data], lambda data: [b"", *split(data, 7), b""]])
@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2500, 8192, 1 << 30])
def test_read_gives_what_was_asked_for(parts, size):
    """Every read is as long as asked, but the last one, whatever the chunks are; then there is no more."""
    data = NOISE[:8500]
    stream = ByteStream(parts(data))
    out = []
    while got := stream.read(size):
        out.append(got)

    assert b"".join(out) == data
    assert {len(got) for got in out[:-1]} <= {size}
    assert stream.read(size) == b""
    assert stream.read() == b""


@pytest.mark.parametrize("parts", [split, reused])
def test_the_rest_is_read_at_once(parts):
    """Without a size, with None or below 0, a read gives all that is left."""
    for rest in (ByteStream.read, ByteStream.readall, lambda s: s.read(None), lambda s: s.read(-1)):
        stream = ByteStream(parts(NOISE))

        assert stream.read(10) == NOISE[:10]
        assert rest(stream) == NOISE[10:]
        assert rest(stream) == b""


def test_reading_nothing_asks_for_nothing():
    """A read of no bytes does not touch the source."""
    stream = ByteStream(failing(error=RuntimeError("touched")))

    assert stream.read(0) == b""
    assert stream.readinto(bytearray()) == 0


@pytest.mark.parametrize("parts", [split, reused])
def test_readinto_fills_the_buffer(parts):
    """A buffer of any kind is filled whole, across chunks; only the last one is not."""
    stream = ByteStream(parts(NOISE[:5000]))
    target = bytearray(3000)

    assert stream.readinto(target) == 3000
    assert target == NOISE[:3000]
    assert stream.readinto(memoryview(target).cast("I")) == 2000
    assert target[:2000] == NOISE[3000:5000]
    assert stream.readinto(target) == 0


def test_a_whole_chunk_is_not_copied():
    """A read of exactly one chunk of bytes gives that chunk, and so does an iteration over chunks."""
    chunk = bytes(NOISE)
    stream = ByteStream(iter([chunk, chunk]))
    stream.readinto(bytearray(1))
    stream.readinto(bytearray(len(chunk) - 1))
    assert next(stream.chunks()) is chunk

    stream = ByteStream(iter([b"ab", chunk]))
    assert stream.read(2) == b"ab"
    assert stream.readinto(memoryview(bytearray(0))) == 0
    stream._more()
    assert stream.read(len(chunk)) is chunk


def test_chunks_give_what_is_left_as_it_comes():
    """After some reads the rest of the chunk comes first, then the chunks themselves, without a copy."""
    buffer = bytearray(b"klmno")
    stream = ByteStream(iter([b"abcde", b"", b"fghij", buffer]))
    assert stream.read(2) == b"ab"
    chunks = list(stream.chunks())

    assert b"".join(chunks) == b"cdefghijklmno"
    assert len(chunks) == 3
    last = chunks[2]
    assert isinstance(last, memoryview)
    assert last.obj is buffer
    assert list(stream.chunks()) == []


def test_a_tar_is_read_as_a_stream(tmp_path):
    """Python's tarfile and the tar of the system read a layer through it."""
    tree: dict[str, bytes | Path] = {"usr/lib/json": Path(json.__file__).parent, "etc/empty": b"", "big": NOISE * 2}
    content = layer_tar(tree)
    stream = ByteStream(uncompressed(iter(split(zstd(content), 10_000)), "zstd", diff_id(content)))
    names = {}
    with stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            names[member.name] = file.read() if file else None

    assert names["big"] == NOISE * 2
    assert names["usr/lib/json/decoder.py"] == Path(json.__file__).with_name("decoder.py").read_bytes()
    assert names["etc/empty"] == b""


def test_the_standard_library_takes_it_for_a_file():
    """copyfileobj, BufferedReader, TextIOWrapper, pickle and iteration by line work on it."""
    data = "".join(f"line {number}\n" for number in range(5000)).encode()

    out = io.BytesIO()
    shutil.copyfileobj(ByteStream(iter(split(data, 777))), out)
    assert out.getvalue() == data
    with io.BufferedReader(ByteStream(iter(split(data, 777)))) as buffered:
        assert buffered.peek(4)[:4] == b"line"
        assert buffered.read(10) == data[:10]
        assert buffered.read() == data[10:]
    with io.TextIOWrapper(io.BufferedReader(ByteStream(iter(split(data, 777))))) as text:
        assert sum(1 for _ in text) == 5000
    assert list(ByteStream(iter(split(data[:2000], 77)))) == data[:2000].splitlines(keepends=True)
    value = {"weights": bytearray(NOISE), "names": ["a"] * 1000}
    assert pickle.load(ByteStream(iter(split(pickle.dumps(value, protocol=5), 777)))) == value


def test_it_says_what_it_can_do():
    """It is readable, not writable and not seekable."""
    stream = ByteStream(iter([b"x"]))

    assert (stream.readable(), stream.writable(), stream.seekable(), stream.isatty()) == (True, False, False, False)
    for unsupported in (stream.tell, stream.fileno, lambda: stream.seek(0), stream.truncate):
        with pytest.raises(io.UnsupportedOperation):
            unsupported()


# Errors


READS = {
    "read": lambda stream: stream.read(10),
    "read all": lambda stream: stream.read(),
    "readall": lambda stream: stream.readall(),
    "readinto": lambda stream: stream.readinto(bytearray(10)),
    "chunks": lambda stream: list(stream.chunks()),
    "readline": lambda stream: stream.readline(),
}


@pytest.mark.parametrize("again", READS)
@pytest.mark.parametrize("first", READS)
def test_an_error_is_raised_by_every_later_read(first, again):
    """An exhausted generator says "no more"; after an error that must not pass for the end."""
    stream = ByteStream(failing(b"abc", error=IntegrityError("a damaged chunk")))
    for read in (first, again, again):
        with pytest.raises(IntegrityError, match="damaged"):
            READS[read](stream)
    stream.close()


@pytest.mark.parametrize("again", READS)
def test_an_interrupt_is_not_the_end(again):
    """After Ctrl-C in the middle of a chunk the stream says that it was interrupted."""
    stream = ByteStream(failing(b"abc", error=KeyboardInterrupt()))
    assert stream.read(3) == b"abc"
    with pytest.raises(KeyboardInterrupt):
        stream.read(1)
    with pytest.raises(LayerCacheError, match="interrupted"):
        READS[again](stream)


# Closing


def test_close_in_the_middle_lets_go_of_everything():
    """Closing ends the source, then calls on_close, once; closing again is nothing."""
    source, order = Source(split(NOISE)), []
    stream = ByteStream(source, on_close=lambda: order.append(source.closed))
    stream.read(10)
    stream.close()
    stream.close()

    assert stream.closed
    assert order == [1]
    assert source.closed == 1


def test_close_ends_a_generator():
    """A generator's own clean-up runs at close, not at some later collection."""
    ended = []

    def source():
        try:
            yield NOISE
        finally:
            ended.append(True)

    with ByteStream(source()) as stream:
        stream.read(5)
        assert not ended
    assert ended == [True]


def test_close_after_an_error_or_the_end_is_quiet():
    """Whatever became of the stream, closing it raises nothing."""
    stream = ByteStream(failing(b"abc", error=IntegrityError("a damaged chunk")))
    with pytest.raises(IntegrityError), stream:
        stream.read()
    stream = ByteStream(iter([b"abc"]))
    stream.read()
    stream.close()
    ByteStream(iter([b"abc"])).close()


def test_on_close_is_called_even_if_the_source_fails_to_close():
    """A lease is given up whatever the source does; its error is raised."""

    class Stubborn(Source):
        def close(self):
            raise OSError("stuck")

    called = []
    stream = ByteStream(Stubborn([b"abc"]), on_close=lambda: called.append(True))
    with pytest.raises(OSError, match="stuck"):
        stream.close()

    assert called == [True]
    assert stream.closed


def test_a_stream_that_is_dropped_is_closed():
    """Nobody has to wait for a garbage collection of cycles for a lease to be given up."""
    called = []
    stream = ByteStream(iter(split(NOISE)), on_close=lambda: called.append(True))
    stream.read(10)
    gc.disable()
    try:
        del stream
        assert called == [True]
    finally:
        gc.enable()


@pytest.mark.parametrize("use", [*READS.values(), ByteStream.readable, ByteStream.__enter__, lambda s: s.read(0)])
def test_use_after_close_is_a_value_error(use):
    """As with every file."""
    stream = ByteStream(iter([b"abc"]))
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        use(stream)


def test_an_iteration_over_chunks_ends_with_an_error_at_close():
    """Closing under a running iteration is not the end of the content."""
    stream = ByteStream(iter([b"abc", b"def"]))
    chunks = stream.chunks()
    next(chunks)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(chunks)


# Verified


@pytest.mark.parametrize("parts", [split, reused, lambda data: [b"", *split(data, 300_000), b""]])
def test_verified_passes_a_blob_on(parts):
    """The right bytes come out as they went in."""
    assert b"".join(bytes(chunk) for chunk in verified(parts(NOISE), descriptor_of(NOISE))) == NOISE
    assert list(verified(iter([]), descriptor_of(b""))) == []


@pytest.mark.parametrize("parts", [split, reused, lambda data: [*split(data, 300_000), b""]])
@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (NOISE, {"digest": Digest.of(b"another")}),
        (NOISE, {"size": len(NOISE) + 1}),
        (NOISE, {"size": len(NOISE) - 1}),
        (b"", {"size": 1}),
        (b"", {"digest": Digest.of(b"another")}),
    ],
)
def test_verified_holds_the_last_chunk_back(parts, data, fields):
    """A wrong size or digest raises in place of the last chunk."""
    out: list[bytes] = []
    with pytest.raises(IntegrityError):
        out.extend(bytes(chunk) for chunk in verified(parts(data), descriptor_of(data, **fields)))

    assert len(b"".join(out)) < max(1, len(data))


def test_verified_closes_its_source():
    """At the end, after an error and when left in the middle."""
    source = Source(split(NOISE))
    list(verified(source, descriptor_of(NOISE)))
    assert source.closed == 1

    source = Source(split(NOISE))
    with pytest.raises(IntegrityError):
        list(verified(source, descriptor_of(b"short")))
    assert source.closed == 1

    source = Source(split(NOISE))
    chunks = generator(verified(source, descriptor_of(NOISE)))
    next(chunks)
    chunks.close()
    assert source.closed == 1


# Uncompressed


@pytest.mark.parametrize("parts", [split, reused, lambda data: [data]])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_uncompressed_gives_the_content(compression, parts):
    """Every compression gives the content, with and without a DiffID to compare it with."""
    for content in (b"", b"x", NOISE[:5000], NOISE * 2):
        stream = MAKE[compression](content)
        for expected in (diff_id(content), None, DiffID(Digest.of(content, algorithm="sha512"))):
            got = b"".join(bytes(piece) for piece in uncompressed(iter(parts(stream)), compression, expected))
            assert got == content


@pytest.mark.parametrize("parts", [split, reused, lambda data: [data]])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("content", [b"", b"x", NOISE * 3])
def test_a_wrong_diff_id_raises_in_place_of_the_last_piece(compression, parts, content):
    """Neither the end nor the last piece is reported, also not to a reader who wants no more than the size."""
    wrong = diff_id(b"another")
    out: list[bytes] = []
    pieces = uncompressed(iter(parts(MAKE[compression](content))), compression, wrong, digest="sha256:abc")
    with pytest.raises(IntegrityError, match="DiffID") as caught:
        out.extend(map(bytes, pieces))

    assert len(b"".join(out)) < max(1, len(content))
    assert caught.value.digest == "sha256:abc"
    assert caught.value.expected == str(wrong)
    assert caught.value.actual == str(diff_id(content))

    stream = ByteStream(uncompressed(iter(parts(MAKE[compression](content))), compression, wrong))
    for _ in range(2):
        with pytest.raises(IntegrityError, match="DiffID"):
            stream.read(max(1, len(content)))


@pytest.mark.parametrize(("compression", "cut"), [("gzip", 1), ("gzip", 5000), ("zstd", 1), ("zstd", 5000)])
def test_a_cut_stream_raises_in_place_of_the_last_piece(compression, cut):
    """Also with no DiffID that could tell."""
    content = NOISE * 2
    out: list[bytes] = []
    stream = MAKE[compression](content)[:-cut]
    with pytest.raises(CorruptStreamError):
        out.extend(map(bytes, uncompressed(iter(split(stream)), compression, None)))

    assert len(b"".join(out)) < len(content)
    assert content.startswith(b"".join(out))


def test_a_stream_cut_between_frames_is_caught_by_the_diff_id():
    """Whole frames are a whole stream; what was behind them only the DiffID knows."""
    content = NOISE * 2
    with pytest.raises(IntegrityError, match="DiffID"):
        list(uncompressed(iter([zstd(NOISE), skippable(b"index")]), "zstd", diff_id(content)))


def test_limits_are_passed_on():
    """A layer over the caller's limits is refused."""
    with pytest.raises(LimitError):
        list(uncompressed(iter([gzip(NOISE)]), "gzip", None, limits=Limits(output=1000)))


def test_an_error_of_the_source_passes_through():
    """What the source raises is what the reader gets."""
    with pytest.raises(OSError, match="gone"):
        list(uncompressed(failing(gzip(NOISE)[:5000], error=OSError("gone")), "gzip", diff_id(NOISE)))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_uncompressed_closes_its_source_and_ends_its_thread(compression):
    """At the end, after an error and when left in the middle, nothing of a large read remains."""
    content = NOISE * 7
    stream = MAKE[compression](content)

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "layercache-diffid"]

    for expected, leave in ((diff_id(content), False), (diff_id(b"another"), False), (diff_id(content), True)):
        source = Source(split(stream, 3 * MIB))
        iterator = generator(uncompressed(source, compression, expected))
        seen = False
        with contextlib.suppress(IntegrityError):
            for _ in iterator:
                seen = seen or bool(threads())
                if seen and leave:
                    break
        iterator.close()

        assert seen
        assert not threads()
        assert source.closed == 1


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_large_layer_hashed_on_the_side_is_still_checked(compression):
    """Past the point where the second thread starts, a flipped bit is found, and reused memory does no harm."""
    content = NOISE * 7
    other = bytearray(content)
    other[-MIB] ^= 1
    for data, right in ((content, True), (bytes(other), False)):
        out = bytearray()
        with contextlib.nullcontext() if right else pytest.raises(IntegrityError):
            for piece in uncompressed(reused(MAKE[compression](data), 3 * MIB), compression, diff_id(content)):
                out += piece
        assert (out == content) is right


def test_without_a_second_thread_the_hash_goes_on_alone(monkeypatch):
    """A process that may start no more threads reads its layers all the same."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    content = NOISE * 8

    assert b"".join(bytes(p) for p in uncompressed(iter([content]), "none", diff_id(content))) == content
    with pytest.raises(IntegrityError):
        list(uncompressed(iter([content]), "none", diff_id(b"another")))


def test_a_forked_child_can_read_on():
    """The thread stays with the parent; the child hashes alone and comes to the same end."""
    program = """
        import hashlib, os, sys, time
        from layercache.oci import Digest, DiffID
        from layercache.stream import ByteStream, uncompressed
        content = hashlib.shake_128(b"fork").digest(1 << 20) * 16
        parts = iter([content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20)])
        stream = ByteStream(uncompressed(parts, "none", DiffID(Digest.of(content))))
        head = stream.read(8 << 20)
        time.sleep(0.3)  # nothing is being hashed at the fork
        child = os.fork()
        whole = head + stream.read()
        stream.close()
        if child == 0:
            os._exit(7 if whole == content else 1)
        assert whole == content
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_alone(program) == "7\n"


def test_a_piece_lost_in_a_fork_is_an_error():
    """What was being hashed at the fork never ends in the child, which says so and does not wait."""
    program = """
        import os, threading
        from layercache.errors import LayerCacheError
        from layercache.stream import _SideHash
        class Slow:
            def __init__(self):
                self.go = threading.Event()
            def update(self, data):
                self.go.wait()
        slow = Slow()
        check = _SideHash(slow)
        check.update(bytes(5 << 20))
        child = os.fork()
        if child == 0:
            try:
                check.settle()
            except LayerCacheError:
                os._exit(7)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        slow.go.set()
        check.close()
    """
    assert run_alone(program) == "7\n"


def test_memory_stays_bounded_for_any_size():
    """A layer of 256 MiB is read in less than 16 MiB."""
    program = """
        import re
        from layercache.oci import Digest, DiffID
        from layercache.stream import ByteStream, uncompressed
        from tests.compressed import gzip, zstd
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        part = b"".join(b"%d is a number " % number for number in range(60_000))
        layer = {"gzip": gzip(part), "zstd": zstd(part)}
        wrong = DiffID(Digest.of(b""))
        for compression, frame in layer.items():
            list(uncompressed(iter([frame]), compression, None))
        for compression, frame in layer.items():
            before = peak()
            stream = ByteStream(uncompressed((frame for _ in range((256 << 20) // len(part))), compression, wrong))
            size = 0
            try:
                while data := stream.read(64 << 10):
                    size += len(data)
            except Exception as error:
                print(type(error).__name__, size >> 20, peak() - before)
    """
    lines = run_alone(program).splitlines()
    for line in lines:
        name, size, memory = line.split()
        assert name == "IntegrityError"
        assert int(size) >= 250
        assert int(memory) < 16 * MIB
    assert len(lines) == 2
