"""One live generation of one namespace: its blobs and what its references last meant.

Every change to a published name (publish, remove, quarantine) happens under one of sixteen locks chosen by the name,
so that no remover can take the meta of a blob that was published a moment ago. What the names, records and chunks look
like is the form's to say.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from layercache.errors import (
    FormatError,
    InUseError,
    LayerCacheError,
    NamespacePurgedError,
    NotFoundError,
    StoreError,
)
from layercache.oci import Descriptor, Digest, Reference
from layercache.store import _ingest, _removal
from layercache.store._disk import Dir, Disk, File
from layercache.store._faults import Guarding, store_error
from layercache.store._files import read_record, temporary
from layercache.store._form import Form
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
    Ref,
    Slot,
    SlotState,
    generation_name,
    lock_name,
)
from layercache.store._read import Blob
from layercache.store._shards import Shards
from layercache.store._space import RECORD, Space
from layercache.store._uses import Use, Uses

__all__ = ["Generation"]

_log = logging.getLogger("layercache.store")

_READER_PATIENCE = 0.05
_LOCK_PATIENCE = 5.0


class Generation:
    """The handle every content verb of the store lives on. Safe to use from several threads.

    Once the generation is fenced by a purge, in whatever process, every verb raises :class:`NamespacePurgedError`.
    """

    def __init__(
        self,
        disk: Disk,
        slots: Dir,
        data: Dir,
        slot: Slot,
        generation: int,
        *,
        form: Form,
        health: Health,
        space: Space,
        uses: Uses,
        writable: bool,
    ) -> None:
        self.disk = disk
        self.form = form
        self.health = health
        self.space = space
        self.uses = uses
        self.writable = writable
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
        self._slot_dir, self.folder, self.incoming, blobs, metas, self._refs, self._locks, self.bad = opened
        self.blobs, self._meta = Shards(disk, blobs), Shards(disk, metas)
        self._opened = opened

    # -- the fence

    @property
    def fenced(self) -> bool:
        """True once a purge of this generation began. Costs no system call."""
        return self._word.get() != 0

    def check(self) -> None:
        """Raise :class:`NamespacePurgedError` once a purge began. Costs no system call."""
        if self._word.get() != 0:
            self.form.forget()
            raise NamespacePurgedError("the namespace was purged", hint="get a new handle to begin anew")

    def check_slot(self) -> None:
        """Do as :meth:`check`, and look at the slot itself, which is the truth: for whoever publishes."""
        self.check()
        if self.disk.stat(self._slot_dir, self._state) is None:
            raise NamespacePurgedError("the namespace was purged", hint="get a new handle to begin anew")

    def guarding(self, what: str) -> Guarding:
        """Turn an ``OSError`` of the block into the typed error; after a purge it is the purge's doing."""
        return _Guarding(self, what)

    # -- reading

    def open(self, digest: Digest) -> Blob:
        """Return a blob, open and leased.

        Damage that shows at opening moves the blob aside and is a miss.

        :raises NotFoundError: when it is not here.
        :raises InUseError: when somebody changes it just now and did not finish within 50 ms.
        """
        name = self.form.blob_name(digest)
        blob = self._open(name)
        if blob is None and self.holds(name):
            with self.guarding(f"move {digest} aside"), self.lock(name):
                blob = self.open_locked(name)
        try:
            self.check()
        except NamespacePurgedError:
            if blob is not None:
                blob.close()
            raise
        if blob is None:
            raise NotFoundError(f"{digest} is not in this namespace", hint="pull it")
        return blob

    def open_locked(self, name: str) -> Blob | None:
        """Do as :meth:`open` for a blob's file name, whose lock is held; ``None`` when it is not here or not sound."""
        blob = self._open(name)
        if blob is None and self.holds(name):
            self._move_aside(name, "its record is missing or damaged")
        return blob

    def has(self, digest: Digest) -> bool:
        """Tell whether a blob of that name is here. Only opening it tells whether it is sound."""
        return self.holds(self.form.blob_name(digest))

    def judge(self, name: str) -> bool:
        """Tell whether a blob that is here is sound as far as can be told; its lock is held, damage moves aside."""
        if not self.form.keyless:
            blob = self.open_locked(name)
            if blob is not None:
                blob.close()
            return blob is not None
        with self._meta.folder(name) as metas:
            if metas is not None and self.disk.stat(metas, name) is not None:
                return True
        self._move_aside(name, "its record is missing")
        return False

    def holds(self, name: str) -> bool:
        """Do as :meth:`has`, for a blob's file name."""
        with self.guarding("look for a blob"), self.blobs.folder(name) as blobs:
            return blobs is not None and self.disk.stat(blobs, name) is not None

    def digests(self) -> Iterator[Digest]:
        """Yield the digests of the blobs that are here, in no order. Reads directories, and records where it must."""
        with self.guarding("list blobs"):
            for name in self.blobs.names():
                if not self.form.is_blob(name):
                    continue
                digest = self.form.digest(name)
                if digest is None and (meta := self._read_meta(name)) is not None:
                    digest = meta.digest
                if digest is not None:
                    yield digest
        self.check()

    def verified(self, digest: Digest) -> float:
        """Return when the blob's content was last compared with its digest (seconds since the epoch)."""
        name = self.form.blob_name(digest)
        with self.guarding(f"look at {digest}"), self._meta.folder(name) as metas:
            status = self.disk.stat(metas, name) if metas is not None else None
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

    def settle(self, digest: Digest) -> None:
        """Make a blob that another writer published as durable as one's own: he may have died before his last fsync."""
        name = self.form.blob_name(digest)
        with self.guarding(f"make {digest} durable"):
            for shards in (self._meta, self.blobs):
                with shards.folder(name) as folder:
                    if folder is not None:
                        self.disk.sync(folder)
                self.disk.sync(shards.at)
        self.check()

    def mark_verified(self, digest: Digest) -> None:
        """Record that the content was compared with its digest just now."""
        name = self.form.blob_name(digest)
        with self.guarding(f"mark {digest}"), self._meta.folder(name) as metas:
            if metas is None:
                return
            file = self.disk.open(metas, name)
            try:
                self.disk.touch(file)
            finally:
                self.disk.close(file)

    def remove(self, digest: Digest) -> int:
        """Drop a blob and return its size.

        :raises NotFoundError: when it is not here.
        :raises InUseError: when somebody has it open; it stays.
        """
        return _removal.remove(self, self.form.blob_name(digest), f"{digest}")

    def quarantine(self, blob: Blob, why: str) -> None:
        """Move a damaged blob aside, so that it is a miss from now on. Others who read it go on, chunk by chunk."""
        try:
            name = self.form.blob_name(blob.digest)
            with self.guarding(f"move {blob.digest} aside"), self.lock(name):
                self._move_aside(name, why, inode=self.disk.fstat(blob.file).inode)
        except (StoreError, NamespacePurgedError) as error:
            _log.warning("%s is damaged (%s) and could not be moved aside: %s", blob.digest, why, error)

    # -- references

    def set_ref(self, ref: Ref) -> None:
        """Remember what a reference resolved to."""
        name = self.form.ref_name(ref.reference)
        with self.guarding("record a reference"):
            self.check_slot()
            with self.space.taking(lambda: RECORD, "record a reference"):
                pass  # not held for a flush
            with temporary(self.disk, self.incoming, self.form.pack(REFS, name, ref.pack())) as new, self.lock(name):
                self.disk.rename(self.incoming, new, self._refs, name, replace=True)
            self.disk.sync(self._refs)

    def get_ref(self, reference: Reference) -> Ref | None:
        """Return what a reference resolved to last; ``None`` when it never did, or its record is damaged."""
        ref = self._read_ref(self.form.ref_name(reference))
        self.check()
        return ref

    def refs(self) -> Iterator[Ref]:
        """Yield every reference's record."""
        with self.guarding("list references"):
            names = self.disk.names(self._refs)
        for name in sorted(names):
            ref = self._read_ref(name)
            if ref is not None:
                yield ref
        self.check()

    def remove_ref(self, reference: Reference) -> None:
        """Forget a reference. Nothing happens where it is not known."""
        with self.guarding("forget a reference"):
            self.check_slot()
            name = self.form.ref_name(reference)
            with self.lock(name):
                if self.disk.stat(self._refs, name) is None:
                    return
                self.disk.remove(self._refs, name)
                self.disk.sync(self._refs)

    def used(self, digest: Digest) -> None:
        """Note that a blob was of use, so that it stays longer. Costs no lock and no call."""
        self.uses.note(Use(self.disk.now(), "h", (self.form.blob_name(digest),)))

    def fetched(self, digest: Digest, *, rtt: float, bandwidth: float) -> None:
        """Note what a miss of a blob that came just now costs: seconds to its first byte, bytes a second."""
        self.uses.note(Use(self.disk.now(), "i", (self.form.blob_name(digest),), rtt, bandwidth))

    def together(self, reference: Reference, digests: Sequence[Digest]) -> None:
        """Note which blobs make an image: with one of them gone, the others are worth less."""
        names = (self.form.ref_name(reference), *map(self.form.blob_name, digests))
        self.uses.note(Use(self.disk.now(), "m", names))

    def note_uses(self) -> None:
        """Write down the uses since the last time, for whoever evicts next, if that can be done now."""
        if self.writable and self.space.limits is not None and not self.fenced:
            self.uses.flush(self.disk, self.folder, self.space)

    def close(self) -> None:
        """Close the directories. Open blobs stay open."""
        _let_go(self.disk, self._opened, self.form)

    def close_when_dropped(self) -> Generation:
        """Return it; it closes with its last reference: its directories, and above all its key, must not stay."""
        weakref.finalize(self, _let_go, self.disk, self._opened, self.form).atexit = False
        return self

    # -- for the other rooms of the store

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock under which a blob's or reference's name changes: for a few system calls, never a transfer."""
        disk = self.disk
        file = disk.create(self._locks, lock_name(name), exist_ok=True)
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

    def sound_ref(self, name: str) -> bool:
        """Tell whether the record of that name is whole and of that name."""
        return self.form.keyless or self._read_ref(name) is not None

    def shard_for_write(self, name: str) -> tuple[Dir, Dir]:
        """Return the two directories a blob and its record go to, made where they are not there yet."""
        blobs = self.blobs.made(name)
        try:
            return blobs, self._meta.made(name)
        except OSError:
            self.disk.close(blobs)
            raise

    def lease(self, file: File, name: str, meta: Meta, *, writer: File) -> Blob:
        """Return the blob that ``writer`` has just published and ``file`` reads, leased without a gap.

        ``file`` is closed where that fails.
        """
        disk = self.disk
        try:
            disk.lock(writer, exclusive=False)
            # Others may read it by now, nobody can change it: this cannot be refused.
            if not disk.lock(file, exclusive=False):
                raise BlockingIOError(errno.EWOULDBLOCK, "a shared lock was refused beside another", name)
            return self._blob(name, file, meta)
        except BaseException:
            disk.close(file)
            raise

    # -- inside

    def _open(self, name: str) -> Blob | None:
        """Return the blob, or ``None`` where it is not here or not sound."""
        disk = self.disk
        with self.guarding(f"open blob {name}"), self.blobs.folder(name) as blobs:
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
                        raise InUseError(f"blob {name} is being changed", hint="try again")
                    disk.pause(0.002)
                    waited += 0.002
                # With the lock in hand: the name may have been taken away between open and lock.
                named = disk.stat(blobs, name)
                if named is None or named.inode != file.inode:
                    return None
                meta = self._read_meta(name)
                if meta is not None and meta.size + self.form.head == file.size:
                    blob = self._blob(name, file, meta)
                    file = None  # type: ignore[assignment]
                    return blob
            except FormatError:
                return None  # the file does not begin as it should
            else:
                return None
            finally:
                if file is not None:
                    disk.close(file)

    def _blob(self, name: str, file: File, meta: Meta) -> Blob:
        head = bytearray(self.form.head)
        del head[self.disk.read(file, head, 0) if head else 0 :]
        return Blob(
            self.disk,
            file,
            meta,
            reader=self.form.reader(name, meta.size, bytes(head)),
            head=self.form.head,
            check=self.check,
            report=lambda blob: self.quarantine(blob, "its content does not match"),
        )

    def _read_meta(self, name: str) -> Meta | None:
        with self._meta.folder(name) as metas:
            raw = None if metas is None else read_record(self.disk, metas, name)
        try:
            meta = None if raw is None else Meta.unpack(self.form.unpack(META, name, raw))
        except FormatError:
            return None
        return meta if meta is not None and self.form.blob_name(meta.digest) == name else None

    def _read_ref(self, name: str) -> Ref | None:
        with self.guarding("read a reference"):
            raw = read_record(self.disk, self._refs, name)
        try:
            ref = None if raw is None else Ref.unpack(self.form.unpack(REFS, name, raw))
        except FormatError:
            return None
        return ref if ref is not None and self.form.ref_name(ref.reference) == name else None

    def _move_aside(self, name: str, why: str, inode: int | None = None) -> None:
        disk = self.disk
        with self.blobs.folder(name) as blobs:
            status = None if blobs is None else disk.stat(blobs, name)
            if blobs is None or status is None or (inode is not None and status.inode != inode):
                return  # replaced or removed meanwhile
            self.check_slot()
            disk.rename(blobs, name, self.bad, f"{name}.{disk.token()}", replace=False)
            disk.sync(blobs)
            disk.sync(self.bad)
        self.forget(name)
        _log.warning("blob %s is damaged: %s; moved aside, it will be fetched again", name, why)

    def forget(self, name: str) -> int:
        """Remove what is known of a blob that is not here any more, and return the bytes it took; its lock is held."""
        with self._meta.folder(name) as metas:
            status = None if metas is None else self.disk.stat(metas, name)
            if metas is None or status is None:
                return 0
            try:
                self.disk.remove(metas, name)
            except FileNotFoundError:
                return 0
            self.disk.sync(metas)
        return status.allocated


class _Guarding(Guarding):
    __slots__ = ("_generation",)

    def __init__(self, generation: Generation, what: str) -> None:
        super().__init__(what)
        self._generation = generation

    def typed(self, error: OSError) -> LayerCacheError:
        self._generation.check()
        self._generation.health.failed(error)
        return store_error(error, self.what)


def _let_go(disk: Disk, opened: list[Dir], form: Form) -> None:
    handles = opened.copy()
    opened.clear()
    for handle in handles:
        disk.close(handle)
    if handles:
        form.close()
