"""Our eviction policies and libcachesim's on the same requests: object, byte and cost miss ratios.

    python -m bench.eviction [--seed N ...] [--trace PATH ...] [--gib N ...] [--no-save]

A trace is a csv (also .gz) with a header; columns time, namespace, object, size. libcachesim's columns start with lib-.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import libcachesim

from bench.measure import machine, save, table
from bench.workloads import WORKLOADS, Request
from layercache.policy import POLICIES, Policy, Source

LIBRARY = ("LRU", "FIFO", "Sieve", "S3FIFO", "Belady")
RIVALS = ("lru", "sieve", "s3-fifo", "greedy-dual", "lib-S3FIFO")
_SOURCE = Source()
Ratios = tuple[float, float, float]


def read(path: Path) -> list[Request]:
    """Return the requests of a csv; the columns may have the names ``tenant`` and ``layer_id`` too."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [
            (row.get("namespace") or row.get("tenant", ""), row.get("object") or row["layer_id"], int(row["size"]))
            for row in csv.DictReader(lines)
        ]


def ours(name: str, requests: list[Request], capacity: int) -> Ratios:
    """Replay through our policy."""
    policy, missed = Policy(name, capacity=capacity), []
    for _, key, size in requests:
        if policy.hit(key):
            continue
        missed.append(size)
        if size <= capacity:
            for victim in policy.victims(policy.used + size - capacity):
                policy.evict(victim.key)
            policy.insert(key, size, namespace="replay", source=_SOURCE)
    return ratios(missed, requests)


def theirs(name: str, requests: list[Request], capacity: int) -> Ratios:
    """Replay through libcachesim."""
    cache, missed = getattr(libcachesim, name)(capacity, hashpower=17), []
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(key, len(numbers)) for _, key, _ in requests]
    after, following = dict[int, int](), [0] * len(ids)
    for at in range(len(ids) - 1, -1, -1):
        following[at] = after.get(ids[at], (1 << 63) - 1)
        after[ids[at]] = at + 1
    for at, (_, _, size) in enumerate(requests):
        request = libcachesim.Request(obj_id=ids[at], obj_size=size, next_access_vtime=following[at])
        if size > capacity or not cache.get(request):
            missed.append(size)
    return ratios(missed, requests)


def ratios(missed: list[int], requests: list[Request]) -> Ratios:
    """Objects, bytes and seconds missed, of those asked for."""
    sizes = [size for _, _, size in requests]
    cost = sum(map(_SOURCE.cost, missed)) / sum(map(_SOURCE.cost, sizes))
    return len(missed) / len(sizes), sum(missed) / sum(sizes), cost


def main() -> None:
    """Replay, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, nargs="+", default=[11])
    parser.add_argument("--trace", type=Path, nargs="*", default=[])
    parser.add_argument("--gib", type=float, nargs="*", default=[8, 16, 32])
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    facts, cells, rows = machine(Path.cwd(), ()), {}, []
    traces = {f"{name} {seed}": make(seed) for name, make in WORKLOADS.items() for seed in args.seed}
    for name, requests in (traces | {path.name.split(".")[0]: read(path) for path in args.trace}).items():
        footprint = sum({key: size for _, key, size in requests}.values())
        sizes = [int(footprint * share) for share in (0.02, 0.1, 0.3)]
        for capacity in sizes if name in traces else [int(gib * (1 << 30)) for gib in args.gib]:
            cell = {policy: ours(policy, requests, capacity) for policy in POLICIES}
            cell |= {f"lib-{policy}": theirs(policy, requests, capacity) for policy in LIBRARY}
            cells[f"{name} {capacity / (1 << 30):.2f} GiB"] = cell
            against = cell["default"][2] / min(cell[rival][2] for rival in RIVALS)
            same = all(
                cell[a] == cell[b] for a, b in (("lru", "lib-LRU"), ("fifo", "lib-FIFO"), ("sieve", "lib-Sieve"))
            )
            costs = [f"{ratio[2]:.4f}" for ratio in cell.values()]
            rows.append([list(cells)[-1], *costs, f"{against:.3f}", "yes" if same else "NO"])
    print(table(["cost miss ratio", *next(iter(cells.values())), "default/best", "exact"], rows))
    if not args.no_save:
        print(f"kept in {save('eviction', machine=facts, cells=cells)}")


if __name__ == "__main__":
    main()
