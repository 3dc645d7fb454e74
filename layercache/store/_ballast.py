"""Space held back for the day when the disk is full and something must still be written so that bytes can go."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from layercache.store._disk import Disk
from layercache.store._layout import BALLAST

__all__ = ["Ballast"]

_SIZE = 4 << 20
_PLENTY = 4 * _SIZE
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Ballast:
    """The file ``ballast`` of one root: blocks that nobody else can take."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def prepare(self) -> None:
        """Take the blocks, if they are not taken yet and there is plenty left."""
        disk = self._disk
        status = disk.stat(disk.root, BALLAST)
        if (status is not None and status.size == _SIZE) or disk.room().free < _PLENTY:
            return
        with suppress(FileNotFoundError):  # given up by another process, just now
            file = disk.create(disk.root, BALLAST, exist_ok=True)
            try:
                disk.reserve(file, _SIZE)
                disk.truncate(file, _SIZE)  # last: the size says that the blocks are there
            except OSError as error:
                if error.errno not in _FULL:
                    raise
            finally:
                disk.close(file)

    def spared(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns; where the disk is full for it, give the ballast up and call once more."""
        try:
            return call()
        except OSError as error:
            if error.errno not in _FULL or not self._give_up():
                raise
        return call()

    def _give_up(self) -> bool:
        disk = self._disk
        try:
            file = disk.open(disk.root, BALLAST)
        except FileNotFoundError:
            return False
        disk.close(file)
        file = disk.create(disk.root, BALLAST, exist_ok=True)
        try:
            disk.truncate(file, 0)  # some filesystems free the blocks of an unlinked file some time later
        finally:
            disk.close(file)
        with suppress(FileNotFoundError):
            disk.remove(disk.root, BALLAST)
        disk.sync(disk.root)
        return True
