"""gzip through ``zlib_ng`` where it is installed (two to seven times less CPU), else through ``zlib``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from layercache.codec._stage import PIECE, Limits, Stage

__all__ = ["Gzip"]

_GZIP = 31  # zlib's window bits: the largest window, and 16 for a gzip header and trailer
# Bytes of input a call takes: large, so that nearly every call puts out a whole piece. Output of odd sizes makes malloc
# give memory back to the system and fault it in again, 8 % of the time.
_SLICE = 1 << 20
# The first call for a member takes little and gives little: what follows the member is copied out by the binding, room
# not used is given back, and a layer may hold one member for each file.
_FIRST_SLICE, _FIRST_PIECE = 16 << 10, 64 << 10


class _Member(Protocol):
    """One gzip member being inflated, in the words of CPython's own ``_ZlibDecompressor``.

    It keeps the input it could not take yet (``needs_input`` is false then: call it with nothing), and puts what
    follows the member into ``unused_data``.
    """

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes: ...


class Gzip(Stage):
    """gzip members, as many as there are, then NUL padding. CRC and length of each are checked by the binding."""

    def __init__(self, limits: Limits, digest: object) -> None:
        super().__init__(limits, digest)
        self._open, self._error = _binding()
        self._member: _Member | None = None
        self._members = 0
        self._slice, self._room = _FIRST_SLICE, _FIRST_PIECE
        self._padding = False

    def _expand(self, view: memoryview) -> Iterator[bytes]:
        position, end = 0, len(view)
        while position < end:
            if self._member is None:
                if self._padding or view[position] == 0:
                    self._padding = True
                    self._expect_zeros(view[position:])
                    return
                self._member = self._open()
                self._members += 1
                self._slice, self._room = _FIRST_SLICE, _FIRST_PIECE
            data = view[position : position + self._slice]
            position += len(data)
            yield from self._inflate(self._member, data)
            self._slice, self._room = min(_SLICE, 2 * self._slice), PIECE
            if self._member.eof:
                position -= len(self._member.unused_data)
                self._member = None

    def _inflate(self, member: _Member, data: bytes | memoryview) -> Iterator[bytes]:
        while True:
            try:
                piece = member.decompress(data, self._room)
            except self._error as error:
                first = "not gzip data" if self._members == 1 else "gzip data does not decode"
                raise self._corrupt(f"{first} ({error})") from error
            if piece:
                yield piece
            if member.eof or member.needs_input:
                return
            data, self._room = b"", PIECE

    def _expect_zeros(self, view: memoryview) -> None:
        for start in range(0, len(view), _SLICE):
            piece = bytes(view[start : start + _SLICE])
            if piece.count(0) != len(piece):
                raise self._corrupt("bytes after the NUL padding of a gzip stream")

    def _complete(self) -> bool:
        return self._member is None and self._members > 0


class _Zlib:
    """``zlib.decompressobj`` with the face of :class:`_Member`."""

    def __init__(self, member: Any) -> None:
        self._member = member

    @property
    def eof(self) -> bool:
        return bool(self._member.eof)

    @property
    def needs_input(self) -> bool:
        return not self._member.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        data: bytes = self._member.unused_data
        return data

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        piece: bytes = self._member.decompress(self._member.unconsumed_tail or data, max_length)
        return piece


@functools.cache
def _binding() -> tuple[Callable[[], _Member], type[Exception]]:
    """What opens a member, and the error it raises."""
    binding: Any = zlib
    whole = None
    # An extra, and only a reader of gzip should pay for it.
    with contextlib.suppress(ImportError):
        binding = importlib.import_module("zlib_ng.zlib_ng")
        # Its own class fills a whole piece in one call without the GIL; decompressobj takes six.
        whole = getattr(binding, "_ZlibDecompressor", None)
    if whole is None:
        return lambda: _Zlib(binding.decompressobj(_GZIP)), binding.error
    return lambda: whole(_GZIP), binding.error
