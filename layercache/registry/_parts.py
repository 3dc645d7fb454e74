"""A large blob over several connections: bounded ranges that come side by side and are given out in their order."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Protocol

from layercache.control import Control
from layercache.crowd import queued
from layercache.errors import LayerCacheError, RegistryError

__all__ = ["PART", "WORTH", "Ask", "in_parts", "spare_parts"]

_log = logging.getLogger("layercache.registry")

PART = 4 << 20
"""Bytes of a part. Its last waits in memory until its turn comes, so many parts mean so much memory."""

WORTH = 32 << 20
"""Bytes from which on parts are thought of: many registries answer ranges wrongly, and small blobs gain nothing."""

_LOOK = 4 << 20  # bytes by which a connection is judged
_IDLE = 0.5  # share of the time that is spent waiting for bytes where the wire is what is slow
_QUICK = 192 << 20  # bytes a second of one connection that need no others
_MOST = 8  # connections to one blob
_SPARE = 12  # parts of all blobs that may be in memory
_LATE = 2.0  # times as long as parts take: one that will take longer is asked for over another connection as well
_LATELY = 8  # parts by which that is judged
_SLICE = 0.05


def spare_parts() -> threading.BoundedSemaphore:
    """Return what bounds the parts that wait in memory for their turn, of all blobs together: 48 MiB."""
    return threading.BoundedSemaphore(_SPARE)


class Ask(Protocol):
    """A request for bytes of the blob. ``strict``: a reply with other bytes as well is an error, and not read."""

    def __call__(self, offset: int, length: int, *, strict: bool, control: Control) -> Generator[bytes, None, None]:
        """Yield ``length`` bytes from ``offset`` on."""
        ...


def in_parts(
    ask: Ask, offset: int, end: int, *, spare: threading.BoundedSemaphore, control: Control
) -> Generator[bytes, None, None]:
    """Yield the bytes from ``offset`` to ``end`` in order, over as many connections as the wire is worth.

    It begins with one. While that keeps its reader waiting, and is no fast one, parts further on are asked for beside
    it: one at first, which shows whether ranges work here, then up to eight. Where one of them is so slow that the
    others have nothing left to do, what is missing of its part is asked for once more, and it is dropped when that has
    come. Where anything goes wrong the rest comes over one connection, and what is wrong there is the error. Closing it
    ends all of them.
    """
    at = offset
    pieces = ask(offset, end - offset, strict=False, control=control)
    parts: _Parts | None = None
    try:
        with closing(pieces):
            for piece, starved in _watched(pieces):
                at += len(piece)
                if parts is None and starved and end - at > 2 * PART:
                    # The first connection goes on for two parts, so that it does not end before others have begun.
                    parts = _Parts(ask, at + 2 * PART, end, spare=spare, control=control)
                if parts is None or at < parts.start:
                    yield piece
                    continue
                if not parts.work():
                    # It stays with the connection that there is: another one would begin at byte 0.
                    parts.close()
                    yield piece
                    yield from pieces
                    return
                yield piece[: len(piece) - (at - parts.start)]
                at = parts.start
                break
        if parts is not None:
            at = yield from parts.pieces()
            if at < end:
                yield from ask(at, end - at, strict=False, control=control)
    finally:
        if parts is not None:
            parts.close()


def _watched(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield each piece, and whether the connection has kept its reader waiting so far."""
    size = 0
    idle = began = waited = 0.0
    while True:
        start, ran = time.perf_counter(), time.thread_time()
        piece = next(pieces, None)
        if piece is None:
            return
        now = time.perf_counter()
        if size:
            idle += now - start - (time.thread_time() - ran)
            took = now - began
            # The last question costs a file's reading: only where the answer may be yes.
            starved = size >= _LOOK and size < _QUICK * took and idle > _IDLE * took
            yield piece, starved and idle - (queued() - waited) > _IDLE * took
        else:  # how long the first byte took says nothing of those after it
            began, waited = now, queued()
            yield piece, False
        size += len(piece)


class _Part:
    __slots__ = ("at", "began", "end", "pieces", "start", "transfers")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.at = start  # everything before it has come
        self.began = time.monotonic()
        self.pieces: deque[bytes] = deque()
        self.transfers: list[Control] = []  # one, and a second where that is slow

    @property
    def done(self) -> bool:
        return self.at == self.end

    def take(self, start: int, piece: bytes) -> None:
        """Keep what is new of the bytes that came from ``start`` on."""
        new = start + len(piece) - self.at
        if new > 0:
            self.pieces.append(piece[-new:])
            self.at += new


class _Parts:
    """Threads that fetch parts ahead of the one who gives them out."""

    def __init__(self, ask: Ask, start: int, end: int, *, spare: threading.BoundedSemaphore, control: Control) -> None:
        self.start = start
        self._ask, self._end = ask, end
        self._spare = spare
        self._control = control
        self._own = control.part()
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._next = start  # everything before it is somebody's
        self._claimed: dict[int, _Part] = {}
        self._took: deque[float] = deque(maxlen=_LATELY)
        self._failed = self._stopped = False
        self._threads: list[threading.Thread] = []
        self._begin(1)

    def pieces(self) -> Generator[bytes, None, int]:
        """Yield the bytes in order, and return where they end: before the end of the blob where something failed."""
        at = self.start
        while at < self._end:
            part = self._whose(at)
            if part is None:  # nobody's: there was no room for another part
                end = min(at + PART, self._end)
                for piece in self._ask(at, end - at, strict=False, control=self._control):
                    yield piece
                    at += len(piece)
                continue
            while piece := self._wait_for(part):
                yield piece
                at += len(piece)
            if at < part.end:
                return at
            self._give_back(part)
        return at

    def work(self) -> bool:
        """Wait for the first bytes of a part, and tell whether any came: not where there is no room for one."""
        while True:
            self._check()
            with self._changed:
                if self._failed or not self._claimed:
                    return False
                if any(part.pieces or part.done for part in self._claimed.values()):
                    return True
                self._changed.wait(_SLICE)

    def close(self) -> None:
        """End all transfers, and wait for that."""
        if self._pid != os.getpid():
            return
        self._own.stop()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for part in list(self._claimed.values()):
            self._give_back(part)

    # -- who gives out

    def _whose(self, at: int) -> _Part | None:
        with self._changed:
            part = self._claimed.get(at)
            if part is None:
                self._next = max(self._next, min(at + PART, self._end))
            return part

    def _wait_for(self, part: _Part) -> bytes:
        """Return the next bytes of a part; none at its end, or where no more will come."""
        while True:
            self._check()
            with self._changed:
                if part.pieces:
                    return part.pieces.popleft()
                if part.done or self._failed:
                    return b""
                self._changed.wait(_SLICE)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise RegistryError("this transfer belongs to the parent of this process", hint="start it anew")
        self._control.checkpoint()

    def _give_back(self, part: _Part) -> None:
        with self._changed:
            del self._claimed[part.start]
            self._spare.release()
            self._changed.notify_all()

    # -- who fetches

    def _begin(self, count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._work, name="layercache-part", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        clean = False
        try:
            while (claim := self._claim()) is not None:
                self._fetch(*claim)
            clean = True
        except LayerCacheError as error:
            # Whatever it is: one connection goes on, and meets it too if it matters.
            _log.info("the rest comes over one connection: %s", error.what)
        finally:
            with self._changed:
                self._failed = self._failed or not clean
                self._changed.notify_all()

    def _fetch(self, part: _Part, control: Control) -> None:
        """Fetch what is missing of a part, until it is there: by this transfer or by another."""
        at = part.at
        try:
            with closing(self._ask(at, part.end - at, strict=True, control=control)) as pieces:
                for piece in pieces:
                    with self._changed:
                        before = part.at
                        part.take(at, piece)
                        at += len(piece)
                        if part.done and part.at > before:  # it was the first to get there
                            for other in part.transfers:
                                if other is not control:
                                    other.stop()
                        self._changed.notify_all()
                        if len(self._threads) == 1 and not self._stopped:  # ranges work here
                            self._begin(min(_MOST - 1, -(-(self._end - self._next) // PART)))
        except LayerCacheError:
            if not part.done:
                raise  # also where it was the second: what is wrong is not that the first is slow
            return
        with self._changed:
            self._took.append(time.monotonic() - part.began)

    def _claim(self) -> tuple[_Part, Control] | None:
        with self._changed:
            while not (self._stopped or self._failed):
                part = None
                if self._next < self._end and self._spare.acquire(blocking=False):
                    part = _Part(self._next, min(self._next + PART, self._end))
                    self._next = part.end
                    self._claimed[part.start] = part
                elif self._next >= self._end and all(one.done for one in self._claimed.values()):
                    return None
                part = self._late() if part is None else part
                if part is not None:
                    part.transfers.append(control := self._own.part())
                    return part, control
                self._changed.wait(_SLICE)
            return None

    def _late(self) -> _Part | None:
        """Return the part that everybody waits for, where it takes much longer than others did."""
        part = next((one for one in self._claimed.values() if not one.done), None)  # in the order they were claimed
        if part is None or len(part.transfers) > 1 or not self._took:
            return None
        usual = max(sorted(self._took)[len(self._took) // 2], _SLICE)
        age = time.monotonic() - part.began
        # Not before the others would have been done: the first bytes take their time.
        late = age > usual and age * (part.end - part.start) > _LATE * usual * (part.at - part.start)
        return part if late else None
