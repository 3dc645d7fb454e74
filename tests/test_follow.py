"""Reading a blob behind whoever writes it: fetched once, proven before its last byte, taken over from the dead."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import pytest

from layercache import LayerCache
from layercache.control import Control
from layercache.errors import CancelledError, IntegrityError, NamespacePurgedError, NoSpaceError
from layercache.fill import through
from layercache.integrity import CHUNK
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Arriving, Generation, NamespaceName, Seal, Store
from layercache.testing.registry import Drip, ScriptedRegistry

SIZE = 6 * CHUNK + 4321
DATA = random.Random(8).randbytes(SIZE)
WHAT = Descriptor(OCTET_STREAM, Digest.of(DATA), SIZE)
NAME = NamespaceName("acme/one")


@pytest.fixture(params=["clear", "sealed"])
def generation(request, root) -> Iterator[Generation]:
    with closing(Store(root)) as store:
        seal: Seal | None = "ephemeral" if request.param == "sealed" else None
        made = store.generation(NAME, create=True, seal=seal)
        assert made is not None
        with closing(made):
            yield made


class Source:
    """Gives the blob's bytes from any offset, and notes which."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[int] = []

    def __call__(self, offset: int) -> Iterator[bytes]:
        self.asked.append(offset)
        for start in range(offset, len(self.data), CHUNK):
            yield self.data[start : start + CHUNK]


def follow(
    generation: Generation, source: Callable[[int], Iterator[bytes]], **options
) -> Generator[bytes | memoryview, None, None]:
    return through(generation, WHAT, source, origin="test", control=Control(**options))


def write(generation: Generation, count: int, data: bytes = DATA):
    ingest = generation.begin(WHAT)
    assert ingest is not None
    ingest.feed(data[ingest.offset : count])
    return ingest


def commit(ingest) -> None:
    ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="test").close()


def test_what_is_whole_comes_before_the_writer_is_done_and_the_rest_after(generation):
    source, got = Source(), bytearray()
    with write(generation, 3 * CHUNK + 100) as ingest:
        pieces = follow(generation, source)
        while len(got) < 3 * CHUNK:
            got += next(pieces)
        assert got == DATA[: 3 * CHUNK]  # whole chunks only
        ingest.feed(DATA[ingest.offset :])
        commit(ingest)
    for piece in pieces:
        got += piece
    assert got == DATA
    assert source.asked == []


def test_the_last_piece_is_never_one_that_is_wrong(generation):
    """Behind a writer whose source lies about the last byte it is proven by who has read the rest, or an error."""
    got = bytearray()
    with write(generation, SIZE, DATA[:-1] + bytes([DATA[-1] ^ 1])) as ingest:
        pieces = follow(generation, Source())
        while len(got) < 6 * CHUNK:
            got += next(pieces)
        with pytest.raises(IntegrityError):
            commit(ingest)
    try:
        for piece in pieces:
            got += piece
    except IntegrityError:
        assert got == DATA[: len(got)]
        assert len(got) < SIZE
    else:
        assert got == DATA


def test_a_writer_that_is_lied_to_gives_no_last_piece_to_who_reads_behind_him(generation):
    lie = DATA[:CHUNK] + b"x" + DATA[CHUNK + 1 :]
    source, got = Source(), bytearray()
    ingest = write(generation, 4 * CHUNK, lie)
    pieces = follow(generation, source)
    while len(got) < 3 * CHUNK:
        got += next(pieces)
    ingest.abort()  # he has found out
    with pytest.raises(IntegrityError):  # noqa: PT012
        for piece in pieces:
            got += piece
    assert len(got) < SIZE
    assert generation.has(WHAT.digest)  # what came after was right, and is kept
    with generation.open(WHAT.digest) as blob:
        assert b"".join(map(bytes, blob.chunks())) == DATA


@pytest.mark.parametrize("read", [0, 1, 3])
def test_where_the_writer_stops_the_reader_goes_on_and_stores_it(generation, read):
    source, got = Source(), bytearray()
    ingest = write(generation, 3 * CHUNK + 100)
    pieces = follow(generation, source)
    while len(got) < read * CHUNK:
        got += next(pieces)
    ingest.suspend()
    for piece in pieces:
        got += piece
    assert got == DATA
    assert source.asked == [3 * CHUNK]
    assert generation.has(WHAT.digest)


def test_where_what_he_wrote_is_gone_it_is_fetched_anew_and_nothing_comes_twice(generation):
    source, got = Source(), bytearray()
    ingest = write(generation, 3 * CHUNK + 100)
    pieces = follow(generation, source)
    while len(got) < 2 * CHUNK:
        got += next(pieces)
    ingest.abort()
    for piece in pieces:
        got += piece
    assert got == DATA
    assert source.asked == [0]
    assert generation.has(WHAT.digest)


def test_a_writer_without_progress_is_gone_past(generation, monkeypatch):
    monkeypatch.setattr("layercache.fill._NO_PROGRESS", 0.2)
    source = Source()
    with write(generation, 2 * CHUNK):
        assert b"".join(map(bytes, follow(generation, source))) == DATA
    assert source.asked == [2 * CHUNK]
    assert not generation.has(WHAT.digest)


def test_a_store_without_room_is_gone_past(generation, monkeypatch):
    def refuse(*_args, **_options):
        raise NoSpaceError("full")

    monkeypatch.setattr(Generation, "begin", refuse)
    source = Source()
    assert b"".join(map(bytes, follow(generation, source))) == DATA
    assert source.asked == [0]
    with pytest.raises(IntegrityError):
        list(follow(generation, Source(DATA[:-1] + b"!")))


def test_a_cancel_ends_the_wait(generation):
    cancel = threading.Event()
    with write(generation, 2 * CHUNK):
        pieces = follow(generation, Source(), cancel=cancel)
        next(pieces)
        cancel.set()
        with pytest.raises(CancelledError):
            list(pieces)


def test_a_purge_ends_it_and_nothing_stays_open(generation, root):
    store = Store(root)
    with write(generation, 2 * CHUNK) as ingest:
        pieces = follow(generation, Source())
        next(pieces)
        assert store.purge(NAME, wait=0.0).level == "fenced"
        with pytest.raises(NamespacePurgedError):
            list(pieces)
        ingest.abort()
    generation.close()
    assert store.purge(NAME, wait=5.0).level in ("unlinked", "crypto-erased")
    store.close()
    assert not list(root.glob("data/*"))


def test_who_stops_reading_leaves_the_writer_alone(generation):
    with write(generation, 2 * CHUNK) as ingest:
        pieces = follow(generation, Source())
        next(pieces)
        pieces.close()
        ingest.feed(DATA[ingest.offset :])
        commit(ingest)
    assert generation.has(WHAT.digest)


def test_who_stops_reading_in_the_place_of_a_writer_keeps_what_there_is(generation):
    write(generation, 4 * CHUNK).suspend()
    pieces = follow(generation, Source())
    next(pieces)
    pieces.close()
    with write(generation, SIZE) as ingest:
        assert ingest.offset == SIZE


def test_damage_behind_the_writer_is_not_given_out(generation, root):
    head = generation.form.head
    with write(generation, 3 * CHUNK):
        (path,) = (path for path in root.glob("data/*/in/*") if path.stat().st_size == head + 3 * CHUNK)
        with path.open("r+b") as file:
            file.seek(head + CHUNK + 5)
            file.write(b"damage")
        arriving = Arriving.of(generation, WHAT)
        assert arriving is not None
        with closing(arriving):
            assert b"".join(map(bytes, arriving.chunks(0))) == DATA[:CHUNK]


def test_one_transfer_for_a_pull_and_readers_in_two_processes(root, scripted: ScriptedRegistry):
    scripted.put_blob("demo/big", DATA)
    scripted.fault("blobs/*", Drip(rate=3 << 20, size=1 << 18), times=None)
    repository = f"{scripted.host}/demo/big"
    pids = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                time.sleep(0.2 * number)
                with LayerCache(root, janitor=False) as cache, cache.namespace("acme").stream(WHAT, repository) as read:
                    status = 0 if read.read() == DATA else 2
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert scripted.count("blobs/*") == 1


def test_a_killed_leader_is_followed_by_a_reader_in_another_process(root, scripted: ScriptedRegistry):
    scripted.put_blob("demo/big", DATA)
    scripted.fault("blobs/*", Drip(rate=3 << 20, size=1 << 18), times=None)
    repository = f"{scripted.host}/demo/big"
    pid = os.fork()
    if pid == 0:
        try:
            with LayerCache(root, janitor=False) as cache, cache.namespace("acme").stream(WHAT, repository) as read:
                read.read()
        finally:
            os._exit(1)
    end = time.monotonic() + 20
    while not list(root.glob("data/*/in/*")) and time.monotonic() < end:  # it leads
        time.sleep(0.01)
    with LayerCache(root, janitor=False) as cache:
        with cache.namespace("acme").stream(WHAT, repository) as read:
            got = read.read(2 * CHUNK)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            got += read.read()
        assert got == DATA
        assert cache.namespace("acme").open(WHAT.digest).size == SIZE
    assert scripted.count("blobs/*") == 2
