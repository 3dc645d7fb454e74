"""Very many pulls: those that fail leave nothing behind, those that meet make one transfer of each blob."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layercache import LayerCache
from layercache.errors import LayerCacheError, UnauthorizedError
from layercache.registry import Anonymous, Password
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import BasicAuth, Redirect, ScriptedRegistry, Status, WrongBytes
from tests.crash import sweeps

IMAGE = build_image([layer_tar({"a": os.urandom(200_000)}), layer_tar({"b": b"x" * 5000})], platform="linux/amd64")
NAME = "demo/serving"
PLATFORM = "linux/amd64"
COUNT = 10_000 if sweeps.SOAK else 150
CHILD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from layercache import LayerCache
from layercache.registry import Anonymous
with LayerCache(sys.argv[1], janitor=False, credentials=Anonymous()) as cache, ThreadPoolExecutor(12) as pool:
    print("ready", flush=True)
    sys.stdin.readline()
    for image in pool.map(lambda _: cache.namespace("a").pull(sys.argv[2], platform="linux/amd64"), range(12)):
        image.close()
"""


@pytest.mark.timeout(3600 if sweeps.SOAK else 120)
def test_failing_pulls_leave_no_descriptor_thread_or_memory(scripted: ScriptedRegistry, root: Path) -> None:
    """containerd/containerd#12126: failures used up what the next pull needed. Here a good one starts at once.

    Ten thousand in a soak; they fail in the manifest, the config and the layers, by refusal, redirect and wrong bytes.
    """
    scripted.add(IMAGE, NAME, "1")
    reference = f"{scripted.host}/{NAME}:1"
    ways = (
        ("manifests/*", Status(404)),
        ("manifests/*", Status(403, b"x" * 100_000)),
        ("blobs/*", Status(404)),
        ("blobs/*", Redirect(to="ftp://x/")),
        ("blobs/*", Redirect(to="http://169.254.169.254/")),
        ("blobs/*", WrongBytes()),
    )

    def fail(cache: LayerCache, count: int) -> None:
        for number in range(count):
            pattern, fault = ways[number % len(ways)]
            scripted.clear_faults()
            scripted.clear_requests()
            scripted.fault(pattern, fault, times=None)
            with pytest.raises(LayerCacheError):
                cache.namespace("a").pull(reference, platform=PLATFORM)

    with LayerCache(root, janitor=False, credentials=Anonymous()) as cache:
        fail(cache, 60)  # what is made once is made
        before = state()
        fail(cache, COUNT)
        after = state()
        scripted.clear_faults()
        start = time.monotonic()
        cache.namespace("a").pull(reference, platform=PLATFORM).close()
        assert time.monotonic() - start < 5

    assert after[0] <= before[0] + 8  # the server's side of a connection may lag
    assert after[1] <= before[1] + 4
    assert after[2] <= before[2] + 16 * 1024


def test_fifty_threads_and_four_processes_make_one_transfer_of_each_blob(
    scripted: ScriptedRegistry, root: Path
) -> None:
    """moby/moby#15582, containerd/containerd#8790: whoever pulls the image at the same time waits for one download."""
    scripted.add(IMAGE, NAME, "1")
    reference = f"{scripted.host}/{NAME}:1"
    LayerCache(root, janitor=False).close()
    command = [sys.executable, "-c", CHILD, str(root), reference]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        with LayerCache(root, janitor=False, credentials=Anonymous()) as cache, ThreadPoolExecutor(50) as pool:
            for child in children:
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
            for image in pool.map(lambda _: cache.namespace("a").pull(reference, platform=PLATFORM), range(50)):
                image.close()
        assert [child.wait(60) for child in children] == [0] * 4
    finally:
        for child in children:
            child.kill()
            child.communicate()

    assert [scripted.count(f"blobs/{layer.digest}") for layer in IMAGE.layers] == [1, 1]


# --- tenants ---


def test_to_know_a_digest_is_not_to_have_it(root: Path) -> None:
    """project-zot/zot CVE-2024-39897: what one tenant pulled is no reason to give it to another without rights."""
    with ScriptedRegistry(auth=BasicAuth("a", "right")) as registry:
        registry.add(IMAGE, NAME, "1")
        reference = f"{registry.host}/{NAME}@{IMAGE.digest}"
        with LayerCache(root, janitor=False, credentials=Password(registry.host, "a", "right")) as cache:
            cache.namespace("tenant-a").pull(reference, platform=PLATFORM).close()
        with LayerCache(root, janitor=False, credentials=Password(registry.host, "b", "wrong")) as cache:
            with pytest.raises(UnauthorizedError):
                cache.namespace("tenant-b").pull(reference, platform=PLATFORM)
            assert list(cache.namespace("tenant-b").blobs()) == []


def test_a_name_of_one_tenant_is_nobody_elses(scripted: ScriptedRegistry, root: Path) -> None:
    """containerd/containerd CVE-2026-50195: what a tag meant to one tenant is not what another one gets for it."""
    scripted.add(IMAGE, NAME, "1")
    reference = f"{scripted.host}/{NAME}:1"
    with LayerCache(root, janitor=False, credentials=Anonymous()) as cache:
        cache.namespace("tenant-a").pull(reference, platform=PLATFORM).close()
        scripted.stop()
        assert cache.namespace("tenant-a").pull(reference, platform=PLATFORM).report.stale
        with pytest.raises(LayerCacheError):
            cache.namespace("tenant-b").pull(reference, platform=PLATFORM)


def state() -> tuple[int, int, int]:
    """Descriptors, threads and KiB of resident memory of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), resident
