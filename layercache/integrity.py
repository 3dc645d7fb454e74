"""What a blob's bytes must be: size, digest, and the sum of each chunk.

sha256 (or sha512) is the identity, checked once, when a blob is admitted. XXH3-128 of each chunk is checked on every
read. XXH3 finds rot, not an attacker: who can write the sums can forge them.
"""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from layercache.errors import IntegrityError
from layercache.oci import Digest

__all__ = [
    "CHUNK",
    "FIRST",
    "SUM_SIZE",
    "ChunkSums",
    "Verifier",
    "chunk_count",
    "chunk_index",
    "chunk_range",
    "chunk_sum",
]

CHUNK = 1 << 20
"""Bytes of a chunk, but for the first mebibyte, which is two chunks."""

FIRST = 64 << 10
"""Bytes of the very first chunk: a reader that wants the head of a blob (a tar header, a magic number, a manifest)
need not wait for a whole mebibyte to be read and summed."""

SUM_SIZE = 16
"""Bytes of one chunk sum (XXH3-128, big endian)."""

Buffer = bytes | bytearray | memoryview


def chunk_count(size: int) -> int:
    """Number of chunks of a blob of ``size`` bytes."""
    if size <= FIRST:
        return 1 if size else 0
    return 1 + -(-size // CHUNK)


def chunk_index(offset: int) -> int:
    """Index of the chunk that holds byte ``offset``."""
    return 0 if offset < FIRST else 1 + offset // CHUNK


def chunk_range(index: int, size: int) -> tuple[int, int]:
    """First byte and the byte after the last one of chunk ``index`` in a blob of ``size`` bytes."""
    if index == 0:
        return 0, min(FIRST, size)
    return max(FIRST, (index - 1) * CHUNK), min(size, index * CHUNK)


def chunk_sum(data: Buffer) -> bytes:
    """XXH3-128 of one chunk.

    In slices: an update of 64 KiB or less keeps the GIL, a larger one drops it and, beside a busy thread of the host
    process, waits up to 5 ms to get it back.
    """
    if len(data) <= FIRST:
        return xxhash.xxh3_128_digest(data)
    state = xxhash.xxh3_128()
    view = memoryview(data)
    for start in range(0, len(view), FIRST):
        state.update(view[start : start + FIRST])
    return state.digest()


class ChunkSums:
    """Sums of a stream's chunks, made while it passes. Feed in order; read ``sums`` at any time for whole chunks."""

    __slots__ = ("_position", "_state", "sums")

    def __init__(self) -> None:
        self._position = 0
        self._state = xxhash.xxh3_128()
        self.sums = bytearray()

    def feed(self, data: Buffer) -> None:
        """Add the next bytes of the stream."""
        view = memoryview(data)
        for start, end in self._pieces(len(view)):
            self._state.update(view[start:end])
            self._position += end - start
            if self._position == FIRST or self._position % CHUNK == 0:
                self._close()

    def finish(self) -> bytes:
        """Close the last, short chunk and return all sums, :data:`SUM_SIZE` bytes each."""
        if self._position != FIRST and self._position % CHUNK:
            self._close()
        return bytes(self.sums)

    def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
        start = 0
        while start < length:
            position = self._position
            edge = FIRST if position < FIRST else (position // CHUNK + 1) * CHUNK
            end = min(length, start + edge - position, start + FIRST)
            yield start, end
            start = end

    def _close(self) -> None:
        self.sums += self._state.digest()
        self._state.reset()


class Verifier:
    """Size and digest of a stream, fed chunk by chunk.

    :meth:`feed` refuses the byte after ``size`` before it is used; :meth:`finish` compares size first, then digest.
    """

    __slots__ = ("_hash", "digest", "size", "taken")

    def __init__(self, digest: Digest, size: int | None = None) -> None:
        self.digest = digest
        self.size = size
        self.taken = 0
        self._hash = digest.hasher()

    def feed(self, data: Buffer) -> None:
        """Add the next bytes.

        :raises IntegrityError: if they would make the stream longer than ``size``.
        """
        taken = self.taken + len(data)
        if self.size is not None and taken > self.size:
            raise IntegrityError("too many bytes", digest=self.digest, expected=self.size, actual=f"at least {taken}")
        self._hash.update(data)
        self.taken = taken

    def finish(self) -> None:
        """Compare with what was promised.

        :raises IntegrityError: on a different size or digest.
        """
        if self.size is not None and self.taken != self.size:
            raise IntegrityError("wrong size", digest=self.digest, expected=self.size, actual=self.taken)
        encoded = self._hash.hexdigest()
        if encoded != self.digest.encoded:
            raise IntegrityError(
                "wrong digest",
                digest=self.digest,
                expected=self.digest,
                actual=f"{self.digest.algorithm}:{encoded}",
            )
