"""Whether an image of the device that was taken before the purge of a sealed namespace can be read after it.

    python -m tests.purge.dumps ext4 --rounds 3

Each round a tenant moves in, sealed; the device is dumped; the dump is mounted and read, which the key that is still
there allows. Then he is purged on the device as it goes on, and the dump is tried again: by the library, and under
every key that what is left in the place of keys could hold.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from layercache import LayerCache, Receipt
from layercache.errors import FormatError, LayerCacheError
from layercache.oci import Digest
from layercache.store import NamespaceName, Store
from layercache.store._layout import generation_name
from layercache.store._seal import SealedForm
from layercache.store._secret import Key
from layercache.testing.registry import ScriptedRegistry
from tests.crash import loopfs
from tests.purge.canary import Canary

__all__ = ["main"]

Dump = list[tuple[int, bytes]]


class _Round:
    def __init__(self, image: loopfs.Image, keys: Path, registry: ScriptedRegistry) -> None:
        self._image = image
        self._root = image.place / "root"
        self._keys = keys
        self._registry = registry
        self._canary = Canary()
        self._layers: list[Digest] = []

    def play(self, *, trim: bool) -> Iterator[str]:
        """Yield what is wrong."""
        self._image.mount()
        self._move_in()
        self._unmount()
        dump = self._image.save()
        yield from (f"in clear, in the dump: {hit}" for hit in self._canary.in_file(self._image.flush()))
        self._image.mount()
        if self._readable() != len(self._layers):
            yield "with the key at hand the dump cannot be read: this trial does not show what it should"
        with LayerCache(self._root, janitor=False) as cache:
            receipt = cache.namespace(self._canary.namespace).purge(trim=trim)
            recorded = [one for one in cache.receipts() if one.generation and one.slot == receipt.slot]
        yield from _judge(receipt, recorded, trim=trim)
        self._unmount()
        after = self._image.save()
        self._image.restore(dump)
        self._image.mount()
        yield from (f"a record opens under what is left: {name}" for name in self._opened_by_what_is_left())
        if readable := self._readable():
            yield f"after the purge {readable} layers of the dump can be read"
        yield from (f"in clear, on the device: {hit}" for hit in self._canary.in_tree(self._root))
        self._unmount()
        self._image.restore(after)

    def _move_in(self) -> None:
        image = self._canary.image()
        self._registry.add(image, self._canary.repository, "1.0")
        with LayerCache(self._root, janitor=False) as cache:
            namespace = cache.namespace(self._canary.namespace, seal="ephemeral")
            with namespace.pull(f"{self._registry.host}/{self._canary.repository}:1.0") as pulled:
                for layer in pulled.layers:
                    layer.uncompressed().read()
            if not all(info.seal == "ephemeral" for info in cache.namespaces()):
                raise AssertionError("not sealed")
        self._layers = [descriptor.digest for descriptor in image.layers]

    def _unmount(self) -> None:
        gc.collect()  # a mapped word goes with the last reference to its generation
        self._image.unmount()

    def _readable(self) -> int:
        """Return how many of the layers the library reads."""
        count = 0
        with LayerCache(self._root, janitor=False) as cache:
            namespace = cache.namespace(self._canary.namespace)
            for digest in self._layers:
                with suppress(LayerCacheError), namespace.open(digest) as layer:
                    count += self._canary.inner in layer.uncompressed().read()
        return count

    def _opened_by_what_is_left(self) -> Iterator[str]:
        """Try every 32 bytes of what is in the place of keys as the key of every record of the dump."""
        left = [path.read_bytes() for path in self._keys.iterdir()]
        candidates = {raw[at : at + 32] for raw in [*left, bytes(32)] for at in range(len(raw) - 31)}
        store = Store(self._root)
        try:
            slot = next(one for one in store.namespaces() if one.name in (None, NamespaceName(self._canary.namespace)))
        finally:
            store.close()
        home = generation_name(slot.slot, slot.generation)
        for path in [self._root / "data" / home / "name", *(self._root / "data" / home).glob("meta/*/*")]:
            kind = "name" if path.name == "name" else "meta"
            for raw in candidates:
                key = Key("tried", bytearray(raw), release=_nothing)
                form = SealedForm("ephemeral", key, home, fresh=lambda: os.urandom(32))
                with suppress(FormatError):
                    form.unpack(kind, path.name, path.read_bytes())
                    yield path.name
                form.close()


def _nothing() -> None:
    pass


def _judge(receipt: Receipt, recorded: list[Receipt], *, trim: bool) -> Iterator[str]:
    if receipt.level != "crypto-erased" or not receipt.complete:
        yield f"nobody has the key, and the receipt says {receipt}"
    if [bool(one.trimmed) for one in recorded] != ([False, True] if trim else [False]):
        yield f"trim is {trim}, and the receipts say {recorded}"


def main(arguments: list[str] | None = None) -> int:
    """Play rounds on one filesystem; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.purge.dumps", description=__doc__.partition("\n")[0])
    parser.add_argument("filesystem", choices=sorted(loopfs.FILESYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    if why := loopfs.unavailable(options.filesystem):
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    logging.disable()
    started = time.monotonic()
    findings: list[str] = []
    mounts = loopfs.enter_private_mounts()
    keys = mounts / "keys"
    os.environ["LAYERCACHE_KEYS"] = str(keys)
    with loopfs.Image(options.filesystem, mounts / options.filesystem) as image, ScriptedRegistry() as registry:
        for number in range(options.rounds):
            one = _Round(image, keys, registry)
            findings += (f"round {number}: {text}" for text in one.play(trim=bool(number % 2)))
        left = list(keys.iterdir())
    findings += (f"left in the place of keys: {path.name}" for path in left)
    for finding in findings:
        print(f"FAILED {finding}")
    print(
        f"dumps of {options.filesystem}: {options.rounds} sealed tenants purged, {len(findings)} findings,"
        f" {time.monotonic() - started:.1f} s"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
