"""How a blob leaves: by its name, when nobody has it open, or because somebody needs the room."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from layercache.errors import InUseError, LayerCacheError, NotFoundError

if TYPE_CHECKING:
    from layercache.store._generation import Generation

__all__ = ["clear_damaged", "evict", "remove"]


def remove(generation: Generation, name: str, what: str) -> int:
    """Drop the blob of that file name and return its size; ``what`` names it in errors.

    :raises NotFoundError: when it is not here.
    :raises InUseError: when somebody has it open; it stays.
    """
    size, taken, walk = _remove(generation, name, what, may_go=lambda: True, ask=True)
    with suppress(OSError, LayerCacheError):
        generation.space.give_back(taken, walk)
    return size


def evict(generation: Generation, name: str, *, may_go: Callable[[], bool]) -> int:
    """Do as :func:`remove` for the room it gives, and return that. Asks nobody who has it open.

    :param may_go: asked once nobody can have it open: pins are looked at then.
    """
    _, taken, walk = _remove(generation, name, f"blob {name}", may_go=may_go, ask=False)
    generation.space.give_back(taken, walk)
    return taken


def clear_damaged(generation: Generation) -> int:
    """Remove what was moved aside; return the bytes that gives."""
    disk, taken, walk = generation.disk, 0, generation.space.walk()
    with generation.guarding("clear what was moved aside"):
        for name in disk.names(generation.bad):
            status = disk.stat(generation.bad, name)
            if status is not None and status.kind != "dir":
                disk.remove(generation.bad, name)
                taken += status.allocated
    generation.space.give_back(taken, walk)
    return taken


def _remove(
    generation: Generation, name: str, what: str, *, may_go: Callable[[], bool], ask: bool
) -> tuple[int, int, int]:
    """Return its size, the bytes it took, and what to give them back with."""
    disk = generation.disk
    with generation.guarding(f"remove {what}"), generation.lock(name):
        generation.check_slot()
        with generation.blobs.folder(name) as blobs:
            if blobs is None or disk.stat(blobs, name) is None:
                generation.check()  # a purge may have taken it
                raise NotFoundError(f"{what} is not in this namespace")
            file = disk.open(blobs, name)
            try:
                if not disk.lock(file, exclusive=True):
                    holders = disk.openers(but=file).get(disk.fstat(file).inode, frozenset()) if ask else ()
                    raise InUseError(f"{what} is open", holders=tuple(sorted(holders)), hint="close it first")
                if not may_go():
                    raise InUseError(f"{what} is pinned", hint="unpin it first")
                status = disk.fstat(file)
                walk = generation.space.walk()  # before the first block goes
                # The file goes before its record: what the record alone leaves is swept, a file alone holds bytes.
                disk.remove(blobs, name)
                disk.sync(blobs)
            finally:
                disk.close(file)
        taken = status.allocated + generation.forget(name)
    return status.size - generation.form.head, taken, walk
