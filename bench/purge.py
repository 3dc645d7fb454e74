"""How soon a purge returns after its fence, how long it takes by the number of blobs, and what a neighbour notices.

python -m bench.purge deadline
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from bench import measure
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Generation, NamespaceName, Store
from layercache.store._purge import Purge

_NAME = NamespaceName("bench/tenant")
_WAITS = (0.0, 0.05)


def main() -> None:
    """Measure one question and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", choices=("deadline",))
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layercache-bench.") as name:
        machine = measure.machine(Path(name), ())
        _deadline(Path(name), machine, options.rounds)


def _deadline(place: Path, machine: dict[str, object], rounds: int) -> None:
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


def _put(generation: Generation, data: bytes) -> Digest:
    descriptor = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
    ingest = generation.begin(descriptor)
    assert ingest is not None
    with ingest:
        ingest.feed(data)
        ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="bench").close()
    return descriptor.digest


if __name__ == "__main__":
    main()
