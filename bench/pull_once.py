"""Pull once into a new cache and print, as JSON, what the call cost: ``python -m bench.pull_once ROOT REFERENCE``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from layercache import LayerCache


def main() -> None:
    """Pull in this process, so that the call can be told from the start of the interpreter."""
    root, reference = sys.argv[1:]
    with LayerCache(root) as cache:
        wall, cpu = time.perf_counter(), time.process_time()
        with cache.namespace("bench").pull(reference) as image:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            report = image.report
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"wall": wall, "cpu": cpu, "peak_kib": int(peak.split()[1]), "report": report.to_json()}))


if __name__ == "__main__":
    main()
