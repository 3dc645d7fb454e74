"""How long importing takes, over the bare interpreter: the package, the class that everybody uses, what it requires.

python -m bench.imports
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from statistics import median

from bench import measure

_BARE = "pass"
_PROGRAMS = (
    "import layercache",
    "from layercache import LayerCache",
    "from layercache.registry import Registry",
    "import zstandard, xxhash, aiofiles, urllib3",  # what it requires, boto3 apart; a yardstick of the machine
)


def main() -> None:
    """Measure in rounds, every program in each, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    machine = measure.machine(Path.cwd(), ())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    programs = (_BARE, *_PROGRAMS)
    for program in programs:  # compiled once, as an installed package is
        measure.run([sys.executable, "-c", program], env=environment)
    costs: dict[str, list[measure.Cost]] = {program: [] for program in programs}
    for number in range(options.rounds):
        order = list(programs)
        random.Random(number).shuffle(order)
        for program in order:
            costs[program].append(measure.run([sys.executable, "-c", program], env=environment))
    over = {
        program: {
            "wall": median(one.wall - bare.wall for one, bare in zip(costs[program], costs[_BARE], strict=True)),
            "cpu": median(one.cpu - bare.cpu for one, bare in zip(costs[program], costs[_BARE], strict=True)),
        }
        for program in _PROGRAMS
    }
    rows = [(program, f"{1e3 * cost['wall']:.1f}", f"{1e3 * cost['cpu']:.1f}") for program, cost in over.items()]
    print(measure.table(("over the bare interpreter", "wall ms", "cpu ms"), rows))
    path = measure.save("imports", machine=machine, rounds=options.rounds, costs=costs, over_bare=over)
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
