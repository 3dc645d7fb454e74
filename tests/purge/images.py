"""What a purge leaves on the device itself: canaries are looked for in the raw image of a real filesystem.

    python -m tests.purge.images ext4 --rounds 3

One filesystem goes through all rounds, each with a tenant of its own, beside a neighbour that must keep every byte.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from layercache import LayerCache, Namespace, Receipt
from layercache.errors import NamespacePurgedError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.testing.registry import ScriptedRegistry
from tests.crash import loopfs
from tests.purge.canary import Canary, Hit

__all__ = ["main"]

_KEPT = 5 << 20
"""Bytes of a blob whose unfinished write is kept."""


class _Half(io.BytesIO):
    """A source that breaks off at its end."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise ConnectionError("broken off")
        return data


class _Tenant:
    """One namespace with everything in it that a namespace can hold."""

    def __init__(self, cache: LayerCache, registry: ScriptedRegistry) -> None:
        self.canary = Canary()
        self.namespace: Namespace = cache.namespace(self.canary.namespace)
        image = self.canary.image()
        large = self.canary.file(_KEPT, salt="large")
        self.large = Descriptor(OCTET_STREAM, Digest.of(large), len(large))
        self.layers = [descriptor.digest for descriptor in image.layers]
        registry.add(image, self.canary.repository, "1.0")
        self._half = _Half(large[: _KEPT - 1000])
        self.repository = f"{registry.host}/{self.canary.repository}"

    def move_in(self, root: Path) -> None:
        """Fill the namespace: blobs, records, a reference, a damaged blob moved aside, an unfinished write."""
        with self.namespace.pull(f"{self.repository}:1.0") as image:
            for layer in image.layers:
                layer.uncompressed().read()
        (path,) = root.glob(f"data/*/blobs/*/{self.layers[1].encoded}")
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[100] ^= 1
            view.flush()
        if len(list(self.namespace.verify(self.layers[1]))) != 1:
            raise AssertionError("the damage was not found")
        try:
            self.namespace.admit(self.large, self._half)
        except ConnectionError:
            return  # what came is kept for the next attempt
        raise AssertionError("half a blob was taken")


def play(
    image: loopfs.Image, cache: LayerCache, root: Path, neighbour: Canary, tenant: _Tenant, *, trim: bool
) -> Iterator[str]:
    """Let a tenant move in, be purged while he reads, and be looked for; yield what is wrong."""
    canary = tenant.canary
    theirs = neighbour.in_tree(root)
    tenant.move_in(root)
    places = {Path(hit.where).parent.parent.name for hit in canary.in_tree(root)}
    if not {"blobs", "meta"} & places or not canary.in_file(image.flush()):
        yield f"the canaries cannot be seen where they are: {sorted(places)}"
    for part in ("bad", "in", "refs"):
        if not any(root.glob(f"data/*/{part}/*")):
            yield f"there is nothing in {part}/"
    with ExitStack() as held:
        reader = held.enter_context(tenant.namespace.open(tenant.layers[0]))
        receipt = tenant.namespace.purge(wait=0.0, trim=trim)
        for wait in (0.1, 10.0):
            if not receipt.pending:  # the call was over before the purge came to the open file
                receipt = tenant.namespace.purge(wait=wait, trim=trim)
        if receipt.level != "fenced" or receipt.pending != (os.getpid(),):
            yield f"somebody reads, and the receipt says {receipt.level}, held by {receipt.pending}"
        try:
            reader.compressed().read()
            yield "a reader got bytes after the fence"
        except NamespacePurgedError:
            pass
    receipt = tenant.namespace.purge(wait=30.0, trim=trim)
    if trim and not receipt.generation:
        # The errand of the calls before had ended it, so there was nothing left to do: what that came to is recorded.
        receipt = _recorded(cache, receipt, "discarded")
    if receipt.level != ("discarded" if trim else "unlinked"):
        yield f"nobody reads, and the receipt says {receipt.level}, held by {receipt.pending}"
    yield from after(image, root, canary, receipt)
    if neighbour.in_tree(root) != theirs:
        yield "the neighbour's bytes are not what they were"
    told = [repr(receipt), repr(tenant.namespace), *(json.dumps(one.to_json()) for one in cache.receipts())]
    yield from (f"told: {hit}" for hit in canary.in_bytes("\n".join(told).encode(), "what was told"))


def _recorded(cache: LayerCache, receipt: Receipt, level: str) -> Receipt:
    """Return the record of that level of the same slot, once there is one; else what was given."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for one in cache.receipts():
            if (one.slot, one.level) == (receipt.slot, level):
                return one
        time.sleep(0.01)
    return receipt


def after(image: loopfs.Image, root: Path, canary: Canary, receipt: Receipt) -> Iterator[str]:
    """Hold a receipt's level against what is there; yield where it says too much."""
    hits: list[Hit] = [*canary.in_tree(root), *canary.in_processes(root)]
    yield from (f"{receipt.level}, and there is {hit}" for hit in hits)
    left = canary.in_file(image.flush(), "the device")
    if receipt.level == "unlinked":
        # That is why the level says no more: what was unlinked is on the device until it is trimmed.
        if not left:
            yield "unlinked, and nothing was on the device: this scan does not see what it should"
        loopfs.trim(image.place)
        left = canary.in_file(image.flush(), "the device, trimmed")
    yield from (f"{receipt.level}, and there is {hit}" for hit in left)


def main(arguments: list[str] | None = None) -> int:
    """Play rounds on one filesystem; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.purge.images", description=__doc__.partition("\n")[0])
    parser.add_argument("filesystem", choices=sorted(loopfs.FILESYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    if why := loopfs.unavailable(options.filesystem):
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    logging.disable()
    started = time.monotonic()
    findings: list[str] = []
    levels: dict[str, int] = {}
    place = loopfs.enter_private_mounts() / options.filesystem
    size = max(loopfs.FILESYSTEMS[options.filesystem], 96 << 20)
    with loopfs.Image(options.filesystem, place, size=size) as image, ScriptedRegistry() as registry:
        image.mount()
        root = place / "root"
        with LayerCache(root, janitor=False) as cache:
            neighbour = _Tenant(cache, registry)
            neighbour.move_in(root)
            for number in range(options.rounds):
                tenant = _Tenant(cache, registry)
                played = play(image, cache, root, neighbour.canary, tenant, trim=number % 2 == 0)
                findings += (f"round {number}: {text}" for text in played)
            for receipt in cache.receipts():
                levels[receipt.level] = levels.get(receipt.level, 0) + 1
    for finding in findings:
        print(f"FAILED {finding}")
    print(
        f"canaries on {options.filesystem}: {options.rounds} tenants purged, receipts {levels},"
        f" {len(findings)} findings, {time.monotonic() - started:.1f} s"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
