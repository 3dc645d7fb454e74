"""Grants: which blobs of the public namespace a tenant may read, kept in the tenant's own generation.

A grant is made where a manifest of a public repository, fetched with the tenant's own permission, names the blob. It
says what that manifest says of it, so that nothing another tenant's manifest says is believed. It ends with its
generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layercache.errors import FormatError, LayerCacheError, NamespacePurgedError, NotFoundError
from layercache.oci import DiffID, Digest, MediaType
from layercache.store._files import read_record, temporary
from layercache.store._layout import GRANTS, PINS, Slot, pack_record, unpack_record
from layercache.store._pins import pinned
from layercache.store._space import RECORD

if TYPE_CHECKING:
    from layercache.store._disk import Dir
    from layercache.store._generation import Generation
    from layercache.store._read import Blob
    from layercache.store._slots import Slots

__all__ = ["Grant", "as_granted", "grant", "granted", "grants", "kept", "lend", "revoke"]

_MAGIC = b"LCgrnt1\n"


@dataclass(frozen=True, slots=True)
class Grant:
    """A tenant may read a public blob: the repository ``origin`` has a manifest that says this of it.

    ``created`` is in seconds since the epoch.
    """

    digest: Digest
    size: int
    media_type: MediaType
    diff_id: DiffID | None
    origin: str
    created: float

    def pack(self) -> bytes:
        """Return the record as stored."""
        fields = {
            "digest": str(self.digest),
            "size": self.size,
            "media_type": str(self.media_type),
            "diff_id": None if self.diff_id is None else str(self.diff_id),
            "origin": self.origin,
            "created": self.created,
        }
        return pack_record(_MAGIC, fields)

    @staticmethod
    def unpack(raw: bytes) -> Grant:
        """Undo :meth:`pack`.

        :raises FormatError: when the record is not whole or not sensible.
        """
        fields = unpack_record(_MAGIC, raw)
        try:
            diff_id = fields["diff_id"]
            return Grant(
                Digest.parse(fields["digest"]),
                int(fields["size"]),
                MediaType.parse(fields["media_type"]),
                None if diff_id is None else DiffID(Digest.parse(diff_id)),
                str(fields["origin"]),
                float(fields["created"]),
            )
        except (LayerCacheError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError("a grant is damaged") from error


def grant(generation: Generation, new: Sequence[Grant]) -> None:
    """Let a tenant read these public blobs, durably, until its generation ends or the grant is revoked."""
    disk = generation.disk
    with generation.guarding("record a grant"):
        generation.check_slot()
        with generation.space.taking(lambda: RECORD * len(new), "record a grant"):
            pass  # not held for a flush
        if disk.stat(generation.folder, GRANTS) is None:
            with suppress(FileExistsError):
                disk.make_dir(generation.folder, GRANTS)
        disk.sync(generation.folder)
        at = disk.dir(generation.folder, GRANTS)
        try:
            for one in new:
                name = generation.form.blob_name(one.digest)
                raw = generation.form.pack(GRANTS, name, one.pack())
                with temporary(disk, generation.incoming, raw) as record, generation.lock(name):
                    generation.check_slot()
                    disk.rename(generation.incoming, record, at, name, replace=True)
            disk.sync(at)
        finally:
            disk.close(at)
    generation.check()


def granted(generation: Generation, digest: Digest) -> Grant | None:
    """Return what a tenant was granted of a public blob; ``None`` where it was not, or the record is damaged."""
    with generation.guarding("look for a grant"):
        at = _folder(generation)
        try:
            return None if at is None else _read(generation, at, generation.form.blob_name(digest))
        finally:
            if at is not None:
                generation.disk.close(at)


def grants(generation: Generation) -> Iterator[Grant]:
    """Yield what a tenant was granted, by name on disk; a damaged one is passed over."""
    with generation.guarding("list grants"):
        at = _folder(generation)
        if at is None:
            return
        try:
            for name in sorted(generation.disk.names(at)):
                if (found := _read(generation, at, name)) is not None:
                    yield found
        finally:
            generation.disk.close(at)
    generation.check()


def revoke(generation: Generation, digest: Digest) -> Grant | None:
    """Take a grant back and return it; ``None`` where there was none. The public blob stays."""
    disk, name = generation.disk, generation.form.blob_name(digest)
    with generation.guarding("revoke a grant"), generation.lock(name):
        at = _folder(generation)
        if at is None:
            return None
        try:
            generation.check_slot()
            if disk.stat(at, name) is None:
                return None
            found = _read(generation, at, name)
            disk.remove(at, name)
            disk.sync(at)
            return found
        finally:
            disk.close(at)


def lend(public: Generation, found: Grant, own: Generation) -> Blob | None:
    """Return a public blob as a tenant may read it, open and leased; ``None`` where it is not here.

    It says what the tenant's own manifest says, and gives nothing out once either generation was purged.

    :raises InUseError: as :meth:`Generation.open`.
    """
    try:
        blob = public.open(found.digest)
    except (NotFoundError, NamespacePurgedError):
        return None
    if blob.size != found.size:
        blob.close()
        return None
    try:
        as_granted(blob, found, own)
    except NamespacePurgedError:
        blob.close()
        raise
    return blob


def as_granted(blob: Blob, found: Grant, own: Generation) -> None:
    """Let an open public blob be what a grant says it is to a tenant, until one of the two generations is purged.

    :raises NamespacePurgedError: where the tenant's was.
    """
    meta = replace(
        blob.meta, media_type=found.media_type, diff_id=found.diff_id, origin=found.origin, created=found.created
    )
    blob.lend(meta, check=own.check)
    own.check()


def kept(slots: Slots, generation: Generation, public: Slot) -> frozenset[str] | None:
    """Return the file names of the blobs of a generation that must stay; ``None`` where that cannot be told.

    Those of the public one are pinned by tenants, too. A damaged pin keeps all that its tenant was granted, a tenant
    whose pins cannot be read all there is.
    """
    held = pinned(generation)
    if held is None or generation.slot != public:
        return held
    names = set(held)
    for slot in slots.names():
        try:
            # Most tenants have not both, and this look costs less than opening one.
            tenant = slots.live(slot, keyless=True) if slot != public and slots.has(slot, GRANTS, PINS) else None
            if tenant is not None:
                try:
                    names |= _pinned(tenant)
                finally:
                    tenant.close()
        except NamespacePurgedError:
            continue  # its pins went with it
        except (OSError, LayerCacheError):
            return None
    return frozenset(names)


def _pinned(tenant: Generation) -> frozenset[str]:
    with tenant.guarding("list grants"):
        at = _folder(tenant)
        if at is None:
            return frozenset()
        try:
            lent = frozenset(tenant.disk.names(at))
        finally:
            tenant.disk.close(at)
    held = pinned(tenant)
    return lent if held is None else lent & held


def _read(generation: Generation, at: Dir, name: str) -> Grant | None:
    raw = read_record(generation.disk, at, name)
    try:
        found = None if raw is None else Grant.unpack(generation.form.unpack(GRANTS, name, raw))
    except FormatError:
        return None
    return found if found is not None and generation.form.blob_name(found.digest) == name else None


def _folder(generation: Generation) -> Dir | None:
    try:
        return generation.disk.dir(generation.folder, GRANTS)
    except FileNotFoundError:
        return None
