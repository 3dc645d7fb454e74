"""A directory of many names, kept in directories of its own by their first two digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from layercache.store._disk import Dir, Disk
from layercache.store._layout import shard

__all__ = ["Shards"]


class Shards:
    """What lies below the open directory ``at``."""

    def __init__(self, disk: Disk, at: Dir) -> None:
        self._disk = disk
        self.at = at

    @contextmanager
    def folder(self, name: str) -> Iterator[Dir | None]:
        """Open the directory that ``name`` is kept in; ``None`` where it is not there yet."""
        try:
            folder = self._disk.dir(self.at, shard(name))
        except FileNotFoundError:
            yield None
            return
        try:
            yield folder
        finally:
            self._disk.close(folder)

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
