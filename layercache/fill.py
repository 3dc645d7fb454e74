"""One blob from a source into the store, by whoever gets the right to write it; everybody else waits for that one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import chain
from typing import Protocol

from layercache.control import Control, Progress
from layercache.errors import IntegrityError, InUseError, NotFoundError, StoreError
from layercache.integrity import Verifier
from layercache.metrics import Ledger
from layercache.oci import Descriptor, DiffID, Repository
from layercache.store import Arriving, Blob, Generation, Ingest, arrived

__all__ = ["Fetch", "Source", "fill", "mend", "through"]

_log = logging.getLogger("layercache")

_POLL = 0.02
_NO_PROGRESS = 30.0
"""Seconds without a new byte after which a waiter stops waiting for a leader. It robs nobody: it goes without."""


class Source(Protocol):
    """Where blobs come from. What it gives is not trusted: the store compares it with the digest."""

    @property
    def host(self) -> str:
        """Name of the source in reports."""
        ...

    def fetch(
        self,
        repository: Repository,
        descriptor: Descriptor,
        *,
        offset: int = 0,
        length: int | None = None,
        control: Control,
        ledger: Ledger,
    ) -> Iterator[bytes]:
        """Yield the blob's bytes from ``offset`` on. Closing the iterator ends the transfer."""
        ...


Fetch = Callable[[int], Iterator[bytes]]
"""Yields a blob's bytes from an offset on."""


def fill(
    generation: Generation,
    descriptor: Descriptor,
    fetch: Fetch,
    *,
    diff_id: DiffID | None = None,
    origin: str,
    control: Control,
    ledger: Ledger,
) -> tuple[Blob, bool]:
    """Return the blob, open and leased, and whether this call fetched it.

    One transfer for any number of threads and processes that ask for one digest at once. What an interrupted transfer
    left is gone on with.

    :raises InUseError: when another process has the right to write it and makes no progress.
    :raises StoreError: when the store cannot take it. Nothing of it is visible.
    :raises IntegrityError: when the source gives something else. Nothing is left behind.
    """
    seen, idle = -1, 0.0
    while True:
        control.checkpoint()
        blob = _here(generation, descriptor)
        if blob is not None:
            if seen >= 0:
                _settle(generation, blob)
            return blob, False
        ingest = generation.begin(descriptor)
        if ingest is not None:
            resumed = ingest.offset > 0
            try:
                blob = _transfer(
                    ingest, descriptor, fetch, diff_id=diff_id, origin=origin, control=control, ledger=ledger
                )
            except IntegrityError:
                if not resumed:
                    raise
                continue  # what was left may have been of something else: once more, from the first byte
            return blob, True
        with ledger.span("wait"):
            control.wait(_POLL)
        now = arrived(generation, descriptor)
        control.report(Progress(descriptor.digest, descriptor.size, now, "waiting"))
        seen, idle = (now, 0.0) if now != seen else (seen, idle + _POLL)
        if idle >= _NO_PROGRESS:
            raise InUseError(
                f"whoever fetches {descriptor.digest} makes no progress", hint="look for a stopped process"
            )


def _here(generation: Generation, descriptor: Descriptor) -> Blob | None:
    try:
        return generation.open(descriptor.digest)
    except NotFoundError:
        return None


def _settle(generation: Generation, blob: Blob) -> None:
    """Make sure of what was waited for: whoever published it may have died before it was durable."""
    try:
        generation.settle(blob.digest)
    except BaseException:
        blob.close()
        raise


def _transfer(
    ingest: Ingest,
    descriptor: Descriptor,
    fetch: Fetch,
    *,
    diff_id: DiffID | None,
    origin: str,
    control: Control,
    ledger: Ledger,
) -> Blob:
    with ingest:
        if ingest.offset < descriptor.size:
            pieces = fetch(ingest.offset)
            try:
                for piece in pieces:
                    with ledger.span("write"):
                        ingest.feed(piece)
                    control.report(Progress(descriptor.digest, descriptor.size, ingest.offset, "fetching"))
                    control.checkpoint()
            finally:
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()
        with ledger.span("flush"):
            return ingest.commit(media_type=descriptor.media_type, diff_id=diff_id, origin=origin)


def mend(generation: Generation, blob: Blob, fetch: Callable[[int, int], Iterator[bytes]], *, control: Control) -> bool:
    """Store a damaged blob anew from its sound chunks and, for the others, from a source; tell whether that was done.

    ``blob`` is the open handle of what was moved aside. ``fetch`` yields the bytes of a range, given its offset and
    length. Where no single chunk is to blame, all of it is fetched. False where somebody else is fetching it already.

    :raises IntegrityError: when the source gives something else.
    """
    meta = blob.meta
    bad = blob.damage() or [(0, meta.size)]
    ingest = generation.begin(Descriptor(meta.media_type, meta.digest, meta.size), resume=False)
    if ingest is None:
        return False
    with ingest:
        for start, end in bad:
            pieces: Iterator[bytes | memoryview] = chain(blob.sound(ingest.offset, start), fetch(start, end - start))
            for piece in pieces:
                control.checkpoint()
                ingest.feed(piece)
        for piece in blob.sound(ingest.offset, meta.size):
            control.checkpoint()
            ingest.feed(piece)
        ingest.commit(media_type=meta.media_type, diff_id=meta.diff_id, origin=meta.origin).close()
    return True


def through(
    generation: Generation, descriptor: Descriptor, fetch: Fetch, *, origin: str, control: Control
) -> Generator[bytes | memoryview, None, None]:
    """Yield a blob's bytes as they arrive: from here, behind whoever writes it, or stored on the way by this call.

    The last piece comes only once size and digest of all of them are right. Where a writer dies, this call goes on in
    his place; where he makes no progress, or the store fails, the rest comes past it. A piece is valid until the next.

    :raises IntegrityError: instead of the last piece, when size or digest is wrong.
    :raises NamespacePurgedError: once the namespace was purged.
    """
    taken = Verifier(descriptor.digest, descriptor.size)
    pieces: Iterator[bytes | memoryview] | None
    try:
        pieces = _first(generation, descriptor, fetch, origin=origin)
    except (StoreError, InUseError) as error:
        _log.warning("%s streams past the cache: %s", descriptor.digest, error)
        pieces, proven = fetch(0), False
    else:
        proven = pieces is not None
        pieces = pieces or _behind(generation, descriptor, fetch, taken, origin=origin, control=control)
    if proven:  # what gives it compares it already
        yield from pieces
        return
    for piece in pieces:
        taken.feed(piece)
        if taken.taken == descriptor.size:
            taken.finish()
        yield piece
    taken.finish()


def _first(
    generation: Generation, descriptor: Descriptor, fetch: Fetch, *, origin: str
) -> Iterator[bytes | memoryview] | None:
    """Return all of a blob from here, or stored on the way; ``None`` where somebody else is at it, or was."""
    blob = _here(generation, descriptor)
    if blob is not None:
        return _closing(blob)
    ingest = generation.begin(descriptor)
    if ingest is None:
        return None
    if ingest.offset:
        ingest.suspend()
        return None
    return _tee(fetch(0), ingest, descriptor, origin=origin)


def _closing(blob: Blob, start: int = 0) -> Iterator[memoryview]:
    with blob:
        yield from blob.chunks(start)


def _behind(
    generation: Generation,
    descriptor: Descriptor,
    fetch: Fetch,
    taken: Verifier,
    *,
    origin: str,
    control: Control,
) -> Iterator[bytes | memoryview]:
    """Yield the pieces from ``taken`` on, which counts them as they are used, wherever they come from next."""
    idle = 0.0
    try:
        while taken.taken < descriptor.size and idle < _NO_PROGRESS:
            control.checkpoint()
            blob = _here(generation, descriptor)
            if blob is not None:
                yield from _closing(blob, taken.taken)
                return
            ingest = generation.begin(descriptor)
            before = taken.taken
            try:
                arriving = Arriving.of(generation, descriptor)
                if arriving is not None:
                    with closing(arriving):
                        yield from arriving.chunks(before)
            except BaseException:
                if ingest is not None:
                    ingest.suspend()
                raise
            if ingest is not None:  # the writer is gone
                yield from _rest(ingest, descriptor, fetch, taken, origin=origin)
                return
            idle = 0.0 if taken.taken > before else idle + _POLL
            if taken.taken == before:
                control.wait(_POLL)
    except (StoreError, InUseError) as error:
        _log.warning("%s streams past the cache: %s", descriptor.digest, error)
    if taken.taken < descriptor.size:
        yield from fetch(taken.taken)


def _rest(
    ingest: Ingest, descriptor: Descriptor, fetch: Fetch, taken: Verifier, *, origin: str
) -> Iterator[bytes | memoryview]:
    """Write a blob from where ``ingest`` is; yield it from where ``taken`` is."""
    skip = taken.taken - ingest.offset
    for piece in _tee(fetch(ingest.offset), ingest, descriptor, origin=origin):
        if skip >= len(piece):
            skip -= len(piece)
            continue
        yield piece[skip:]
        skip = 0


def _tee(pieces: Iterator[bytes], ingest: Ingest, descriptor: Descriptor, *, origin: str) -> Iterator[bytes]:
    """Yield the pieces as they come and store them on the way; the last one comes only once all of it is right.

    A store that fails in between does not end the stream.

    :raises IntegrityError: instead of the last piece, when size or digest is wrong.
    """
    verifier = ingest.verifier
    storing, held = True, b""
    with ingest:
        for piece in pieces:
            if storing:
                try:
                    ingest.feed(piece)
                except StoreError as error:
                    _log.warning("%s streams on past the cache: %s", descriptor.digest, error)
                    storing = False
            else:
                verifier.feed(piece)
            if held:
                yield held
            held = piece
        if storing:
            try:
                ingest.commit(media_type=descriptor.media_type, diff_id=None, origin=origin).close()
            except StoreError as error:
                _log.warning("%s was streamed, not stored: %s", descriptor.digest, error)
        else:
            verifier.finish()
        if held:
            yield held
