"""Memory stays bounded, whatever a layer's size: measured in a process of its own, against the bare interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from layercache.testing.images import build_image, synthetic_layer
from layercache.testing.registry import ScriptedRegistry

MIB = 1 << 20

_PEAK = """
import json, sys

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

before = peak()
from layercache import LayerCache
with LayerCache(sys.argv[1], platform="linux/amd64", janitor=False) as cache:
    with cache.namespace("a").pull(sys.argv[2]) as image:
        pulled = peak()
        size = 0
        with image.layers[0].uncompressed() as tar:
            while piece := tar.read(1 << 20):
                size += len(piece)
print(json.dumps({"pull": pulled - before, "read": peak() - before, "size": size}))
"""


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_large_layer_is_pulled_and_read_in_little_memory(tmp_path: Path, scripted: ScriptedRegistry, compression):
    """Pulling and reading a layer of 128 MiB takes less than 64 MiB above the interpreter."""
    layer = synthetic_layer(tmp_path / "layer", 128 * MIB, compression=compression, seed=1)
    image = build_image([layer], platform="linux/amd64")
    scripted.add(image, "demo/big", "1")

    ran = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "root"), f"{scripted.host}/demo/big:1"],
        check=True,
        capture_output=True,
        timeout=100,
    )

    measured = json.loads(ran.stdout)
    assert measured["size"] >= 128 * MIB
    assert measured["read"] < 64 * MIB, measured
