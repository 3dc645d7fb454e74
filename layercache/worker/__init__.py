"""Large fills in processes of their own, so that the host's threads do not starve them.

Beside a thread that holds the GIL each call that drops it waits up to 5 ms to get it back, and a download over TLS
drops it every 16 KiB. A worker is a fresh interpreter that works on the same root: what it publishes is simply there.
"""

from __future__ import annotations

from layercache.worker._messages import Config
from layercache.worker._pool import LARGE, Filled, Workers

__all__ = ["LARGE", "Config", "Filled", "Workers"]
