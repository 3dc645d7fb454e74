"""Compressed streams made by hand, valid or wrong in exactly one way (RFC 8878 for zstd, RFC 1952 for gzip)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import zstandard

from layercache.codec import Decoder, Limits, decoder
from layercache.oci import Compression

RAW, RLE, COMPRESSED, RESERVED = 0, 1, 2, 3
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
EMPTY_GZIP = zlib.compress(b"", wbits=31)


def block(kind: int, size: int, payload: bytes, *, last: bool = False) -> bytes:
    """Return a block: its 3-byte header and ``payload``, whatever that is."""
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + payload


def raw(data: bytes, *, last: bool = False) -> bytes:
    """Return a raw block."""
    return block(RAW, len(data), data, last=last)


def rle(size: int, *, last: bool = False) -> bytes:
    """Return a block of ``size`` letters in four bytes."""
    return block(RLE, size, b"z", last=last)


def frame(*blocks: bytes, descriptor: int = 0, fields: bytes = b"\x58") -> bytes:
    """Return a frame. ``descriptor`` and ``fields`` are taken as they are; by default they say a window of 2 MiB."""
    return ZSTD_MAGIC + bytes([descriptor]) + fields + b"".join(blocks)


def skippable(payload: bytes, *, number: int = 0) -> bytes:
    """Return a skippable frame."""
    return struct.pack("<II", 0x184D2A50 + number, len(payload)) + payload


def zstd(data: bytes, *, checksum: bool = True, sized: bool = True, level: int = 3) -> bytes:
    """Return one frame by the real encoder. With its size it is a single-segment frame, without it is not."""
    encoder = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=sized)
    if sized:
        return encoder.compress(data)
    stream = encoder.compressobj()
    return stream.compress(data) + stream.flush()


def gzip(
    data: bytes, *, extra: bytes | None = None, name: bytes = b"", comment: bytes = b"", crc: bool = False
) -> bytes:
    """Return one gzip member with the optional fields of its header."""
    flags = (extra is not None) << 2 | bool(name) << 3 | bool(comment) << 4 | crc << 1
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    if extra is not None:
        header += struct.pack("<H", len(extra)) + extra
    header += name + b"\0" if name else b""
    header += comment + b"\0" if comment else b""
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF) if crc else b""
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    return header + body.compress(data) + body.flush() + struct.pack("<II", zlib.crc32(data), len(data))


def pieces(stage: Decoder, parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what a decoder gives for the parts of a stream, its end included."""
    for part in parts:
        for piece in stage.feed(part):
            yield bytes(piece)
    stage.finish()


def decode(compression: Compression, *parts: bytes, limits: Limits | None = None) -> bytes:
    """Return the content of a stream that is fed in ``parts``."""
    return b"".join(pieces(decoder(compression, limits=limits), parts))
