"""What a namespace holds, by digest: looked at, checked, dropped, purged. No pull begins here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from layercache.binding import Binding
from layercache.control import Control
from layercache.errors import LayerCacheError, NotFoundError
from layercache.fill import mend
from layercache.image import Layer
from layercache.inventory import blob_info, findings
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Digest, Repository
from layercache.reports import BlobInfo, Finding
from layercache.store import Blob, Receipt
from layercache.view import View

if TYPE_CHECKING:
    from layercache.registry import Registry  # imports sockets, TLS and more, which a hit does not need

__all__ = ["Contents", "as_digest"]

_log = logging.getLogger("layercache")


class Contents:
    """The blobs of a namespace. Safe to use from several threads.

    A call that a purge overtakes raises :class:`~layercache.errors.NamespacePurgedError`, as does every read of an
    image or layer from before it. A call that begins after the purge finds the namespace empty, in its next generation.

    :param binding: the generation that is looked at.
    :param public: where that one borrows from; ``None`` for the public namespace itself.
    :param registry: what damaged chunks are fetched from again.
    """

    def __init__(
        self, binding: Binding, *, public: Binding | None, registry: Callable[[Repository, bool | None], Registry]
    ) -> None:
        self.binding = binding
        self._public = public
        self._registry = registry

    def open(self, digest: Digest | str) -> Layer:
        """Return a blob that is here, open and leased.

        :raises NotFoundError: when it is not here.
        """
        wanted = as_digest(digest)
        view = self._existing()
        blob = view.open(wanted)
        view.used(blob)
        meta = blob.meta
        return Layer(Descriptor(meta.media_type, meta.digest, meta.size), meta.diff_id, blob=blob)

    def stat(self, digest: Digest | str) -> BlobInfo:
        """Return what is known of a blob that is here.

        :raises NotFoundError: when it is not here.
        """
        wanted = as_digest(digest)
        view = self._existing()
        with view.open(wanted) as blob:
            return blob_info(view, blob)

    def contains(self, digest: Digest | str) -> bool:
        """Tell whether a blob is here, sound as far as opening it tells."""
        wanted = as_digest(digest)
        try:
            with self._existing().open(wanted):
                return True
        except NotFoundError:
            return False

    def blobs(self) -> Iterator[BlobInfo]:
        """Yield every blob that is here, in no order; one that goes or is damaged meanwhile is passed over."""
        view = self._view()
        if view is not None:
            for blob in view.present():
                yield blob_info(view, blob)

    def verify(
        self, digest: Digest | str | None = None, *, repair: bool = False, plain_http: bool | None = None
    ) -> Iterator[Finding]:
        """Read one blob, or all of them, again and yield what is wrong. What is damaged is a miss from now on.

        With ``repair``, the damaged chunks of a blob are fetched again from where it came from, and only those.

        :raises NotFoundError: when the one asked for is not here.
        """
        wanted = None if digest is None else as_digest(digest)
        view = self._view() if wanted is None else self._existing()
        if view is not None:
            yield from findings(
                view, wanted, mend=(lambda blob: self._mend(view, plain_http, blob)) if repair else None
            )

    def remove(self, digest: Digest | str) -> int:
        """Drop a blob and return its size. A public one stays for others: this namespace gives up its grant.

        :raises NotFoundError: when it is not here.
        :raises InUseError: when somebody has it open.
        """
        wanted = as_digest(digest)
        return self._existing().remove(wanted)

    def purge(self, *, wait: float = 5.0, trim: bool = False) -> Receipt:
        """Remove everything of this namespace, whoever is using it, and return what was reached.

        Nobody can read or store anything of it from the first moment on. From then on the call takes at most ``wait``
        seconds and a tenth, for readers and for the files to go. Who still has files open then is named in the receipt
        (``pending``; with ``wait=0`` there may be no time to look), and what is left goes as soon as it can: beside the
        caller, with the next purge, or when the root is opened next. A namespace that holds nothing is not an error:
        its receipt is of generation 0. A tenant's purge takes the grants of what is public, and leaves that itself.

        :param trim: also hand the freed blocks to the device (``discarded``): root only, on ext4 and xfs. The receipt
            says what came of it within the wait; :meth:`LayerCache.receipts` has what comes later.
        :raises StoreError: when the root cannot be written.
        """
        return self.binding.store().purge(self.binding.name, wait=wait, trim=trim)

    # -- inside

    def _view(self) -> View | None:
        generation = self.binding.generation(create=False)
        return None if generation is None else View(generation, self._public)

    def _existing(self) -> View:
        return View(self.binding.existing(), self._public)

    def _made(self, control: Control | None = None) -> View:
        return View(self.binding.made(control), self._public)

    def _mend(self, view: View, plain_http: bool | None, blob: Blob) -> bool:  # noqa: FBT001
        meta = blob.meta
        descriptor = Descriptor(meta.media_type, meta.digest, meta.size)
        control, ledger = Control(), Ledger()
        try:
            repository = Repository.parse(meta.origin)
            registry = self._registry(repository, plain_http)

            def fetch(offset: int, length: int) -> Iterator[bytes]:
                return registry.fetch(
                    repository, descriptor, offset=offset, length=length, control=control, ledger=ledger
                )

            return mend(view.home(blob), blob, fetch, control=control)
        except LayerCacheError as error:
            _log.warning("%s could not be mended: %s", meta.digest, error)
            return False


def as_digest(digest: Digest | str) -> Digest:
    """Return a digest, parsed where it is a text."""
    return Digest.parse(digest) if isinstance(digest, str) else digest
