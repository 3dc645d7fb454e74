"""How soon a purge returns after its fence, how long it takes by the number of blobs, and what a neighbour notices.

python -m bench.purge deadline      a reader stays: when does the call come back?
python -m bench.purge sizes         10, 1,000 and 100,000 blobs: seconds and bytes a second until nothing is left
python -m bench.purge neighbour     warm reads of another namespace, before and while, by this process and another

The blobs go through the store's own door, without its flushes, which are made up for by one sync before the clock
starts: what is purged is on the disk, and 100,000 of them are there in a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles

from bench import measure
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Generation, NamespaceName, Store
from layercache.store._disk import PosixDisk
from layercache.store._purge import Purge

_NAME, _NEIGHBOUR = NamespaceName("bench/tenant"), NamespaceName("bench/neighbour")
_WAITS = (0.0, 0.05)
_SIZES = ((10, 64 << 20), (1000, 1 << 20), (100_000, 4096))
"""How many blobs of how many bytes: large ones, the size of a chunk, and the smallest that take a block."""

_READS, _READ = 64, 1 << 20
"""What the neighbour has: it is read in turns, whole, each time opened anew, and stays in the page cache."""

_PACE = 0.002
_QUIET = 3.0


def main() -> None:
    """Measure one question and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", choices=(*_QUESTIONS, "read"), help="read: be the neighbour, of the root --at")
    parser.add_argument("--rounds", type=int, help="default: 500 of deadline, 3 of sizes, 6 of neighbour")
    parser.add_argument("--blobs", type=int, default=50_000, help="that are purged beside the neighbour")
    parser.add_argument("--at", type=Path)
    options = parser.parse_args()
    if options.question == "read":
        _be_the_neighbour(options.at)
        return
    question, rounds = _QUESTIONS[options.question]
    with tempfile.TemporaryDirectory(prefix="layercache-bench.") as name:
        question(Path(name), measure.machine(Path(name), ()), options.rounds or rounds, options.blobs)


def _deadline(place: Path, machine: dict[str, object], rounds: int, _: int) -> None:
    """Purge under a reader that stays; print how long after fence and wait the call comes back."""
    fenced: list[float] = []
    fence = Purge.fence

    def noting(self: Purge, *args: object) -> None:
        fence(self, *args)  # type: ignore[arg-type]
        fenced.append(time.perf_counter())

    Purge.fence = noting  # type: ignore[method-assign,assignment]
    late: dict[float, list[float]] = {wait: [] for wait in _WAITS}
    named = 0
    store = Store(place / "root")
    for number in range(rounds):
        wait = _WAITS[number % len(_WAITS)]
        generation = store.generation(_NAME, create=True)
        assert generation is not None
        with generation.open(_put(generation, random.Random(number).randbytes(5000))):
            receipt = store.purge(_NAME, wait=wait)
            late[wait].append(time.perf_counter() - fenced[-1] - wait)
            if receipt.level != "fenced":
                raise AssertionError(f"somebody reads, and the receipt says {receipt.level}")
            named += bool(receipt.pending)
        generation.close()
    store.close()
    rows = [
        (
            f"wait={wait}",
            str(len(some)),
            *(f"{1000 * value:.1f}" for value in (median(some), quantiles(some, n=100)[-1], max(some))),
        )
        for wait, some in late.items()
    ]
    print(measure.table(("under a reader", "calls", "median ms", "p99 ms", "worst ms"), rows))
    print(f"holder named in {named} of {rounds} receipts")
    path = measure.save("purge-deadline", machine=machine, rounds=rounds, late=late, named=named)
    print(f"kept in {path}")


def _sizes(place: Path, machine: dict[str, object], rounds: int, _: int) -> None:
    """Purge what nobody reads; print how long it takes until nothing is left."""
    taken: dict[int, list[float]] = {count: [] for count, _ in _SIZES}
    with closing(Store(place / "root")) as store:
        for _ in range(rounds):
            for count, size in _SIZES:
                fill(place / "root", count, size)
                taken[count].append(_purge(store, count))
    rows = [
        (
            f"{count:,} of {size >> 10:,} KiB",
            f"{median(some):.3f}",
            f"{min(some):.3f} to {max(some):.3f}",
            f"{count / median(some):,.0f}",
            f"{count * size / median(some) / 1e6:,.0f}",
        )
        for (count, size), some in zip(_SIZES, taken.values(), strict=True)
    ]
    print(measure.table(("blobs", "seconds", "from, to", "blobs/s", "MB/s"), rows))
    path = measure.save("purge-sizes", machine=machine, rounds=rounds, sizes=_SIZES, seconds=taken)
    print(f"kept in {path}")


def _neighbour(place: Path, machine: dict[str, object], rounds: int, blobs: int) -> None:
    """Read a neighbour's blobs while nothing happens and while a purge goes on, in turns; print both."""
    root = place / "root"
    samples: dict[str, dict[str, list[float]]] = {
        who: {"before": [], "meanwhile": []} for who in ("another process", "the same process")
    }
    purges: list[float] = []
    with closing(Store(root)) as store:
        fill(root, _READS, _READ, name=_NEIGHBOUR)
        for number in range(rounds):
            who, reading = (("another process", _from_another), ("the same process", _from_here))[number % 2]
            fill(root, blobs, 4096)
            with reading(root) as reads:
                time.sleep(_QUIET)
                began = time.monotonic()
                purges.append(_purge(store, blobs))
                ended = time.monotonic()
            samples[who]["before"] += [took for at, took in reads if at + took < began]
            samples[who]["meanwhile"] += [took for at, took in reads if at > began and at < ended]
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, dict[str, float]] = {}
    for who, of in samples.items():
        figures = {when: {"p50": median(some), "p99": quantiles(some, n=100)[-1]} for when, some in of.items()}
        ratios[who] = {key: figures["meanwhile"][key] / figures["before"][key] for key in ("p50", "p99")}
        for key in ("p50", "p99"):
            before, meanwhile = (f"{1000 * figures[when][key]:.2f}" for when in of)
            rows.append((f"{who}, {key}", before, meanwhile, f"{ratios[who][key]:.2f}"))
        rows.append((f"{who}, reads", *(str(len(some)) for some in of.values()), ""))
    print(measure.table(("warm read of 1 MiB", "before ms", "meanwhile ms", "ratio"), rows))
    print(f"purges of {blobs:,} blobs: {median(purges):.2f} s each")
    kept = {
        who: {when: {"count": len(some), "percentiles": quantiles(some, n=100)} for when, some in of.items()}
        for who, of in samples.items()
    }
    path = measure.save(
        "purge-neighbour", machine=machine, rounds=rounds, blobs=blobs, purges=purges, ratios=ratios, reads=kept
    )
    print(f"kept in {path}")


_Reads = list[tuple[float, float]]


@contextmanager
def _from_here(root: Path) -> Iterator[_Reads]:
    """Read in a thread of this process, the store opened anew; yield when each read began and how long it took."""
    found: _Reads = []
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: _read_on(root, found, stop.is_set, ready.set))
    thread.start()
    ready.wait()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@contextmanager
def _from_another(root: Path) -> Iterator[_Reads]:
    """Do as :func:`_from_here` in a process of its own. The clock is the machine's."""
    found: _Reads = []
    command = [sys.executable, "-m", "bench.purge", "read", "--at", str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield found
        process.stdin.close()
        found += map(tuple, json.load(process.stdout))


def _be_the_neighbour(root: Path) -> None:
    found: _Reads = []
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    _read_on(root, found, stop.is_set, lambda: print("ready", flush=True))
    json.dump(found, sys.stdout)


def _read_on(root: Path, found: _Reads, stopped: Callable[[], bool], ready: Callable[[], None]) -> None:
    with closing(Store(root)) as store:
        generation = store.generation(_NEIGHBOUR, create=False)
        assert generation is not None
        digests = list(generation.digests())
        number = 0
        while not stopped():
            began = time.monotonic()
            with generation.open(digests[number % len(digests)]) as blob:
                for _ in blob.chunks():
                    pass
            found.append((began, time.monotonic() - began))
            number += 1
            if number == len(digests):  # all are in the page cache now
                found.clear()
                ready()
            time.sleep(_PACE)
        generation.close()


def _purge(store: Store, count: int) -> float:
    began = time.perf_counter()
    receipt = store.purge(_NAME, wait=3600.0)
    seconds = time.perf_counter() - began
    if (receipt.level, receipt.blobs) != ("unlinked", count):
        raise AssertionError(f"{count} blobs were there, and the receipt says {receipt}")
    return seconds


def fill(root: Path, count: int, size: int, *, name: NamespaceName = _NAME) -> list[Digest]:
    """Store so many blobs of so many bytes, durably, and return their digests."""
    disk = PosixDisk.open_root(root)
    disk.sync = lambda _: None  # type: ignore[method-assign,assignment]
    rng = random.Random(count)
    some = rng.randbytes(size)
    with closing(Store(root, disk=disk)) as store:
        generation = store.generation(name, create=True)
        assert generation is not None
        digests = [_put(generation, number.to_bytes(8, "big") + some[8:]) for number in range(count)]
        generation.close()
    measure.settle()
    return digests


def _put(generation: Generation, data: bytes) -> Digest:
    descriptor = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
    ingest = generation.begin(descriptor)
    assert ingest is not None
    with ingest:
        ingest.feed(data)
        ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="bench").close()
    return descriptor.digest


_QUESTIONS = {"deadline": (_deadline, 500), "sizes": (_sizes, 3), "neighbour": (_neighbour, 6)}


if __name__ == "__main__":
    main()
