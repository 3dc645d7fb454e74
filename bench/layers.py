"""Layers for benchmarks: files of this machine, as many as it takes to reach a size, in one gzip stream."""

from __future__ import annotations

import itertools
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from layercache.oci import DiffID, Digest
from layercache.testing.images import BuiltImage, BuiltLayer, build_image

try:
    import zlib_ng.zlib_ng as deflate  # faster, where it is installed
except ImportError:
    import zlib as deflate  # type: ignore[no-redef]

_MIB = 1 << 20
Names = Iterable[tuple[str, Path]]


def serving_image(directory: Path, largest: int) -> BuiltImage:
    """Return an image as a model server has it; its blobs are files in ``directory``.

    Lowest first: the interpreter's library; the installed packages again and again under new names until the layer has
    ``largest`` bytes (gzip looks back 32 KiB only, so each copy counts in full); one small file.
    """
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    copies = itertools.chain.from_iterable(tree(packages, f"opt/venv{number}") for number in itertools.count())
    return build_image(
        [
            gzip_layer(directory / "library.tar.gz", tree(library, "usr/lib/python3")),
            gzip_layer(directory / "packages.tar.gz", copies, most=largest),
            gzip_layer(directory / "entry.tar.gz", [("opt/serve.py", Path(__file__))]),
        ]
    )


def tree(top: Path, under: str) -> Iterator[tuple[str, Path]]:
    """Yield the regular files below ``top``, without what was installed into it or cached by the interpreter."""
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    for path in sorted(top.rglob("*")):
        inner = path.relative_to(top)
        if path.is_file() and not path.is_symlink() and not left_out & set(inner.parts):
            yield f"{under}/{inner}", path


def gzip_layer(path: Path, files: Names, *, most: int | None = None) -> BuiltLayer:
    """Write the gzip layer of ``files`` to ``path``; stop at the first file after ``most`` bytes."""
    with path.open("wb") as out:
        sink = _Gzip(out)
        # An iterator without an end needs ``most``; both streams are hashed as they pass.
        with tarfile.open(fileobj=cast("BinaryIO", sink), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_MIB) as tar:
            for name, source in files:
                tar.add(source, name, recursive=False)
                if most is not None and sink.size >= most:
                    break
        sink.finish()
    digest, diff_id = (Digest.parse(f"sha256:{hasher.hexdigest()}") for hasher in (sink.outer, sink.inner))
    return BuiltLayer(path, "gzip", digest, sink.size, DiffID(diff_id))


class _Gzip:
    """A file for ``tarfile`` that compresses and hashes what is written to it."""

    def __init__(self, out: BinaryIO) -> None:
        self.size = 0
        self.inner, self.outer = sha256(), sha256()
        self._out = out
        self._encoder: Any = deflate.compressobj(6, deflate.DEFLATED, 31)

    def write(self, data: bytes) -> int:
        self.inner.update(data)
        self._put(self._encoder.compress(data))
        return len(data)

    def finish(self) -> None:
        self._put(self._encoder.flush())

    def _put(self, data: bytes) -> None:
        self.outer.update(data)
        self.size += len(data)
        self._out.write(data)
