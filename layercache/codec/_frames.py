"""The outline of a zstd stream (RFC 8878, 3.1): where frames and blocks begin and end, and what they ask for.

The binding decodes, but never says that a stream was cut. This walks headers only, eight of 3 bytes a mebibyte or more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from layercache.errors import CorruptStreamError, LimitError, UnsupportedError

__all__ = ["MAGIC", "Frames", "is_skippable"]

MAGIC = 0xFD2FB528
_BLOCK = 128 << 10  # Block_Maximum_Size is this or the window, whichever is less (3.1.1.2.4)
_RLE, _RESERVED = 1, 3


def is_skippable(magic: int) -> bool:
    """Whether a frame of this magic number is skippable (3.1.2)."""
    return magic & ~0xF == 0x184D2A50


class Frames:
    """Walks a stream fed in any cut. ``corrupt`` makes the error for what is wrong at an offset.

    :attr:`whole` is true where the stream may end: after at least one frame, and between frames.
    """

    __slots__ = ("_at", "_between", "_corrupt", "_digest", "_fed", "_partial", "_rules", "_want", "_window")

    def __init__(self, window: int, digest: object, corrupt: Callable[[str, int], CorruptStreamError]) -> None:
        self._window = window
        self._digest = digest
        self._corrupt = corrupt
        self._fed = 0
        self._at = 0  # where the next header begins, counted from the beginning of the stream
        self._partial = b""  # what is there of it
        self._between = False
        self._rules = self._grammar()
        _, self._want = next(self._rules)

    @property
    def whole(self) -> bool:
        """Whether the bytes so far are whole frames, at least one."""
        return self._between and self._at == self._fed > 0

    def feed(self, view: memoryview) -> None:
        """Walk the next bytes.

        :raises CorruptStreamError: on anything that is not a frame where one must be.
        :raises LimitError: on a window over the limit.
        :raises UnsupportedError: on a frame that needs a dictionary.
        """
        base = self._fed
        self._fed = fed = base + len(view)
        # Two rounds a frame and one for each further block: this loop is what thousands of small frames cost.
        while (end := self._at + self._want) <= fed:
            here = self._at - base
            header = bytes(view[here : end - base]) if here >= 0 else self._partial + view[: end - base]
            skip, self._want = self._rules.send(header)
            self._at = end + skip
        if self._at >= base:
            self._partial = bytes(view[self._at - base :])
        else:
            self._partial += view

    def _grammar(self) -> Generator[tuple[int, int], bytes, None]:
        """Yield ``(skip, want)``: pass over ``skip`` bytes, then send the ``want`` bytes of the next header.

        What must follow anyway is asked for together: magic number and descriptor, the rest and a block header.
        """
        skip = 0
        while True:
            self._between = True
            start = yield skip, 5
            self._between = False
            magic = int.from_bytes(start[:4], "little")
            if is_skippable(magic):
                skip = int.from_bytes(start[4:] + (yield 0, 3), "little")
                continue
            if magic != MAGIC:
                raise self._corrupt("bytes that are no zstd frame", self._at)
            flags = start[4]
            if flags & 0x08:
                raise self._corrupt("a reserved bit is set in a zstd frame header", self._at)
            fields = _Fields(flags)
            rest = yield 0, fields.length + 3
            most = min(self._allowed(fields.window(rest), fields.dictionary(rest)), _BLOCK)
            head = int.from_bytes(rest[-3:], "little")
            while True:
                kind, size = head >> 1 & 3, head >> 3
                if kind == _RESERVED:
                    raise self._corrupt("a zstd block of the reserved type", self._at)
                if size > most:
                    raise self._corrupt(f"a zstd block of {size} bytes where {most} are allowed", self._at)
                skip = 1 if kind == _RLE else size
                if head & 1:
                    break
                head = int.from_bytes((yield skip, 3), "little")
            skip += 4 if flags & 0x04 else 0  # the checksum, which the binding compares

    def _allowed(self, window: int, dictionary: int) -> int:
        name = "" if self._digest is None else f" in {self._digest}"
        if dictionary:
            raise UnsupportedError(f"zstd dictionary {dictionary} is needed{name}", hint="layers are read without one")
        if window > self._window:
            raise LimitError(
                f"a zstd window of {window} bytes is over the limit of {self._window}{name}",
                hint="raise Limits.window to read it",
            )
        return window


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
