"""The main job of layercache, step by step, with what each step did and what it cost on this machine.

It needs nothing but the library: the image is made of files that are here, and the registry is the one in
``layercache.testing``. Run it with ``make demo``, or with ``python docs/examples/demo.py``.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Self

import urllib3
import xxhash

from layercache import LayerCache, PullReport
from layercache.testing.images import BuiltImage, build_image, build_layer, layer_tar
from layercache.testing.registry import ScriptedRegistry


def main() -> None:
    """Build, serve, pull, pull again, stop the registry, read, purge."""
    logging.getLogger("layercache").setLevel(logging.ERROR)  # what it would warn of is shown as a step
    registry = ScriptedRegistry()
    with tempfile.TemporaryDirectory(prefix="layercache-demo-") as folder:
        with Timed() as took:
            image = build()
        size = sum(layer.size for layer in image.layers)
        say("build", f"an image of {len(image.layers)} layers from files on this machine", amount(size), took.seconds)

        registry.start()
        try:
            reference = f"{registry.host}/demo/serving:1.0"
            registry.add(image, "demo/serving", "1.0")
            say("serve", reference)

            with LayerCache(Path(folder, "cache")) as cache:
                demonstrate(cache, registry, reference)
        finally:
            registry.stop()


def demonstrate(cache: LayerCache, registry: ScriptedRegistry, reference: str) -> None:
    """Do what a model server does with the cache, from the first pull to the end of its endpoint."""
    endpoint = cache.namespace("acme/endpoint-7")

    with Timed() as took, endpoint.pull(reference) as image:
        report = image.report
    say(
        "pull",
        f"each blob verified, synced, then visible; {report.requests} requests",
        amount(report.bytes_fetched),
        took.seconds,
    )
    for blob in report.blobs:
        note(f"{blob.source:6}  {str(blob.digest)[:19]}  {amount(blob.size):>10}  {blob.media_type}")

    by_digest = f"{registry.host}/demo/serving@{image.digest}"
    with Timed() as took, endpoint.pull(by_digest) as image:
        report = image.report
    say(
        "again", f"by digest: {sources(report)}; {report.requests} requests", amount(report.bytes_fetched), took.seconds
    )

    registry.stop()
    with Timed() as took, endpoint.pull(reference) as image:
        report = image.report
    answer = "the tag's last digest, marked stale" if report.stale else "a fresh answer"
    say("offline", f"the registry is stopped: {answer}; {sources(report)}", amount(report.bytes_fetched), took.seconds)

    with endpoint.pull(by_digest) as image, image.layers[0].uncompressed() as tar:
        count = 0
        with Timed() as took:
            while piece := tar.read(1 << 20):
                count += len(piece)
    say(
        "read",
        "by digest, still offline: the first layer's tar; chunks and DiffID checked",
        amount(count),
        took.seconds,
    )

    with Timed() as took:
        receipt = endpoint.purge()
    say("purge", f"receipt: {receipt.level}, {receipt.blobs} blobs", amount(receipt.bytes), took.seconds)
    note(f"what is left of the namespace: {len(list(cache.namespace('acme/endpoint-7').blobs()))} blobs")


def build() -> BuiltImage:
    """Return an image of the interpreter's library, two installed packages and a configuration, in gzip and zstd."""
    library = layer_tar([Path(json.__file__).parents[1]], under="usr/lib", keep=is_source)
    packages = layer_tar([Path(urllib3.__file__).parent, Path(xxhash.__file__).parent], under="opt/serving")
    config = layer_tar({"serving.json": json.dumps({"model": "demo", "replicas": 1}).encode()}, under="etc")
    return build_image([library, build_layer(packages, "zstd", frames=4), config])


def is_source(path: Path) -> bool:
    """Keep the library's own modules: no tests, no compiled parts, nothing that was installed later."""
    return path.suffix == ".py" and not {"test", "tests", "site-packages", "dist-packages"} & set(path.parts)


def sources(report: PullReport) -> str:
    """Count the blobs of a report by where they came from."""
    blobs = [blob.source for blob in report.blobs]
    return ", ".join(f"{blobs.count(source)} {source}" for source in dict.fromkeys(blobs))


class Timed:
    """The seconds of a ``with`` block."""

    seconds = 0.0

    def __enter__(self) -> Self:
        """Begin."""
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.seconds += time.perf_counter()


def amount(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def say(step: str, what: str, size: str = "", seconds: float | None = None) -> None:
    """Show one step."""
    took = "" if seconds is None else f"{seconds * 1000:8.1f} ms"
    print(f"{step:8} {what:76} {size:>10} {took}".rstrip())


def note(what: str) -> None:
    """Show a detail of the step above."""
    print(f"{'':8} {what}")


if __name__ == "__main__":
    main()
