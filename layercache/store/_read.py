"""An open blob: leased, and verified chunk by chunk before a byte is given out."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Self

from layercache.errors import IntegrityError, UnsupportedError
from layercache.integrity import CHUNK, FIRST, SUM_SIZE, Verifier, chunk_count, chunk_index, chunk_range
from layercache.oci import Digest
from layercache.store._disk import Disk, File
from layercache.store._faults import store_error
from layercache.store._form import Reader
from layercache.store._layout import Meta

__all__ = ["Blob"]

_STRIDE = 8 * CHUNK
"""Bytes of one sequential read. Beside a busy Python thread every call that drops the GIL waits up to 5 ms to get it
back, so there must be few of them."""

_POOLED = 4
_pool: list[mmap.mmap] = []
_pool_lock = threading.Lock()


def _take() -> mmap.mmap:
    # Page-aligned and reused: the kernel copies into an unaligned heap buffer several times slower on some CPUs.
    with _pool_lock:
        if _pool:
            return _pool.pop()
    return mmap.mmap(-1, _STRIDE + SUM_SIZE)


def _give_back(buffer: mmap.mmap) -> None:
    with _pool_lock:
        if len(_pool) < _POOLED:
            _pool.append(buffer)


class Blob:
    """One published blob, open for reading. The lease is the open handle: until :meth:`close` it is not evicted.

    Several threads may read through one handle.

    :param reader: checks the chunks of the file, the first of which is at ``head``.
    :param check: raises once the generation is fenced; called after every read, before its bytes are given out.
    :param report: told about damage, once, before the error is raised.
    """

    def __init__(
        self,
        disk: Disk,
        file: File,
        meta: Meta,
        *,
        reader: Reader,
        head: int,
        check: Callable[[], None],
        report: Callable[[Blob], None],
    ) -> None:
        self._disk = disk
        self._file = file
        self._reader = reader
        self._head = head
        self._check_live = check
        self._report = report
        self.meta = meta
        self.lent = False

    @property
    def digest(self) -> Digest:
        """The name of the content."""
        return self.meta.digest

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return self.meta.size

    @property
    def file(self) -> File:
        """The open file, for the store's own rooms."""
        return self._file

    def lend(self, meta: Meta, *, check: Callable[[], None]) -> None:
        """Let this handle say ``meta``, and give nothing out either once ``check`` raises: a namespace borrows it."""
        live = self._check_live

        def both() -> None:
            check()
            live()

        self.meta, self._check_live, self.lent = meta, both, True

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        """Yield the content from ``start`` on, where a chunk begins, verified. A piece is valid until the next one.

        The first piece is small (64 KiB), the next ends at 1 MiB, later ones are 8 MiB.

        :raises IntegrityError: on the first damaged chunk; nothing of it is yielded.
        :raises NamespacePurgedError: once the namespace was purged.
        """
        buffer = _take()
        try:
            view = memoryview(buffer)
            while start < self.size:
                end = min(self.size, FIRST if start < FIRST else CHUNK if start < CHUNK else start + _STRIDE)
                piece = view[: end - start]
                self._fill(piece, start)
                yield piece
                start = end
            self._check_live()
        finally:
            _give_back(buffer)

    def pread(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer at the end. Reads and verifies every chunk they touch."""
        if offset < 0 or length < 0:
            raise ValueError("offset and length must not be negative")
        end = min(offset + length, self.size)
        if offset >= end:
            self._check_live()
            return b""
        buffer = _take()
        try:
            view = memoryview(buffer)
            parts = []
            start, _ = chunk_range(chunk_index(offset), self.size)
            while start < end:
                # One stride at a time, so that memory stays bounded whatever the caller asks for.
                _, stop = chunk_range(chunk_index(min(end, start + _STRIDE) - 1), self.size)
                stop = min(stop, start + _STRIDE)
                self._fill(view[: stop - start], start)
                parts.append(bytes(view[max(offset, start) - start : min(end, stop) - start]))
                start = stop
            return b"".join(parts)
        finally:
            _give_back(buffer)

    def descriptor(self) -> int:
        """Descriptor of the file, in which the content lies from byte 0 on; it is this handle's, and ends with it.

        Whoever reads through it reads what the disk gives: no sum and no fence is looked at after this call.

        :raises UnsupportedError: where the file does not hold the content as it is: a sealed namespace.
        :raises NamespacePurgedError: once the namespace was purged.
        """
        if self._reader.apart or self._head:
            raise UnsupportedError(
                "a sealed namespace has no file of the content", hint="read it with compressed() or pread()"
            )
        if self._file.closed:
            raise ValueError("I/O operation on closed blob")
        self._check_live()
        return self._file.fd

    def verify(self, *, pace: Callable[[int], None] | None = None) -> None:
        """Read everything again and compare with the digest, which no chunk sum can vouch for.

        :param pace: called after each piece with its size; may wait, or raise to end it.
        :raises IntegrityError: when the content is not what the digest says.
        """
        verifier = Verifier(self.digest, self.size)
        for piece in self.chunks():
            verifier.feed(piece)
            if pace is not None:
                pace(len(piece))
        try:
            verifier.finish()
        except IntegrityError:
            self._report(self)
            raise

    def damage(self) -> list[tuple[int, int]]:
        """Return where the content does not match its chunk sums: first byte and the byte after the last, in order.

        Reads everything. Reports nothing, and works on a blob that was moved aside while this handle was open.
        """
        bad: list[tuple[int, int]] = []
        buffer = _take()
        try:
            view = memoryview(buffer)
            for index in range(chunk_count(self.size)):
                start, end = chunk_range(index, self.size)
                if self._matches(view[: end - start], start):
                    continue
                if bad and bad[-1][1] == start:
                    start = bad.pop()[0]
                bad.append((start, end))
            return bad
        finally:
            _give_back(buffer)

    def sound(self, start: int, end: int) -> Iterator[memoryview]:
        """Yield the chunks of a range that :meth:`damage` left out; both ends lie between chunks.

        :raises IntegrityError: where one does not match after all.
        """
        buffer = _take()
        try:
            view = memoryview(buffer)
            while start < end:
                _, stop = chunk_range(chunk_index(start), self.size)
                piece = view[: stop - start]
                if not self._matches(piece, start):
                    raise IntegrityError("a damaged chunk", digest=self.digest, offset=start, length=stop - start)
                yield piece
                start = stop
        finally:
            _give_back(buffer)

    def close(self) -> None:
        """Give up the lease. Closing twice is nothing."""
        self._disk.close(self._file)
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _matches(self, view: memoryview, start: int) -> bool:
        try:
            count, bad = self._load(view, start)
        except OSError:
            return False
        self._check_live()
        return count == len(view) and bad is None

    def _load(self, view: memoryview, start: int) -> tuple[int, int | None]:
        """Read whole chunks; return the count of bytes there are, and the index of the first damaged chunk if any."""
        scratch = _take() if self._reader.apart else None
        try:
            stored = view if scratch is None else memoryview(scratch)
            count = self._disk.read(self._file, stored[: len(view)], self._head + start)
            return count, None if count < len(view) else self._reader.unpack(stored, view, start, self.meta.sums)
        finally:
            if scratch is not None:
                _give_back(scratch)

    def _fill(self, view: memoryview, start: int) -> None:
        try:
            count, bad = self._load(view, start)
        except OSError as error:
            if self._file.closed:
                raise store_error(error, f"read {self.digest}") from error
            self._report(self)
            raise IntegrityError(
                f"the disk cannot read it ({error.strerror})", digest=self.digest, offset=start, length=len(view)
            ) from error
        if count < len(view):
            self._report(self)
            raise IntegrityError("the file is too short", digest=self.digest, expected=self.size, actual=start + count)
        if bad is not None:
            self._report(self)
            begin, end = chunk_range(bad, self.size)
            raise IntegrityError("a damaged chunk", digest=self.digest, offset=begin, length=end - begin)
        # After the read: a byte read before the fence must not be given out after it.
        self._check_live()
