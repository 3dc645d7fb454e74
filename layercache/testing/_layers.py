"""Layers: a tar of real files, compressed in every shape the field produces."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import shake_128
from pathlib import Path
from typing import Protocol

import zstandard

from layercache.oci import Compression, DiffID, Digest
from layercache.testing._content import PIECE, Content, size_of

__all__ = ["BuiltLayer", "build_layer", "compress", "layer_tar", "synthetic_layer"]

_SKIPPABLE = 0x184D2A50  # RFC 8878 3.1.2: sixteen magic numbers, 0x184D2A50 to 0x184D2A5F


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """A layer ready to be put into images: its bytes as stored, and both its names."""

    content: Content
    compression: Compression
    digest: Digest
    size: int
    diff_id: DiffID


def layer_tar(
    tree: Mapping[str, bytes | Path] | Iterable[Path],
    *,
    under: str = "",
    keep: Callable[[Path], bool] | None = None,
) -> bytes:
    """Return a layer's tar of real files, the same bytes whenever the files are the same.

    ``tree`` maps names in the image to bytes, to a file, or to a directory that is taken with all it holds; or it
    lists files and directories that keep their last name. ``under`` is the directory of the image that takes
    them. ``keep`` chooses among the files found in directories. Owner, time and mode are normalised (execute
    permission stays), links stay links, and what the interpreter caches (``__pycache__``) is left out.

    The tar is held in memory: for a layer of gigabytes use :func:`synthetic_layer`.

    :raises FileNotFoundError: if a path does not exist.
    """
    named = tree if isinstance(tree, Mapping) else {path.name: path for path in tree}
    entries: dict[str, bytes | Path | None] = {}  # None is a directory
    for name, source in named.items():
        for inner, content in _walk(source, keep):
            full = "/".join(part for part in (under.strip("/"), name.strip("/"), inner) if part)
            if not full:
                continue
            parts = full.split("/")
            for depth in range(1, len(parts)):
                entries.setdefault("/".join(parts[:depth]), None)
            entries[full] = content
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(entries):
            _add(tar, name, entries[name])
    return out.getvalue()


def compress(
    tar: bytes, compression: Compression, *, frames: int = 1, members: int = 1, skippable: bool = False
) -> bytes:
    """Return ``tar`` as the stream of ``compression``.

    ``members`` (gzip) and ``frames`` (zstd) cut it into so many independent parts, some of them empty where the tar
    is shorter than that. ``skippable`` (zstd) puts a skippable frame before, between and after them. The same
    arguments give the same bytes with the same versions of zlib and zstandard.

    :raises ValueError: on a number of parts that ``compression`` does not have.
    """
    if (frames != 1 or skippable) and compression != "zstd":
        raise ValueError(f"frames exist in zstd only, not in {compression}")
    if members != 1 and compression != "gzip":
        raise ValueError(f"members exist in gzip only, not in {compression}")
    if frames < 1 or members < 1:
        raise ValueError("there is no stream of less than one part")
    if compression == "none":
        return tar
    out: list[bytes] = []
    for index, part in enumerate(_parts(tar, members if compression == "gzip" else frames)):
        if skippable:
            out.append(_skippable_frame(index))
        encoder = _encoder(compression, len(part))
        out += encoder.compress(part), encoder.flush()
    if skippable:
        out.append(_skippable_frame(frames))
    return b"".join(out)


def build_layer(
    tar: bytes,
    compression: Compression = "gzip",
    *,
    frames: int = 1,
    members: int = 1,
    skippable: bool = False,
    algorithm: str = "sha256",
) -> BuiltLayer:
    """Return ``tar`` as a layer, compressed as :func:`compress` does and named by ``algorithm``."""
    content = compress(tar, compression, frames=frames, members=members, skippable=skippable)
    digest = Digest.of(content, algorithm=algorithm)
    return BuiltLayer(content, compression, digest, len(content), DiffID(Digest.of(tar)))


def synthetic_layer(
    path: Path, size: int, *, seed: int = 0, compression: Compression = "none", name: str = "model.safetensors"
) -> BuiltLayer:
    """Write a layer with one file of ``size`` bytes to ``path`` and return it.

    The file's bytes follow from ``seed`` alone and do not compress, as the weights of a model do not. Nothing larger
    than a few mebibytes is held in memory, whatever ``size`` is. Blocks while it writes (about 5 s a GiB).
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    inner, outer = Digest.of(b"").hasher(), Digest.of(b"").hasher()
    encoder = _encoder(compression, None)
    with path.open("wb") as file:

        def put(data: bytes) -> None:
            outer.update(data)
            file.write(data)

        for piece in _tar_of_one(info, _noise(size, seed)):
            inner.update(piece)
            put(encoder.compress(piece))
        put(encoder.flush())
    diff_id = DiffID(Digest.parse(f"sha256:{inner.hexdigest()}"))
    return BuiltLayer(path, compression, Digest.parse(f"sha256:{outer.hexdigest()}"), size_of(path), diff_id)


class _Encoder(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Identity:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _encoder(compression: Compression, size: int | None) -> _Encoder:
    if compression == "gzip":
        return zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: a gzip header, which zlib writes without a time
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj(size=-1 if size is None else size)
    return _Identity()


def _parts(data: bytes, count: int) -> Iterator[bytes]:
    step = -(-len(data) // count)
    return (data[index * step : (index + 1) * step] for index in range(count))


def _skippable_frame(index: int) -> bytes:
    payload = shake_128(b"skippable %d" % index).digest(300 * (index % 2))  # every other one is empty, as it may be
    return struct.pack("<II", _SKIPPABLE + index % 16, len(payload)) + payload


def _walk(source: bytes | Path, keep: Callable[[Path], bool] | None) -> Iterator[tuple[str, bytes | Path | None]]:
    if isinstance(source, bytes) or source.is_symlink() or not source.is_dir():
        yield "", source
        return
    yield "", None
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if "__pycache__" in inner.parts or path.suffix == ".pyc":
            continue
        if path.is_dir() and not path.is_symlink():
            if keep is None:
                yield inner.as_posix(), None
        elif keep is None or keep(path):
            yield inner.as_posix(), path


def _add(tar: tarfile.TarFile, name: str, content: bytes | Path | None) -> None:
    info = tarfile.TarInfo(name)
    if content is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
    elif isinstance(content, bytes):
        info.size, info.mode = len(content), 0o644
        tar.addfile(info, io.BytesIO(content))
    elif content.is_symlink():
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, str(content.readlink())
        tar.addfile(info)
    else:
        with content.open("rb") as file:
            info.size = size_of(content)
            info.mode = 0o755 if content.stat().st_mode & 0o100 else 0o644
            tar.addfile(info, file)


def _tar_of_one(info: tarfile.TarInfo, content: Iterable[bytes]) -> Iterator[bytes]:
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield from content
    yield bytes(-info.size % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)


def _noise(size: int, seed: int) -> Iterator[bytes]:
    for offset in range(0, size, PIECE):
        yield shake_128(b"%d:%d" % (seed, offset)).digest(min(PIECE, size - offset))
