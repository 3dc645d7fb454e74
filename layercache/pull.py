"""One pull: what a reference means, which image of it, and every blob of that image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from layercache import stream
from layercache.control import Control, Progress
from layercache.errors import (
    IntegrityError,
    InUseError,
    InvalidDescriptorError,
    InvalidManifestError,
    LayerCacheError,
    NamespacePurgedError,
    NotFoundError,
    RegistryError,
    StoreError,
)
from layercache.fill import Fetch
from layercache.image import Image, Layer
from layercache.inventory import unique
from layercache.metrics import Ledger, Meter
from layercache.oci import (
    Config,
    Descriptor,
    DiffID,
    Digest,
    Index,
    Manifest,
    Platform,
    Reference,
    Tag,
    descend,
    parse_document,
)
from layercache.policy import Source as Cost
from layercache.reports import BlobReport, PullReport, Source
from layercache.store import Blob, Generation, Grant, Ref, as_granted, grant
from layercache.view import View
from layercache.worker import Filled

if TYPE_CHECKING:
    from layercache.registry import Registry  # imports sockets, TLS and more, which a hit does not need

__all__ = ["Pull"]

_log = logging.getLogger("layercache")


class Pull:
    """One pull. Its state is what it has opened, so that a failure can give all of it back.

    :param registry: gives the client, when the network is needed at all.
    :param costs: what a miss has taken so far, by source; kept up to date.
    :param view: where blobs are kept; ``None`` where the store cannot be used, for the reason in ``trouble``.
    :param filling: fetches a blob into a generation, here or in a worker process: :meth:`Workers.fill`.
    :param public: the repository is a public one: what its manifests name is kept once for all, and borrowed.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        registry: Callable[[], Registry],
        view: View | None,
        public: bool,
        trouble: StoreError | None,
        costs: dict[str, Cost],
        filling: Callable[..., Filled],
        control: Control,
    ) -> None:
        self._reference = reference
        self._repository = reference.repository
        self._client = registry
        self._view = view
        self._generation = None if view is None else view.own
        self._borrows = public and view is not None and view.public is not None
        self._grants: dict[Digest, Grant] = {}  # what the manifest of a public repository lets us read
        self._trouble = trouble
        self._costs = costs
        self._fill = filling
        self._control = control
        self._ledger = Ledger()
        self._held: dict[Digest, Blob] = {}
        self._reports: dict[Digest, BlobReport] = {}
        self._documents: dict[Digest, Manifest | Index] = {}
        self._fetched: set[Digest] = set()  # those of them that the registry gave us just now
        self._claimed: Digest | None = None  # what a HEAD said a tag means: its size is not proven

    def run(self, platform: Platform, *, explicit: bool, jobs: int, fresh: bool) -> Image:
        """Do it all, or give back what was opened and raise."""
        try:
            root, stale = self._resolve(fresh=fresh)
            descriptor, manifest = descend(root, platform, self._document)
            root = self._described(root.digest)
            fresh_grants = self._authorise(descriptor, manifest) if self._borrows else []
            config = self._config(manifest)
            self._keep(fresh_grants, manifest, config)
            if (
                config is not None
                and explicit
                and descriptor.platform is None
                and not platform.matches(config.platform)
            ):
                raise NotFoundError(f"the image is for {config.platform}, not for {platform}")
            layers = self._layers(manifest, config, jobs)
            self._remember(root, descriptor, platform)
            order = unique(
                (*[self._described(digest) for digest in self._documents], manifest.config, *manifest.layers)
            )
            self._note_image([part.digest for part in order])
            report = PullReport(
                reference=self._reference,
                digest=root.digest,
                manifest=descriptor.digest,
                platform=platform,
                stale=stale,
                blobs=tuple(self._reports[part.digest] for part in order),
                bytes_fetched=self._ledger.bytes_fetched,
                bytes_by_source=self._ledger.bytes_by_source,
                requests=self._ledger.requests,
                seconds=self._ledger.seconds,
                stages=self._ledger.seconds_by_stage,
            )
            return Image(
                reference=self._reference,
                digest=root.digest,
                platform=platform,
                manifest=manifest,
                config=config,
                layers=layers,
                held=tuple(self._held.values()),
                report=report,
            )
        except BaseException:
            for blob in self._held.values():
                blob.close()
            raise

    # -- resolve

    def _resolve(self, *, fresh: bool) -> tuple[Descriptor, bool]:
        target = self._reference.target
        if isinstance(target, Digest):
            blob = self._open(target)
            if blob is not None:
                return Descriptor(blob.meta.media_type, target, blob.size), False
            return self._fetch_document(target), False
        try:
            found = self._registry.resolve(self._reference, control=self._control, ledger=self._ledger)
        except RegistryError as error:
            ref = None if self._generation is None else self._generation.get_ref(self._reference)
            if fresh or not error.retryable or ref is None:
                raise
            _log.warning("%s does not answer; the digest that the tag had last is used", self._registry.host)
            return ref.descriptor, True
        self._claimed = found.digest
        return found, False

    @property
    def _registry(self) -> Registry:
        return self._client()

    # -- documents

    def _document(self, descriptor: Descriptor) -> Manifest | Index:
        """Return a manifest or index, from here or from the registry."""
        found = self._documents.get(descriptor.digest)
        if found is not None:
            return found
        raw = self._read(descriptor.digest)
        if raw is None:
            named = None if descriptor.digest == self._claimed else descriptor
            self._fetch_document(descriptor.digest, expected=named)
            return self._documents[descriptor.digest]
        self._documents[descriptor.digest] = parse_document(raw, expected=descriptor.media_type)
        self._report(Descriptor(self._held[descriptor.digest].meta.media_type, descriptor.digest, len(raw)), "hit")
        return self._documents[descriptor.digest]

    def _fetch_document(self, target: Digest | Tag, *, expected: Descriptor | None = None) -> Descriptor:
        document = self._registry.document(
            self._repository,
            target,
            expected=expected,
            tag=self._reference.tag,
            control=self._control,
            ledger=self._ledger,
        )
        descriptor = document.descriptor
        self._fetched.add(descriptor.digest)
        self._documents[descriptor.digest] = parse_document(document.raw, expected=descriptor.media_type)
        self._obtain(descriptor, None, lambda offset: iter((document.raw[offset:],)))
        return descriptor

    def _read(self, digest: Digest) -> bytes | None:
        """Return a small blob that is here whole and sound; ``None`` where it must be fetched."""
        blob = self._open(digest)
        if blob is None:
            return None
        try:
            return blob.pread(0, blob.size)
        except IntegrityError as error:
            _log.warning("%s is fetched again: %s", digest, error)
            self._held.pop(digest).close()
            self._reports.pop(digest, None)  # no hit after all
            return None

    def _described(self, digest: Digest) -> Descriptor:
        report = self._reports[digest]
        return Descriptor(report.media_type, digest, report.size)

    # -- what is public

    def _authorise(self, descriptor: Descriptor, manifest: Manifest) -> list[Digest]:
        """Find out what this tenant may borrow of what a manifest names; return what it was not granted before.

        A manifest that lies here proves nothing, whoever put it there: for a new grant the registry gives it to us.
        """
        assert self._view is not None  # noqa: S101 - who borrows has one
        view, now, new = self._view, self._view.own.disk.now(), []
        for part in unique((manifest.config, *manifest.layers)):
            found = view.granted(part.digest)
            if found is None:
                if view.own.has(part.digest):
                    continue  # its own copy, from elsewhere: it stays where it is
                new.append(part.digest)
                found = Grant(part.digest, part.size, part.media_type, None, str(self._repository), now)
            self._grants[part.digest] = found
        if new and descriptor.digest not in self._fetched:
            self._registry.document(
                self._repository,
                descriptor.digest,
                expected=None if descriptor.digest == self._claimed else descriptor,
                tag=self._reference.tag,
                control=self._control,
                ledger=self._ledger,
            )
        return new

    def _keep(self, new: list[Digest], manifest: Manifest, config: Config | None) -> None:
        """Remember what was granted, with what the config says of it. Where that cannot be, it holds for this pull."""
        if config is not None:
            diff_ids = dict(zip((layer.digest for layer in manifest.layers), config.diff_ids, strict=True))
            for digest in new:
                self._grants[digest] = replace(self._grants[digest], diff_id=diff_ids.get(digest))
        if new and self._generation is not None:
            try:
                grant(self._generation, [self._grants[digest] for digest in new])
            except StoreError as error:
                _log.warning("what is borrowed is not remembered: %s", error)

    def _home(self, digest: Digest) -> Generation | None:
        """Return where a blob that is held lies."""
        blob = self._held.get(digest)
        return self._generation if self._view is None or blob is None else self._view.home(blob)

    def _note_image(self, digests: list[Digest]) -> None:
        """Let eviction know which blobs belong together, in each place by itself."""
        with suppress(NotFoundError, StoreError):
            places = [(self._home(digest), digest) for digest in digests]
            for home in {id(home): home for home, _ in places if home is not None}.values():
                home.together(self._reference, [digest for place, digest in places if place is home])

    # -- blobs

    def _config(self, manifest: Manifest) -> Config | None:
        descriptor = manifest.config
        if not descriptor.media_type.is_config:
            self._obtain(descriptor, None)
            return None  # an artifact: its config means nothing to us
        raw = self._read(descriptor.digest) if self._hit(descriptor) else None
        if raw is None:
            self._obtain(descriptor, None)
            raw = self._read(descriptor.digest)
        if raw is None:
            raw = b"".join(bytes(piece) for piece in stream.verified(self._fetcher(descriptor)(0), descriptor))
        config = Config.parse(raw)
        if len(config.diff_ids) != len(manifest.layers):
            raise InvalidManifestError(
                f"the config {descriptor.digest} has {len(config.diff_ids)} DiffIDs for {len(manifest.layers)} layers"
            )
        return config

    def _layers(self, manifest: Manifest, config: Config | None, jobs: int) -> tuple[Layer, ...]:
        diff_ids = (None,) * len(manifest.layers) if config is None else config.diff_ids
        wanted = {layer.digest: (layer, diff_id) for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)}
        sizes: dict[Digest, int] = {}
        for layer in manifest.layers:
            if sizes.setdefault(layer.digest, layer.size) != layer.size:
                raise InvalidDescriptorError("one digest with two sizes", value=str(layer.digest))
        missing = []
        for layer, diff_id in wanted.values():
            # What is here needs no thread.
            if not self._hit(layer):
                missing.append((layer, diff_id))
                self._control.report(Progress(layer.digest, layer.size, 0, "queued"))
        # The largest first: it decides when the pull is done.
        missing.sort(key=lambda pair: pair[0].size, reverse=True)
        self._fetch_all(missing, jobs)
        return tuple(
            Layer(
                layer,
                diff_id,
                blob=self._held.get(layer.digest),
                fetch=partial(self._again, layer),
            )
            for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
        )

    def _fetch_all(self, missing: list[tuple[Descriptor, DiffID | None]], jobs: int) -> None:
        if len(missing) == 1:
            self._obtain(*missing[0])
        if len(missing) <= 1:
            return
        with ThreadPoolExecutor(min(jobs, len(missing)), thread_name_prefix="layercache-pull") as pool:
            futures = [pool.submit(self._obtain, layer, diff_id) for layer, diff_id in missing]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._control.stop()  # the other transfers end at their next chunk
                for future in futures:
                    future.cancel()
                raise

    def _obtain(self, descriptor: Descriptor, diff_id: DiffID | None, fetch: Fetch | None = None) -> None:
        """Hold a blob, or note why the store cannot."""
        if descriptor.digest in self._held:
            return
        if self._generation is None:
            self._report(descriptor, "bypass", self._trouble)
            return
        meter = Meter()
        lent = self._grants.get(descriptor.digest)
        try:
            found = self._fill(
                self._generation if lent is None or self._view is None else self._view.lender(),
                descriptor,
                fetch or self._fetcher(descriptor),
                remote=fetch is None,
                repository=self._repository,
                parent=self._reference.tag or self._reference.digest,
                diff_id=diff_id,
                control=self._control,
                ledger=self._ledger,
                meter=meter,
            )
        except (StoreError, InUseError, NamespacePurgedError) as error:
            if isinstance(error, NamespacePurgedError):
                if lent is None or self._generation.fenced:
                    raise
                error = InUseError("the public namespace was purged meanwhile")  # its operator did, not our tenant
            _log.warning("%s goes past the cache: %s", descriptor.digest, error)
            self._report(descriptor, "bypass", error)
            return
        self._held[descriptor.digest] = found.blob
        self._check_size(found.blob, descriptor)
        if lent is not None:
            as_granted(found.blob, lent, self._generation)
        if found.fetched:
            self._note_cost(descriptor, meter, remote=fetch is None)
        self._report(descriptor, "miss" if found.fetched else "hit", reason=found.reason, worker=found.worker)

    def _note_cost(self, descriptor: Descriptor, meter: Meter, *, remote: bool) -> None:
        """Let eviction know what it took to get a blob."""
        host = self._registry.host
        cost = self._costs.get(host, Cost())
        if remote and meter.size:
            cost = cost.measured(meter.size, wait=meter.wait, seconds=meter.seconds)
            self._costs[host] = cost
        with suppress(NotFoundError, StoreError):
            home = self._home(descriptor.digest)
            if home is not None:
                home.fetched(descriptor.digest, rtt=cost.rtt, bandwidth=cost.bandwidth)

    def _hit(self, descriptor: Descriptor) -> bool:
        """Hold a blob if it is here."""
        blob = self._open(descriptor.digest)
        if blob is None:
            return False
        self._check_size(blob, descriptor)
        self._report(descriptor, "hit")
        return True

    @staticmethod
    def _check_size(blob: Blob, descriptor: Descriptor) -> None:
        if blob.size != descriptor.size:
            raise InvalidDescriptorError(
                f"{descriptor.digest} has {blob.size} bytes, not the {descriptor.size} that the manifest says"
            )

    def _open(self, digest: Digest) -> Blob | None:
        if digest in self._held:
            return self._held[digest]
        if self._generation is None or self._view is None:
            return None
        try:
            blob = self._own(digest)
            if blob is None and digest in self._grants:
                blob = self._view.borrow(self._grants[digest])
            if blob is None:
                return None
            self._held[digest] = blob
        except (StoreError, InUseError) as error:
            _log.warning("%s is read past the cache: %s", digest, error)
            return None
        return self._held[digest]

    def _own(self, digest: Digest) -> Blob | None:
        try:
            return None if self._generation is None else self._generation.open(digest)
        except NotFoundError:
            return None

    def _fetcher(self, descriptor: Descriptor) -> Fetch:
        return lambda offset: self._registry.fetch(
            self._repository,
            descriptor,
            offset=offset,
            parent=self._reference.tag or self._reference.digest,
            control=self._control,
            ledger=self._ledger,
        )

    def _again(self, descriptor: Descriptor) -> Iterator[bytes]:
        """Read a blob that the store could not take, later, outside of the pull's deadline."""
        return self._registry.fetch(self._repository, descriptor, control=Control(), ledger=Ledger())

    def _report(
        self,
        descriptor: Descriptor,
        source: Source,
        error: LayerCacheError | None = None,
        *,
        reason: str = "",
        worker: bool = False,
    ) -> None:
        if descriptor.digest in self._reports:
            return
        blob = self._held.get(descriptor.digest)
        if source == "hit" and self._view is not None and blob is not None:
            self._view.used(blob)
        reason = reason if error is None else f"{getattr(error, 'reason', 'in use')}: {error.what}"
        self._reports[descriptor.digest] = BlobReport(
            digest=descriptor.digest,
            media_type=descriptor.media_type,
            size=descriptor.size,
            source=source,
            origin="" if source == "hit" else self._registry.host,
            reason=reason,
            public=blob is not None and blob.lent,
            worker=worker,
        )
        self._control.report(Progress(descriptor.digest, descriptor.size, descriptor.size, source))

    def _remember(self, root: Descriptor, chosen: Descriptor, platform: Platform) -> None:
        if self._generation is None:
            return
        known = self._generation.get_ref(self._reference)
        if known is not None and known.descriptor == root and known.manifest == chosen.digest:
            return  # a hit writes nothing
        ref = Ref(self._reference, root, chosen.digest, platform, self._generation.disk.now())
        try:
            self._generation.set_ref(ref)
        except StoreError as error:
            _log.warning("what %s resolved to is not remembered: %s", self._reference, error)
