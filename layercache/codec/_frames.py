"""The outline of a zstd stream (RFC 8878, 3.1): where frames and blocks begin and end, and what they ask for.

The binding decodes, but never says that a stream was cut. This walks headers only: 3 bytes for each block.
"""

from __future__ import annotations

from collections.abc import Generator

from layercache.codec._stage import corrupt, named
from layercache.errors import LimitError, UnsupportedError

__all__ = ["MAGIC", "Frames", "is_skippable"]

MAGIC = 0xFD2FB528
_BLOCK = 128 << 10  # Block_Maximum_Size is this or the window, whichever is less (3.1.1.2.4)
_RLE, _RESERVED = 1, 3


def is_skippable(magic: int) -> bool:
    """Whether a frame of this magic number is skippable (3.1.2)."""
    return magic & ~0xF == 0x184D2A50


class Frames:
    """Walks a stream fed in any cut, up to ``window`` bytes of history. ``digest`` names the blob in errors."""

    __slots__ = ("_at", "_between", "_digest", "_fed", "_partial", "_rules", "_want")

    def __init__(self, window: int, digest: object) -> None:
        self._digest = digest
        self._fed = 0
        self._at = 0  # where the next header begins, counted from the beginning of the stream
        self._partial = b""  # what is there of it
        # It knows nothing of this object: a cycle would keep a decoder, and its window, until the next collection.
        self._rules = _grammar(window, named(digest))
        _, self._want, self._between = next(self._rules)

    @property
    def whole(self) -> bool:
        """Whether the stream may end here: between frames, after at least one."""
        return self._between and self._at == self._fed > 0

    def feed(self, view: memoryview) -> None:
        """Walk the next bytes.

        :raises CorruptStreamError: on anything that is not a frame where one must be, with its offset.
        :raises LimitError: on a window over the limit.
        :raises UnsupportedError: on a frame that needs a dictionary.
        """
        base = self._fed
        self._fed = fed = base + len(view)
        try:
            # Two rounds a frame and one a block: this loop is what thousands of small frames cost.
            while (end := self._at + self._want) <= fed:
                here = self._at - base
                header = bytes(view[here : end - base]) if here >= 0 else self._partial + view[: end - base]
                skip, self._want, self._between = self._rules.send(header)
                self._at = end + skip
        except _MalformedError as error:
            raise corrupt(str(error), self._digest, offset=self._at) from None
        if self._at >= base:
            self._partial = bytes(view[self._at - base :])
        else:
            self._partial += view


class _MalformedError(Exception):
    """What is wrong; where it is, only the walker knows."""


def _grammar(limit: int, blob: str) -> Generator[tuple[int, int, bool], bytes, None]:
    """Yield ``(skip, want, between)``: pass over ``skip`` bytes, then send the ``want`` bytes of the next header.

    ``between`` says that a frame begins there. A header is asked for no later than the binding could act on it: the
    window has to be refused here.
    """
    skip = 0
    while True:
        start = yield skip, 5, True
        magic = int.from_bytes(start[:4], "little")
        if is_skippable(magic):
            skip = int.from_bytes(start[4:] + (yield 0, 3, False), "little")
            continue
        if magic != MAGIC:
            raise _MalformedError("bytes that are no zstd frame")
        flags = start[4]
        if flags & 0x08:
            raise _MalformedError("a reserved bit set in the header of a zstd frame")
        fields = _Fields(flags)
        rest = yield 0, fields.length, False
        if dictionary := fields.dictionary(rest):
            raise UnsupportedError(f"zstd dictionary {dictionary} is needed{blob}", hint="layers are read without one")
        window = fields.window(rest)
        if window > limit:
            raise LimitError(
                f"a zstd window of {window} bytes is over the limit of {limit}{blob}",
                hint="raise Limits.window to read it",
            )
        most = min(window, _BLOCK)
        skip = head = 0
        while not head & 1:
            head = int.from_bytes((yield skip, 3, False), "little")
            kind, size = head >> 1 & 3, head >> 3
            if kind == _RESERVED:
                raise _MalformedError("a zstd block of the reserved type")
            if size > most:
                raise _MalformedError(f"a zstd block of {size} bytes where {most} are allowed")
            skip = 1 if kind == _RLE else size
        skip += 4 if flags & 0x04 else 0  # the checksum, which the binding compares


class _Fields:
    """Where the fields of a frame header are, by its descriptor (3.1.1.1); given the bytes that follow that."""

    __slots__ = ("_content", "_dictionary", "_single", "length")

    def __init__(self, flags: int) -> None:
        self._single = bool(flags & 0x20)
        self._dictionary = (0, 1, 2, 4)[flags & 3]
        self._content = (1 if self._single else 0, 2, 4, 8)[flags >> 6]
        self.length = (not self._single) + self._dictionary + self._content

    def dictionary(self, rest: bytes) -> int:
        start = not self._single
        return int.from_bytes(rest[start : start + self._dictionary], "little")

    def window(self, rest: bytes) -> int:
        if self._single:
            # The content itself is the window. Two bytes count from 256, which one byte can say.
            size = int.from_bytes(rest[self._dictionary : self._dictionary + self._content], "little")
            return size + 256 if self._content == 2 else size
        return (8 + (rest[0] & 7)) << (rest[0] >> 3) + 7
