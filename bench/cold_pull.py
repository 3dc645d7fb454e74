"""A cold pull of a gzip image: layercache, skopeo to an OCI layout, and the floor of curl, openssl and sync.

    python -m bench.cold_pull [--largest MIB] [--rounds N] [--directory DIR]

All fetch the same image from the same registry on loopback, in turns, in an order that changes with every round:

layercache, the call     ``Namespace.pull`` from call to return: every blob verified, published and fsynced
layercache, the process  the same with the start of the interpreter and the imports
skopeo copy to oci:      ``skopeo copy``, which leaves the sync to the system; then with a sync of its files added
floor                    ``curl -Z`` of the blobs to files, ``openssl sha256`` of them two at a time, sync of the files
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench.layers import serving_image
from bench.measure import ROOT, Cost, commit, machine, middle, missing, run, save, settle, shell, table
from layercache.testing.images import BuiltImage
from tests.peers import REPOSITORY, PeerRegistry, missing_programs

FLOOR = "floor: curl, openssl, sync"
CALL = "layercache, the call"
PROCESS = "layercache, the process"
SKOPEO = "skopeo copy to oci:"
SKOPEO_SYNC = "skopeo copy to oci:, then sync"
ORDER = (FLOOR, CALL, PROCESS, SKOPEO, SKOPEO_SYNC)

_MIB = 1 << 20
_KIND = "gzip"
_FETCH = """
for digest in "${@:2}"; do
    printf 'url = "%s%s"\\noutput = "%s"\\n' "$1" "$digest" "${digest#sha256:}"
done | curl --silent --show-error --fail --parallel --parallel-max 4 --config - 2>log || { cat log >&2; exit 1; }
for digest in "${@:2}"; do printf '%s\\n' "${digest#sha256:}"; done |
    xargs --max-procs 2 --max-args 1 openssl dgst -sha256 -r >sums
awk '{ if ($1 != substr($2, 2)) exit 1 }' sums
"""
_SYNC = "find . -type f -print0 | xargs -0 sync; find . -type d -print0 | xargs -0 sync"

Measured = dict[str, list[Cost]]


class Contest:
    """The contenders; each call fetches the image once into an empty directory and adds what it cost."""

    def __init__(self, registry: PeerRegistry, image: BuiltImage) -> None:
        self.reference = registry.reference(_KIND)
        self.digests = [str(digest) for digest in image.blobs]
        self.blobs = f"http://{registry.host}/v2/{REPOSITORY}/blobs/"
        self.size = sum(layer.size for layer in image.layers)
        self.measured: Measured = defaultdict(list)
        self.peaks: list[int] = []

    def floor(self, directory: Path) -> None:
        """What the machine can do: two passes over the bytes, nothing published."""
        cost = shell(_FETCH + _SYNC, self.blobs, *self.digests, cwd=directory)
        self.measured[FLOOR].append(cost)

    def layercache(self, directory: Path) -> None:
        """Pull in a process of its own, which tells what the call cost in it."""
        out = directory / "out.json"
        with out.open("wb") as stdout:
            command = [sys.executable, "-m", "bench.pull_once", str(directory / "cache"), self.reference]
            cost = run(command, cwd=ROOT, stdout=stdout)
        told = json.loads(out.read_text())
        report = told["report"]
        if report["bytes_fetched"] < self.size or any(blob["source"] != "miss" for blob in report["blobs"]):
            raise RuntimeError(f"not a cold pull: {report}")
        self.measured[PROCESS].append(cost)
        self.measured[CALL].append(Cost(told["wall"], told["cpu"]))
        self.peaks.append(told["peak_kib"])

    def skopeo(self, directory: Path) -> None:
        """Copy to a layout, then sync it."""
        source, target = f"docker://{self.reference}", f"oci:{directory / 'layout'}:1.0"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", source, target]
        cost = run(command, stdout=subprocess.DEVNULL)
        sync = shell(_SYNC, cwd=directory)
        self.measured[SKOPEO].append(cost)
        self.measured[SKOPEO_SYNC].append(Cost(cost.wall + sync.wall, cost.cpu + sync.cpu))


def contest(registry: PeerRegistry, image: BuiltImage, directory: Path, rounds: int) -> Contest:
    """Let all contenders that are installed fetch the image ``rounds`` times, in turns."""
    runs = Contest(registry, image)
    contenders: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
        (runs.floor, ("curl", "openssl")),
        (runs.layercache, ()),
        (runs.skopeo, ("skopeo",)),
    ]
    ready = []
    for contender, programs in contenders:
        if absent := missing(*programs):
            print(f"skipped: {contender.__name__}, {' and '.join(absent)} not installed")
        else:
            ready.append(contender)
    for number in range(-1, rounds):
        first = number % len(ready)
        for contender in ready[first:] + ready[:first]:
            place = Path(tempfile.mkdtemp(dir=directory))
            settle()
            contender(place)
            shutil.rmtree(place)
        if number < 0:  # it warms the registry's files and the programs
            runs.measured.clear()
            runs.peaks.clear()
    return runs


def show(runs: Contest) -> None:
    """Print the medians, each run, and what the bars are about."""
    medians = {name: middle(runs.measured[name]) for name in ORDER if name in runs.measured}
    floor, call = medians.get(FLOOR), medians[CALL]
    rows = [
        (
            name,
            f"{cost.wall:.2f}",
            f"{cost.cpu:.2f}",
            f"{runs.size / _MIB / cost.wall:.0f}",
            f"{cost.wall / floor.wall:.2f} x" if floor else "-",
            " ".join(f"{one.wall:.2f}" for one in runs.measured[name]),
        )
        for name, cost in medians.items()
    ]
    print(table(("median of the rounds", "wall s", "CPU s", "MiB/s", "of the floor", "wall s of each round"), rows))
    print()
    if floor:
        wall, cpu = call.wall / floor.wall, call.cpu / floor.cpu
        print(f"layercache's call takes {wall:.2f} x the floor's time, {cpu:.2f} x its CPU")
    if SKOPEO in medians:
        ratio, synced = (medians[name].wall / call.wall for name in (SKOPEO, SKOPEO_SYNC))
        print(f"skopeo takes {ratio:.2f} x layercache's time, {synced:.2f} x with its files synced as layercache's are")
    print(f"layercache's process peaks at {max(runs.peaks) / 1024:.0f} MiB")


def main() -> None:
    """Build the image, serve it, run the contest, print and keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--largest", type=int, default=256, metavar="MIB", help="size of the largest layer (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (%(default)s)")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="work here (default: the temporary directory)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if absent := missing_programs():
        parser.exit(1, f"not installed, and needed to serve the image: {' and '.join(absent)}\n")
    with tempfile.TemporaryDirectory(prefix="layercache-bench-", dir=args.directory) as name:
        directory = Path(name)
        facts = machine(directory, ("docker-registry", "skopeo", "curl", "openssl"))
        image = serving_image(directory, args.largest * _MIB)
        sizes = [layer.size for layer in image.layers]
        where = f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, {facts['filesystem']}"
        print(f"{where}, load {facts['load_before']:.1f}, commit {commit()}")
        total, top = sum(sizes) / _MIB, max(sizes) / _MIB
        print(f"a gzip image of {len(sizes)} layers, {total:.0f} MiB, the largest {top:.0f} MiB\n")
        registry = PeerRegistry(directory, directory / "registry")
        registry.start()
        try:
            registry.push(_KIND, image)
            runs = contest(registry, image, directory, args.rounds)
        finally:
            registry.stop()
    show(runs)
    if not args.no_save:
        path = save("cold_pull", machine=facts, layers=sizes, rounds=runs.measured, peak_kib=runs.peaks)
        print(f"kept in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
