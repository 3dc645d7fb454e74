"""One live generation of one namespace: its blobs and what its references last meant.

Every change to a published name (publish, remove, quarantine) happens under one of sixteen locks chosen by the digest,
so that no remover can take the meta of a blob that was published a moment ago.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from layercache.errors import (
    FormatError,
    InUseError,
    NamespacePurgedError,
    NotFoundError,
    StoreError,
)
from layercache.oci import Descriptor, Digest, Reference
from layercache.store import _ingest
from layercache.store._disk import Dir, Disk, File
from layercache.store._faults import store_error
from layercache.store._files import read_record
from layercache.store._health import Health
from layercache.store._ingest import Ingest
from layercache.store._layout import (
    BLOBS,
    FENCE,
    FENCE_SIZE,
    IN,
    LOCKS,
    META,
    QUARANTINE,
    REFS,
    Meta,
    Partial,
    Ref,
    Slot,
    SlotState,
    blob_name,
    generation_name,
    lock_name,
    parse_blob_name,
    ref_name,
    shard,
    temporary_name,
)
from layercache.store._read import Blob

__all__ = ["Generation"]

_log = logging.getLogger("layercache.store")

_READER_PATIENCE = 0.05
_LOCK_PATIENCE = 5.0


class Generation:
    """The handle every content verb of the store lives on. Safe to use from several threads.

    Once the generation is fenced by a purge, in whatever process, every verb raises :class:`NamespacePurgedError`.
    """

    def __init__(
        self, disk: Disk, slots: Dir, data: Dir, slot: Slot, generation: int, *, health: Health, writable: bool
    ) -> None:
        self.disk = disk
        self.health = health
        self.slot = slot
        self.generation = generation
        self._state = str(SlotState("live", generation))
        opened: list[Dir] = []
        try:
            for at, name in ((slots, slot), (data, generation_name(slot, generation))):
                opened.append(disk.dir(at, name))
            opened.extend(disk.dir(opened[1], name) for name in (IN, BLOBS, META, REFS, LOCKS, QUARANTINE))
            if writable:
                # Whoever made the namespace may have died before this: nothing may be built on a name that can be lost.
                disk.sync(opened[0])
            fence = disk.create(opened[1], FENCE, exist_ok=True) if writable else disk.open(opened[1], FENCE)
            try:
                if disk.fstat(fence).size < FENCE_SIZE:
                    disk.truncate(fence, FENCE_SIZE)  # damaged; a word must not be mapped beyond the end
                self._word = disk.word(fence)
            finally:
                disk.close(fence)
        except OSError:
            for handle in opened:
                disk.close(handle)
            raise
        self._slot_dir, self._dir, self.incoming, self._blobs, self._meta, self._refs, self._locks, self._bad = opened
        self._opened = opened

    # -- the fence

    @property
    def fenced(self) -> bool:
        """True once a purge of this generation began. Costs no system call."""
        return self._word.get() != 0

    def check(self) -> None:
        """Raise :class:`NamespacePurgedError` once a purge began. Costs no system call."""
        if self._word.get() != 0:
            raise NamespacePurgedError("the namespace was purged", hint="get a new handle to begin anew")

    def check_slot(self) -> None:
        """Do as :meth:`check`, and look at the slot itself, which is the truth: for whoever publishes."""
        self.check()
        if self.disk.stat(self._slot_dir, self._state) is None:
            raise NamespacePurgedError("the namespace was purged", hint="get a new handle to begin anew")

    @contextmanager
    def guarding(self, what: str) -> Iterator[None]:
        """Turn an ``OSError`` of the block into the typed error; after a purge it is the purge's doing."""
        try:
            yield
        except OSError as error:
            self.check()
            self.health.failed(error)
            raise store_error(error, what) from error

    # -- reading

    def open(self, digest: Digest) -> Blob:
        """Return a blob, open and leased.

        Damage that shows at opening moves the blob aside and is a miss.

        :raises NotFoundError: when it is not here.
        :raises InUseError: when somebody changes it just now and did not finish within 50 ms.
        """
        blob = self._open(digest)
        if blob is None and self.has(digest):
            with self.guarding(f"move {digest} aside"), self.digest_lock(digest):
                blob = self.open_locked(digest)
        try:
            self.check()
        except NamespacePurgedError:
            if blob is not None:
                blob.close()
            raise
        if blob is None:
            raise NotFoundError(f"{digest} is not in this namespace", hint="pull it")
        return blob

    def open_locked(self, digest: Digest) -> Blob | None:
        """Do as :meth:`open` where the digest's lock is held; ``None`` when it is not here."""
        blob = self._open(digest)
        if blob is None and self.has(digest):
            self._move_aside(digest, "its record is missing or damaged")
        return blob

    def has(self, digest: Digest) -> bool:
        """Tell whether a blob of that name is here. Only opening it tells whether it is sound."""
        with self.guarding(f"look for {digest}"), self._shard(self._blobs, digest) as blobs:
            return blobs is not None and self.disk.stat(blobs, blob_name(digest)) is not None

    def digests(self) -> Iterator[Digest]:
        """Yield the digests of the blobs that are here, in no order. Reads directories only."""
        with self.guarding("list blobs"):
            for folder in sorted(self.disk.names(self._blobs)):
                try:
                    blobs = self.disk.dir(self._blobs, folder)
                except OSError:
                    continue  # not a directory: not ours
                try:
                    names = self.disk.names(blobs)
                finally:
                    self.disk.close(blobs)
                for name in sorted(names):
                    digest = parse_blob_name(name)
                    if digest is not None and shard(name) == folder:
                        yield digest
        self.check()

    def verified(self, digest: Digest) -> float:
        """Return when the blob's content was last compared with its digest (seconds since the epoch)."""
        with self.guarding(f"look at {digest}"), self._shard(self._meta, digest) as metas:
            status = self.disk.stat(metas, blob_name(digest)) if metas is not None else None
        return status.mtime if status is not None else 0.0

    # -- writing

    def begin(self, descriptor: Descriptor, *, resume: bool = True) -> Ingest | None:
        """Return the right to write a blob; ``None`` where another writer has it, or has published it just now.

        Without ``resume``, what an earlier attempt left is dropped.

        :raises NoSpaceError: when the disk has no room for it.
        :raises StoreError: when the disk failed several times and is left alone for a while.
        """
        self.check()
        self.health.check()
        return _ingest.begin(self, descriptor, resume=resume)

    def arrived(self, descriptor: Descriptor) -> int:
        """Return the bytes that whoever writes this blob now has written so far."""
        with self.guarding(f"look for {descriptor.digest}"):
            status = self.disk.stat(self.incoming, Partial(descriptor.digest, descriptor.size, self.disk.boot).data)
        return 0 if status is None else status.size

    def settle(self, digest: Digest) -> None:
        """Make a blob that another writer published as durable as one's own: he may have died before his last fsync."""
        with self.guarding(f"make {digest} durable"):
            for at in (self._meta, self._blobs):
                with self._shard(at, digest) as folder:
                    if folder is not None:
                        self.disk.sync(folder)
                self.disk.sync(at)
        self.check()

    def mark_verified(self, digest: Digest) -> None:
        """Record that the content was compared with its digest just now."""
        with self.guarding(f"mark {digest}"), self._shard(self._meta, digest) as metas:
            if metas is None:
                return
            file = self.disk.open(metas, blob_name(digest))
            try:
                self.disk.touch(file)
            finally:
                self.disk.close(file)

    def remove(self, digest: Digest) -> int:
        """Drop a blob and return its size.

        :raises NotFoundError: when it is not here.
        :raises InUseError: when somebody has it open; it stays.
        """
        with self.guarding(f"remove {digest}"), self.digest_lock(digest):
            self.check_slot()
            with self._shard(self._blobs, digest) as blobs:
                name = blob_name(digest)
                if blobs is None or self.disk.stat(blobs, name) is None:
                    raise NotFoundError(f"{digest} is not in this namespace")
                file = self.disk.open(blobs, name)
                try:
                    if not self.disk.lock(file, exclusive=True):
                        holders = self.disk.holders(frozenset({self.disk.fstat(file).inode}), but=file)
                        raise InUseError(f"{digest} is open", holders=holders, hint="close it first")
                    size = self.disk.fstat(file).size
                    # The file goes before its record: what the record alone leaves is swept, a file alone holds bytes.
                    self.disk.remove(blobs, name)
                    self.disk.sync(blobs)
                finally:
                    self.disk.close(file)
            self.forget(digest)
        return size

    def quarantine(self, blob: Blob, why: str) -> None:
        """Move a damaged blob aside, so that it is a miss from now on. Others who read it go on, chunk by chunk."""
        try:
            with self.guarding(f"move {blob.digest} aside"), self.digest_lock(blob.digest):
                self._move_aside(blob.digest, why, inode=self.disk.fstat(blob.file).inode)
        except (StoreError, NamespacePurgedError) as error:
            _log.warning("%s is damaged (%s) and could not be moved aside: %s", blob.digest, why, error)

    # -- references

    def set_ref(self, ref: Ref) -> None:
        """Remember what a reference resolved to."""
        with self.guarding("record a reference"):
            self.check_slot()
            with self.temporary(ref.pack()) as temporary, self.ref_lock(ref_name(ref.reference)):
                self.disk.rename(self.incoming, temporary, self._refs, ref_name(ref.reference), replace=True)
            self.disk.sync(self._refs)

    def get_ref(self, reference: Reference) -> Ref | None:
        """Return what a reference resolved to last; ``None`` when it never did, or its record is damaged."""
        ref = self._read_ref(ref_name(reference))
        self.check()
        return ref if ref is not None and ref.reference == reference else None

    def refs(self) -> Iterator[Ref]:
        """Yield every reference's record."""
        with self.guarding("list references"):
            names = self.disk.names(self._refs)
        for name in sorted(names):
            ref = self._read_ref(name)
            if ref is not None and ref_name(ref.reference) == name:
                yield ref
        self.check()

    def remove_ref(self, reference: Reference) -> None:
        """Forget a reference. Nothing happens where it is not known."""
        with self.guarding("forget a reference"):
            self.check_slot()
            name = ref_name(reference)
            with self.ref_lock(name):
                if self.disk.stat(self._refs, name) is None:
                    return
                self.disk.remove(self._refs, name)
                self.disk.sync(self._refs)

    def close(self) -> None:
        """Close the directories. Open blobs stay open."""
        for handle in self._opened:
            self.disk.close(handle)

    # -- for the other rooms of the store

    @contextmanager
    def temporary(self, raw: bytes) -> Iterator[str]:
        """Write a durable file of a fresh name into ``in/`` and yield the name, to be moved within the block.

        Its lock tells the sweeper that somebody is at it.
        """
        disk = self.disk
        name, file = self._new_temporary()
        try:
            disk.write(file, raw, 0)
            disk.sync(file)
            yield name
        finally:
            with suppress(OSError):
                if disk.stat(self.incoming, name) is not None:
                    disk.remove(self.incoming, name)
            disk.close(file)

    def digest_lock(self, digest: Digest) -> AbstractContextManager[None]:
        """Hold the lock under which the names of ``digest`` change: for a few system calls, never for a transfer."""
        return self._lock(lock_name(digest))

    def ref_lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock under which the record of a reference changes."""
        return self._lock(name[0])

    def sound_ref(self, name: str) -> bool:
        """Tell whether the record of that name is whole and of that name."""
        ref = self._read_ref(name)
        return ref is not None and ref_name(ref.reference) == name

    def shard_for_write(self, digest: Digest) -> tuple[Dir, Dir]:
        """Return the two directories a blob and its record go to, made where they are not there yet."""
        folder = shard(blob_name(digest))
        blobs = self._make_dir(self._blobs, folder)
        try:
            return blobs, self._make_dir(self._meta, folder)
        except OSError:
            self.disk.close(blobs)
            raise

    def lease(self, digest: Digest, meta: Meta, *, writer: File) -> Blob:
        """Return the blob that ``writer`` has just published, leased without a gap."""
        disk, name = self.disk, blob_name(digest)
        disk.lock(writer, exclusive=False)  # ours alone until now, so this cannot be refused
        with self._shard(self._blobs, digest) as blobs:
            if blobs is None:
                raise FileNotFoundError(errno.ENOENT, "gone", name)
            file = disk.open(blobs, name)
        try:
            if not disk.lock(file, exclusive=False):
                raise BlockingIOError(errno.EWOULDBLOCK, "a shared lock was refused beside another", name)
        except OSError:
            disk.close(file)
            raise
        return self._blob(file, meta)

    # -- inside

    def _new_temporary(self) -> tuple[str, File]:
        disk = self.disk
        while True:
            name = temporary_name(disk.boot, disk.token())
            file = disk.create(self.incoming, name)
            try:
                if disk.lock(file, exclusive=True) and disk.stat(self.incoming, name) is not None:
                    return name, file
            except BaseException:
                with suppress(OSError):
                    disk.remove(self.incoming, name)
                disk.close(file)
                raise
            disk.close(file)  # the sweeper came between the two calls and took it for a leftover

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        disk = self.disk
        file = disk.create(self._locks, name, exist_ok=True)
        try:
            waited = 0.0
            while not disk.lock(file, exclusive=True):
                if waited >= _LOCK_PATIENCE:
                    raise StoreError("a lock of the store was not released", hint="look for a stopped process")
                disk.pause(0.001)
                waited += 0.001
            yield
        finally:
            disk.close(file)

    def _open(self, digest: Digest) -> Blob | None:
        """Return the blob, or ``None`` where it is not here or not sound."""
        disk, name = self.disk, blob_name(digest)
        with self.guarding(f"open {digest}"), self._shard(self._blobs, digest) as blobs:
            if blobs is None:
                return None
            try:
                file = disk.open(blobs, name)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EMEDIUMTYPE, errno.ENXIO):
                    return None  # a link, fifo or device was planted under the name
                raise
            try:
                waited = 0.0
                while not disk.lock(file, exclusive=False):
                    if waited >= _READER_PATIENCE:
                        raise InUseError(f"{digest} is being changed", hint="try again")
                    disk.pause(0.002)
                    waited += 0.002
                # With the lock in hand: the name may have been taken away between open and lock.
                named = disk.stat(blobs, name)
                status = disk.fstat(file)
                meta = self._read_meta(digest) if named is not None and named.inode == status.inode else None
                if meta is not None and meta.size == status.size:
                    blob = self._blob(file, meta)
                    file = None  # type: ignore[assignment]
                    return blob
                return None
            finally:
                if file is not None:
                    disk.close(file)

    def _blob(self, file: File, meta: Meta) -> Blob:
        return Blob(
            self.disk,
            file,
            meta,
            check=self.check,
            report=lambda blob: self.quarantine(blob, "its content does not match"),
        )

    def _read_meta(self, digest: Digest) -> Meta | None:
        with self._shard(self._meta, digest) as metas:
            raw = None if metas is None else read_record(self.disk, metas, blob_name(digest))
        try:
            meta = None if raw is None else Meta.unpack(raw)
        except FormatError:
            return None
        return meta if meta is not None and meta.digest == digest else None

    def _read_ref(self, name: str) -> Ref | None:
        with self.guarding("read a reference"):
            raw = read_record(self.disk, self._refs, name)
        try:
            return None if raw is None else Ref.unpack(raw)
        except FormatError:
            return None

    def _move_aside(self, digest: Digest, why: str, inode: int | None = None) -> None:
        disk, name = self.disk, blob_name(digest)
        with self._shard(self._blobs, digest) as blobs:
            status = None if blobs is None else disk.stat(blobs, name)
            if blobs is None or status is None or (inode is not None and status.inode != inode):
                return  # replaced or removed meanwhile
            self.check_slot()
            disk.rename(blobs, name, self._bad, f"{name}.{disk.token()}", replace=False)
            disk.sync(blobs)
            disk.sync(self._bad)
        self.forget(digest)
        _log.warning("%s is damaged: %s; moved aside, it will be fetched again", digest, why)

    def forget(self, digest: Digest) -> None:
        """Remove what is known of a blob that is not here any more; the digest's lock is held."""
        with self._shard(self._meta, digest) as metas:
            if metas is None:
                return
            try:
                self.disk.remove(metas, blob_name(digest))
            except FileNotFoundError:
                return
            self.disk.sync(metas)

    @contextmanager
    def _shard(self, at: Dir, digest: Digest) -> Iterator[Dir | None]:
        try:
            folder = self.disk.dir(at, shard(blob_name(digest)))
        except FileNotFoundError:
            yield None
            return
        try:
            yield folder
        finally:
            self.disk.close(folder)

    def _make_dir(self, at: Dir, name: str) -> Dir:
        with suppress(FileExistsError):
            if self.disk.stat(at, name) is None:
                self.disk.make_dir(at, name)
        # Also when another made it: it may have died before its fsync, and our blob must not hang from a lost name.
        self.disk.sync(at)
        return self.disk.dir(at, name)
