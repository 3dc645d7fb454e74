"""Forks of a process that holds locks of the store: the child holds none of them and ends none of them.

    python -m tests.multiprocess.forks --rounds 100

Each round takes a lock, forks a child that lives on, and looks from a third process whether the lock holds exactly as
long as its taker wants.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from layercache.errors import InUseError, LayerCacheError, StoreClosedError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Blob, Generation, Ingest, NamespaceName, Store
from layercache.store._disk import Dir
from layercache.store._layout import SlotState
from tests.crash.loopfs import enter_private_mounts

__all__ = ["HELD", "main"]

_DATA = b"held" * 1000
_WANTED = Descriptor(OCTET_STREAM, Digest.of(_DATA), len(_DATA))
_OTHER = Descriptor(OCTET_STREAM, Digest.of(_DATA + b"!"), len(_DATA) + 1)
_NAME = NamespaceName("forks")


class _Child:
    """A fork that does nothing until it is told to end."""

    def __init__(self, act: Callable[[], int] = lambda: 0) -> None:
        out, self._into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.close(self._into)
                status = act()
                os.read(out, 1)
            finally:
                os._exit(status)
        os.close(out)

    def end(self, *, kill: bool = False) -> int:
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._into)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _elsewhere(look: Callable[[Store, Generation], bool], root: Path) -> bool:
    """Look from a process that shares nothing with this one but the root."""

    def act() -> int:
        store = Store(root)
        generation = store.generation(_NAME, create=True)
        return 2 if generation is None else int(look(store, generation))

    child = _Child(act)
    status = child.end()
    if status not in (0, 1):
        raise AssertionError(f"the looker ended with {status}")
    return bool(status)


def _soon(look: Callable[[], bool]) -> bool:
    """Look again for a second: a fork closes its copies when it first runs, which may be a moment after the fork."""
    end = time.monotonic() + 1
    while not look():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def _removable(_: Store, generation: Generation) -> bool:
    try:
        generation.remove(_WANTED.digest)
    except InUseError:
        return False
    return True


def _writable(_: Store, generation: Generation) -> bool:
    ingest = generation.begin(_OTHER)
    if ingest is None:
        return False
    ingest.abort()
    return True


def _put(generation: Generation) -> Blob:
    ingest = generation.begin(_WANTED)
    if ingest is None:
        return generation.open(_WANTED.digest)
    with ingest:
        ingest.feed(_DATA)
        return ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="forks")


def _blob(generation: Generation, root: Path, *, kill: bool) -> Iterator[str]:
    blob = _put(generation)
    child = _Child(lambda: _unusable(blob))
    if _elsewhere(_removable, root):
        yield "a leased blob was removed while its reader's fork lived"
        blob = _put(generation)
    second = _Child()
    if second.end(kill=kill) != (-9 if kill else 0):
        yield "a fork did not end as told"
    if _elsewhere(_removable, root):
        yield "the end of a fork ended its parent's lease"
        blob = _put(generation)
    blob.close()
    if not _soon(lambda: _elsewhere(_removable, root)):
        yield "a fork keeps a blob leased that its parent has closed"
    if child.end() != 0:
        yield "a fork can use its parent's lease"


def _unusable(blob: Blob) -> int:
    try:
        blob.pread(0, 1)
    except StoreClosedError:
        return 0
    return 1


def _ingest(generation: Generation, root: Path, *, kill: bool) -> Iterator[str]:
    ingest = generation.begin(_OTHER)
    if ingest is None:
        yield "the right to write is held by nobody, and not to be had"
        return
    ingest.feed(_DATA)
    child = _Child(lambda: _misused(ingest))
    second = _Child()
    second.end(kill=kill)
    if _elsewhere(_writable, root):
        yield "the end of a fork ended its parent's right to write"
    ingest.feed(b"!")
    ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="forks").close()
    if not _elsewhere(lambda _, theirs: theirs.has(_OTHER.digest), root):
        yield "what a fork's parent published is not there"
    generation.remove(_OTHER.digest)
    ingest = generation.begin(_OTHER)
    third = _Child()
    if ingest is not None:
        ingest.suspend()
    if not _soon(lambda: _elsewhere(_writable, root)):
        yield "a fork keeps the right to write that its parent has given up"
    third.end()
    if child.end() != 0:
        yield "a fork can go on with its parent's write"


def _misused(ingest: Ingest | None) -> int:
    if ingest is None:
        return 1
    try:
        ingest.feed(b"?")
    except LayerCacheError:
        return 0
    return 1


def _slot(generation: Generation, root: Path, *, kill: bool) -> Iterator[str]:
    """A fork made in the middle of a purge must not keep the slot's lock."""
    store = Store(root)
    children: list[_Child] = []
    state = store._slots.state

    def forking(slot_dir: Dir) -> SlotState | None:
        children.append(_Child())  # with the slot's lock in hand
        return state(slot_dir)

    store._slots.state = forking  # type: ignore[method-assign]
    try:
        store.purge(_NAME)
    finally:
        store.close()
    started = time.monotonic()
    _elsewhere(lambda *_: True, root)  # makes the next generation, under the slot's lock
    if time.monotonic() - started > 2:
        yield "a fork keeps the lock of a namespace"
    if not children:
        yield "nothing was forked during the purge"
    for child in children:
        child.end(kill=kill)


def _root(_: Generation, root: Path, *, kill: bool) -> Iterator[str]:
    """A fork of a process with a root open does not keep the root: it can be made its own by whoever asks alone."""
    home = root.parent / "another"
    home.mkdir(mode=0o700, exist_ok=True)
    store = Store(home)
    child = _Child()
    if _exclusive(home):
        yield "an open root can be locked by another"
    store.close()
    if not _soon(lambda: _exclusive(home)):
        yield "a fork keeps a root that its parent has closed"
    child.end(kill=kill)


def _exclusive(home: Path) -> bool:
    import fcntl

    with (home / "root.lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


HELD: dict[str, Callable[..., Iterator[str]]] = {"blob": _blob, "ingest": _ingest, "slot": _slot, "root": _root}


def main(arguments: list[str] | None = None) -> int:
    """Play rounds; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.multiprocess.forks", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time() // 86400))
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    findings: list[str] = []
    started = time.monotonic()
    # For root, files that end with this process however it ends.
    place = enter_private_mounts() if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="layercache-forks.", dir=place) as home:
        root = Path(home) / "root"
        store = Store(root)
        for number in range(options.rounds):
            kind = rng.choice(sorted(HELD))
            generation = store.generation(_NAME, create=True)
            if generation is None:
                raise AssertionError
            findings += [
                f"round {number} ({kind}): {text}" for text in HELD[kind](generation, root, kill=rng.random() < 0.5)
            ]
            generation.close()
        store.close()
    for finding in findings[:20]:
        print(f"FAILED {finding}")
    seconds = time.monotonic() - started
    print(f"forks: {options.rounds} rounds, seed {options.seed}, {len(findings)} findings, {seconds:.1f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
