"""How a generation writes down what it holds: the names, the records, the chunks.

:class:`Form` is what the other rooms ask; :class:`PlainForm` is the one where a name is a digest and the file the blob.
A form does no I/O: it says which name, which bytes, and where in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from layercache.integrity import SUM_SIZE, ChunkSums, chunk_index, chunk_range, chunk_sum
from layercache.oci import Digest, Reference
from layercache.store._layout import Partial, blob_name, parse_blob_name, pin_name, ref_name

__all__ = ["Buffer", "Form", "PlainForm", "Reader", "Writer", "pieces"]

Buffer = bytes | bytearray | memoryview


class Reader(Protocol):
    """The chunks of one blob's file, on their way out."""

    apart: bool
    """Whether what is stored must be read to a buffer of its own, :data:`~layercache.integrity.SUM_SIZE` longer."""

    def unpack(self, stored: memoryview, into: memoryview, start: int, sums: Buffer) -> int | None:
        """Check whole chunks from offset ``start`` on against ``sums`` and leave their content in ``into``.

        Returns the index of the first chunk that is damaged; ``None`` where all are sound.
        """
        ...

    def close(self) -> None:
        """Give up what it holds. Closing twice is nothing."""
        ...


class Writer(Protocol):
    """The chunks of one blob's file, on their way in."""

    @property
    def sums(self) -> bytearray:
        """The sums of the chunks that were given out whole, :data:`~layercache.integrity.SUM_SIZE` bytes each."""
        ...

    def keep(self, chunk: memoryview, total: bytes) -> None:
        """Go past a whole chunk that is in the file already; only before the first :meth:`feed`."""
        ...

    def feed(self, data: Buffer) -> Iterator[tuple[int, Buffer]]:
        """Take the next bytes of the content; yield what to write, and where in the file, as far as it is known."""
        ...

    def finish(self) -> Iterator[tuple[int, Buffer]]:
        """Yield what is left to write. ``sums`` is whole after it."""
        ...


class Form(Protocol):
    """How one generation writes things down."""

    @property
    def seal(self) -> str:
        """How it is sealed; empty where it is in clear."""
        ...

    head: int
    """Bytes of a blob's file before its first chunk."""

    @property
    def keyless(self) -> bool:
        """True where only names can be judged: it is sealed, and its key is not at hand."""
        ...

    def close(self) -> None:
        """Give up what it holds. What it made stays usable."""
        ...

    def forget(self) -> None:
        """Forget what it keeps secret, also what it made: the generation was purged."""
        ...

    def blob_name(self, digest: Digest) -> str:
        """Return the file name of a blob."""
        ...

    def is_blob(self, name: str) -> bool:
        """Tell whether a name can be a :meth:`blob_name`."""
        ...

    def digest(self, name: str) -> Digest | None:
        """Return the digest of a blob, where its name alone tells."""
        ...

    def ref_name(self, reference: Reference) -> str:
        """Return the file name of a reference's record: 64 hex digits."""
        ...

    def pin_name(self, name: str) -> str:
        """Return the file name of a pin's record: 64 hex digits."""
        ...

    def partial(self, digest: Digest, size: int, boot: str) -> Partial:
        """Return the names of an unfinished write."""
        ...

    def parse_partial(self, name: str) -> Partial | None:
        """Undo :meth:`partial`; ``None`` for any other name."""
        ...

    def pack(self, kind: str, name: str, raw: bytes) -> bytes:
        """Return a record as stored in the directory ``kind`` under ``name``."""
        ...

    def unpack(self, kind: str, name: str, raw: bytes) -> bytes:
        """Undo :meth:`pack`.

        :raises FormatError: when it was not packed for this place.
        """
        ...

    def reader(self, name: str, size: int, head: bytes) -> Reader:
        """Return what reads the chunks of the blob ``name`` of ``size`` bytes, whose file begins with ``head``.

        :raises FormatError: when ``head`` is not sensible.
        """
        ...

    def writer(self, name: str, size: int, *, head: bytes = b"") -> Writer:
        """Return what writes the chunks of a blob; ``head`` is what an earlier attempt that is gone on with began with.

        :raises FormatError: when ``head`` cannot be gone on with.
        """
        ...


def pieces(start: int, length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield the chunks in a range of a blob: index, first byte and the byte after the last one."""
    end = start + length
    index = chunk_index(start)
    while start < end:
        _, stop = chunk_range(index, size)
        yield index, start, stop
        start = stop
        index += 1


class PlainForm:
    """Content as it is, names that are digests, XXH3 sums that find rot."""

    seal = ""
    head = 0
    keyless = False

    def close(self) -> None:
        return

    def forget(self) -> None:
        return

    def blob_name(self, digest: Digest) -> str:
        return blob_name(digest)

    def is_blob(self, name: str) -> bool:
        return parse_blob_name(name) is not None

    def digest(self, name: str) -> Digest | None:
        return parse_blob_name(name)

    def ref_name(self, reference: Reference) -> str:
        return ref_name(reference)

    def pin_name(self, name: str) -> str:
        return pin_name(name)

    def partial(self, digest: Digest, size: int, boot: str) -> Partial:
        return Partial(f"{digest.encoded}.{size}", boot)

    def parse_partial(self, name: str) -> Partial | None:
        return Partial.parse(name, stem=_STEM)

    def pack(self, kind: str, name: str, raw: bytes) -> bytes:  # noqa: ARG002 - a record of this form checks itself
        return raw

    def unpack(self, kind: str, name: str, raw: bytes) -> bytes:  # noqa: ARG002
        return raw

    def reader(self, name: str, size: int, head: bytes) -> Reader:  # noqa: ARG002
        return _PlainReader(size)

    def writer(self, name: str, size: int, *, head: bytes = b"") -> Writer:  # noqa: ARG002
        return _PlainWriter()


_STEM = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{64})?\.(?:0|[1-9][0-9]{0,18})")


class _PlainReader:
    apart = False

    def __init__(self, size: int) -> None:
        self._size = size

    def unpack(self, stored: memoryview, into: memoryview, start: int, sums: Buffer) -> int | None:  # noqa: ARG002
        for index, begin, end in pieces(start, len(into), self._size):
            if chunk_sum(into[begin - start : end - start]) != sums[index * SUM_SIZE : (index + 1) * SUM_SIZE]:
                return index
        return None

    def close(self) -> None:
        return


class _PlainWriter:
    def __init__(self) -> None:
        self._sums = ChunkSums()
        self._position = 0

    @property
    def sums(self) -> bytearray:
        return self._sums.sums

    def keep(self, chunk: memoryview, total: bytes) -> None:  # noqa: ARG002
        self._sums.feed(chunk)
        self._position += len(chunk)

    def feed(self, data: Buffer) -> Iterator[tuple[int, Buffer]]:
        start = self._position
        self._position += len(data)
        yield start, data
        self._sums.feed(data)

    def finish(self) -> Iterator[tuple[int, Buffer]]:
        self._sums.finish()
        yield from ()
