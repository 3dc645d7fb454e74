"""One tenant's handle: what a hit is, when the network is asked, and what happens when the store cannot help."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

from layercache import stream
from layercache.binding import Binding
from layercache.clients import Clients
from layercache.contents import Contents, as_digest
from layercache.control import Control, Progress
from layercache.errors import InUseError, NotFoundError, StoreError
from layercache.fill import fill, through
from layercache.image import Image
from layercache.integrity import CHUNK
from layercache.inventory import (
    blob_info,
    image_info,
    only_needed_by,
    pin_info,
    stored_descriptor,
    stored_document,
    unique,
)
from layercache.layout import write_layout
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, DiffID, Digest, MediaType, Platform, Reference, Repository, descend
from layercache.policy import Source as Cost
from layercache.public import PublicRepositories
from layercache.pull import Pull
from layercache.reports import BlobInfo, ImageInfo, PinInfo
from layercache.store import Blob, Generation, Pin, check_pin_name, pin, pins, unpin
from layercache.worker import Workers

__all__ = ["Namespace", "as_platform"]

_log = logging.getLogger("layercache")


class Namespace(Contents):
    """One tenant's blobs and references. Safe to use from several threads.

    Blobs of public repositories lie in the public namespace and are borrowed: they are here for who was granted them.

    :param listed: which repositories are public.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        public: Binding,
        listed: PublicRepositories,
        clients: Clients,
        workers: Workers,
        platform: Platform,
        jobs: int,
        costs: dict[str, Cost],
    ) -> None:
        tenant = binding.name.text
        super().__init__(binding, public=public, registry=partial(clients.client, tenant=tenant))
        self._filling = partial(workers.fill, tenant=tenant)
        self._listed = listed
        self._platform = platform
        self._jobs = jobs
        self._costs = costs

    # -- content

    def pull(
        self,
        reference: Reference | str,
        *,
        platform: Platform | str | None = None,
        plain_http: bool | None = None,
        jobs: int | None = None,
        fresh: bool = False,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Image:
        """Return an image with every blob of it at hand, fetching those that are not here.

        A reference by digest whose blobs are all here makes no request. A tag costs one, which says what it means now;
        where the registry does not answer, the digest it had last is used and the report says ``stale``, unless
        ``fresh``. A blob that the store cannot take is read from the registry when it is asked for (``bypass``).

        :param platform: what to choose from a multi-platform image. Default: the cache's.
        :param plain_http: talk HTTP without TLS. Default: only to a loopback registry.
        :param jobs: transfers at once. Default: the cache's.
        :param timeout: seconds for all of it.
        :param cancel: ends the pull soon after it is set.
        :param progress: called from worker threads, for each blob.
        :raises InvalidReferenceError: before anything is asked of the network.
        :raises NotFoundError: when the registry has no such image, or it has none for the platform.
        :raises IntegrityError: when a blob is not what its digest says. Nothing of it is stored.
        :raises RegistryError: when the registry refuses, or cannot be reached and something is missing here.
        """
        wanted = self._platform if platform is None else as_platform(platform)
        reference = _reference(reference)
        control = Control(timeout=timeout, cancel=cancel, progress=progress)
        view, trouble = None, None
        try:
            view = self._made(control)
        except StoreError as error:
            trouble = error  # the caller gets its bytes all the same
        pull = Pull(
            reference,
            registry=lambda: self._registry(reference.repository, plain_http),
            view=view,
            public=reference.repository in self._listed,
            trouble=trouble,
            costs=self._costs,
            filling=partial(self._filling, plain_http=plain_http),
            control=control,
        )
        return pull.run(wanted, explicit=platform is not None, jobs=jobs or self._jobs, fresh=fresh)

    def images(self) -> Iterator[ImageInfo]:
        """Yield what each pulled reference resolved to last, and whether all of it is here."""
        view = self._view()
        if view is not None:
            for ref in view.own.refs():
                yield image_info(view, ref)

    def admit(
        self, descriptor: Descriptor, readable: IO[bytes], *, diff_id: DiffID | None = None, origin: str = "admit"
    ) -> BlobInfo:
        """Store a blob from any readable object and return what is known of it.

        Nothing is read where it is here already.

        :raises IntegrityError: when size or digest differ. Nothing is left behind.
        :raises StoreError: when the store cannot take it.
        """
        view = self._made()

        def fetch(offset: int) -> Iterator[bytes]:
            while offset:  # what an earlier attempt left is here already
                skipped = readable.read(min(offset, CHUNK))
                if not skipped:
                    return
                offset -= len(skipped)
            while piece := readable.read(CHUNK):
                yield piece

        blob, _ = fill(
            view.own,
            descriptor,
            fetch,
            diff_id=diff_id,
            origin=origin,
            control=Control(),
            ledger=Ledger(),
        )
        with blob:
            return blob_info(view, blob)

    def put(self, path: str | os.PathLike[str], *, media_type: MediaType | str = OCTET_STREAM) -> BlobInfo:
        """Store a local file and return what is known of the blob. The file is read twice: for its digest, and in.

        :raises IntegrityError: when the file changed between the two.
        """
        if isinstance(media_type, str):
            media_type = MediaType.parse(media_type)
        with Path(path).open("rb") as file:
            hasher, size = Digest.of(b"").hasher(), 0
            while piece := file.read(CHUNK):
                hasher.update(piece)
                size += len(piece)
            file.seek(0)
            digest = Digest.parse(f"sha256:{hasher.hexdigest()}")
            return self.admit(Descriptor(media_type, digest, size), file, origin="put")

    def stream(
        self,
        descriptor: Descriptor,
        repository: Repository | str,
        *,
        plain_http: bool | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
    ) -> stream.ByteStream:
        """Return a blob's bytes as they arrive, stored on the way where the store can take them.

        Where another thread or process is fetching it, they are read behind that one, and fetched once; should it die,
        this one goes on. The last piece is held back until size and digest are right: whoever read to the end has read
        the blob. A blob that is here is read from here.

        :raises IntegrityError: from a read, instead of the last piece.
        """
        if isinstance(repository, str):
            repository = Repository.parse(repository)
        control, ledger = Control(timeout=timeout, cancel=cancel), Ledger()
        registry = self._registry(repository, plain_http)

        def fetch(offset: int) -> Iterator[bytes]:
            return registry.fetch(repository, descriptor, offset=offset, control=control, ledger=ledger)

        try:
            blob, home = self._open_or_home(descriptor, repository, control)
        except (StoreError, InUseError) as error:
            _log.warning("%s streams past the cache: %s", descriptor.digest, error)
            return stream.ByteStream(stream.verified(fetch(0), descriptor))
        if blob is not None:
            return stream.ByteStream(blob.chunks(), on_close=blob.close)
        return stream.ByteStream(through(home, descriptor, fetch, origin=str(repository), control=control))

    def _open_or_home(
        self, descriptor: Descriptor, repository: Repository, control: Control
    ) -> tuple[Blob | None, Generation]:
        """Return a blob where it may be read from in the name of a repository, and where it belongs."""
        view = self._made(control)
        found = view.granted(descriptor.digest) if repository in self._listed else None
        blob: Blob | None
        try:
            blob = view.own.open(descriptor.digest)
        except NotFoundError:
            blob = None if found is None else view.borrow(found)
        if blob is not None:
            view.used(blob)
        return blob, view.own if blob is not None or found is None else view.lender()

    def export(self, target: Reference | Digest | str, directory: str | os.PathLike[str]) -> Digest:
        """Write an image that is here as an OCI image layout and return its manifest's digest.

        :param target: a reference that was pulled, or the digest of a manifest or index.
        :raises NotFoundError: when the image, or a blob of it, is not here.
        """
        view = self._existing()
        name: str | None = None
        if isinstance(target, Digest) or (isinstance(target, str) and target.startswith(("sha256:", "sha512:"))):
            root = stored_descriptor(view, as_digest(target))
            platform = self._platform
        else:
            ref = view.get_ref(_reference(target))
            root, platform, name = ref.descriptor, ref.platform, ref.reference.tag
        descriptor, manifest = descend(root, platform, lambda entry: stored_document(view, entry))
        parts = unique((manifest.config, *manifest.layers, descriptor))
        with ExitStack() as held:
            # All of them are opened before the first byte is written.
            blobs = [(part, held.enter_context(view.open(part.digest))) for part in parts]
            write_layout(
                Path(directory),
                descriptor=descriptor,
                reference_name=name,
                blobs=((part, blob.chunks()) for part, blob in blobs),
            )
        return descriptor.digest

    # -- care

    def remove_image(self, reference: Reference | str) -> tuple[Digest, ...]:
        """Forget a reference, drop the blobs that only it needs and return their digests. Open ones stay.

        Of public ones the grants go.

        :raises NotFoundError: when the reference is not known here.
        """
        view = self._existing()
        ref = view.get_ref(_reference(reference))
        only = only_needed_by(view, ref)
        view.own.remove_ref(ref.reference)
        removed = []
        for digest in only:
            try:
                view.remove(digest)
                removed.append(digest)
            except (NotFoundError, InUseError):
                continue
        return tuple(removed)

    def pin(self, name: str, reference: Reference | str) -> PinInfo:
        """Keep an image that is here whole from being evicted, for good, and return the pin.

        It ends with :meth:`unpin` or a purge; one of that name is replaced. What the reference comes to mean later is
        not pinned.

        :raises NotFoundError: when the reference is not known here, or a blob of it is not here.
        """
        view = self._existing()
        ref = view.get_ref(_reference(reference))
        image = image_info(view, ref)
        if image.missing:
            raise NotFoundError(f"{len(image.missing)} blobs of {ref.reference} are not here", hint="pull it")
        made = Pin(check_pin_name(name), ref.reference, image.digest, image.blobs, view.own.disk.now())
        pin(view.own, made, hold=view.open)
        return pin_info(view, made)

    def unpin(self, name: str) -> None:
        """Let go of what a pin keeps; :class:`~layercache.errors.NotFoundError` when there is none of that name."""
        unpin(self._existing().own, check_pin_name(name))

    def pins(self) -> Iterator[PinInfo]:
        """Yield the pins of this namespace."""
        if (view := self._view()) is not None:
            yield from (pin_info(view, found) for found in pins(view.own))


def as_platform(platform: Platform | str) -> Platform:
    """Return a platform, parsed where it is a text."""
    return Platform.parse(platform) if isinstance(platform, str) else platform


def _reference(reference: Reference | str) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference
