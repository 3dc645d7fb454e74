"""What recovery found, and how one entry that resists is kept from hindering the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from layercache.errors import InUseError, StoreError
from layercache.store._disk import Dir, Disk, Stat

__all__ = ["Kind", "Leftover", "Leftovers"]

_log = logging.getLogger("layercache.store")

Kind = Literal["partial", "temporary", "record", "blob", "reference", "generation", "unknown", "failed"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that recovery found and dealt with.

    ``kind`` is ``partial`` (an unfinished write), ``temporary`` (a record that never came to its place), ``record``
    (one without its blob), ``blob`` (one without a sound record: moved aside), ``reference`` (a damaged one: moved
    aside), ``generation`` (a directory of no living namespace, or a namespace that lost one), ``unknown`` (not ours:
    moved aside) or ``failed`` (it stays; ``detail`` says why). ``place`` is its path below the root, with no tenant's
    name in it; ``bytes`` its size where it is a file.
    """

    kind: Kind
    place: str
    bytes: int = 0
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"kind": self.kind, "place": self.place, "bytes": self.bytes, "detail": self.detail}


class Leftovers:
    """The leftovers found so far."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.found: list[Leftover] = []

    def note(self, kind: Kind, place: str, status: Stat | None = None, detail: str = "removed") -> None:
        """Add one."""
        size = status.size if status is not None and status.kind == "file" else 0
        self.found.append(Leftover(kind, ascii(place)[1:-1], size, detail))

    @contextmanager
    def alone(self, place: str) -> Iterator[None]:
        """Let a failure within the block hinder nothing after it."""
        try:
            yield
        except (FileNotFoundError, InUseError):
            return  # somebody was faster, or is at it
        except (OSError, StoreError) as error:
            _log.warning("recovery could not deal with an entry: %s", error)
            self.note("failed", place, detail=str(error))

    def move_aside(self, kind: Kind, at: Dir, name: str, place: str, *, to: Dir) -> None:
        """Move an entry to where nothing is served from."""
        disk = self._disk
        status = disk.stat(at, name)
        if status is not None:
            disk.rename(at, name, to, f"unknown.{disk.token()}", replace=False)
            disk.sync(to)
            disk.sync(at)
            self.note(kind, place, status, "moved aside")
