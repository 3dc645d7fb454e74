"""Every call of scripted scenarios on the simulated disk: cut, killed or failing there; and every order of two.

python -m tests.simulation.points                        all of it; prints what it covered
python -m tests.simulation.points --kind cuts --only put one scenario
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from tests.simulation.scenarios import CUTS, KILLS, ORDERS

__all__ = ["attempts", "main"]

KINDS = ("orders", "cuts", "kills", "faults")
_CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)

Attempt = tuple[str, str, Callable[[], Counter[str]]]
"""Kind, scenario, and what runs it."""


def attempts(
    *, shard: tuple[int, int] = (0, 1), seed: int = 0, fates: int = 3, most: int | None = None
) -> Iterator[Attempt]:
    """Yield what there is to run; of cuts, kills and faults each n-th place from the k-th on."""
    offset, every = shard
    for orders in ORDERS:
        yield "orders", orders.name, partial(orders.run, most=most, seed=seed)
    for kind, scripts in (("cuts", CUTS), ("kills", KILLS)):
        for script in scripts:
            yield kind, script.name, partial(script.cuts, fates=fates, seed=seed, every=every, offset=offset)
    for script in CUTS:
        for code in _CODES if script.faulty else ():
            for sticky in (False, True):
                yield (
                    "faults",
                    f"{script.name}: {errno.errorcode[code]}{' for good' * sticky}",
                    partial(script.faults, code, sticky=sticky, seed=seed, every=every, offset=offset),
                )


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep and return 0 when every promise held."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.points", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--only", help="the scenarios whose name begins so")
    parser.add_argument("--shard", default="0/1", help="K/N: each N-th place, beginning with the K-th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fates", type=int, default=3, help="states of the disk tried after each cut")
    parser.add_argument("--most", type=int, help="runs of each pair of processes, instead of all their orders")
    options = parser.parse_args(arguments)
    logging.getLogger("layercache.store").setLevel(logging.CRITICAL)
    offset, every = map(int, options.shard.split("/"))
    started = time.monotonic()
    done: Counter[str] = Counter()
    failed = 0
    for kind, name, run in attempts(shard=(offset, every), seed=options.seed, fates=options.fates, most=options.most):
        if (options.kind and kind not in options.kind) or (options.only and not name.startswith(options.only)):
            continue
        try:
            counted = run()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            failed += 1
            again = f"--kind {kind} --only '{name}' --shard {options.shard} --seed {options.seed}"
            if options.most:
                again += f" --most {options.most}"
            print(f"{kind} of {name}: {error!r}\n  python -m tests.simulation.points {again} --fates {options.fates}")
        else:
            done["scenarios"] += 1
            for what, count in counted.items():
                done[f"{kind} {what}"] += count
    seconds = time.monotonic() - started
    figures = ", ".join(f"{count} {what}" for what, count in sorted(done.items()))
    print(f"simulated points: {figures}, shard {options.shard}, seed {options.seed}, {failed} failed, {seconds:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
