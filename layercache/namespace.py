"""One tenant's handle: what a hit is, when the network is asked, and what happens when the store cannot help."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO

from layercache import stream
from layercache.control import Control, Progress
from layercache.errors import InUseError, LayerCacheError, NamespacePurgedError, NotFoundError, StoreError
from layercache.fill import fill, mend, tee
from layercache.image import Image, Layer
from layercache.integrity import CHUNK
from layercache.inventory import (
    blob_info,
    findings,
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
from layercache.policy import Quota
from layercache.policy import Source as Cost
from layercache.pull import Pull
from layercache.registry import Registry
from layercache.reports import BlobInfo, Finding, ImageInfo, PinInfo
from layercache.store import (
    Blob,
    Generation,
    NamespaceName,
    Pin,
    Receipt,
    Ref,
    Seal,
    Store,
    check_pin_name,
    pin,
    pins,
    set_quota,
    unpin,
)

__all__ = ["Namespace", "as_platform"]

_log = logging.getLogger("layercache")

# A forked child opens what it needs for itself: neither a directory of its parent's nor a lock that another thread of
# the parent may have held is of use to it.
_forked: weakref.WeakSet[Namespace] = weakref.WeakSet()


def _after_fork() -> None:
    for namespace in list(_forked):
        namespace._forget()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)


class Namespace:
    """One tenant's blobs and references. Safe to use from several threads.

    A call that a purge overtakes raises :class:`~layercache.errors.NamespacePurgedError`, as does every read of an
    image or layer from before it. A call that begins after the purge finds the namespace empty, in its next generation.
    """

    def __init__(
        self,
        name: NamespaceName,
        *,
        store: Callable[[], Store],
        registry: Callable[[Repository, bool | None], Registry],
        platform: Platform,
        jobs: int,
        costs: dict[str, Cost],
        seal: Seal | None = None,
    ) -> None:
        self._name = name
        self._store = store
        self._registry = registry
        self._platform = platform
        self._jobs = jobs
        self._costs = costs
        self._seal = seal
        self._quota: Quota | None = None
        self._lock = threading.Lock()
        self._bound: Generation | None = None
        _forked.add(self)

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
        generation, trouble = None, None
        try:
            generation = self._made()
        except StoreError as error:
            trouble = error  # the caller gets its bytes all the same
        pull = Pull(
            reference,
            registry=lambda: self._registry(reference.repository, plain_http),
            generation=generation,
            trouble=trouble,
            costs=self._costs,
            control=Control(timeout=timeout, cancel=cancel, progress=progress),
        )
        return pull.run(wanted, explicit=platform is not None, jobs=jobs or self._jobs, fresh=fresh)

    def open(self, digest: Digest | str) -> Layer:
        """Return a blob that is here, open and leased.

        :raises NotFoundError: when it is not here.
        """
        wanted = _digest(digest)
        generation = self._existing()
        blob = generation.open(wanted)
        generation.used(wanted)
        meta = blob.meta
        return Layer(Descriptor(meta.media_type, meta.digest, meta.size), meta.diff_id, blob=blob)

    def stat(self, digest: Digest | str) -> BlobInfo:
        """Return what is known of a blob that is here.

        :raises NotFoundError: when it is not here.
        """
        wanted = _digest(digest)
        generation = self._existing()
        with generation.open(wanted) as blob:
            return blob_info(generation, blob)

    def contains(self, digest: Digest | str) -> bool:
        """Tell whether a blob is here, sound as far as opening it tells."""
        wanted = _digest(digest)
        try:
            with self._existing().open(wanted):
                return True
        except NotFoundError:
            return False

    def blobs(self) -> Iterator[BlobInfo]:
        """Yield every blob that is here, in no order; one that goes or is damaged meanwhile is passed over."""
        generation = self._generation(create=False)
        if generation is None:
            return
        for digest in generation.digests():
            try:
                with generation.open(digest) as blob:
                    info = blob_info(generation, blob)
            except (NotFoundError, InUseError):
                continue
            yield info

    def images(self) -> Iterator[ImageInfo]:
        """Yield what each pulled reference resolved to last, and whether all of it is here."""
        generation = self._generation(create=False)
        if generation is None:
            return
        for ref in generation.refs():
            yield image_info(generation, ref)

    def admit(
        self, descriptor: Descriptor, readable: IO[bytes], *, diff_id: DiffID | None = None, origin: str = "admit"
    ) -> BlobInfo:
        """Store a blob from any readable object and return what is known of it.

        Nothing is read where it is here already.

        :raises IntegrityError: when size or digest differ. Nothing is left behind.
        :raises StoreError: when the store cannot take it.
        """
        generation = self._made()

        def fetch(offset: int) -> Iterator[bytes]:
            while offset:  # what an earlier attempt left is here already
                skipped = readable.read(min(offset, CHUNK))
                if not skipped:
                    return
                offset -= len(skipped)
            while piece := readable.read(CHUNK):
                yield piece

        blob, _ = fill(
            generation,
            descriptor,
            fetch,
            diff_id=diff_id,
            origin=origin,
            control=Control(),
            ledger=Ledger(),
        )
        with blob:
            return blob_info(generation, blob)

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

        The last piece is held back until size and digest are right: whoever read to the end has read the blob. A blob
        that is here is read from here.

        :raises IntegrityError: from a read, instead of the last piece.
        """
        if isinstance(repository, str):
            repository = Repository.parse(repository)
        control, ledger = Control(timeout=timeout, cancel=cancel), Ledger()
        registry = self._registry(repository, plain_http)

        def fetch() -> Iterator[bytes]:
            return registry.fetch(repository, descriptor, control=control, ledger=ledger)

        try:
            generation = self._made()
            try:
                blob = generation.open(descriptor.digest)
                generation.used(descriptor.digest)
                return stream.ByteStream(blob.chunks(), on_close=blob.close)
            except NotFoundError:
                ingest = generation.begin(descriptor, resume=False)
        except (StoreError, InUseError) as error:
            _log.warning("%s streams past the cache: %s", descriptor.digest, error)
            ingest = None
        if ingest is None:
            return stream.ByteStream(stream.verified(fetch(), descriptor))
        return stream.ByteStream(tee(fetch(), ingest, descriptor, origin=str(repository)), on_close=ingest.abort)

    def export(self, target: Reference | Digest | str, directory: str | os.PathLike[str]) -> Digest:
        """Write an image that is here as an OCI image layout and return its manifest's digest.

        :param target: a reference that was pulled, or the digest of a manifest or index.
        :raises NotFoundError: when the image, or a blob of it, is not here.
        """
        generation = self._existing()
        name: str | None = None
        if isinstance(target, Digest) or (isinstance(target, str) and target.startswith(("sha256:", "sha512:"))):
            root = stored_descriptor(generation, _digest(target))
            platform = self._platform
        else:
            ref = self._ref(generation, _reference(target))
            root, platform, name = ref.descriptor, ref.platform, ref.reference.tag
        descriptor, manifest = descend(root, platform, lambda entry: stored_document(generation, entry))
        parts = unique((manifest.config, *manifest.layers, descriptor))
        with ExitStack() as held:
            # All of them are opened before the first byte is written.
            blobs = [(part, held.enter_context(generation.open(part.digest))) for part in parts]
            write_layout(
                Path(directory),
                descriptor=descriptor,
                reference_name=name,
                blobs=((part, blob.chunks()) for part, blob in blobs),
            )
        return descriptor.digest

    # -- care

    def verify(
        self, digest: Digest | str | None = None, *, repair: bool = False, plain_http: bool | None = None
    ) -> Iterator[Finding]:
        """Read one blob, or all of them, again and yield what is wrong. What is damaged is a miss from now on.

        With ``repair``, the damaged chunks of a blob are fetched again from where it came from, and only those.

        :raises NotFoundError: when the one asked for is not here.
        """
        wanted = None if digest is None else _digest(digest)
        generation = self._generation(create=False) if wanted is None else self._existing()
        if generation is not None:
            yield from findings(
                generation, wanted, mend=partial(self._mend, generation, plain_http) if repair else None
            )

    def remove(self, digest: Digest | str) -> int:
        """Drop a blob and return its size.

        :raises NotFoundError: when it is not here.
        :raises InUseError: when somebody has it open.
        """
        wanted = _digest(digest)
        return self._existing().remove(wanted)

    def remove_image(self, reference: Reference | str) -> tuple[Digest, ...]:
        """Forget a reference, drop the blobs that only it needs and return their digests. Open ones stay.

        :raises NotFoundError: when the reference is not known here.
        """
        generation = self._existing()
        ref = self._ref(generation, _reference(reference))
        only = only_needed_by(generation, ref)
        generation.remove_ref(ref.reference)
        removed = []
        for digest in only:
            try:
                generation.remove(digest)
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
        generation = self._existing()
        ref = self._ref(generation, _reference(reference))
        image = image_info(generation, ref)
        if image.missing:
            raise NotFoundError(f"{len(image.missing)} blobs of {ref.reference} are not here", hint="pull it")
        made = Pin(check_pin_name(name), ref.reference, image.digest, image.blobs, generation.disk.now())
        pin(generation, made)
        return pin_info(generation, made)

    def unpin(self, name: str) -> None:
        """Let go of what a pin keeps; :class:`~layercache.errors.NotFoundError` when there is none of that name."""
        unpin(self._existing(), check_pin_name(name))

    def pins(self) -> Iterator[PinInfo]:
        """Yield the pins of this namespace."""
        if (generation := self._generation(create=False)) is not None:
            yield from (pin_info(generation, found) for found in pins(generation))

    def purge(self, *, wait: float = 5.0, trim: bool = False) -> Receipt:
        """Remove everything of this namespace, whoever is using it, and return what was reached.

        Nobody can read or store anything of it from the first moment on. From then on the call takes at most ``wait``
        seconds and a tenth, for readers and for the files to go. Who still has files open then is named in the receipt
        (``pending``; with ``wait=0`` there may be no time to look), and what is left goes as soon as it can: beside the
        caller, with the next purge, or when the root is opened next. A namespace that holds nothing is not an error:
        its receipt is of generation 0.

        :param trim: also hand the freed blocks to the device (``discarded``): root only, on ext4 and xfs. The receipt
            says what came of it within the wait; :meth:`LayerCache.receipts` has what comes later.
        :raises StoreError: when the root cannot be written.
        """
        return self._store().purge(self._name, wait=wait, trim=trim)

    # -- for the other rooms of the cache

    def limit(self, quota: Quota) -> None:
        """Remember what this namespace may take and keeps, in this generation and those to come."""
        with self._lock:
            self._quota = quota
            self._note_quota()

    def release(self) -> None:
        """Give back what is open of the namespace itself, so that its filesystem can be unmounted. Images stay."""
        with self._lock:
            bound, self._bound = self._bound, None
        if bound is not None:
            bound.close()

    def let_go(self) -> None:
        """Do what the next call would do after a purge: give up what is open, and wipe the key, also of images."""
        with self._lock:
            if self._bound is None or not self._bound.fenced:
                return
            bound, self._bound = self._bound, None
        with suppress(NamespacePurgedError):
            bound.check()
        bound.close()

    def _generation(self, *, create: bool) -> Generation | None:
        """Return the live generation, made where there is none and ``create`` says so."""
        with self._lock:
            if self._bound is not None and self._bound.fenced:
                self._bound.close()
                self._bound = None
            if self._bound is None:
                found = self._store().generation(self._name, create=create, seal=self._seal)
                self._bound = None if found is None else found.close_when_dropped()
                self._note_quota()
            return self._bound

    def _note_quota(self) -> None:
        if self._bound is not None and self._quota is not None:
            try:
                set_quota(self._bound, self._quota)
            except (StoreError, NamespacePurgedError) as error:
                _log.warning("a quota is not remembered: %s", error)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._bound = None

    def _mend(self, generation: Generation, plain_http: bool | None, blob: Blob) -> bool:  # noqa: FBT001
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

            return mend(generation, blob, fetch, control=control)
        except LayerCacheError as error:
            _log.warning("%s could not be mended: %s", meta.digest, error)
            return False

    def _existing(self) -> Generation:
        generation = self._generation(create=False)
        if generation is None:
            raise NotFoundError("the namespace holds nothing", hint="pull something into it")
        return generation

    def _made(self) -> Generation:
        generation = self._generation(create=True)
        if generation is None:
            raise StoreError("the namespace was purged while it was made", hint="try again")
        return generation

    @staticmethod
    def _ref(generation: Generation, reference: Reference) -> Ref:
        ref = generation.get_ref(reference)
        if ref is None:
            raise NotFoundError(f"{reference} was not pulled into this namespace", hint="pull it")
        return ref


def as_platform(platform: Platform | str) -> Platform:
    """Return a platform, parsed where it is a text."""
    return Platform.parse(platform) if isinstance(platform, str) else platform


def _digest(digest: Digest | str) -> Digest:
    return Digest.parse(digest) if isinstance(digest, str) else digest


def _reference(reference: Reference | str) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference
