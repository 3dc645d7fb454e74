"""A filesystem that becomes read-only under a store, and writable again, on a real ext4 or xfs.

python -m tests.crash.readonly ext4
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from layercache.errors import ReadOnlyError, StoreError
from layercache.store import Generation, Store
from tests.crash import loopfs
from tests.crash.fulldisk import reads
from tests.crash.scenarios import content, descriptor, name_of

__all__ = ["main"]


def remounted(image: loopfs.Image) -> Iterator[str]:
    """A store that was opened on a read-only mount reads, refuses to write, and writes once it is mounted otherwise."""
    root = image.place / "root"
    _begin(root)
    image.remount(read_only=True)
    store = Store(root)
    generation = _generation(store)
    yield from reads(generation, "small")
    for what, verb in (
        ("put", lambda: _put(generation, "chunks")),
        ("remove", lambda: generation.remove(descriptor("small").digest)),
        ("create", lambda: store.generation(name_of("b"), create=True)),
        ("purge", lambda: store.purge(name_of("a"))),
        ("recover", store.recover),
    ):
        try:
            verb()
            yield f"{what} worked on a read-only mount"
        except ReadOnlyError:
            pass

    image.remount(read_only=False)
    _put(generation, "chunks")
    yield from reads(generation, "small", "chunks")
    generation.remove(descriptor("small").digest)
    other = store.generation(name_of("b"), create=True)
    if other is None:
        yield "no namespace can be made"
    else:
        other.close()
    store.recover()
    if store.purge(name_of("a")).level != "unlinked":
        yield "the purge did not end"
    generation.close()
    store.close()


def failed(image: loopfs.Image) -> Iterator[str]:
    """A filesystem that stops writing by itself, as ext4 does after an error, still gives what it has."""
    trigger = Path("/sys/fs/ext4", Path(image.device).name, "trigger_fs_error")
    if not trigger.exists():
        return
    store = Store(image.place / "root")
    generation = _generation(store, create=True)
    _put(generation, "small")
    trigger.write_text("x", encoding="ascii")
    yield from reads(generation, "small")
    for what, verb in (("put", lambda: _put(generation, "chunks")), ("purge", lambda: store.purge(name_of("a")))):
        try:
            verb()
            yield f"{what} worked on a filesystem that stopped"
        except StoreError:
            pass
    generation.close()
    store.close()


def _begin(root: Path) -> None:
    """Put the first blob. Nothing of it stays open for writing, a mapping neither, or the mount could not change."""
    store = Store(root)
    generation = _generation(store, create=True)
    _put(generation, "small")
    generation.close()
    store.close()


def _generation(store: Store, *, create: bool = False) -> Generation:
    generation = store.generation(name_of("a"), create=create)
    assert generation is not None
    return generation


def _put(generation: Generation, key: str) -> None:
    wanted = descriptor(key)
    ingest = generation.begin(wanted)
    assert ingest is not None
    with ingest:
        ingest.feed(content(key)[ingest.offset :])
        ingest.commit(media_type=wanted.media_type, diff_id=None, origin="test").close()


def main(arguments: list[str] | None = None) -> int:
    """Play both; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.readonly", description=__doc__.partition("\n")[0])
    parser.add_argument("filesystem", choices=sorted(loopfs.FILESYSTEMS))
    options = parser.parse_args(arguments)
    logging.disable()
    findings: list[str] = []
    with loopfs.Image(options.filesystem, loopfs.enter_private_mounts() / options.filesystem) as image:
        for scenario in (remounted, failed):
            image.mount(errors="remount-ro" if options.filesystem == "ext4" else "")
            findings += [f"{scenario.__name__}: {finding}" for finding in scenario(image)]
            image.unmount()
    print("\n".join(findings) if findings else f"{options.filesystem}: read-only and back, 0 findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
