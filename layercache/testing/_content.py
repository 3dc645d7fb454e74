"""Bytes that may be larger than memory: held as ``bytes``, or left in a file and read piece by piece."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PIECE", "Content", "pieces", "size_of"]

Content = bytes | Path
"""What a blob is made of: the bytes themselves, or the file that holds exactly them."""

PIECE = 1 << 20
"""Bytes handed on at a time."""


def size_of(content: Content) -> int:
    """Bytes in ``content``."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def pieces(content: Content, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Bytes ``start`` up to, not including, ``end`` of ``content``, at most :data:`PIECE` at a time."""
    if isinstance(content, bytes):
        end = len(content) if end is None else min(end, len(content))
        for offset in range(start, end, PIECE):
            yield content[offset : min(end, offset + PIECE)]
        return
    with content.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size if end is None else end
        left -= file.seek(start)
        while left > 0 and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece
