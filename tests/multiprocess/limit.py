"""Eight processes at the limit of a budget put, read, hold, pin, evict, remove and purge: nothing goes that must stay.

    python -m tests.multiprocess.limit --operations 100000
    python -m tests.multiprocess.limit --operations 2000 --seed 7 --below /var/tmp

The disk is walked over all the while with the count's lock in hand, so that what is found is exact: never more than is
counted, never more than the budget. Each process reads what it holds open and what it has pinned again and again, and
compares. When all have ended, the count that a walk finds must be what the disk shows and what is kept back.

The root lies in memory where there is a place for it: a flush costs nothing there, and what is looked for is what
processes do to each other. ``--below`` names another filesystem.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from layercache import Descriptor, Digest, LayerCache, Namespace
from layercache.errors import InUseError, LayerCacheError, NamespacePurgedError, NotFoundError, StoreError
from layercache.image import Layer
from layercache.oci import OCTET_STREAM
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import ScriptedRegistry
from tests.crash.room import accounting, on_disk

__all__ = ["main"]

BUDGET = 12 << 20
"""Of which 6 MiB are kept back: a few dozen blobs of those that are put fit beside each other."""

PROCESSES = 8
_NUMBERS, _LARGEST, _IMAGES = 48, 96 << 10, 4
_LASTING, _PASSING = ("a", "b"), ("c", "d")
"""Namespaces that are never purged, and some that are, by anybody at any time."""


def content(number: int) -> bytes:
    """Return the bytes that everybody puts under a number."""
    rng = random.Random(number)
    return rng.randbytes(rng.randrange(1, _LARGEST))


@dataclass(slots=True)
class _Held:
    """A blob that this process has open: it must be there, and right, until it is closed or its namespace purged."""

    namespace: Namespace
    layer: Layer
    number: int


@dataclass(slots=True)
class _Worker:
    """One of the processes: draws what to do, does it, and looks after what must not go."""

    cache: LayerCache
    host: str
    me: int
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    held: list[_Held] = field(default_factory=list)
    pinned: tuple[str, tuple[Digest, ...]] | None = None

    def step(self) -> None:
        """Do one thing, and look at one that must have stayed."""
        acts: tuple[tuple[Callable[[], None], int], ...] = (
            (self._put, 40),
            (self._read, 25),
            (self._hold, 12),
            (self._release, 8),
            (self._pull_and_pin, 5),
            (self._unpin, 3),
            (self._remove, 4),
            (self._evict, 2),
            (self._purge, 1),
        )
        (act,) = self.rng.choices([act for act, _ in acts], [weight for _, weight in acts])
        try:
            act()
            self.done[act.__name__] += 1
        except (NotFoundError, InUseError, NamespacePurgedError):
            self.done["missed"] += 1  # as it may be: gone, held by another, or purged
        except StoreError:
            self.done["refused"] += 1
        if self.held:
            self._look(self.rng.choice(self.held))
        if self.pinned is not None and self.rng.random() < 0.2:
            where, digests = self.pinned
            for digest in digests:
                if not _here(self.cache.namespace(where), digest):
                    self.findings.append(f"pinned by {self.me} and gone: {digest}")

    def _namespace(self) -> Namespace:
        return self.cache.namespace(self.rng.choice(_LASTING + _PASSING))

    def _put(self) -> None:
        data = content(self.rng.randrange(_NUMBERS))
        self._namespace().admit(Descriptor(OCTET_STREAM, Digest.of(data), len(data)), io.BytesIO(data))

    def _read(self) -> None:
        number = self.rng.randrange(_NUMBERS)
        with self._namespace().open(Digest.of(content(number))) as layer:
            if _all(layer) != content(number):
                self.findings.append(f"wrong bytes of number {number}")

    def _hold(self) -> None:
        number, namespace = self.rng.randrange(_NUMBERS), self._namespace()
        layer = namespace.open(Digest.of(content(number)))
        self.held.append(_Held(namespace, layer, number))
        if len(self.held) > 3:
            self.held.pop(0).layer.close()

    def _release(self) -> None:
        if self.held:
            self.held.pop(self.rng.randrange(len(self.held))).layer.close()

    def _pull_and_pin(self) -> None:
        where = self.rng.choice(_LASTING)
        reference = f"{self.host}/demo/image:{self.rng.randrange(_IMAGES)}"
        namespace = self.cache.namespace(where)
        with namespace.pull(reference):
            if self.pinned is not None:
                self._unpin()
            made = namespace.pin(f"of {self.me}", reference)
        self.pinned = (where, made.blobs)

    def _unpin(self) -> None:
        if self.pinned is not None:
            where, self.pinned = self.pinned[0], None
            self.cache.namespace(where).unpin(f"of {self.me}")

    def _remove(self) -> None:
        self._namespace().remove(Digest.of(content(self.rng.randrange(_NUMBERS))))

    def _evict(self) -> None:
        self.cache.prune(to=self.rng.randrange(3 * BUDGET // 4, BUDGET))

    def _purge(self) -> None:
        self.cache.namespace(self.rng.choice(_PASSING)).purge(wait=self.rng.choice((0.0, 0.05)))

    def _look(self, held: _Held) -> None:
        try:
            right = _all(held.layer) == content(held.number)
        except NamespacePurgedError:
            held.layer.close()
            self.held.remove(held)
            return
        except LayerCacheError as error:
            self.findings.append(f"held and not readable: {error}")
            return
        if not right:
            self.findings.append(f"held and wrong: number {held.number}")
        # Purged and begun anew between the two is no loss: then the handle says so.
        if not _here(held.namespace, held.layer.digest):
            with suppress(NamespacePurgedError):
                _all(held.layer)
                self.findings.append(f"held open and gone: number {held.number}")


def _all(layer: Layer) -> bytes:
    with layer.compressed() as stream:
        return stream.read()


def _here(namespace: Namespace, digest: Digest) -> bool:
    for _ in range(200):
        with suppress(InUseError, NamespacePurgedError):
            return namespace.contains(digest)
    return False


def work(root: str, host: str, me: int, seed: int, operations: int) -> None:
    """Be one of the processes; print what was done and found."""
    with LayerCache(root, budget=BUDGET, keep_free=0, janitor=False) as cache:
        worker = _Worker(cache, host, me, random.Random(f"{seed} {me}"))
        for _ in range(operations):
            worker.step()
        for held in worker.held:
            held.layer.close()
        worker.pinned = None  # it stays, as a pin does
    print(json.dumps({"done": worker.done, "findings": worker.findings}))


@dataclass(slots=True)
class _Watch:
    """What the disk showed while they worked."""

    walks: int = 0
    most: int = 0
    findings: list[str] = field(default_factory=list)

    def look(self, root: Path) -> None:
        """Walk over the root while nobody can take room."""
        with _locked(root / "space") as raw:
            taken = on_disk(root)
            counted = _counted(raw())
        self.walks += 1
        self.most = max(self.most, taken)
        if taken > BUDGET:
            self.findings.append(f"{taken} bytes on disk, over the budget of {BUDGET}")
        if counted is not None and taken > counted:
            self.findings.append(f"{taken} bytes on disk, {counted} counted")

    def settle(self, root: Path) -> None:
        """Compare a walk of the store with one of ours, when nobody is at work any more."""
        self.look(root)
        with LayerCache(root, budget=BUDGET, keep_free=0, janitor=False) as cache:
            cache.store().recover()
            self.findings += accounting(root, cache.store())


class _locked:  # noqa: N801 - a context
    """The count's lock, in hand; reads the count."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Callable[[], bytes]:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        return lambda: os.pread(self._fd, 64, 0)

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def _counted(raw: bytes) -> int | None:
    return struct.unpack_from(">Q", raw, 24)[0] if raw[:8] == b"LCspace1" else None


def _serve(registry: ScriptedRegistry) -> str:
    for number in range(_IMAGES):
        layers = [layer_tar({f"{part}": random.Random(f"{number} {part}").randbytes(20_000)}) for part in range(2)]
        registry.add(build_image(layers), "demo/image", str(number))
    return registry.host


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when nothing was found, 1 otherwise; the last line says what was done."""
    parser = argparse.ArgumentParser(prog="python -m tests.multiprocess.limit", description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--below", type=Path, default=Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)  # one of the processes
    options = parser.parse_args(arguments)
    if options.work is not None:
        root, host, me, operations = options.work
        work(root, host, int(me), options.seed, int(operations))
        return 0
    watch, done, began = _Watch(), Counter[str](), time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="layercache-limit.", dir=options.below) as name,
        ScriptedRegistry() as registry,
    ):
        root, host = Path(name) / "root", _serve(registry)
        LayerCache(root, budget=BUDGET, keep_free=0, janitor=False).close()
        share = -(-options.operations // PROCESSES)
        command = [
            sys.executable,
            "-m",
            "tests.multiprocess.limit",
            "--seed",
            str(options.seed),
            "--work",
            str(root),
            host,
        ]
        workers = [
            subprocess.Popen([*command, str(me), str(share)], stdout=subprocess.PIPE, text=True)
            for me in range(PROCESSES)
        ]
        try:
            while any(worker.poll() is None for worker in workers):
                watch.look(root)
                time.sleep(0.1)
            for worker in workers:
                told = json.loads(worker.communicate()[0] or '{"done": {}, "findings": ["a process ended early"]}')
                done.update(told["done"])
                watch.findings += told["findings"]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        watch.settle(root)
    for finding in watch.findings[:50]:
        print(finding)
    took = time.monotonic() - began
    print(
        f"limit: {sum(done.values()):,} operations by {PROCESSES} processes in {took:.0f} s; {watch.walks:,} walks, at"
        f" most {watch.most:,} of {BUDGET:,} bytes on disk; {len(watch.findings)} findings; "
        + ", ".join(f"{name.strip('_')} {count:,}" for name, count in sorted(done.items()))
    )
    return 1 if watch.findings else 0


if __name__ == "__main__":
    sys.exit(main())
