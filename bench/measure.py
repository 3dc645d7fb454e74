"""What benchmarks share: run a command and know its cost, describe the machine, print a table, keep the result."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
_DISTRIBUTIONS = ("layercache", "urllib3", "xxhash", "zstandard", "zlib-ng")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took: ``wall`` and ``cpu`` in seconds."""

    wall: float
    cpu: float


def run(command: Sequence[str | os.PathLike[str]], **options: object) -> Cost:
    """Run a command to its end and return its cost, that of the processes it started and waited for included.

    :raises subprocess.CalledProcessError: if it fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, **options) as process:  # type: ignore[call-overload]
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def shell(script: str, *arguments: str | os.PathLike[str], cwd: Path) -> Cost:
    """Run a bash script that ends at its first error; see :func:`run`."""
    return run(["bash", "-euo", "pipefail", "-c", script, "bench", *arguments], cwd=cwd, stdout=subprocess.DEVNULL)


def missing(*programs: str) -> list[str]:
    """Return the programs that are not installed."""
    return [program for program in programs if shutil.which(program) is None]


def settle() -> None:
    """Let what earlier runs wrote reach the disk, so that the next one does not pay for it."""
    os.sync()
    time.sleep(0.2)


def machine(directory: Path, programs: Iterable[str]) -> dict[str, object]:
    """Describe where a benchmark ran: the machine, the filesystem under ``directory``, and the versions of things."""
    cpu = next((line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")), ": unknown")
    memory = next(line for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / (1 << 20), 1),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "kernel": platform.release(),
        "filesystem": _filesystem(directory),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _DISTRIBUTIONS},
        "programs": {name: _version(name) for name in programs if not missing(name)},
    }


def commit() -> str:
    """Return the commit that was measured, marked where files of it were changed."""
    text = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return text.stdout.strip() or "unknown"


def save(name: str, *, machine: dict[str, object], **result: object) -> Path:
    """Keep a result under ``bench/results/`` and return its path."""
    now = datetime.now(UTC)
    document = {"benchmark": name, "date": now.isoformat(timespec="seconds"), "commit": commit(), "machine": machine}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(document | result, indent=1, default=_plain) + "\n")
    return path


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an aligned table; all columns but the first are flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def middle(costs: Iterable[Cost]) -> Cost:
    """Return the medians."""
    costs = list(costs)
    return Cost(median(cost.wall for cost in costs), median(cost.cpu for cost in costs))


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Cost) else str(value)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _filesystem(directory: Path) -> str:
    text = subprocess.run(
        ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory],
        capture_output=True,
        text=True,
        check=True,
    )
    return text.stdout.strip()


def _version(program: str) -> str:
    for flag in ("--version", "version"):
        text = subprocess.run([program, flag], capture_output=True, text=True, check=False)
        if text.returncode == 0:
            return text.stdout.strip().splitlines()[0]
    return "unknown"
