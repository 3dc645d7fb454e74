"""What the root takes, counted: no process takes room that is not there, whatever the others do at that moment.

The count in the file ``space`` is what a walk over the root found, and what was taken since. Room is taken under the
file's lock, before the first block; what becomes free is subtracted after it is free. So the count is never below what
is on disk, whoever dies when; where it comes to be too high, the next walk puts it right, and there is one before
anybody is refused or anything is evicted.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import xxhash

from layercache.errors import NoSpaceError
from layercache.integrity import SUM_SIZE, chunk_count
from layercache.store._disk import Dir, Disk, File
from layercache.store._files import lock_within
from layercache.store._layout import BALLAST, BLOBS, DATA, IN, META, SPACE, TRASH, parse_generation_name
from layercache.store._limits import Limits

__all__ = ["GENERATION", "RECORD", "Count", "Space", "footprint", "unused"]

_log = logging.getLogger("layercache.store")

_BLOCK = 4096
_NAMES = 4 * _BLOCK
"""Room for the names of a blob: two directories of its own, and growth of those it passes through."""
_DOCUMENT = 2 * _BLOCK
"""Room for the JSON of a record."""

GENERATION = 24 * _BLOCK
"""Room that a generation takes before it holds anything."""
RECORD = 2 * _BLOCK
"""Room for a small record and its name."""

_BALLAST = 4 << 20
_APART = 2 << 20
"""The next segment of receipts, as a purge asks nobody; and small records that have room and are not there yet."""
_INODES = 8
_ATTEMPTS = 3
_HOPELESS, _PATIENCE = 1.0, 10.0
"""Once nothing was found that could go, nobody looks again for ten times as long as that took, at most a second."""

_MAGIC = b"LCspace1"
_RECORD = struct.Struct(">8s16sQQ")
_SUM = 16
_PARTIAL = re.compile(r"[0-9a-f]+\.([0-9]+)\.[0-9a-f]+\.part")
# A name moves from the first of these to the last, so a walk in this order misses none: it may count one twice.
_ORDER = {name: place for place, name in enumerate((IN, META, BLOBS, DATA, TRASH))}


def footprint(size: int) -> int:
    """Return the most that a blob's file of ``size`` bytes can take on disk, with all that comes with it."""
    sums = _whole(chunk_count(size) * SUM_SIZE)
    return _whole(size) + 3 * sums + _DOCUMENT + _NAMES


def unused(size: int) -> int:
    """Return what of a :func:`footprint` is free for certain when a write ends and leaves nothing."""
    return footprint(size) - _NAMES


def _whole(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True, slots=True)
class Count:
    """Bytes that are taken, and in which walk's counting."""

    used: int
    walk: int


class Space:
    """The count of one root. Without ``limits`` nothing is counted and nothing refused.

    :ivar evict: makes as many bytes free as it is told when its turn comes, and tells whether it did; called without
        the lock.
    """

    def __init__(self, disk: Disk, limits: Limits | None) -> None:
        self._disk = disk
        self.limits = limits
        self.evict: Callable[[Callable[[], int]], bool] | None = None
        self._hopeless = 0.0

    @contextmanager
    def taking(self, amount: Callable[[], int], what: str) -> Iterator[None]:
        """Take room and hold the lock while what it is for is begun, so that a walk sees both or neither.

        Where there is none, what may go is evicted first.

        :param amount: called with the lock in hand.
        :raises NoSpaceError: when there is no room and none can be made.
        :raises StoreError: when somebody keeps the lock.
        """
        if self.limits is None:
            yield
            return
        lock = self._enter(amount, what, self.limits)
        try:
            yield
        finally:
            self._disk.close(lock)

    @contextmanager
    def offered(self, size: int) -> Iterator[bool]:
        """Tell whether there is a little room for what can be done without, taken and held as in :meth:`taking`.

        Evicts nothing.
        """
        if self.limits is None:
            yield True
            return
        with self._locked() as lock:
            count = self._read(lock) or self._walk(lock)
            fits = self._short(count.used, size, self.limits) <= 0
            if fits:
                self._write(lock, Count(count.used + size, count.walk))
            yield fits

    def walk(self) -> int:
        """Return in which walk's counting the root is; to be asked before something goes, for :meth:`give_back`."""
        if self.limits is None:
            return 0
        try:
            file = self._disk.create(self._disk.root, SPACE, exist_ok=True)
            try:
                count = self._read(file)
            finally:
                self._disk.close(file)
        except OSError:
            return -1
        return -1 if count is None else count.walk

    def give_back(self, size: int, walk: int) -> None:
        """Subtract what has gone, durably or not: its blocks are free."""
        if self.limits is None or size <= 0:
            return
        with self._locked() as lock:
            count = self._read(lock)
            # A walk since then has seen it gone, or counts it until the next one.
            if count is not None and count.walk == walk:
                self._write(lock, Count(max(0, count.used - size), count.walk))
        self._hopeless = 0.0

    def free(self) -> int:
        """Return the bytes that the filesystem has left."""
        return self._disk.room().free

    def measure(self) -> tuple[int, int]:
        """Walk over the root; return what is counted, and how much of that is on disk now."""
        with self._locked() as lock:
            return self._walk(lock).used, self.below(self._disk.root)[0]

    def count(self) -> int:
        """Walk over the root and return what it takes, with what is reserved. Takes as long as a listing of it."""
        with self._locked() as lock:
            return self._walk(lock).used

    def counted(self) -> int:
        """Return the count as it stands; walks only where there is none yet."""
        with self._locked() as lock:
            return (self._read(lock) or self._walk(lock)).used

    # -- inside

    def _enter(self, amount: Callable[[], int], what: str, limits: Limits) -> File:
        began = self._disk.elapsed()
        for attempt in range(_ATTEMPTS):
            lock = self._lock()
            try:
                need = amount()
                count = self._read(lock) or self._walk(lock)
                short = self._short(count.used, need, limits)
                if short > 0:
                    if need > limits.low or began < self._hopeless:
                        raise _no_room(what)
                    count = self._walk(lock)
                    short = self._short(count.used, need, limits)
                if short <= 0:
                    if need:
                        self._write(lock, Count(count.used + need, count.walk))
                    return lock
            except BaseException:
                self._disk.close(lock)
                raise
            self._disk.close(lock)
            if self.evict is None or attempt == _ATTEMPTS - 1:
                break
            if not self.evict(partial(self._wanted, need, limits, limits.low)) and not self.evict(
                partial(self._wanted, need, limits, limits.most)
            ):
                break
        now = self._disk.elapsed()
        self._hopeless = now + min(_HOPELESS, _PATIENCE * (now - began))
        raise _no_room(what)

    def _wanted(self, need: int, limits: Limits, down_to: int) -> int:
        """Return how many bytes must go now for ``need``, and then down to a level; 0 where others have made room."""
        with self._locked() as lock:
            count = self._read(lock) or self._walk(lock)
            short = self._short(count.used, need, limits)
            return max(short, count.used + need - down_to) if short > 0 else 0

    def _short(self, used: int, need: int, limits: Limits) -> int:
        """Return how many bytes must go before ``need`` can be taken; not above zero where it can."""
        if need == 0:
            return 0
        room = self._disk.room()
        short = max(used + need - limits.most, limits.floor + need - room.free)
        if room.total_inodes and room.free_inodes < limits.floor_inodes + _INODES:
            short = max(short, need)
        return short

    def _lock(self) -> File:
        lock = self._disk.create(self._disk.root, SPACE, exist_ok=True)
        try:
            lock_within(self._disk, lock)
        except BaseException:
            self._disk.close(lock)
            raise
        return lock

    @contextmanager
    def _locked(self) -> Iterator[File]:
        lock = self._lock()
        try:
            yield lock
        finally:
            self._disk.close(lock)

    def _read(self, file: File) -> Count | None:
        """Return the count; ``None`` where it is damaged, or of another boot: what was written last may be lost."""
        raw = bytearray(_RECORD.size + _SUM)
        if self._disk.read(file, raw, 0) < len(raw) or xxhash.xxh3_128_digest(raw[:-_SUM]) != raw[-_SUM:]:
            return None
        magic, boot, used, walk = _RECORD.unpack_from(raw)
        if magic != _MAGIC or boot.rstrip(b"\0") != self._disk.boot.encode()[:16]:
            return None
        return Count(used, walk)

    def _write(self, lock: File, count: Count) -> None:
        # Written, never stored through a mapping: on a full disk that kills the process. Not flushed: another boot
        # counts anew.
        raw = _RECORD.pack(_MAGIC, self._disk.boot.encode()[:16], count.used, count.walk)
        self._disk.write(lock, raw + xxhash.xxh3_128_digest(raw), 0)

    def _walk(self, lock: File) -> Count:
        before = self._read(lock)
        ballast = self._disk.stat(self._disk.root, BALLAST)
        used = _APART + max(0, _BALLAST - (0 if ballast is None else ballast.allocated))
        used += sum(self.below(self._disk.root))
        # Never the number of a walk before: who asked then must not subtract now.
        count = Count(used, int(self._disk.now() * 1e6) if before is None else before.walk + 1)
        self._write(lock, count)
        return count

    def below(self, at: Dir) -> tuple[int, int]:
        """Return the bytes that everything below a directory takes, and those that it will take beyond them."""
        disk, used, promised = self._disk, 0, 0
        for name in sorted(disk.names(at), key=lambda name: (_ORDER.get(name, len(_ORDER)), name)):
            status = disk.stat(at, name)
            if status is None:
                continue  # moved on to where the walk has not been yet, or gone
            used += status.allocated
            if status.kind == "dir":
                try:
                    folder = disk.dir(at, name)
                except FileNotFoundError:
                    continue
                try:
                    inside, more = self.below(folder)
                finally:
                    disk.close(folder)
                used += inside
                promised += more
                if parse_generation_name(name) is not None:
                    promised += max(0, GENERATION - inside - more)
            elif (begun := _PARTIAL.fullmatch(name)) is not None:
                # All that it will take was taken when it was begun, whether or not it is there yet.
                promised += max(0, footprint(int(begun[1])) - status.allocated)
        return used, promised


def _no_room(what: str) -> NoSpaceError:
    return NoSpaceError(f"no room to {what}", hint="raise the budget, free the disk, or close and unpin images")
