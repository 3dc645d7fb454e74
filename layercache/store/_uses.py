"""Which blobs were used: noted in memory, written down now and then, read by whoever evicts. May be lost.

A line is a time in seconds and a word: ``h`` a blob was used; ``i`` it was fetched, and what that cost: seconds to the
first byte, bytes a second; ``m`` blobs that were used together, an image by the name of its reference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from layercache.errors import LayerCacheError
from layercache.store._disk import Dir, Disk
from layercache.store._layout import HINTS
from layercache.store._space import Space

__all__ = ["Use", "Uses", "parse_uses", "take_uses"]

_MOST = 1 << 14
_LARGEST = 4 << 20


class Use(NamedTuple):
    """One line: ``kind`` is its word, ``names`` are file names of blobs, for an image after its own."""

    # One is made on every hit: a tuple takes a third of the time.

    time: float
    kind: str
    names: tuple[str, ...]
    rtt: float = 0.0
    bandwidth: float = 0.0

    def __str__(self) -> str:
        cost = f" {self.rtt:.6f} {self.bandwidth:.0f}" if self.kind == "i" else ""
        return f"{self.time:.3f} {self.kind}{cost} {' '.join(self.names)}\n"


class Uses:
    """The uses of one generation in this process that are not written down yet: the last 16384."""

    def __init__(self) -> None:
        self._noted: deque[Use] = deque(maxlen=_MOST)

    def note(self, use: Use) -> None:
        """Remember one."""
        self._noted.append(use)

    def __bool__(self) -> bool:
        return bool(self._noted)

    def flush(self, disk: Disk, folder: Dir, space: Space) -> None:
        """Append them to the generation's file, if nobody is at it and there is room; else they wait."""
        if not self:
            return
        with suppress(OSError, LayerCacheError):
            file = disk.create(folder, HINTS, exist_ok=True)
            try:
                if not disk.lock(file, exclusive=True):
                    return
                end = disk.fstat(file).size
                lines = "".join(map(str, self._drain())).encode()
                if end + len(lines) <= _LARGEST:
                    with space.offered(len(lines) + 8192) as fits:
                        if fits:
                            disk.write(file, lines, end)
            finally:
                disk.close(file)

    def _drain(self) -> Iterator[Use]:
        with suppress(IndexError):
            while True:
                yield self._noted.popleft()


def parse_uses(raw: bytes) -> Iterator[Use]:
    """Yield what can be read of such a file; a line that was cut is passed over."""
    for line in raw.decode("ascii", "replace").split("\n"):
        with suppress(ValueError, IndexError):
            time, kind, *rest = line.split(" ")
            if kind == "i" and rest[2]:
                yield Use(float(time), kind, (rest[2],), float(rest[0]), float(rest[1]))
            elif kind in ("h", "m") and rest and all(rest):
                yield Use(float(time), kind, tuple(rest))


def take_uses(disk: Disk, folder: Dir) -> list[Use]:
    """Return the uses that a generation's file tells of, and empty it; none where somebody writes to it now."""
    try:
        file = disk.create(folder, HINTS, exist_ok=True)
    except OSError:
        return []
    try:
        if not disk.lock(file, exclusive=True):
            return []
        raw = bytearray(min(disk.fstat(file).size, _LARGEST))
        del raw[disk.read(file, raw, 0) :]
        if raw:
            disk.truncate(file, 0)
        return list(parse_uses(bytes(raw)))
    except OSError:
        return []
    finally:
        disk.close(file)
