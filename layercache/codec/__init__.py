"""Layers as they were before compression: bounded decoders for plain, gzip and zstd streams.

A decoder is fed the compressed bytes in order, in any cut, and gives bounded pieces. It does no I/O. It notices a
stream that is cut anywhere (also inside a skippable frame), damaged, followed by garbage, or larger than its limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from layercache.codec._frames import MAGIC, is_skippable
from layercache.codec._gzip import Gzip
from layercache.codec._stage import PIECE, RATIO_FLOOR, Buffer, Identity, Limits
from layercache.codec._zstd import Zstd
from layercache.errors import UnsupportedError
from layercache.oci import Compression

__all__ = ["PIECE", "RATIO_FLOOR", "Buffer", "Decoder", "Limits", "decoder", "sniff"]


class Decoder(Protocol):
    """One stream being decoded. Not safe to use from several threads at once."""

    def feed(self, data: Buffer) -> Iterator[bytes | memoryview]:
        """Output for the next bytes of the stream, in pieces of at most 1 MiB.

        Read it to its end before the next :meth:`feed` or :meth:`finish`. ``bytes`` are yours to keep; a ``memoryview``
        (of an uncompressed stream) shows ``data`` itself.

        :raises CorruptStreamError: if the stream is not what it says. The decoder then says so again on every call.
        :raises LimitError: if the output, its ratio or the window is over :class:`Limits`.
        :raises UnsupportedError: if a dictionary is needed.
        """

    def finish(self) -> None:
        """Confirm that the stream ended where it may end.

        :raises CorruptStreamError: if it was cut. An empty stream is cut, except where there is no compression.
        """


def decoder(compression: Compression, *, limits: Limits | None = None, digest: object = None) -> Decoder:
    """Fresh decoder for one stream of ``compression``.

    gzip: any number of members, then NUL padding (RFC 1952, 2.2). zstd: any number of frames and skippable frames
    (RFC 8878, 3.1). What follows is refused. ``digest`` names the blob in errors.

    :raises UnsupportedError: for any other compression.
    """
    limits = limits or Limits()
    if compression == "none":
        return Identity(limits, digest)
    if compression == "gzip":
        return Gzip(limits, digest)
    if compression == "zstd":
        return Zstd(limits, digest)
    raise UnsupportedError(f"compression {compression!a}", hint="layers are read as none, gzip or zstd")


def sniff(head: bytes) -> Compression:
    """Compression of a stream that begins with ``head``: four bytes decide, fewer may.

    Only a media type says for sure. This is for blobs whose type does not say.
    """
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    magic = int.from_bytes(head[:4], "little")
    if len(head) >= 4 and (magic == MAGIC or is_skippable(magic)):
        return "zstd"
    return "none"
