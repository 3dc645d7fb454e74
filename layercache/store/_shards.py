"""A directory of many names, kept in directories of its own by their first two digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from layercache.store._disk import Dir, Disk
from layercache.store._layout import shard

__all__ = ["Shards"]


class Shards:
    """What lies below the open directory ``at``."""

    def __init__(self, disk: Disk, at: Dir) -> None:
        self._disk = disk
        self.at = at

    def folder(self, name: str) -> _Folder:
        """Open the directory that ``name`` is kept in, within a block; ``None`` where it is not there yet."""
        return _Folder(self._disk, self.at, shard(name))

    def made(self, name: str) -> Dir:
        """Return the directory that ``name`` is kept in, made and durable; to be closed."""
        disk, folder = self._disk, shard(name)
        with suppress(FileExistsError):
            if disk.stat(self.at, folder) is None:
                disk.make_dir(self.at, folder)
        # Also when another made it: it may have died before its fsync, and our blob must not hang from a lost name.
        disk.sync(self.at)
        return disk.dir(self.at, folder)

    def names(self) -> Iterator[str]:
        """Yield every name, in order, that is kept where it belongs."""
        for folder in sorted(self._disk.names(self.at)):
            try:
                at = self._disk.dir(self.at, folder)
            except OSError:
                continue  # not a directory: not ours
            try:
                names = self._disk.names(at)
            finally:
                self._disk.close(at)
            yield from (name for name in sorted(names) if shard(name) == folder)


class _Folder:
    # A class: a generator that serves as a context costs a hit, which opens two, more than the calls it makes.
    __slots__ = ("_at", "_disk", "_name", "_opened")

    def __init__(self, disk: Disk, at: Dir, name: str) -> None:
        self._disk = disk
        self._at = at
        self._name = name
        self._opened: Dir | None = None

    def __enter__(self) -> Dir | None:
        try:
            self._opened = self._disk.dir(self._at, self._name)
        except FileNotFoundError:
            return None
        return self._opened

    def __exit__(self, *exc: object) -> None:
        if self._opened is not None:
            self._disk.close(self._opened)
