"""Large blobs over several connections: what is asked for, in which order it comes, and that nothing stays behind."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.control import Control
from layercache.crowd import queued
from layercache.errors import CancelledError, UnreachableError
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Repository
from layercache.registry import Anonymous, Registry, _parts
from layercache.registry._flow import RangesError
from layercache.registry._parts import in_parts, spare_parts
from tests import peers

KIB = 1024


class Wire:
    """Serves ranges of some bytes, each connection at its own pace."""

    def __init__(self, data: bytes, *, pause: float = 0.0005, ranges: bool = True) -> None:
        self.data, self.pause, self.ranges = data, pause, ranges
        self.asked: list[tuple[int, int, bool]] = []
        self.breaks: dict[int, int] = {}
        self.stalls: dict[int, int] = {}
        self.dropped: list[int] = []
        self.open = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int, *, strict: bool, control: Control) -> Generator[bytes, None, None]:
        with self._lock:
            self.asked.append((offset, length, strict))
            self.open += 1
            self.most = max(self.most, self.open)
            after = self.breaks.pop(offset, None)
            stall = self.stalls.pop(offset, None)
        try:
            if strict and not self.ranges:
                raise RangesError("no ranges", host="")
            for start in range(offset, offset + length, KIB):
                if self.pause:
                    control.wait(self.pause)
                else:
                    hashlib.sha256(self.data).digest()  # the core is what is slow
                if after is not None and start - offset >= after:
                    raise UnreachableError("broken", host="")
                if stall is not None and start - offset >= stall:
                    try:
                        control.wait(60)
                    except CancelledError:
                        self.dropped.append(offset)
                        raise
                yield self.data[start : min(start + KIB, offset + length)]
        finally:
            with self._lock:
                self.open -= 1


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parts be small, and every connection one to look at."""
    monkeypatch.setattr(_parts, "PART", 8 * KIB)
    monkeypatch.setattr(_parts, "_LOOK", 4 * KIB)
    monkeypatch.setattr(_parts, "queued", lambda: 0.0)  # whatever else this machine does


def whole(wire: Wire, offset: int = 0, *, spare: threading.BoundedSemaphore | None = None) -> bytes:
    spare = spare_parts() if spare is None else spare
    data = b"".join(in_parts(wire, offset, len(wire.data), spare=spare, control=Control()))
    assert not wire.open
    assert not [thread for thread in threading.enumerate() if thread.name == "layercache-part"]
    for _ in range(_parts._SPARE):
        assert spare.acquire(blocking=False)  # all were given back
    return data


def test_a_slow_wire_gets_more_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parts, "_LATE", 1e9)  # whatever this machine does
    wire = Wire(random.Random(1).randbytes(400 * KIB))
    assert whole(wire) == wire.data
    assert 4 < wire.most <= 9  # eight, and the first at the end of its time
    assert wire.asked[0] == (0, 400 * KIB, False)
    assert all(length <= 8 * KIB for _, length, _ in wire.asked[1:])
    assert len({offset for offset, _, _ in wire.asked}) == len(wire.asked)  # nothing is asked for twice


def test_a_fast_wire_keeps_its_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parts, "queued", queued)  # the wait for a core is not the wire's
    wire = Wire(random.Random(1).randbytes(400 * KIB), pause=0.0)
    assert whole(wire) == wire.data
    assert wire.asked == [(0, 400 * KIB, False)]


def test_a_reader_that_is_slower_than_the_wire_keeps_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parts, "queued", queued)
    wire = Wire(random.Random(1).randbytes(64 * KIB), pause=0.0)
    pieces = in_parts(wire, 0, len(wire.data), spare=spare_parts(), control=Control())
    got = b""
    for piece in pieces:
        time.sleep(0.002)
        got += piece
    assert got == wire.data
    assert len(wire.asked) == 1


@pytest.mark.parametrize("stalled", [1, 3])
def test_what_a_slow_connection_owes_is_fetched_by_another(stalled: int) -> None:
    """Parts of which nothing or half comes hold nobody up: their rest is asked for again, and the slow are dropped."""
    wire = Wire(random.Random(1).randbytes(800 * KIB))
    # Where parts begin depends on when the first connection was found slow; these stall for whoever asks first.
    begun: list[int] = []

    def ask(offset: int, length: int, *, strict: bool, control: Control) -> Generator[bytes, None, None]:
        if strict and length == 8 * KIB:
            begun.append(offset)
            if len(begun) in range(20, 20 + stalled):
                wire.stalls[offset] = 4 * KIB * (len(begun) % 2)
        return wire(offset, length, strict=strict, control=control)

    data = b"".join(in_parts(ask, 0, len(wire.data), spare=spare_parts(), control=Control(timeout=50)))
    assert data == wire.data
    assert len(wire.dropped) == stalled
    twice = [offset for offset in wire.dropped if [o for o, *_ in wire.asked].count(offset) > 1]
    halves = [o for o, length, strict in wire.asked if strict and length == 4 * KIB]
    assert len(twice) + len(halves) >= stalled
    assert not wire.open


def test_a_part_that_is_not_late_is_asked_for_once_though_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads with nothing to do, at the end of a blob, leave what comes at the usual pace to whoever has it."""
    monkeypatch.setattr(_parts, "_LATE", 1e9)
    wire = Wire(random.Random(1).randbytes(100 * KIB), pause=0.002)
    assert whole(wire) == wire.data
    assert len({offset for offset, _, _ in wire.asked}) == len(wire.asked)


def test_where_ranges_do_not_work_one_try_shows_it() -> None:
    wire = Wire(random.Random(1).randbytes(200 * KIB), ranges=False)
    assert whole(wire) == wire.data
    assert [strict for _, _, strict in wire.asked] == [False, True]


def test_where_the_memory_is_others_it_goes_on_alone() -> None:
    wire = Wire(random.Random(1).randbytes(100 * KIB))
    spare = spare_parts()
    while spare.acquire(blocking=False):
        pass
    assert b"".join(in_parts(wire, 0, len(wire.data), spare=spare, control=Control())) == wire.data
    assert len(wire.asked) == 1


def test_who_stops_reading_ends_all_connections() -> None:
    wire = Wire(random.Random(1).randbytes(400 * KIB))
    spare = spare_parts()
    pieces = in_parts(wire, 0, len(wire.data), spare=spare, control=Control())
    while wire.most < 5:
        next(pieces)
    pieces.close()
    assert not wire.open
    assert all(spare.acquire(blocking=False) for _ in range(_parts._SPARE))


def test_a_cancel_ends_all_connections() -> None:
    wire = Wire(random.Random(1).randbytes(400 * KIB))
    cancel = threading.Event()
    pieces = in_parts(wire, 0, len(wire.data), spare=spare_parts(), control=Control(cancel=cancel))

    def read() -> None:
        for _ in pieces:
            if wire.most >= 5:
                cancel.set()

    with pytest.raises(CancelledError):
        read()
    assert not wire.open


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(40 * KIB, 160 * KIB),
    offset=st.integers(0, 9 * KIB),
    broken=st.dictionaries(st.integers(1, 18), st.integers(0, 7 * KIB), max_size=3),
)
def test_whatever_breaks_of_the_parts_the_bytes_come_whole_and_in_order(
    size: int, offset: int, broken: dict[int, int]
) -> None:
    wire = Wire(random.Random(size).randbytes(size), pause=0.0002)
    # Where parts begin depends on when the first connection was found slow: all possible places.
    step = _parts.PART
    for start in range(offset + step, size):
        if (start - offset) % KIB == 0 and (start - offset) // step in broken:
            wire.breaks[start] = broken[(start - offset) // step]
    keep = wire.breaks.copy()

    def ask(offset: int, length: int, *, strict: bool, control: Control) -> Generator[bytes, None, None]:
        if not strict:
            wire.breaks.pop(offset, None)  # one connection works
        return wire(offset, length, strict=strict, control=control)

    data = b"".join(in_parts(ask, offset, size, spare=spare_parts(), control=Control()))
    assert data == wire.data[offset:], keep
    assert not wire.open


# --- a real server that gives each connection little ---


@pytest.fixture
def shaped(tmp_path: Path) -> Iterator[Callable[[int, str], tuple[peers.Nginx, bytes]]]:
    started: list[peers.Nginx] = []

    def start(size: int, extra: str) -> tuple[peers.Nginx, bytes]:
        data = random.Random(5).randbytes(size)
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / "blob").write_bytes(data)
        box = peers.Nginx(
            tmp_path / "nginx",
            f"root {tmp_path}/files; location /v2/ {{{{ return 200; }}}} "
            f"location ~ /blobs/ {{{{ rewrite ^ /blob break; {extra} }}}}",
        )
        started.append(box)
        box.start()
        return box, data

    yield start
    for box in started:
        box.close()


def fetched(box: peers.Nginx, data: bytes) -> list[str]:
    client = Registry(box.hosts[0], credentials=Anonymous())
    blob = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
    ledger = Ledger()
    pieces = client.fetch(Repository(box.hosts[0], "any/image"), blob, control=Control(), ledger=ledger)
    assert b"".join(pieces) == data
    client.close()
    assert ledger.bytes_fetched <= 1.05 * len(data)
    return [line.split()[3] for line in box.log(least=ledger.requests) if "/blobs/" in line or "/blob " in line]


@peers.needs_nginx
def test_a_server_that_gives_each_connection_little_is_asked_over_several(
    shaped: Callable[[int, str], tuple[peers.Nginx, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # as it is, but for what else this machine does
    monkeypatch.setattr(_parts, "queued", lambda: 0.0)
    box, data = shaped(40 << 20, "limit_rate 16m;")
    statuses = fetched(box, data)
    assert statuses.count("206") >= 5
    assert set(statuses) == {"200", "206"}


@peers.needs_nginx
def test_a_slow_server_without_ranges_is_asked_for_one_and_then_left_in_peace(
    shaped: Callable[[int, str], tuple[peers.Nginx, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_parts, "queued", lambda: 0.0)
    box, data = shaped(40 << 20, "limit_rate 30m; max_ranges 0;")
    assert len(fetched(box, data)) == 2  # all of it, and the try
