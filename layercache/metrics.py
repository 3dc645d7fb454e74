"""Where the time and the bytes of an operation went. Exporters sit elsewhere; this only counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Ledger", "Meter"]

_Piece = TypeVar("_Piece", bound=Sized)


class Meter:
    """How long a source took: ``wait`` seconds to its first byte, ``seconds`` for the ``size`` bytes in all after it.

    What is done with the bytes meanwhile does not count.
    """

    def __init__(self) -> None:
        self.size = 0
        self.wait = self.seconds = 0.0

    def over(self, pieces: Iterator[_Piece]) -> Iterator[_Piece]:
        """Yield the pieces as they come."""
        try:
            while True:
                start = time.perf_counter()
                piece = next(pieces, None)
                took = time.perf_counter() - start
                if piece is None:
                    return
                if self.size:
                    self.seconds += took
                else:
                    self.wait = took
                self.size += len(piece)
                yield piece
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()


class Ledger:
    """Counts of one operation: requests, bytes by source, seconds by stage. Safe to use from several threads.

    Stages run in parallel, so their seconds may add up to more than the operation took.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._bytes: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def request(self) -> None:
        """Count one HTTP request, whatever its answer."""
        with self._lock:
            self._requests += 1

    def received(self, source: str, count: int) -> None:
        """Count ``count`` body bytes that came from ``source`` (a host name)."""
        with self._lock:
            self._bytes[source] = self._bytes.get(source, 0) + count

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to ``stage`` (``resolve``, ``auth``, ``wire``, ``hash``, ``write``, ``flush``, ``wait``)."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def take(self, requests: int, received: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Add what another process has counted for this operation."""
        with self._lock:
            self._requests += requests
        for source, count in received.items():
            self.received(source, count)
        for stage, took in seconds.items():
            self.add(stage, took)

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        """Add the time of the ``with`` block to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    @property
    def requests(self) -> int:
        """HTTP requests sent so far."""
        return self._requests

    @property
    def bytes_fetched(self) -> int:
        """Body bytes received so far, from all sources."""
        with self._lock:
            return sum(self._bytes.values())

    @property
    def bytes_by_source(self) -> Mapping[str, int]:
        """Body bytes received so far, by host."""
        with self._lock:
            return dict(self._bytes)

    @property
    def seconds_by_stage(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage, rounded to microseconds."""
        with self._lock:
            return {stage: round(seconds, 6) for stage, seconds in self._seconds.items()}

    @property
    def seconds(self) -> float:
        """Seconds since the operation began."""
        return time.perf_counter() - self._started
