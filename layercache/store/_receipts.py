"""Receipts: an append-only chain of records in files made beforehand, so that a full disk can still take one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from layercache.errors import StoreError
from layercache.store._disk import Dir, Disk, File
from layercache.store._layout import Slot

__all__ = ["Chain", "Level", "Receipt"]

Level = Literal["fenced", "unlinked"]

_SEGMENT = 1 << 20
_LOCK = "lock"
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a purge has reached, and no more than that.

    ``level`` is ``fenced`` (nothing of the generation is given out or published any more, but holders in ``pending``
    still have files of it open) or ``unlinked`` (no name and no open file of it is left). ``blobs`` and ``bytes`` are
    what was removed so far. ``generation`` 0 means that there was nothing to purge. Times are seconds since the epoch.
    ``slot`` stands for the namespace: a keyed hash of its name, which is not in the receipt. ``previous`` is the
    SHA-256 of the record before this one.
    """

    slot: Slot
    generation: int
    level: Level
    blobs: int
    bytes: int
    pending: tuple[int, ...]
    started: float
    finished: float
    previous: str

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as JSON values."""
        return asdict(self) | {"pending": list(self.pending)}


class Chain:
    """The receipts of one root. Appending is durable before it returns."""

    def __init__(self, disk: Disk, at: Dir) -> None:
        self._disk = disk
        self._at = at

    def prepare(self) -> None:
        """Make the lock and the first segment, with its blocks taken, where they are not there yet."""
        for name, size in ((_LOCK, 0), (_segment(1), _SEGMENT)):
            self._disk.close(self._make(name, size))
        self._disk.sync(self._at)

    def append(self, receipt: Receipt) -> Receipt:
        """Add a record and return it as stored, with the hash of the one before it.

        The end of a generation is recorded once: a second time, the first record is returned.
        """
        lock = self._disk.create(self._at, _LOCK, exist_ok=True)
        try:
            waited = 0.0
            while not self._disk.lock(lock, exclusive=True):
                if waited >= _PATIENCE:
                    raise StoreError("the receipts are locked", hint="look for a stopped process")
                self._disk.pause(0.002)
                waited += 0.002
            number = max(self._numbers(), default=1)
            raw, torn = self._read(number)
            lines = raw.splitlines()
            if not lines and number > 1:
                lines = self._read(number - 1)[0].splitlines()
            if (known := _end_of(receipt, lines)) is not None:
                # A purge that died after its receipt comes here again. It may have died before the fsync.
                self._settle(number)
                return known
            previous = hashlib.sha256(lines[-1]).hexdigest() if lines else ""
            stored = Receipt(**{**asdict(receipt), "pending": receipt.pending, "previous": previous})
            line = json.dumps(stored.to_json(), separators=(",", ":"), sort_keys=True).encode() + b"\n"
            if len(raw) + len(line) > _SEGMENT:
                number, raw, torn = number + 1, b"", 0
            segment = self._make(_segment(number), _SEGMENT)
            try:
                # A record that a power cut tore goes: what is left of it must not follow ours.
                self._disk.write(segment, line.ljust(torn, b"\0"), len(raw))
                self._disk.sync(segment)
            except OSError:
                # Nobody was told of this record, and it may be lost while the kernel calls it clean: the next one must
                # not stand behind it, but write the same bytes anew.
                with suppress(OSError):
                    self._disk.write(segment, bytes(len(line)), len(raw))
                raise
            finally:
                self._disk.close(segment)
            return stored
        finally:
            self._disk.close(lock)

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts, oldest first.

        :raises StoreError: where a record does not parse or does not follow from the one before it.
        """
        previous = ""
        for number in sorted(self._numbers()):
            for line in self._read(number)[0].splitlines():
                receipt = _parse(line)
                if receipt.previous != previous:
                    raise StoreError("the chain of receipts is broken", hint="a receipt was changed or removed")
                previous = hashlib.sha256(line).hexdigest()
                yield receipt

    def _settle(self, number: int) -> None:
        file = self._disk.create(self._at, _segment(number), exist_ok=True)
        try:
            self._disk.sync(file)
        finally:
            self._disk.close(file)

    def _numbers(self) -> list[int]:
        return [
            int(name[8:]) for name in self._disk.names(self._at) if name.startswith("segment.") and name[8:].isdigit()
        ]

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

    def _read(self, number: int) -> tuple[bytes, int]:
        """Return the whole records of a segment, and how many bytes after them are not zero yet: a torn record."""
        try:
            file = self._disk.open(self._at, _segment(number))
        except FileNotFoundError:
            return b"", 0
        try:
            raw = bytearray(self._disk.fstat(file).size)
            count = self._disk.read(file, raw, 0)
        finally:
            self._disk.close(file)
        zeros = raw.find(b"\0", 0, count)
        end = raw.rfind(b"\n", 0, zeros if zeros >= 0 else count) + 1
        rest = raw[end:count]
        torn = 0 if rest == bytes(len(rest)) else len(rest.rstrip(b"\0"))
        return bytes(raw[:end]), torn


def _segment(number: int) -> str:
    return f"segment.{number:06d}"


def _parse(line: bytes) -> Receipt:
    try:
        fields = json.loads(line)
        return Receipt(**{**fields, "pending": tuple(fields["pending"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError("a receipt is damaged") from error


def _end_of(receipt: Receipt, lines: list[bytes]) -> Receipt | None:
    """Return the record among ``lines`` that says already that nothing of the receipt's generation is left."""
    if receipt.level == "unlinked":
        for line in reversed(lines):
            if receipt.slot.encode() in line:
                known = _parse(line)
                if (known.slot, known.generation, known.level) == (receipt.slot, receipt.generation, receipt.level):
                    return known
    return None
