"""What this machine says about itself: the one place of ``oci`` that looks outside.

It reads ``uname`` and ``/proc/cpuinfo``, once a process, and writes nothing.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Collection
from pathlib import Path

__all__ = ["amd64_level", "level_of", "uname"]

# The x86-64 psABI's levels in the names of /proc/cpuinfo (lahf_lm: LAHF, pni: SSE3, abm: LZCNT).
_LEVELS = (
    ("v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})),
    ("v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})),
    ("v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)


def uname() -> tuple[str, str]:
    """Operating system and machine, as Python and ``uname`` name them."""
    return sys.platform, platform.machine()


@functools.cache
def amd64_level() -> str:
    """Level of an x86-64 processor (``v1`` to ``v4``); empty on other processors and where it cannot be read."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return level_of(value.split())
    return ""


def level_of(flags: Collection[str]) -> str:
    """Highest level all of whose flags, and those of the levels below, are there."""
    held = set(flags)
    level = "v1"
    for name, needed in _LEVELS:
        if not needed <= held:
            break
        level = name
    return level
