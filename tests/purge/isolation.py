"""Looking up in one namespace what another one holds: as if nobody held it.

python -m tests.purge.isolation calls ROOT SEED      plays every question about a digest, for a tracer
python -m tests.purge.isolation times ROOT           times them; prints what it found
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from layercache import LayerCache, Namespace
from layercache.errors import LayerCacheError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import PUBLIC, Grant, grant

__all__ = ["ALPHA", "QUESTIONS", "Shift", "contents", "furnish", "main", "measure"]

ALPHA = 1e-4
"""Chance of calling equal times different, of one comparison. What counts is two in a row, with new digests."""

_POOL = 64
_SIZE = 5000


def contents(seed: str) -> bytes:
    """Return the bytes of a blob."""
    return random.Random(f"isolation {seed}").randbytes(_SIZE)


def _descriptor(seed: str) -> Descriptor:
    data = contents(seed)
    return Descriptor(OCTET_STREAM, Digest.of(data), len(data))


def _contains(namespace: Namespace, digest: Digest) -> None:
    namespace.contains(digest)


def _open(namespace: Namespace, digest: Digest) -> None:
    namespace.open(digest).close()


def _stat(namespace: Namespace, digest: Digest) -> None:
    namespace.stat(digest)


def _verify(namespace: Namespace, digest: Digest) -> None:
    list(namespace.verify(digest))


def _remove(namespace: Namespace, digest: Digest) -> None:
    namespace.remove(digest)


def _admit(namespace: Namespace, digest: Digest) -> None:
    namespace.admit(Descriptor(OCTET_STREAM, digest, _SIZE), io.BytesIO(b"what somebody else guessed".ljust(_SIZE)))


QUESTIONS: dict[str, Callable[[Namespace, Digest], None]] = {
    "contains": _contains,
    "open": _open,
    "stat": _stat,
    "verify": _verify,
    "remove": _remove,
    "admit": _admit,
}
"""What can be asked about a digest, short of the registry."""


def furnish(root: Path, seeds: Sequence[str]) -> None:
    """Make two namespaces and the public one: one holds a few blobs, the others those of ``seeds``.

    The first one borrows a blob of the public one, and was granted no other.
    """
    with LayerCache(root, janitor=False) as cache:
        for name, held in (("asker", [f"own {number}" for number in range(4)]), ("other", seeds)):
            for seed in held:
                cache.namespace(name).admit(_descriptor(seed), io.BytesIO(contents(seed)))
        public, asker = cache.store().generation(PUBLIC, create=True), cache.namespace("asker").binding.made()
        assert public is not None
        for seed in ("granted", *seeds):
            ingest = public.begin(_descriptor(seed))
            if ingest is not None:
                with ingest:
                    ingest.feed(contents(seed))
                    ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="a test").close()
        public.close()
        lent = _descriptor("granted")
        grant(asker, [Grant(lent.digest, lent.size, OCTET_STREAM, None, "a test", time.time())])
        assert cache.namespace("asker").stat(lent.digest).public


def play(root: Path, digest: Digest) -> None:
    """Ask everything about one digest, with a call between the questions that nothing else makes."""
    with LayerCache(root, janitor=False) as cache:
        namespace = cache.namespace("asker")
        _ask(namespace, _contains, Digest.of(b"something else"))  # what a first call opens is open now
        for ask in QUESTIONS.values():
            os.getppid()
            _ask(namespace, ask, digest)
        os.getppid()


def _ask(namespace: Namespace, ask: Callable[[Namespace, Digest], None], digest: Digest) -> None:
    with suppress(LayerCacheError):
        ask(namespace, digest)


class Shift:
    """What two samples of times say: the rank sum of Mann and Whitney, by its normal approximation."""

    def __init__(self, here: Sequence[float], there: Sequence[float]) -> None:
        ranked = sorted([(value, 0) for value in here] + [(value, 1) for value in there])
        ranks = sum(rank for rank, (_, which) in enumerate(ranked, 1) if which)
        n, m = len(there), len(here)
        self.z = (ranks - n * (n + m + 1) / 2) / math.sqrt(n * m * (n + m + 1) / 12)
        self.p = math.erfc(abs(self.z) / math.sqrt(2))
        self.nanoseconds = median(there) - median(here)

    def __str__(self) -> str:
        return f"z {self.z:+.2f}, p {self.p:.2g}, {self.nanoseconds:+.0f} ns"


def measure(root: Path, lookups: int, rng: random.Random, *, leak: bool = False) -> Shift:
    """Time lookups of digests that are all absent here, of which chance put one half into another namespace.

    Chance decides by digest, so a digest is one observation (the median of its lookups): that its bytes lie elsewhere
    in memory than another's, which shows in ten nanoseconds, is the same for both halves. With ``leak`` it looks
    into the other namespace, too.
    """
    seeds = [f"{rng.random()}" for _ in range(2 * _POOL)]
    digests = [Digest.of(contents(seed)) for seed in seeds]
    held = set(rng.sample(range(2 * _POOL), _POOL))
    furnish(root, [seeds[number] for number in sorted(held)])
    times: list[list[int]] = [[] for _ in digests]
    clock = time.perf_counter_ns
    order = list(range(2 * _POOL))
    with LayerCache(root, janitor=False) as cache:
        asker, other = cache.namespace("asker"), cache.namespace("other")
        for turn in range(lookups // len(order)):
            rng.shuffle(order)
            for number in order:
                start = clock()
                found = asker.contains(digests[number]) or (leak and other.contains(digests[number]))
                if turn:  # in the first one what a first call opens is opened
                    times[number].append(clock() - start)
                if found and not leak:
                    raise AssertionError("absent, and found")
    medians = [median(found) for found in times]
    return Shift(
        [value for number, value in enumerate(medians) if number not in held],
        [value for number, value in enumerate(medians) if number in held],
    )


def _time(root: Path, lookups: int, seed: int) -> int:
    rng = random.Random(seed)
    found = [measure(root / "0", lookups, rng)]
    if found[0].p < ALPHA:
        found.append(measure(root / "1", lookups, rng))
    told = ", again: ".join(map(str, found))
    control = measure(root / "2", max(3, lookups // 2000) * 2 * _POOL, rng, leak=True)
    wrong = []
    if len(found) == 2 and found[1].p < ALPHA and (found[0].z > 0) == (found[1].z > 0):
        wrong.append(f"the time of a lookup tells what another namespace holds: {told}")
    if control.p >= ALPHA:
        wrong.append(f"this would not notice a lookup that looks into another namespace: {control}")
    for text in wrong:
        print(f"FAILED {text}")
    print(f"isolation: {lookups} lookups of {2 * _POOL} digests, {told}; of a lookup that leaks: {control}")
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Play, or time; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.purge.isolation", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("calls", "times"))
    parser.add_argument("root", type=Path)
    parser.add_argument("seed")
    parser.add_argument("--lookups", type=int, default=25_600)
    options = parser.parse_args(arguments)
    if options.what == "times":
        return _time(options.root, options.lookups, int(options.seed))
    play(options.root, Digest.of(contents(options.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
