"""How the sweeps are run by the suite: as commands, which replay what they find, in shares of a written budget."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["FAULT_DAYS", "POWER_DAYS", "SOAK", "cycles", "finish", "power_share", "seed", "shard", "start"]

# Read when this is imported: the suite takes LAYERCACHE_* out of the environment of each test.
SOAK = bool(os.environ.get("LAYERCACHE_SOAK"))
"""All of it instead of today's share: ``make soak``."""

POWER_DAYS, FAULT_DAYS = 10, 10
"""Days in which the shares of the suite come round to every cut, and to every fault."""

_DAY = int(os.environ.get("LAYERCACHE_SHARD", time.time() // 86400))
_ROOT = Path(__file__).parents[2]


def shard(of: int, *, part: int = 0, parts: int = 1) -> str:
    """Return which share of the points is visited today, as K/N; ``part`` of ``parts`` of it where several run at once.

    ``LAYERCACHE_SHARD`` names another day. Soaking, all of it is.
    """
    of = 1 if SOAK else of
    return f"{_DAY % of * parts + part}/{of * parts}"


def power_share() -> list[str]:
    """Return the arguments of a sweep of power cuts: today's share, half of it with deeper chains."""
    return ["--shard", shard(POWER_DAYS), "--seed", str(_DAY), "--nested", "1" if SOAK else "2"]


def seed() -> str:
    """Return the seed of what is drawn by chance today."""
    return str(_DAY)


def cycles() -> str:
    """Return how often a disk is filled."""
    return "100" if SOAK else "20"


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a sweep."""
    command = [sys.executable, "-B", "-m", module, *arguments]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(sweeps: Sequence[subprocess.Popen[str]], record_property: Callable[[str, object], None]) -> None:
    """Wait for sweeps, record what they covered for the end of the run, and fail with what they found."""
    failed = []
    try:
        for sweep in sweeps:
            out, err = sweep.communicate()
            record_property("coverage", out.strip().splitlines()[-1] if out.strip() else err.strip()[-2000:])
            if sweep.returncode != 0:
                failed.append(f"{out}\n{err[-4000:]}")
    finally:
        for sweep in sweeps:
            if sweep.poll() is None:
                sweep.kill()
                sweep.communicate()
    assert not failed, "\n".join(failed)
