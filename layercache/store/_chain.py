"""The chain of receipts: an append-only file of records, made beforehand, so that a full disk can still take one.

Each record holds the hash of the one before. The last page of a segment, its head, holds the number and the hash of the
last record, so that dropping that one shows as well; it is written after the record is durable and may lag behind it.
Whoever can write the root can write a new chain that is whole: only a hash kept elsewhere shows that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from layercache.errors import StoreError
from layercache.store._ballast import Ballast
from layercache.store._disk import Dir, Disk, File
from layercache.store._files import lock_within
from layercache.store._receipts import Receipt, line_hash, parse_line, to_line

__all__ = ["Chain", "Links"]

_SEGMENT = 1 << 20
_HEAD = 4096
_ROOM = _SEGMENT - _HEAD
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Links:
    """The chain as it lies there: the receipts that can be read, the hash of the last record, what is wrong."""

    receipts: tuple[Receipt, ...]
    hashes: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Segment:
    number: int
    raw: bytes
    """Its whole records."""
    torn: int
    """Bytes after them that are not zero: what a power cut left of a record nobody was told of."""
    head: bytes

    @property
    def lines(self) -> list[bytes]:
        return self.raw.splitlines()


class Chain:
    """The receipts of one root. Appending is durable before it returns."""

    def __init__(self, disk: Disk, at: Dir, ballast: Ballast) -> None:
        self._disk = disk
        self._at = at
        self._ballast = ballast

    def prepare(self) -> None:
        """Make the lock and the first segment, with its blocks taken, where they are not there yet."""
        for name, size in ((_LOCK, 0), (_segment(1), _SEGMENT)):
            self._disk.close(self._make(name, size))
        self._disk.sync(self._at)

    def append(self, receipt: Receipt) -> Receipt:
        """Add a record and return it as stored.

        A level at which the files are gone is recorded once for a generation: a second time, the first record is
        returned.
        """
        with self._locked():
            last, count, previous = self._end()
            if receipt.ends and (known := self._known(receipt)) is not None:
                # A purge that died after its receipt comes here again. It may have died before the fsync.
                self._settle(last.number)
                return known
            placed = receipt.at(count + 1, previous=previous)
            line = to_line(placed)
            if len(last.raw) + len(line) > _ROOM:
                last = _Segment(last.number + 1, b"", 0, b"")
            file = self._ballast.spared(lambda: self._make(_segment(last.number), _SEGMENT))
            try:
                try:
                    # A record that a power cut tore goes: what is left of it must not follow ours.
                    self._disk.write(file, line.ljust(last.torn, b"\0"), len(last.raw))
                    self._disk.sync(file)
                except OSError:
                    # Nobody was told of this record, and it may be lost while the kernel calls it clean: the next one
                    # must not stand behind it, but write the same bytes anew.
                    with suppress(OSError):
                        self._disk.write(file, bytes(len(line)), len(last.raw))
                    raise
                self._write_head(file, placed.number, line_hash(line[:-1]))
            finally:
                self._disk.close(file)
            if len(last.raw) + len(line) > _ROOM // 2:
                with suppress(OSError):  # made when it is needed, then, with the ballast
                    self._disk.close(self._make(_segment(last.number + 1), _SEGMENT))
            return placed

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts, oldest first.

        :raises StoreError: where a record does not parse or does not follow from the one before it.
        """
        previous, number = "", 0
        for segment in self._segments():
            for line in segment.lines:
                number += 1
                receipt = parse_line(line, number)
                if receipt.previous != previous:
                    raise StoreError("the chain of receipts is broken", hint="a receipt was changed or removed")
                previous = line_hash(line)
                yield receipt

    def links(self) -> Links:
        """Return the chain with everything that is wrong with it, instead of stopping at the first."""
        with self._locked():  # so that no record is seen without its head
            segments = self._segments()
        receipts: list[Receipt] = []
        hashes = [""]
        problems: list[str] = []
        for segment in segments:
            if segment.number != segments[0].number and segment.number - 1 not in {one.number for one in segments}:
                problems.append(f"{_segment(segment.number - 1)} is missing")
            for line in segment.lines:
                number = len(hashes)
                try:
                    receipt = parse_line(line, number)
                    receipts.append(receipt)
                    if receipt.previous != hashes[-1]:
                        problems.append(f"receipt {number} does not follow from the one before it")
                except StoreError as error:
                    problems.append(str(error))
                hashes.append(line_hash(line))
            problems += _judge_head(segment, hashes)
        if segments and segments[0].number != 1:
            problems.append(f"{_segment(1)} is missing")
        return Links(tuple(receipts), tuple(hashes[1:]), tuple(problems))

    def settle(self) -> None:
        """Make the end of the chain durable, and its head up to date: whoever wrote it may have died before that."""
        with self._locked():
            last, count, previous = self._end()
            if count:
                self._settle(last.number)
                if _read_head(last.head) != (count, previous):
                    file = self._disk.create(self._at, _segment(last.number), exist_ok=True)
                    try:
                        self._write_head(file, count, previous)
                    finally:
                        self._disk.close(file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._ballast.spared(lambda: self._disk.create(self._at, _LOCK, exist_ok=True))
        try:
            lock_within(self._disk, lock)
            yield
        finally:
            self._disk.close(lock)

    def _end(self) -> tuple[_Segment, int, str]:
        """Return the segment that the next record goes to, how many there are, and the hash of the last."""
        numbers = sorted(self._numbers(), reverse=True)
        ahead = 1
        for number in numbers:
            segment = self._read(number)
            if lines := segment.lines:
                # The record says it; those of the first version are counted.
                count = _number_of(lines[-1]) or len(lines) + sum(
                    len(self._read(earlier).lines) for earlier in numbers if earlier < number
                )
                return segment, count, line_hash(lines[-1])
            ahead = number
        return self._read(ahead), 0, ""

    def _known(self, receipt: Receipt) -> Receipt | None:
        """Return the record that says already that nothing of the receipt's generation is left."""
        slot = receipt.slot.encode()
        # Not in segments before the last two: only what was interrupted is recorded twice, soon after.
        for number in sorted(self._numbers(), reverse=True)[:3]:
            lines = self._read(number).lines
            for index in range(len(lines) - 1, -1, -1):
                if slot in lines[index]:
                    known = parse_line(lines[index], _number_of(lines[index]) or index + 1)
                    if (known.slot, known.generation) != (receipt.slot, receipt.generation) or not known.ends:
                        continue
                    # Who comes after a death may know less than who died; a second trim finds less to hand over.
                    same = known.level == receipt.level and (known.trimmed > 0 or not receipt.trimmed)
                    if same or receipt.level == "unlinked":
                        return known
        return None

    def _settle(self, number: int) -> None:
        file = self._disk.create(self._at, _segment(number), exist_ok=True)
        try:
            self._disk.sync(file)
        finally:
            self._disk.close(file)

    def _write_head(self, file: File, count: int, last: str) -> None:
        # Not flushed, and a failure is no harm: a head that lags is made good by the next record, or by recovery.
        with suppress(OSError):
            self._disk.write(file, json.dumps({"count": count, "last": last}).encode().ljust(128, b"\0"), _ROOM)

    def _numbers(self) -> list[int]:
        return [
            int(name[8:]) for name in self._disk.names(self._at) if name.startswith("segment.") and name[8:].isdigit()
        ]

    def _segments(self) -> list[_Segment]:
        return [self._read(number) for number in sorted(self._numbers())]

    def _make(self, name: str, size: int) -> File:
        file = self._disk.create(self._at, name, exist_ok=True)
        try:
            held = self._disk.fstat(file).size
            if held < size:
                # Written, not only reserved: some filesystems need new blocks to turn a reservation into data.
                self._disk.write(file, bytes(size - held), held)
                self._disk.sync(file)
                self._disk.sync(self._at)
        except OSError:
            self._disk.close(file)
            raise
        return file

    def _read(self, number: int) -> _Segment:
        try:
            file = self._disk.open(self._at, _segment(number))
        except FileNotFoundError:
            return _Segment(number, b"", 0, b"")
        try:
            raw = bytearray(self._disk.fstat(file).size)
            count = self._disk.read(file, raw, 0)
        finally:
            self._disk.close(file)
        zeros = raw.find(b"\0", 0, count)
        end = raw.rfind(b"\n", 0, zeros if zeros >= 0 else count) + 1
        rest = raw[end : min(count, _ROOM)]
        torn = 0 if rest == bytes(len(rest)) else len(rest.rstrip(b"\0"))
        # Segments of the first version have records up to their end and no head.
        return _Segment(number, bytes(raw[:end]), torn, bytes(raw[_ROOM:count]) if end <= _ROOM else b"")


def _segment(number: int) -> str:
    return f"segment.{number:06d}"


def _number_of(line: bytes) -> int:
    """Return which number a record says it has, 0 for none."""
    try:
        number = json.loads(line).get("number", 0)
    except (ValueError, AttributeError):
        return 0
    return number if isinstance(number, int) else 0


def _read_head(head: bytes) -> tuple[int, str] | None:
    try:
        values = json.loads(head.rstrip(b"\0"))
        return int(values["count"]), str(values["last"])
    except (ValueError, KeyError, TypeError):
        return None


def _judge_head(segment: _Segment, hashes: list[str]) -> Iterator[str]:
    """Yield how the head of a segment contradicts the records up to its end."""
    if not segment.head.rstrip(b"\0"):
        return  # of the first version, or nothing was written here yet
    head = _read_head(segment.head)
    if head is None:
        yield f"the head of {_segment(segment.number)} is damaged"
    elif head[0] >= len(hashes):
        yield f"receipts {len(hashes)} to {head[0]} are missing"
    elif hashes[head[0]] != head[1]:
        yield f"receipt {head[0]} was changed"
