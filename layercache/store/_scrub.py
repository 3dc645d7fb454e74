"""The scrub: every blob is read again and compared with its digest, the longest unread first, at a bounded rate.

When a blob was compared last is the modification time of its record, so a scrub that is cut short goes on where it was,
also in another process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from layercache.control import Control
from layercache.errors import (
    IntegrityError,
    InUseError,
    LayerCacheError,
    NamespacePurgedError,
    NotFoundError,
    SealError,
)
from layercache.oci import Digest
from layercache.reports import Finding
from layercache.store._disk import Disk
from layercache.store._generation import Generation
from layercache.store._layout import SCRUB_LOCK, Slot
from layercache.store._slots import Slots

__all__ = ["scrub"]

_log = logging.getLogger("layercache.store")

_STEP = 0.05


def scrub(disk: Disk, slots: Slots, *, older_than: float, rate: float, control: Control) -> Iterator[Finding]:
    """Compare every blob not compared for ``older_than`` seconds, reading at most ``rate`` bytes a second.

    Yields what is damaged; it has been moved aside. Ends at once, having done nothing, where another process scrubs.
    """
    lock = disk.create(disk.root, SCRUB_LOCK, exist_ok=True)
    try:
        if not disk.lock(lock, exclusive=True):
            return
        for _, slot, digest in sorted(_due(slots, disk.now() - older_than), key=lambda due: due[0]):
            control.checkpoint()
            generation = _readable(slots, slot)
            if generation is None:
                continue
            try:
                finding = _compare(disk, generation, digest, rate, control)
            finally:
                generation.close()
            if finding is not None:
                yield finding
    finally:
        disk.close(lock)


def _readable(slots: Slots, slot: Slot) -> Generation | None:
    try:
        return slots.live(slot)
    except SealError:
        return None  # without its key nothing can be compared


def _due(slots: Slots, before: float) -> Iterator[tuple[float, Slot, Digest]]:
    for slot in slots.names():
        generation = _readable(slots, slot)
        if generation is None:
            continue
        try:
            for digest in generation.digests():
                verified = generation.verified(digest)
                if verified < before:
                    yield verified, slot, digest
        except NamespacePurgedError:
            continue
        finally:
            generation.close()


def _compare(disk: Disk, generation: Generation, digest: Digest, rate: float, control: Control) -> Finding | None:
    def pace(count: int) -> None:
        left = count / rate
        while left > 0:
            control.checkpoint()
            disk.pause(min(left, _STEP))
            left -= _STEP

    try:
        with generation.open(digest) as blob:
            blob.verify(pace=pace)
        generation.mark_verified(digest)
    except IntegrityError as error:
        return Finding("content", digest, f"{error.what}; it will be fetched again")
    except (NotFoundError, InUseError, NamespacePurgedError):
        return None
    except LayerCacheError as error:
        control.checkpoint()
        _log.warning("%s could not be scrubbed: %s", digest, error)
    return None
