"""Our eviction policies and libcachesim's on the same requests: object, byte and cost misses, and starts that wait.

    python -m bench.eviction [--seed N ...] [--trace PATH ...] [--gib N ...] [--only NAME ...] [--no-save]
    python -m bench.eviction --draw bench/results/eviction-*.json      the plot of a result that was kept

A trace is a csv (also .gz) with a header and the columns ``time,namespace,object,size[,op]``: ``size`` in bytes, ``op``
``get`` (or empty) for a use, ``delete`` for an object that is gone for good. What a namespace asks for at one time, in
lines that follow each other, is taken for one image. libcachesim's columns start with lib-; ``images`` is ``default``
that is told which blobs make an image, as the cache tells it. All others replay the bare requests.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import libcachesim

from bench.measure import machine, save, table
from bench.workloads import WORKLOADS, Request
from layercache.policy import POLICIES, Policy, Source

LIBRARY = ("LRU", "FIFO", "Sieve", "S3FIFO", "Belady")
RIVALS = ("lru", "sieve", "s3-fifo", "greedy-dual", "lib-S3FIFO")
_SOURCE = Source()
_OPS = {"": "get", "get": "get", "delete": "delete"}
Ratios = tuple[float, float, float, float]
"""Objects, bytes, seconds, and starts that miss something; each of all."""


def read(path: Path) -> list[Request]:
    """Return the requests of a csv; the columns may have the names ``unix_time``, ``tenant`` and ``layer_id`` too."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return list(parse(csv.DictReader(lines)))


def parse(rows: Iterable[dict[str, str]]) -> Iterator[Request]:
    """Yield the requests of a csv's rows."""

    def of(row: dict[str, str]) -> tuple[str, str]:
        return row.get("time") or row.get("unix_time", ""), row.get("namespace") or row.get("tenant", "")

    for start, ((_, namespace), lines) in enumerate(groupby(rows, of)):
        found = [(row.get("object") or row["layer_id"], int(row["size"]), _OPS[row.get("op") or ""]) for row in lines]
        used = sorted({key for key, _, op in found if op == "get"})
        image = hashlib.sha256("\n".join(used).encode()).hexdigest()[:16]
        yield from (Request(namespace, key, size, image, start, op) for key, size, op in found)


def ours(name: str, requests: list[Request], capacity: int, *, images: bool = False) -> Ratios:
    """Replay through our policy, told of images or not."""
    policy, missed = Policy(name, capacity=capacity), list[Request]()
    for _, of_one in groupby(requests, lambda request: request.start):
        start = list(of_one)
        for request in start:
            key, size = request.object, request.size
            if request.op == "delete":
                policy.forget(key)
            elif not policy.hit(key):
                missed.append(request)
                if size <= capacity:
                    for victim in policy.victims(policy.used + size - capacity):
                        policy.evict(victim.key)
                    policy.insert(key, size, namespace="replay", source=_SOURCE)
        keys = [request.object for request in start if request.op == "get"]
        if images and start[0].image and all(key in policy for key in keys):
            policy.image(start[0].image, keys, namespace="replay")
    return ratios(missed, requests)


def theirs(name: str, requests: list[Request], capacity: int) -> Ratios:
    """Replay through libcachesim."""
    cache, missed = getattr(libcachesim, name)(capacity, hashpower=17), list[Request]()
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(request.object, len(numbers)) for request in requests]
    after, following = dict[int, int](), [0] * len(ids)
    for at in range(len(ids) - 1, -1, -1):
        following[at] = after.get(ids[at], (1 << 63) - 1)
        after[ids[at]] = at + 1
    for at, request in enumerate(requests):
        if request.op == "delete":
            cache.remove(ids[at])
            continue
        asked = libcachesim.Request(obj_id=ids[at], obj_size=request.size, next_access_vtime=following[at])
        if request.size > capacity or not cache.get(asked):
            missed.append(request)
    return ratios(missed, requests)


def ratios(missed: list[Request], requests: list[Request]) -> Ratios:
    """Return what was missed, of what was asked for."""
    asked = [request for request in requests if request.op == "get"]
    sizes, waited = [request.size for request in asked], [request.size for request in missed]
    starts = len({request.start for request in missed}) / len({request.start for request in asked})
    cost = sum(map(_SOURCE.cost, waited)) / sum(map(_SOURCE.cost, sizes))
    return len(missed) / len(asked), sum(waited) / sum(sizes), cost, starts


def replay(requests: list[Request], capacity: int) -> dict[str, Ratios]:
    """Return what every policy, ours and theirs, misses."""
    cell = {"images": ours("default", requests, capacity, images=True)}
    cell |= {policy: ours(policy, requests, capacity) for policy in POLICIES}
    return cell | {f"lib-{policy}": theirs(policy, requests, capacity) for policy in LIBRARY}


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the cost miss ratios over the capacity, a panel for each workload, as SVG."""
    import matplotlib as mpl  # noqa: PLC0415 - only for this

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "layercache"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    panels: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for name, cell in cells.items():
        workload, gib = name.removesuffix(" GiB").rsplit(" ", 1)
        panels.setdefault(workload, []).append((float(gib), cell))
    columns = 4
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(16, 10), squeeze=False)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(panels))
    for axis, (workload, points) in zip(axes.flat, panels.items(), strict=False):
        for policy in ("images", "default", "lru", "sieve", "s3-fifo", "greedy-dual", "lib-Belady"):
            strong = policy in ("images", "default")
            axis.plot(
                [gib for gib, _ in points],
                [cell[policy][2] for _, cell in points],
                marker="o",
                markersize=3,
                linewidth=2 if strong else 1,
                linestyle=":" if policy == "lib-Belady" else "-",
                label=policy,
            )
        axis.set(title=workload, xscale="log", xlabel="GiB", ylabel="cost miss ratio", ylim=(0, None))
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", ncols=4)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Replay, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, nargs="+", default=[11])
    parser.add_argument("--trace", type=Path, nargs="*", default=[])
    parser.add_argument("--gib", type=float, nargs="*", default=[8, 16, 32])
    parser.add_argument("--only", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="RESULT", help="draw a result that was kept, beside it")
    args = parser.parse_args()
    if args.draw is not None:
        draw(json.loads(args.draw.read_text())["cells"], args.draw.with_suffix(".svg"))
        return
    facts, cells, rows = machine(Path.cwd(), ()), {}, []
    traces = {f"{name} {seed}": WORKLOADS[name](seed) for name in args.only for seed in args.seed}
    for name, requests in (traces | {path.name.split(".")[0]: read(path) for path in args.trace}).items():
        footprint = sum({request.object: request.size for request in requests}.values())
        sizes = [int(footprint * share) for share in (0.02, 0.1, 0.3)]
        for capacity in sizes if name in traces else [int(gib * (1 << 30)) for gib in args.gib]:
            cell = replay(requests, capacity)
            cells[f"{name} {capacity / (1 << 30):.2f} GiB"] = cell
            best = min(cell[rival][2] for rival in RIVALS)
            same = all(
                cell[a] == cell[b] for a, b in (("lru", "lib-LRU"), ("fifo", "lib-FIFO"), ("sieve", "lib-Sieve"))
            )
            costs = [f"{ratio[2]:.4f}" for ratio in cell.values()]
            against = [f"{cell[policy][2] / best:.3f}" for policy in ("default", "images")]
            waits = [f"{cell[policy][3]:.4f}" for policy in ("default", "images", "lru")]
            rows.append([list(cells)[-1], *costs, *against, *waits, "yes" if same else "NO"])
            print(rows[-1][0], *against, *waits, rows[-1][-1], flush=True)
    header = [*next(iter(cells.values())), "default/best", "images/best", "starts", "images", "lru", "exact"]
    print(table(["cost miss ratio", *header], rows))
    if not args.no_save:
        path = save("eviction", machine=facts, cells=cells)
        draw(cells, path.with_suffix(".svg"))
        print(f"kept in {path}")


if __name__ == "__main__":
    main()
