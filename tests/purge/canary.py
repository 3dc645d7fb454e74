"""Canaries: bytes that are a tenant's and nobody else's, and every place of a machine where one could still be.

    canary = Canary()
    namespace.pull(reference to an image of canary.image())       # a canary in every 4 KiB, as stored and as a tar
    namespace.purge()
    assert not canary.in_tree(root) + canary.in_processes(root)

A scan that finds nothing proves something only where the same scan found the canary before: ``test_canary.py`` plants
one in each kind of place.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from layercache.oci import Compression, DiffID, Digest
from layercache.testing.images import BuiltImage, BuiltLayer, build_image, layer_tar
from tests.crash.loopfs import FILESYSTEMS

__all__ = ["COMPRESSIONS", "PERIOD", "Canary", "Hit"]

COMPRESSIONS: tuple[Compression, ...] = ("none", "gzip", "zstd")
PERIOD = 2048
"""Bytes from one canary to the next, so that each aligned block of 4 KiB holds a whole one."""

_SIZE = 64
_WINDOW = 4 << 20
_SKIPPABLE = 0x184D2A50
_IMAGES = tuple(f"/memfd:layercache-{filesystem} " for filesystem in FILESYSTEMS)


@dataclass(frozen=True, slots=True)
class Hit:
    """A canary somewhere: which, where, how often."""

    where: str
    what: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.what} in {self.where}"


@dataclass(frozen=True, slots=True)
class Canary:
    """What marks the bytes of one tenant. ``seed`` makes it again; without one it is new.

    ``inner`` lies in the files of a layer, ``outer`` between the compressed parts of its blob, where decompression
    passes over it, and ``word`` in names: the namespace's, the repository's, an annotation of the manifest.
    """

    seed: str = field(default_factory=lambda: os.urandom(16).hex())
    born: float = field(default_factory=time.time)

    @property
    def inner(self) -> bytes:
        return random.Random(f"inner {self.seed}").randbytes(_SIZE)

    @property
    def outer(self) -> bytes:
        return random.Random(f"outer {self.seed}").randbytes(_SIZE)

    @property
    def word(self) -> str:
        return f"canary{random.Random(f'word {self.seed}').randbytes(12).hex()}"

    @property
    def namespace(self) -> str:
        """Name of the tenant's namespace."""
        return f"{self.word}/endpoint"

    @property
    def repository(self) -> str:
        """Name of the tenant's repository."""
        return f"{self.word}/serving"

    # -- what carries it

    def file(self, size: int, *, salt: object = 0) -> bytes:
        """Return ``size`` bytes of digits, which compress by half, with a canary every :data:`PERIOD`."""
        rng = random.Random(f"file {self.seed} {salt}")
        inner = self.inner
        parts = [rng.randbytes((PERIOD - _SIZE) // 2).hex().encode() + inner for _ in range(0, size, PERIOD)]
        return b"".join(parts)[:size]

    def layer(self, size: int = 64 << 10, compression: Compression = "gzip", *, salt: object = 0) -> BuiltLayer:
        """Return a layer of one file of about ``size`` bytes, with canaries in the tar and in the blob."""
        tar = layer_tar({"weights": self.file(size, salt=salt)})
        blob = tar if compression == "none" else b"".join(self._parts(tar, compression))
        return BuiltLayer(blob, compression, Digest.of(blob), len(blob), DiffID(Digest.of(tar)))

    def image(self, size: int = 64 << 10, *, salt: object = 0) -> BuiltImage:
        """Return an image of one layer of each compression, with the canary's word in its config and manifest."""
        layers = [self.layer(size, compression, salt=f"{salt} {compression}") for compression in COMPRESSIONS]
        return build_image(layers, config={"author": self.word}, annotations={"tenant": self.word})

    def _parts(self, tar: bytes, compression: Compression) -> Iterator[bytes]:
        """Yield ``tar`` in short members or frames, each behind a canary that belongs to the format."""
        outer, step = self.outer, PERIOD
        for start in range(0, len(tar), step):
            piece = tar[start : start + step]
            if compression == "gzip":
                # RFC 1952: an extra field in the member's header.
                deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
                yield struct.pack("<BBBBIBBH", 31, 139, 8, 4, 0, 0, 255, len(outer) + 4)
                yield struct.pack("<2sH", b"CA", len(outer)) + outer
                yield deflate.compress(piece) + deflate.flush()
                yield struct.pack("<II", zlib.crc32(piece), len(piece))
            else:
                # RFC 8878: a skippable frame.
                yield struct.pack("<II", _SKIPPABLE, len(outer)) + outer
                yield zstandard.ZstdCompressor(level=3).compress(piece)

    # -- where it may be

    def in_bytes(self, raw: bytes, where: str = "bytes") -> list[Hit]:
        """Look into bytes: a log, a receipt, what a command printed."""
        counts = {what: raw.count(needle) for what, needle in self._needles.items()}
        return [Hit(where, what, count) for what, count in counts.items() if count]

    def in_file(self, fd: int, where: str = "file") -> list[Hit]:
        """Look into an open file, passing over its holes."""
        counts = dict.fromkeys(self._needles, 0)
        for seen, raw in _data(fd):
            for what, needle in self._needles.items():
                counts[what] += raw.count(needle, max(0, seen - len(needle) + 1))
        return [Hit(where, what, count) for what, count in counts.items() if count]

    def in_tree(self, top: Path, *, but: tuple[Path, ...] = ()) -> list[Hit]:
        """Look into the name and the bytes of everything below ``top``, except below ``but``."""
        hits: list[Hit] = []
        for folder, folders, files in os.walk(top):
            at = Path(folder)
            folders[:] = [name for name in folders if at / name not in but]
            for name in (*folders, *files):
                path = at / name
                hits += self.in_bytes(os.fsencode(name), f"the name {path}")
                if name not in files:
                    continue
                with suppress(FileNotFoundError):
                    if path.is_symlink():
                        hits += self.in_bytes(os.fsencode(path.readlink()), f"the link {path}")
                    elif path.is_file():
                        hits += self._in_path(path, str(path))
        return hits

    def in_processes(self, *places: Path) -> list[Hit]:
        """Look into what any process has open or mapped below ``places``, also where it has no name now.

        Of this process and all it started, into every open file that changed since the canary was made. Not into
        those of others: to open another test's file would make us a holder of it.
        """
        hits: list[Hit] = []
        below = tuple(f"{place}/" for place in places)
        devices = {place.stat().st_dev for place in places}
        family = _family()
        seen: set[tuple[int, int]] = set()
        for pid in _pids():
            with suppress(OSError):  # it has ended, or may not be looked at
                for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                    path = f"/proc/{pid}/fd/{name}"
                    with suppress(OSError):
                        status, target = os.stat(path), os.readlink(path)  # noqa: PTH115, PTH116
                        ours = target.startswith(below) and status.st_dev in devices
                        recent = pid in family and status.st_ctime >= self.born - 1 and not target.startswith(_IMAGES)
                        key = (status.st_dev, status.st_ino)
                        if stat.S_ISREG(status.st_mode) and (ours or recent) and key not in seen:
                            seen.add(key)
                            hits += self._in_path(Path(path), f"fd {name} of {pid} ({target})")
                hits += self._in_maps(pid, below, devices)
        return hits

    @property
    def _needles(self) -> dict[str, bytes]:
        return {"inner": self.inner, "outer": self.outer, "word": self.word.encode()}

    def _in_path(self, path: Path, where: str) -> list[Hit]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return self.in_file(fd, where)
        finally:
            os.close(fd)

    def _in_maps(self, pid: int, below: tuple[str, ...], devices: set[int]) -> list[Hit]:
        hits: list[Hit] = []
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            span, _, _, device, _, *path = line.split(None, 5)
            major, _, minor = device.partition(":")
            if not path or not path[0].startswith(below) or os.makedev(int(major, 16), int(minor, 16)) not in devices:
                continue
            start, end = (int(address, 16) for address in span.split("-"))
            # Through the process's memory: it works for a file without a name, and opens nothing.
            hits += self.in_bytes(_memory(pid, start, end), f"a map of {pid} ({path[0]})")
        return hits


def _data(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield what a file holds between its holes, in pieces that begin with the end of the last: how much of it, all."""
    offset = 0
    while True:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, offset, os.SEEK_HOLE)
        tail = b""
        while offset < end:
            raw = os.pread(fd, min(_WINDOW, end - offset), offset)
            if not raw:
                return
            piece = tail + raw
            yield len(tail), piece
            offset += len(raw)
            tail = piece[-(_SIZE - 1) :]


def _memory(pid: int, start: int, end: int) -> bytes:
    page = os.sysconf("SC_PAGE_SIZE")
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - unbuffered, and no path of ours
        try:
            memory.seek(start)
            return memory.read(end - start) or b""
        except OSError:
            pages = []
            for at in range(start, end, page):
                with suppress(OSError):  # beyond the end of the file
                    memory.seek(at)
                    pages.append(memory.read(page) or b"")
            return b"".join(pages)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _family() -> set[int]:
    """Return this process and all it started, directly or not."""
    parents: dict[int, int] = {}
    for pid in _pids():
        with suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family
