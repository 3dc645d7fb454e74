"""What a start that finds its layers waits for: opening a root of many blobs, and the first byte of one of them.

Beside a hit, its floor: the system calls that it makes, and nothing else. And what a fill waits for where room is
short: the choice of victims.

python -m bench.hits
"""

from __future__ import annotations

import argparse
import fcntl
import mmap
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from bench import measure
from bench.purge import fill
from layercache import LayerCache
from layercache.integrity import FIRST
from layercache.oci import Digest
from layercache.policy import Policy, Source
from layercache.store import NamespaceName

_NAME = NamespaceName("bench/tenant")
_SMALL, _LARGE = 4096, 64 << 20
_OPENS, _HITS = 51, 5000
_HELD, _FREED = 100_000, 10_000


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blobs", type=int, default=1_000_000, help="in the root, of 4 KiB each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layercache-bench.") as name:
        root = Path(name) / "root"
        machine = measure.machine(Path(name), ())
        digests = fill(root, options.blobs, _SMALL, name=_NAME)
        (large,) = fill(root, 1, _LARGE, name=NamespaceName("bench/large"))
        opened = [_open(root, digests[0]) for _ in range(_OPENS)]
        with LayerCache(root, janitor=False) as cache:
            some = random.Random(1).sample(digests, min(1000, len(digests)))
            hits = {
                f"{_SMALL >> 10} KiB": _hits(cache, _NAME.text, some),
                f"{_LARGE >> 20} MiB": _hits(cache, "bench/large", [large]),
            }
        floors = {f"{_SMALL >> 10} KiB": _floor(root, some), f"{_LARGE >> 20} MiB": _floor(root, [large])}
    choice = _choice()
    rows = [(f"open a root of {options.blobs:,} blobs and look one up", f"{1e3 * median(opened):.2f} ms", "")]
    for kind, seconds in hits.items():
        cuts = quantiles(seconds, n=100)
        rows.append((f"hit: open and first byte of {kind}", f"{1e6 * cuts[49]:.0f} us", f"{1e6 * cuts[98]:.0f} us"))
        cuts = quantiles(floors[kind], n=100)
        rows.append(("  its system calls alone", f"{1e6 * cuts[49]:.0f} us", f"{1e6 * cuts[98]:.0f} us"))
    rows.append((f"choose a victim of {_HELD:,}", f"{1e6 * choice:.1f} us", ""))
    print(measure.table(("what", "median", "p99"), rows))
    path = measure.save(
        "hits",
        machine=machine,
        blobs=options.blobs,
        open_seconds=opened,
        hit_seconds={kind: quantiles(seconds, n=100) for kind, seconds in hits.items()},
        floor_seconds={kind: quantiles(seconds, n=100) for kind, seconds in floors.items()},
        victim_seconds=choice,
    )
    print(f"kept in {path}")


def _open(root: Path, digest: Digest) -> float:
    start = time.perf_counter()
    with LayerCache(root, janitor=False) as cache:
        assert cache.namespace(_NAME.text).contains(digest)
        return time.perf_counter() - start


def _hits(cache: LayerCache, name: str, digests: list[Digest]) -> list[float]:
    namespace, rng, found = cache.namespace(name), random.Random(2), []
    for number in range(_HITS + 500):
        digest = rng.choice(digests)
        start = time.perf_counter()
        with namespace.open(digest) as layer, layer.compressed() as stream:
            stream.read(1)
            took = time.perf_counter() - start
        if number >= 500:  # the first ones warm up
            found.append(took)
    return found


def _floor(root: Path, digests: list[Digest]) -> list[float]:
    """Seconds of what a hit asks the kernel for, made by nothing but :mod:`os`; the same calls, in the same order."""
    (generation,) = (where for where in (root / "data").iterdir() if (where / "blobs" / _path(digests[0])).exists())
    folder = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    plain = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    blobs, metas = (os.open(generation / name, folder) for name in ("blobs", "meta"))
    rng, found, buffer = random.Random(2), [], memoryview(mmap.mmap(-1, 1 << 20))
    for number in range(_HITS + 500):
        name = rng.choice(digests).encoded
        start = time.perf_counter()
        shard = os.open(name[:2], folder, dir_fd=blobs)
        blob = os.open(name, plain, dir_fd=shard)
        os.fstat(blob)
        fcntl.flock(blob, fcntl.LOCK_SH | fcntl.LOCK_NB)
        size = os.stat(name, dir_fd=shard, follow_symlinks=False).st_size
        records = os.open(name[:2], folder, dir_fd=metas)
        record = os.open(name, plain, dir_fd=records)
        os.preadv(record, [buffer[: os.fstat(record).st_size]], 0)
        os.close(record)
        os.close(records)
        os.close(shard)
        os.preadv(blob, [buffer[: min(size, FIRST)]], 0)
        took = time.perf_counter() - start
        os.close(blob)
        if number >= 500:
            found.append(took)
    os.close(blobs)
    os.close(metas)
    return found


def _path(digest: Digest) -> Path:
    return Path(digest.encoded[:2], digest.encoded)


def _choice() -> float:
    """Seconds a victim, of a policy that holds layers of many sizes and lets go of a tenth of them."""
    rng = random.Random(3)
    sizes = [rng.randint(1 << 20, 1 << 30) for _ in range(_HELD)]
    policy = Policy(capacity=sum(sizes))
    source = Source(rtt=0.05, bandwidth=100e6)
    for number, size in enumerate(sizes):
        policy.insert(f"{number:x}", size, namespace=f"tenant-{number % 50}", source=source)
    for _ in range(_HELD):
        policy.hit(f"{rng.randrange(_HELD):x}")
    start = time.perf_counter()
    gone = 0
    while gone < _FREED:
        for victim in policy.victims(sum(sizes) // 100):
            policy.evict(victim.key)
            gone += 1
    return (time.perf_counter() - start) / gone


if __name__ == "__main__":
    main()
