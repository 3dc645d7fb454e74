"""Which blobs to evict, in order: decisions without a disk or a clock.

The default keeps a few orders of the blobs' metadata side by side, each as if it had decided from the start, and
follows the one whose misses cost least lately. The evidence is in ``docs/eviction.md``.
"""

from __future__ import annotations

from layercache.policy._policy import POLICIES, Policy
from layercache.policy._values import Quota, Source, Victim

__all__ = ["POLICIES", "Policy", "Quota", "Source", "Victim"]
