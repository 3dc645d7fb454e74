"""Hunts one mutant, in a process of its own: ``python -m tests.mutants.hunt NAME`` prints what caught it.

Without a name it lists the mutants; the name ``none`` runs everything on the store as it is.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.mutants.mutants import MUTANTS, install

__all__ = ["main"]


def attempts(seeds: int, first: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what to try: what is known to catch it, then the cheapest."""
    # Not before the mutant is in: they import the store.
    from layercache.testing.simulation import play
    from tests.simulation import points

    few = min(seeds, 300)
    if first:
        everything = ((f"{kind} of {name}", run) for kind, name, run in points.attempts(most=9000, fates=6))
        yield from ((what, run) for what, run in everything if what.startswith(first))
    yield from ((f"seed {seed}", partial(play, seed)) for seed in range(few))
    yield from ((f"{kind} of {name}", run) for kind, name, run in points.attempts(most=300))
    yield from ((f"seed {seed}", partial(play, seed)) for seed in range(few, seeds))


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when the mutant was caught, 1 when it survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.hunt", description=__doc__)
    parser.add_argument("name", nargs="?", help="the mutant")
    parser.add_argument("--seeds", type=int, default=3000, help="worlds to try at most")
    options = parser.parse_args(arguments)
    if options.name is None:
        print("\n".join(mutant.name for mutant in MUTANTS))
        return 0
    first = ""
    if options.name != "none":
        mutant = next(mutant for mutant in MUTANTS if mutant.name == options.name)
        first = mutant.where
        install(mutant)
        if mutant.test:
            failed = pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", mutant.test])
            print(f"{mutant.test}: {failed.name}" if isinstance(failed, pytest.ExitCode) else mutant.test)
            return 0 if failed == pytest.ExitCode.TESTS_FAILED else 1
    logging.getLogger("layercache.store").setLevel(logging.CRITICAL)
    for what, run in attempts(options.seeds, first):
        try:
            run()
        except Exception as error:  # noqa: BLE001 - whatever it breaks, it is caught
            print(f"{what}: {str(error) or type(error).__name__}")
            return 0
    print(f"survived {options.seeds} seeds and every point")
    return 1


if __name__ == "__main__":
    sys.exit(main())
