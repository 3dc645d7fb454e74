"""How fast zstd layers are decoded, of one frame and of many, beside the zstd program, which uses one thread.

The decoder alone: no store, and no DiffID, which takes a core of its own for two thirds of the time. Pieces of 8 MiB
are fed, as a read from the store gives them.

python -m bench.decode
"""

from __future__ import annotations

import argparse
import random
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import zstandard

from bench import measure
from layercache.codec import decoder

_MIB = 1 << 20
_FED = 8 * _MIB
_CONTENDERS = ("zstd -dc", "layercache")


def main() -> None:
    """Measure in rounds, every contender in each, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="of content")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    content = _content(options.mib * _MIB)
    machine = measure.machine(Path.cwd(), ("zstd",))
    encoder = zstandard.ZstdCompressor(level=3)
    kinds = {
        "one frame": encoder.compress(content),
        "frames of 1 MiB": b"".join(
            encoder.compress(content[start : start + _MIB]) for start in range(0, len(content), _MIB)
        ),
    }
    costs: dict[str, list[measure.Cost]] = {f"{kind}, {name}": [] for kind in kinds for name in _CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="layercache-bench.") as name:
        for number, (kind, data) in enumerate(kinds.items()):
            file = Path(name) / f"{number}.zst"
            file.write_bytes(data)
            for again in range(options.rounds):
                order = list(_CONTENDERS)
                random.Random(again).shuffle(order)
                for contender in order:
                    costs[f"{kind}, {contender}"].append(_decode(contender, data, file, len(content)))
    ratios = {
        f"{kind}: zstd -dc / {name}": median(
            peer.wall / own.wall for peer, own in zip(costs[f"{kind}, zstd -dc"], costs[f"{kind}, {name}"], strict=True)
        )
        for kind in kinds
        for name in _CONTENDERS[1:]
    }
    rows = [
        (name, f"{cost.wall:.3f}", f"{cost.cpu:.3f}")
        for name, cost in zip(costs, map(measure.middle, costs.values()), strict=True)
    ]
    print(measure.table((f"{options.mib} MiB", "wall s", "cpu s"), rows))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    path = measure.save(
        "decode",
        machine=machine,
        mib=options.mib,
        rounds=options.rounds,
        costs=costs,
        ratios=ratios,
        compressed={kind: len(data) for kind, data in kinds.items()},
    )
    print(f"kept in {path}")


def _content(size: int) -> bytes:
    """Libraries of this machine, as many as there are, again and again."""
    found = bytearray()
    files = sorted(path for path in Path("/usr/lib/x86_64-linux-gnu").glob("*.so*") if path.is_file())
    while len(found) < size:
        for path in files:
            found += path.read_bytes()
            if len(found) >= size:
                break
    return bytes(found[:size])


def _decode(contender: str, data: bytes, file: Path, size: int) -> measure.Cost:
    if contender == "zstd -dc":
        return measure.run(["zstd", "-dc", str(file)], stdout=subprocess.DEVNULL)
    wall, cpu = time.perf_counter(), time.process_time()
    stage = decoder("zstd")
    made = 0
    for start in range(0, len(data), _FED):
        for piece in stage.feed(memoryview(data)[start : start + _FED]):
            made += len(piece)
    stage.finish()
    cost = measure.Cost(time.perf_counter() - wall, time.process_time() - cpu)
    if made != size:
        raise SystemExit("other content came")
    return cost


if __name__ == "__main__":
    main()
