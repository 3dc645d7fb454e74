"""What one tenant can read: its own generation, and of the public namespace what it was granted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from layercache.binding import Binding
from layercache.errors import InUseError, NotFoundError, StoreError
from layercache.oci import Digest, Reference
from layercache.store import Blob, Generation, Grant, Ref, granted, grants, lend, revoke

__all__ = ["View"]


class View:
    """A tenant's generation, ``own``, with the public blobs it was granted behind it.

    A lookup begins in ``own`` and goes on to the public namespace where there is a grant, and nowhere without: what is
    asked of the disk for a blob that was not granted is the same whether others hold it or not. A sealed namespace
    borrows nothing: what is public lies in clear, and so would what its tenant uses.
    """

    def __init__(self, own: Generation, public: Binding | None) -> None:
        self.own = own
        self.public = None if own.form.seal else public

    def open(self, digest: Digest) -> Blob:
        """Return a blob, open and leased.

        :raises NotFoundError: when it is not here, or not granted.
        :raises InUseError: as :meth:`Generation.open`.
        """
        try:
            return self.own.open(digest)
        except NotFoundError:
            found = self.granted(digest)
            blob = None if found is None else self.borrow(found)
            if blob is None:
                raise
            return blob

    def borrow(self, found: Grant) -> Blob | None:
        """Return the public blob of a grant, open and leased; ``None`` where it is not here."""
        public = self.shared()
        return None if public is None else lend(public, found, self.own)

    def granted(self, digest: Digest) -> Grant | None:
        """Return what the tenant was granted of a public blob; ``None`` where it was not."""
        return None if self.public is None else granted(self.own, digest)

    def shared(self) -> Generation | None:
        """Return the living generation of the public namespace, if there is one and this tenant may borrow."""
        return None if self.public is None else self.public.generation(create=False)

    def lender(self) -> Generation:
        """Return the public generation to store something in, made where there was none.

        :raises StoreError: when it cannot be.
        """
        if self.public is None:
            raise StoreError("a sealed namespace shares nothing")
        return self.public.made()

    def home(self, blob: Blob) -> Generation:
        """Return the generation that an open blob lies in.

        :raises NotFoundError: when it was purged.
        """
        if not blob.lent:
            return self.own
        public = self.shared()
        if public is None:
            raise NotFoundError(f"{blob.digest} is not here any more", hint="pull it")
        return public

    def used(self, blob: Blob) -> None:
        """Note that an open blob was of use, so that it stays longer; where that cannot be, it is read all the same."""
        if not blob.lent:
            self.own.used(blob.digest)
            return
        with suppress(NotFoundError, StoreError):
            self.home(blob).used(blob.digest)

    def has(self, digest: Digest) -> bool:
        """Tell whether a blob of that name is here. Only opening it tells whether it is sound."""
        if self.own.has(digest):
            return True
        public = self.shared() if self.granted(digest) is not None else None
        return public is not None and public.has(digest)

    def digests(self) -> Iterator[Digest]:
        """Yield the digests of the blobs that are here: its own, then what it borrows."""
        yield from self.own.digests()
        public = self.shared()
        if public is not None:
            for found in grants(self.own):
                if public.has(found.digest) and not self.own.has(found.digest):
                    yield found.digest

    def verified(self, blob: Blob) -> float:
        """Return when a blob's content was last compared with its digest (seconds since the epoch), 0 for never.

        Of a borrowed one not from before it was granted: that would tell when somebody else had it first.
        """
        with suppress(NotFoundError):
            when = self.home(blob).verified(blob.digest)
            return when if not blob.lent or when >= blob.meta.created else 0.0
        return 0.0

    def mark_verified(self, blob: Blob) -> None:
        """Record that the content was compared with its digest just now."""
        with suppress(NotFoundError):
            self.home(blob).mark_verified(blob.digest)

    def remove(self, digest: Digest) -> int:
        """Drop a blob, or the right to borrow it, and return its size. What is public stays.

        :raises NotFoundError: when it is neither here nor granted.
        :raises InUseError: when somebody has it open.
        """
        found = self.granted(digest)
        try:
            size = self.own.remove(digest)
        except NotFoundError:
            if found is None:
                raise
            size = found.size
        if found is not None:
            revoke(self.own, digest)
        return size

    def get_ref(self, reference: Reference) -> Ref:
        """Return what a reference resolved to last.

        :raises NotFoundError: when it was not pulled.
        """
        ref = self.own.get_ref(reference)
        if ref is None:
            raise NotFoundError(f"{reference} was not pulled into this namespace", hint="pull it")
        return ref

    def present(self) -> Iterator[Blob]:
        """Yield every blob that is here, open until the next is asked for; one that goes meanwhile is passed over."""
        for digest in self.digests():
            try:
                blob = self.open(digest)
            except (NotFoundError, InUseError):
                continue
            with blob:
                yield blob
