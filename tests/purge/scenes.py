"""The main jobs of the library and of the command, one after another in this process, for a tracer to look on.

    python -m tests.purge.scenes ROOT TARGET HOST SEED

``HOST`` is a registry with the image of the canary ``SEED``, ``TARGET`` a directory that does not exist yet. It prints
the names of what it played.
"""

from __future__ import annotations

import io
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

from layercache import LayerCache
from layercache.cli import main as command
from layercache.control import Control
from layercache.errors import NamespacePurgedError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import NamespaceName, Store
from tests.purge.canary import Canary

__all__ = ["NAMES", "main"]

_SIZE = 5 << 20
"""Large enough for its unfinished write to be kept."""


class Scenes:
    """Each method is a scene; they are played in the order they are written."""

    def __init__(self, root: Path, target: Path, host: str, canary: Canary) -> None:
        self.root = root
        self.target = target
        self.canary = canary
        self.repository = f"{host}/{canary.repository}"
        self.reference = f"{self.repository}:1.0"
        self.image = canary.image()

    def cold_pull_hit_and_read(self) -> None:
        with LayerCache(self.root) as cache:
            for source in ("miss", "hit"):
                with cache.namespace(self.canary.namespace).pull(self.reference) as image:
                    assert {blob.source for blob in image.report.blobs} == {source}
                    for layer in image.layers:
                        layer.compressed().read()
                        layer.uncompressed().read()

    def admit_in_two_attempts(self) -> None:
        data = self.canary.file(_SIZE)
        large = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
        with LayerCache(self.root) as cache:
            namespace = cache.namespace(self.canary.namespace)
            with suppress(ConnectionError):
                namespace.admit(large, _Broken(data[: _SIZE - 1000]))
            assert list(self.root.glob("data/*/in/*.part"))
            namespace.admit(large, io.BytesIO(data))

    def stream_past(self) -> None:
        with LayerCache(self.root) as cache:
            namespace = cache.namespace(f"{self.canary.namespace} streamed")
            namespace.stream(self.image.layers[0], self.repository).read()
            assert namespace.contains(self.image.layers[0].digest)
            assert namespace.purge().level == "unlinked"

    def verify_and_repair(self) -> None:
        with LayerCache(self.root) as cache:
            for layer in self.image.layers[:2]:
                self._damage(layer.digest)
            namespace = cache.namespace(self.canary.namespace)
            assert [one.repaired for one in namespace.verify(self.image.layers[0].digest)] == [False]
            assert [one.repaired for one in namespace.verify(self.image.layers[1].digest, repair=True)] == [True]

    def scrub(self) -> None:
        store = Store(self.root)
        list(store.scrub(older_than=0.0, rate=1e9, control=Control()))
        store.close()

    def recover(self) -> None:
        (home,) = {path.parents[1] for path in self.root.glob("data/*/refs/*")}
        (home / "in" / f"{'0' * 64}.5000.00000000dead.part").write_bytes(b"of another boot")
        (home / "blobs" / "unknown").write_bytes(b"not ours")
        (self.root / "slots" / "unknown").write_bytes(b"not ours")
        store = Store(self.root)
        assert store.recover()
        store.close()

    def commands(self) -> None:
        name, digest = self.canary.namespace, str(self.image.layers[2].digest)
        file = Path(__file__)
        for line in (
            ["pull", self.reference, "-n", name],
            ["pull", self.reference, "-n", name, "--json"],
            ["ls"],
            ["ls", "-n", name, "--json"],
            ["inspect", digest, "-n", name],
            ["cat", digest, "-n", name, "--uncompressed", "--json"],
            ["export", self.reference, "-n", name, str(self.target)],
            ["put", str(file), "-n", name],
            ["verify", "-n", name],
            ["rm", f"sha256:{_sha(file)}", "-n", name],
            ["rm", self.reference, "-n", name],
            ["pull", self.reference, "-n", name],
            ["pull", self.reference, "-n", f"{name} 2"],
            ["pin", "kept", self.reference, "-n", f"{name} 2"],
            ["df"],
            ["prune", "--dry-run"],
            ["unpin", "kept", "-n", f"{name} 2"],
            ["pin", "kept", self.reference, "-n", f"{name} 2"],
            ["purge", f"{name} 2", "--wait", "5"],
            ["purge", f"{name} 2", "--json"],
            ["ls"],
        ):
            self._command(*line)

    def share_what_is_public(self) -> None:
        name = f"{self.canary.namespace} borrower"
        with LayerCache(self.root, public=[self.repository]) as cache:
            namespace = cache.namespace(name)
            with namespace.pull(self.reference) as image:
                assert {blob.public for blob in image.report.blobs} == {False, True}
            (public,) = [one for one in cache.namespaces() if one.public]
            assert namespace.purge().level == "unlinked"
            folder = f"data/{public.slot}.{public.generation}/"
            shared = {one.where for one in self.canary.in_tree(self.root) if folder in one.where}
            assert shared, "a tenant's purge leaves what is public"
            assert not [one for one in self.root.rglob("*") if one.parent.name == "grants"]
        self._command("pull", self.reference, "-n", name, "--public", self.repository)
        self._command("purge", "--public")
        assert not list(self.root.glob(folder))
        with LayerCache(self.root) as cache:
            assert {blob.public for blob in cache.namespace(name).blobs()} == {False}, "and theirs is left by its purge"
            cache.namespace(name).purge()

    def purge_under_a_reader(self) -> None:
        with LayerCache(self.root) as cache:
            namespace = cache.namespace(self.canary.namespace)
            held = namespace.open(self.image.layers[0].digest)
            assert namespace.purge(wait=0.05).level == "fenced"
            with suppress(NamespacePurgedError):
                held.compressed().read()
            held.close()
        with LayerCache(self.root) as cache:  # opening the root finishes it
            namespace = cache.namespace(self.canary.namespace)
            namespace.pull(self.reference).close()
            namespace.purge(wait=5.0)
            assert namespace.purge().generation == 0
            list(cache.receipts())

    def purge_under_a_writer(self) -> None:
        with LayerCache(self.root) as cache:
            store = cache.store()
            name = NamespaceName(f"{self.canary.namespace} late")
            generation = store.generation(name, create=True)
            assert generation is not None
            data = self.canary.file(100_000)
            ingest = generation.begin(Descriptor(OCTET_STREAM, Digest.of(data), len(data)))
            assert ingest is not None
            purging = threading.Thread(target=lambda: store.purge(name, wait=5.0))
            purging.start()
            time.sleep(0.1)
            with suppress(NamespacePurgedError):
                ingest.feed(data)
            ingest.abort()
            purging.join()
            generation.close()

    def sealed(self) -> None:
        data = self.canary.file(_SIZE)
        with LayerCache(self.root) as cache:
            namespace = cache.namespace(f"{self.canary.namespace} sealed", seal="ephemeral")
            with namespace.pull(self.reference) as image:
                for layer in image.layers:
                    layer.uncompressed().read()
            with suppress(ConnectionError):
                namespace.admit(Descriptor(OCTET_STREAM, Digest.of(data), len(data)), _Broken(data[: _SIZE - 1000]))
            assert namespace.purge().level == "crypto-erased"

    def fill_to_the_limit(self) -> None:
        with LayerCache(self.root, budget=24 << 20, keep_free=0) as cache:
            namespace = cache.namespace(f"{self.canary.namespace} full", quota="10%", floor="1MiB")
            for number in range(4):
                data = self.canary.file(_SIZE + number)
                namespace.admit(Descriptor(OCTET_STREAM, Digest.of(data), len(data)), io.BytesIO(data))
            assert 0 < len(list(namespace.blobs())) < 4
            namespace.open(next(namespace.blobs()).digest).close()
            cache.store().note_uses()
            assert namespace.purge(wait=5.0).level == "unlinked"

    def _command(self, *line: str) -> None:
        out = io.TextIOWrapper(io.BytesIO())
        with redirect_stdout(out):
            code = command(["--root", str(self.root), *line])
        assert code == 0, (line, code)

    def _damage(self, digest: Digest) -> None:
        (path,) = self.root.glob(f"data/*/blobs/*/{digest.encoded}")
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[100] ^= 1


NAMES = tuple(name for name in vars(Scenes) if not name.startswith("_"))


class _Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise ConnectionError("broken off")
        return data


def _sha(path: Path) -> str:
    return Digest.of(path.read_bytes()).encoded


def main(arguments: list[str]) -> None:
    """Play them all."""
    root, target, host, seed = arguments
    scenes = Scenes(Path(root), Path(target), host, Canary(seed))
    for name in NAMES:
        play: Callable[[], None] = getattr(scenes, name)
        play()
        print(name, flush=True)
    os.sync()


if __name__ == "__main__":
    main(sys.argv[1:])
