"""One invisible write: feed, then commit or abort. Commit is the only door into visibility."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from layercache.errors import FormatError, LayerCacheError
from layercache.integrity import CHUNK, SUM_SIZE, Verifier
from layercache.oci import Descriptor, DiffID, MediaType
from layercache.store._arriving import whole_chunks
from layercache.store._disk import Dir, File
from layercache.store._faults import store_error
from layercache.store._files import temporary
from layercache.store._form import Buffer
from layercache.store._layout import META, Meta, Partial
from layercache.store._read import Blob
from layercache.store._space import footprint, unused

if TYPE_CHECKING:
    from layercache.store._generation import Generation

__all__ = ["Ingest", "begin", "worth_keeping"]

_FLUSH = 32 * CHUNK
"""Write-back is started each time so many bytes are in, so that the fsync at the end has little left to do."""

_RESUMABLE = 4 * CHUNK
"""Blobs below this are fetched anew after an interruption: keeping sums for them costs more than it saves."""


class Ingest:
    """A blob on its way in, known to nobody but this handle, which holds the lock of its partial file.

    Feed the bytes from :attr:`offset` on. A partial that is not committed stays for the next attempt where it is
    worth keeping (:meth:`suspend`), or goes (:meth:`abort`).
    """

    def __init__(
        self, generation: Generation, descriptor: Descriptor, partial: Partial, file: File, sums: File | None
    ) -> None:
        self._generation = generation
        self._disk = generation.disk
        self._partial = partial
        self._digest, self._size = descriptor.digest, descriptor.size
        self._name = generation.form.blob_name(descriptor.digest)
        self._head = generation.form.head
        self._writer = generation.form.writer(self._name, self._size)
        self._file = file
        self._sums_file = sums
        self._kept = 0  # bytes of sums that are in the sums file
        self._verifier = Verifier(descriptor.digest, descriptor.size)
        self._flushed = 0
        self._open = True
        self._named = True

    @property
    def verifier(self) -> Verifier:
        """What has been fed so far, compared with the descriptor; it stays right when the disk fails."""
        return self._verifier

    @property
    def offset(self) -> int:
        """Bytes that are in so far: where the next :meth:`feed` goes."""
        return self._verifier.taken

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes.

        :raises IntegrityError: when they are more than the descriptor promised.
        :raises StoreError: when the disk fails; the partial is gone then.
        :raises NamespacePurgedError: when the namespace was purged meanwhile.
        """
        try:
            self._generation.check()
            self._verifier.feed(data)
            with self._generation.guarding("write a blob"):
                self._write(self._writer.feed(data))
                self._keep_sums()
                if self.offset - self._flushed >= _FLUSH:
                    self._disk.start_flush(self._file, self._flushed, self.offset - self._flushed)
                    self._flushed = self.offset
        except LayerCacheError:
            self.abort()
            raise

    def commit(self, *, media_type: MediaType, diff_id: DiffID | None, origin: str) -> Blob:
        """Publish the blob and return it open: whole, verified and durable, or not at all.

        :raises IntegrityError: when size or digest is wrong; nothing is left behind.
        :raises StoreError: when the disk fails; nothing is visible that is not whole and durable.
        :raises NamespacePurgedError: when the namespace was purged meanwhile.
        """
        generation, disk, name = self._generation, self._disk, self._name
        try:
            self._verifier.finish()
            with generation.guarding("publish a blob"):
                self._write(self._writer.finish())
                meta = Meta(
                    digest=self._digest,
                    size=self._size,
                    media_type=media_type,
                    diff_id=diff_id,
                    origin=origin,
                    created=disk.now(),
                    sums=bytes(self._writer.sums),
                )
                # An error of this fsync means that the bytes may be gone while the kernel calls them clean: a second
                # fsync could succeed. The file is dropped, whatever comes after.
                disk.sync(self._file)
                record = generation.form.pack(META, name, meta.pack())
                with temporary(disk, generation.incoming, record) as new, generation.lock(name):
                    generation.check_slot()
                    if (blob := generation.open_locked(name)) is not None:
                        return blob  # somebody else was first
                    blobs, metas = generation.shard_for_write(name)
                    placed = False
                    try:
                        # What cannot be made durable does not stay visible, so an error anywhere takes the names back.
                        # The order is the protocol: meta, its directory, then data, its directory. The data's name is
                        # the commit point; a power cut before it leaves a meta that recovery sweeps.
                        disk.rename(generation.incoming, new, metas, name, replace=True)
                        placed = True
                        disk.sync(metas)
                        disk.rename(generation.incoming, self._partial.data, blobs, name, replace=False)
                        self._named = False
                        disk.sync(blobs)
                        generation.check_slot()
                        published = disk.open(blobs, name)
                    except OSError:
                        self._retract(blobs, metas, meta_too=placed)
                        raise
                    finally:
                        disk.close(blobs)
                        disk.close(metas)
                    # Until now our exclusive lock kept readers off: nobody saw it before it was durable. From here on
                    # others may have it, so a failure takes nothing back any more.
                    blob = generation.lease(published, name, meta, writer=self._file)
                    generation.health.succeeded()
                    return blob
        finally:
            self._drop()

    def suspend(self) -> None:
        """Stop here and keep what is in for the next attempt, if it is worth keeping. Visible to nobody."""
        if self._open and worth_keeping(self.offset, self._kept):
            self._close()
        else:
            self.abort()

    def abort(self) -> None:
        """Forget it all."""
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.suspend()

    def _write(self, parts: Iterator[tuple[int, Buffer]]) -> None:
        for offset, part in parts:
            self._disk.write(self._file, part, offset)

    def _keep_sums(self) -> None:
        if self._sums_file is not None and len(self._writer.sums) > self._kept:
            self._disk.write(self._sums_file, memoryview(self._writer.sums)[self._kept :], self._kept)
            self._kept = len(self._writer.sums)

    def resume(self, *, take: bool) -> None:
        """Take in what an earlier attempt left, as far as its chunk sums vouch for it; drop the rest."""
        if self._sums_file is not None and take:
            self._take_over(self._sums_file)
        if self._sums_file is not None:
            self._disk.truncate(self._sums_file, self._kept)
        self._disk.truncate(self._file, self._head + self.offset if self.offset else 0)
        self._flushed = self.offset

    def _take_over(self, sums_file: File) -> None:
        disk, form = self._disk, self._generation.form
        sums = bytearray(disk.fstat(sums_file).size // SUM_SIZE * SUM_SIZE)
        del sums[disk.read(sums_file, sums, 0) :]
        head = bytearray(self._head)
        del head[disk.read(self._file, head, 0) :]
        try:
            reader = form.reader(self._name, self._size, bytes(head))
            self._writer = form.writer(self._name, self._size, head=bytes(head))
        except FormatError:
            return  # nothing to go on with; the writer is still the one that begins anew
        try:
            for chunk, total in whole_chunks(disk, self._file, reader, sums, head=self._head, size=self._size):
                self._verifier.feed(chunk)
                self._writer.keep(chunk, total)
        finally:
            reader.close()
        self._kept = len(self._writer.sums)

    def _retract(self, blobs: Dir, metas: Dir, *, meta_too: bool) -> None:
        """Undo a publication that came to no good end, as far as the disk lets us; recovery does the rest."""
        if not self._named:
            with suppress(OSError):
                self._disk.remove(blobs, self._name)
        if meta_too:
            with suppress(OSError):
                self._disk.remove(metas, self._name)

    def _drop(self) -> None:
        if not self._open:
            return
        # The names go before the lock does: after it, a name may belong to the next attempt. The sums' before the
        # data's: whoever makes the data's name anew has the right to the sums.
        names = [self._partial.sums] if self._sums_file is not None else []
        if self._named:
            names.append(self._partial.data)
        space = self._generation.space
        gone = self._named
        walk = space.walk() if gone else 0
        for name in names:
            try:
                self._disk.remove(self._generation.incoming, name)
            except OSError:
                gone = False  # swept with its generation; what is left is found by the next sweep
        self._close()
        if gone:
            with suppress(OSError, LayerCacheError):
                space.give_back(unused(self._head + self._size), walk)

    def _close(self) -> None:
        self._open = False
        self._disk.close(self._file)
        if self._sums_file is not None:
            self._disk.close(self._sums_file)


def worth_keeping(held: int, sums: int) -> bool:
    """Tell whether a write can be gone on with: it has ``held`` bytes of the blob, and ``sums`` bytes of their sums.

    Only a blob worth it has a file of sums.
    """
    return held >= CHUNK and sums >= SUM_SIZE


def begin(generation: Generation, descriptor: Descriptor, *, resume: bool) -> Ingest | None:
    """Return the right to write a blob, or ``None`` where another writer has it or has just published it.

    Space for all of it is taken now.

    :raises NoSpaceError: when there is not enough.
    """
    disk, form = generation.disk, generation.form
    partial = form.partial(descriptor.digest, descriptor.size, disk.boot)
    stored = form.head + descriptor.size

    begun = False

    def amount() -> int:
        # One that is there has its room: whoever began it took it.
        nonlocal begun
        begun = disk.stat(generation.incoming, partial.data) is not None
        return 0 if begun else footprint(stored)

    file: File | None = None
    ingest: Ingest | None = None
    ours = False
    try:
        with generation.space.taking(amount, f"take space for {descriptor.size} bytes"):
            file = disk.create(generation.incoming, partial.data, exist_ok=True)
            if not disk.lock(file, exclusive=True):
                return None
            # The last writer may have renamed or removed the name after we opened it: then this is not a partial any
            # more.
            named, status = disk.stat(generation.incoming, partial.data), disk.fstat(file)
            if named is None or named.inode != status.inode:
                return None
            if generation.has(descriptor.digest):
                with suppress(FileNotFoundError):  # whoever published it just now removes its sums, too
                    disk.remove(generation.incoming, partial.sums)
                disk.remove(generation.incoming, partial.data)
                return None
            if begun and not (status.size or status.allocated):
                # Not the one that was there: that went since, with its room. The next attempt takes room anew.
                disk.remove(generation.incoming, partial.data)
                return None
            ours = True
            sums = None
            if descriptor.size >= _RESUMABLE:
                sums = disk.create(generation.incoming, partial.sums, exist_ok=True)
            ingest = Ingest(generation, descriptor, partial, file, sums)
            if not status.size:
                # With the lock in hand, so that who looks next sees how much of the disk is really left.
                ingest.resume(take=resume)
                disk.reserve(file, stored)
        if status.size:
            ingest.resume(take=resume)
            disk.reserve(file, stored)
    except OSError as error:
        if ingest is not None:
            ingest.abort()
        elif ours:
            with suppress(OSError):
                disk.remove(generation.incoming, partial.data)
        generation.check()
        generation.health.failed(error)
        raise store_error(error, f"take space for {descriptor.size} bytes") from error
    else:
        return ingest
    finally:
        if ingest is None and file is not None:
            disk.close(file)
