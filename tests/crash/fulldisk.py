"""A filesystem filled to its last byte: nothing can be stored, and everything can still be read, removed and purged.

    python -m tests.crash.fulldisk ext4 --cycles 20

One filesystem goes through all cycles, so that what a cycle leaks is missed by a later one.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from layercache.errors import LayerCacheError, NoSpaceError, NotFoundError
from layercache.store import Budget, Generation, Store, _chain
from tests.crash import loopfs
from tests.crash.examine import stray
from tests.crash.room import accounting
from tests.crash.scenarios import Actor, Event, content, descriptor, name_of, warm

__all__ = ["cycle", "fill", "main", "reads"]

_LEAST = 4096
_NAMES = 64
_SLACK = 256 << 10
"""Bytes that directories which once were larger, and the filesystem's own records, may keep."""


def fill(place: Path) -> None:
    """Take every byte: space in ever smaller files, then names until no directory can grow."""
    place.mkdir(exist_ok=True)
    size, number = 64 << 20, 0
    while size >= _LEAST:
        number += 1
        try:
            fd = os.open(place / f"fill.{number}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size //= 2
    with suppress(OSError):  # what is left is too little for a block of a file, but perhaps not for a directory's
        for name in range(_NAMES):
            (place / f"directory.{name}").mkdir(exist_ok=True)


def drain(place: Path) -> None:
    """Give it all back."""
    for entry in list(place.iterdir()) if place.exists() else []:
        entry.rmdir() if entry.is_dir() else entry.unlink()


def free(place: Path) -> int:
    """Return the bytes that root can still write."""
    status = os.statvfs(place)
    return status.f_bfree * status.f_frsize


def cycle(place: Path) -> Iterator[str]:
    """Fill, use and empty the root below ``place`` once; yield what is wrong."""
    root, ballast = place / "root", place / "ballast"
    events: list[Event] = []
    actor = Actor(root, events.append)
    actor.open()
    for key in ("small", "chunks", "twin-1"):
        actor.put("a", key)
    actor.put("b", "small")
    actor.set_ref("a", 1, "small")
    generation, store = actor.generation("a"), actor.store
    fill(ballast)

    before = sorted(path for path in root.rglob("*") if "locks" not in path.parts)
    yield from _refused(generation, "large")
    yield from _refused(generation, "twin-2")
    if new := {*root.rglob("*")} - {*before} - {*root.glob("data/*/locks/*")}:
        # A shard's directory may have been made before the space ran out: it holds nothing.
        yield from (f"left by a refused put: {path}" for path in new if not path.is_dir())
    yield from reads(generation, "chunks", "small", "twin-1")

    fill(ballast)
    if generation.remove(descriptor("chunks").digest) != len(content("chunks")):
        yield "a removal gave another size"
    try:
        generation.open(descriptor("chunks").digest).close()
        yield "chunks was removed and is there"
    except NotFoundError:
        pass
    if free(place) < len(content("chunks")):
        yield f"a removal gave {free(place)} bytes back"

    fill(ballast)
    with suppress(NoSpaceError):
        actor.set_ref("a", 2, "small")
    store.recover()
    yield from reads(generation, "small", "twin-1")

    fill(ballast)
    other = Store(root)  # a second process would open it the same way
    try:
        receipt = other.purge(name_of("a"))
        if receipt.level != "unlinked" or receipt.blobs != 2:
            yield f"the purge reached {receipt.level} with {receipt.blobs} blobs"
        yield from reads(actor.generation("b"), "small")
    finally:
        other.close()
    if any(len(home.name) > 40 for home in (root / "trash").iterdir()):
        yield "the purge left something in trash"

    fill(ballast)
    if actor.store.purge(name_of("b")).level != "unlinked":
        yield "the second purge did not end"
    actor.close()
    drain(ballast)
    again = Store(root)
    again.recover()
    yield from again.verify_receipts().problems
    again.close()
    yield from stray(root, "", quarantined=False)
    yield from (event["text"] for event in events if event["op"] == "wrong")


def limited(place: Path) -> Iterator[str]:
    """Do the same where a budget is not used up and others have the disk: blobs go for what is wanted."""
    root, ballast = place / "limited", place / "ballast"
    actor = Actor(root, lambda _: None)
    actor.budget = Budget(most="64MiB", floor=0, policy="lru")
    actor.open()
    for key in ("small", "twin-1", "large"):
        actor.put("a", key)
    generation, store = actor.generation("a"), actor.store
    with generation.open(descriptor("small").digest):
        fill(ballast)
        try:
            actor.put("a", "chunks")
        except NoSpaceError:
            yield "chunks was refused, with a large blob there that nobody needs"
        if generation.has(descriptor("large").digest):
            yield "large stayed, and chunks came"
        yield from reads(generation, "small", "chunks")
        yield from accounting(root, store)
        fill(ballast)
        yield from _refused(generation, "large")
        yield from reads(generation, "small", "chunks")  # too little for it: nothing goes in vain
    if store.purge(name_of("a")).level != "unlinked":
        yield "the purge did not end"
    actor.close()
    drain(ballast)
    again = Store(root, budget=Budget())
    again.recover()
    yield from again.verify_receipts().problems
    yield from accounting(root, again)
    again.close()
    yield from stray(root, "", quarantined=False)


def _refused(generation: Generation, key: str) -> Iterator[str]:
    """A put must fail for want of space, or (where a few bytes were left after all) succeed whole."""
    wanted = descriptor(key)
    try:
        ingest = generation.begin(wanted)
        if ingest is None:
            yield f"{key} is being written, they say"
            return
        with ingest:
            ingest.feed(content(key)[ingest.offset :])
            ingest.commit(media_type=wanted.media_type, diff_id=None, origin="full").close()
        generation.remove(wanted.digest)
        if len(content(key)) > _LEAST:
            yield f"{key} was stored on a full disk"
    except NoSpaceError:
        if generation.has(wanted.digest):
            yield f"{key} was refused and is there"


def reads(generation: Generation, *keys: str) -> Iterator[str]:
    """Read blobs whole; yield which is not what it should be."""
    for key in keys:
        with generation.open(descriptor(key).digest) as blob:
            if b"".join(map(bytes, blob.chunks())) != content(key):
                yield f"wrong bytes of {key}"


def main(arguments: list[str] | None = None) -> int:
    """Go through the cycles; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.fulldisk", description=__doc__.partition("\n")[0])
    parser.add_argument("filesystem", choices=sorted(loopfs.FILESYSTEMS))
    parser.add_argument("--cycles", type=int, default=20)
    options = parser.parse_args(arguments)
    if why := loopfs.unavailable(options.filesystem):
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    warm()
    logging.disable()
    _chain._SEGMENT, _chain._ROOM = 8192, 4096  # every few cycles the receipts go on in a new file
    started = time.monotonic()
    findings: list[str] = []
    frees: list[int] = []
    with loopfs.Image(options.filesystem, loopfs.enter_private_mounts() / options.filesystem) as image:
        image.mount()
        for number in range(options.cycles):
            try:
                for part in (cycle, limited):
                    findings += [f"cycle {number}: {finding}" for finding in part(image.place)]
            except LayerCacheError as error:
                findings.append(f"cycle {number}: {type(error).__name__}: {error}")
                break
            frees.append(free(image.place))
    if frees and frees[0] - frees[-1] > _SLACK:
        findings.append(f"{frees[0] - frees[-1]} bytes were lost on the way")
    for finding in findings[:20]:
        print(f"FAILED {finding}")
    print(
        f"{options.filesystem}: {options.cycles} cycles of a full disk, {len(findings)} findings,"
        f" {time.monotonic() - started:.1f} s"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
