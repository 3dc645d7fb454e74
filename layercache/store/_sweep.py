"""The sweep of one living generation, entry by entry, each under the lock that guards it."""

from __future__ import annotations

import errno
import re

from layercache.store._disk import Dir, Disk
from layercache.store._generation import Generation
from layercache.store._ingest import worth_keeping
from layercache.store._layout import (
    BLOBS,
    FENCE,
    GRANTS,
    HINTS,
    IN,
    KEY,
    LOCK_NAMES,
    LOCKS,
    META,
    NAME,
    PARTS,
    PINS,
    POLICY,
    QUARANTINE,
    QUOTA,
    REFS,
    Partial,
    is_temporary,
    shard,
)
from layercache.store._leftovers import Leftovers

__all__ = ["Sweep"]

_OTHERS = (FENCE, GRANTS, HINTS, KEY, NAME, PINS, POLICY, QUOTA)

_STALE = 7 * 86400.0
"""Seconds after which a partial of this boot that nobody goes on with is given up."""

_SHARD = re.compile(r"[0-9a-f]{2}")
_REF = re.compile(r"[0-9a-f]{64}")
_NOT_OURS = frozenset((errno.EMEDIUMTYPE, errno.EISDIR, errno.ELOOP, errno.ENXIO))


class Sweep:
    """One pass over a generation. ``parts`` are its open directories by name, ``place`` is where it lies."""

    def __init__(
        self,
        disk: Disk,
        generation: Generation,
        leftovers: Leftovers,
        *,
        folder: Dir,
        parts: dict[str, Dir],
        place: str,
    ) -> None:
        self._disk = disk
        self._generation = generation
        self._leftovers = leftovers
        self._folder = folder
        self._parts = parts
        self._place = place

    def run(self) -> None:
        """Sweep it.

        :raises NamespacePurgedError: when it is purged meanwhile.
        """
        alone = self._leftovers.alone
        for name, step in ((IN, self._incoming), (BLOBS, self._blobs), (META, self._records), (REFS, self._references)):
            with alone(f"{self._place}/{name}"):
                step()
            self._generation.check()
        with alone(f"{self._place}/{LOCKS}"):
            for name in sorted(set(self._disk.names(self._parts[LOCKS])) - set(LOCK_NAMES)):
                self._aside(LOCKS, name)
        for name in sorted(set(self._disk.names(self._folder)) - {*PARTS, *_OTHERS}):
            with alone(f"{self._place}/{name}"):
                self._leftovers.move_aside(
                    "unknown", self._folder, name, f"{self._place}/{name}", to=self._parts[QUARANTINE]
                )

    def _aside(self, part: str, name: str) -> None:
        place = f"{self._place}/{part}/{name}"
        with self._leftovers.alone(place):
            self._leftovers.move_aside("unknown", self._parts[part], name, place, to=self._parts[QUARANTINE])

    # -- in/

    def _incoming(self) -> None:
        partials: dict[str, Partial] = {}
        for name in sorted(self._disk.names(self._parts[IN])):
            partial = self._generation.form.parse_partial(name)
            if partial is not None:
                partials[partial.data] = partial
            elif is_temporary(name):
                with self._leftovers.alone(f"{self._place}/{IN}/{name}"):
                    self._temporary(name)
            else:
                self._aside(IN, name)
        for name, partial in partials.items():
            with self._leftovers.alone(f"{self._place}/{IN}/{name}"):
                self._partial(partial)
        self._disk.sync(self._parts[IN])

    def _temporary(self, name: str) -> None:
        disk, at = self._disk, self._parts[IN]
        try:
            file = disk.open(at, name)
        except OSError as error:
            if error.errno in _NOT_OURS:
                self._aside(IN, name)
                return
            raise
        try:
            if disk.lock(file, exclusive=True):  # nobody writes it: its writer holds the lock until it is in its place
                status = disk.stat(at, name)
                if status is not None:
                    disk.remove(at, name)
                    self._leftovers.note("temporary", f"{self._place}/{IN}/{name}", status)
        finally:
            disk.close(file)

    def _partial(self, partial: Partial) -> None:
        """Remove an unfinished write that nobody is at, unless it can be gone on with."""
        disk, at = self._disk, self._parts[IN]
        try:
            # Made where only its sums are left: its lock is the right to them too.
            file = disk.create(at, partial.data, exist_ok=True)
        except OSError as error:
            if error.errno in _NOT_OURS:
                self._aside(IN, partial.data)
                return
            raise
        try:
            if not disk.lock(file, exclusive=True):
                return
            status, named, sums = disk.fstat(file), disk.stat(at, partial.data), disk.stat(at, partial.sums)
            if named is None or named.inode != status.inode:
                return  # published or dropped just now
            if (
                partial.boot == disk.boot
                and disk.now() - status.mtime < _STALE
                and worth_keeping(status.size - self._generation.form.head, sums.size if sums is not None else 0)
            ):
                return
            if sums is not None:
                disk.remove(at, partial.sums)
            disk.remove(at, partial.data)
            self._leftovers.note("partial", f"{self._place}/{IN}/{partial.data}", status)
        finally:
            disk.close(file)

    # -- blobs and what is known of them

    def _blobs(self) -> None:
        for folder, name in self._sharded(BLOBS):
            place = f"{self._place}/{BLOBS}/{folder}/{name}"
            with self._leftovers.alone(place), self._generation.lock(name):
                self._generation.check_slot()
                if self._generation.holds(name) and not self._generation.judge(name):
                    self._leftovers.note("blob", place, detail="its record is missing or damaged; moved aside")

    def _records(self) -> None:
        for folder, name in self._sharded(META):
            if self._generation.holds(name):
                continue
            place = f"{self._place}/{META}/{folder}/{name}"
            with self._leftovers.alone(place), self._generation.lock(name):
                self._generation.check_slot()
                if not self._generation.holds(name):
                    self._record(folder, name, place)

    def _record(self, folder: str, name: str, place: str) -> None:
        disk = self._disk
        at = disk.dir(self._parts[META], folder)
        try:
            status = disk.stat(at, name)
            if status is not None and status.kind == "file":
                disk.remove(at, name)
                disk.sync(at)
                self._leftovers.note("record", place, status)
            else:
                self._leftovers.move_aside("unknown", at, name, place, to=self._parts[QUARANTINE])
        finally:
            disk.close(at)

    def _sharded(self, part: str) -> list[tuple[str, str]]:
        """Return the entries of the shards that can be ours; move the others aside."""
        disk = self._disk
        found = []
        for folder in sorted(disk.names(self._parts[part])):
            status = disk.stat(self._parts[part], folder)
            if status is None:
                continue
            if not _SHARD.fullmatch(folder) or status.kind != "dir":
                self._aside(part, folder)
                continue
            with self._leftovers.alone(f"{self._place}/{part}/{folder}"):
                at = disk.dir(self._parts[part], folder)
                try:
                    for name in sorted(disk.names(at)):
                        if self._generation.form.is_blob(name) and shard(name) == folder:
                            found.append((folder, name))
                            continue
                        place = f"{self._place}/{part}/{folder}/{name}"
                        with self._leftovers.alone(place):
                            self._leftovers.move_aside("unknown", at, name, place, to=self._parts[QUARANTINE])
                finally:
                    disk.close(at)
        return found

    # -- references

    def _references(self) -> None:
        for name in sorted(self._disk.names(self._parts[REFS])):
            if not _REF.fullmatch(name):
                self._aside(REFS, name)
                continue
            if self._generation.sound_ref(name):
                continue
            place = f"{self._place}/{REFS}/{name}"
            with self._leftovers.alone(place), self._generation.lock(name):
                if not self._generation.sound_ref(name):  # looked at again: a new one may have taken its place
                    self._leftovers.move_aside("reference", self._parts[REFS], name, place, to=self._parts[QUARANTINE])
