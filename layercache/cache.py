"""The cache: a root's namespaces, and the registries they are filled from."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Self

from layercache.binding import Binding
from layercache.clients import Clients
from layercache.contents import Contents
from layercache.control import Control
from layercache.errors import FormatError, NotFoundError, StoreClosedError, StoreError, UnsafeRootError
from layercache.janitor import Janitor, keep_house
from layercache.namespace import Namespace, as_platform
from layercache.oci import Platform
from layercache.policy import Quota, Source
from layercache.public import PublicRepositories
from layercache.reports import Housekeeping, NamespaceInfo, NamespaceUsage, Pruned, ReceiptsReport, Usage
from layercache.store import PUBLIC, Amount, Budget, KmsKey, NamespaceName, Receipt, Seal, Store
from layercache.worker import Workers

if TYPE_CHECKING:
    from layercache.registry import Credentials, Mirror, Tls

__all__ = ["LayerCache", "default_root"]

_log = logging.getLogger("layercache")

_JOBS = 4
_CORES = 4
"""From so many on a second worker finds one to run on."""

# A forked child shares nothing with its parent: not the root's locks, not its sockets, and not a lock that another
# thread of the parent may have held. Each side opens its own at its next call.
_forked: weakref.WeakSet[LayerCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_forked):
        cache._forget()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)


class LayerCache:
    """The cache below one root directory, shared by any number of processes and threads.

    A root that cannot be used just now (read-only, full, failing) does not stop a pull: it goes past the cache and the
    report says so. A root that must not be used (another's, writable by others, of another format) is an error here.

    :param root: made if it is not there. Default: ``LAYERCACHE_ROOT``, else ``/var/lib/layercache`` for root, else
        ``layercache`` in the XDG cache directory.
    :param platform: what to choose from a multi-platform image. Default: this host's.
    :param jobs: transfers at once, of one pull.
    :param workers: the most processes for large fills (32 MiB and more), so that this process's own threads do not
        starve them; they start when those threads hold the GIL, and end a minute after their work. Default: one, two
        from four cores on. 0, or a host that lets none be started: all is done on threads.
    :param budget: the most that the root may take on its disk, everything below it counted: ``"200GiB"``, ``"80%"`` of
        the filesystem, or bytes. Default: what was given for this root last, else 80 %. What does not fit is evicted
        for, or passed through.
    :param keep_free: what is left to the rest of the machine, in the same words. Default: 5 %, but no more than 10 GiB;
        unless it is 0, 1 % of the inodes, too.
    :param watermarks: the shares of the budget at which housekeeping begins to evict, and down to which it does.
    :param policy: in which order blobs go: one of :data:`layercache.policy.POLICIES`.
    :param public: repositories whose blobs are kept once for all namespaces: patterns ``HOST/NAME``, see
        :class:`~layercache.public.PublicRepositories` and docs/public.md. List only what every tenant may read.
    :param credentials: for registries and mirrors. Default: AWS's for Amazon ECR, else docker's and podman's.
    :param mirrors: by registry host (``docker.io``), what is asked before the registry itself.
    :param hosts_dir: a directory of ``hosts.toml`` files as containerd has it (``/etc/containerd/certs.d``).
    :param tls: certificates for the registries themselves.
    :param kms: the key of AWS KMS for namespaces with ``seal="kms"``. Default: ``LAYERCACHE_KMS_KEY``, with boto3's
        chain of credentials.
    :param janitor: let a thread of this process sweep and scrub the root now and then, if no other process does.
    :raises InvalidPatternError: for a pattern in ``public`` that is none, or could match hosts of strangers.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        platform: Platform | str | None = None,
        jobs: int = _JOBS,
        workers: int | None = None,
        budget: int | str | None = None,
        keep_free: int | str | None = None,
        watermarks: tuple[float, float] = (0.95, 0.90),
        policy: str = "default",
        janitor: bool = True,
        public: Iterable[str] = (),
        credentials: Credentials | None = None,
        mirrors: Mapping[str, Sequence[Mirror | str]] | None = None,
        hosts_dir: str | os.PathLike[str] | None = None,
        tls: Tls | None = None,
        kms: KmsKey | None = None,
    ) -> None:
        if jobs < 1:
            raise ValueError("jobs must be at least 1")
        if workers is None:
            workers = 1 if (os.cpu_count() or 1) < _CORES else 2
        if workers < 0:
            raise ValueError("workers must not be negative")
        self._listed = PublicRepositories.of(public)
        self._budget = Budget(budget, keep_free, *watermarks, policy)
        self.root = Path(root) if root is not None else default_root()
        self.platform = Platform.host() if platform is None else as_platform(platform)
        self.jobs = jobs
        self._lock = threading.Lock()
        self._clients = Clients(credentials=credentials, mirrors=mirrors, hosts_dir=hosts_dir, tls=tls)
        self._workers = Workers(workers, root=self.root, budget=self._budget, clients=self._clients)
        self._kms = kms or KmsKey()
        self._costs: dict[str, Source] = {}
        self._namespaces: dict[tuple[NamespaceName, Seal | None], Namespace] = {}
        self._store: Store | None = None
        self._janitor: Janitor | None = None
        self._housekeeping = janitor
        self._closed = False
        self._public = Binding(PUBLIC, self.store)
        _forked.add(self)
        try:
            self.store()
        except (UnsafeRootError, FormatError):
            raise
        except StoreError as error:
            _log.warning("the cache goes without its root: %s", error)

    def namespace(
        self,
        name: str,
        *,
        seal: Seal | None = None,
        quota: int | str | None = None,
        floor: int | str = 0,
        credentials: Credentials | None = None,
        mirrors: Mapping[str, Sequence[Mirror | str]] | None = None,
    ) -> Namespace:
        """Return the handle of a tenant's namespace. Nothing is made on disk before something is stored in it.

        This is the only place that takes a namespace's name; whoever has the handle has the namespace. The same name
        gives the same handle, which keeps a few descriptors open until the cache is closed.

        :param name: any non-empty text of at most 255 bytes.
        :param seal: keeps its content encrypted: ``"ephemeral"`` under a key in memory that a reboot takes, ``"kms"``
            under one that is wrapped by a key of AWS KMS; needs the extra ``seal``. A namespace stays as it was begun:
            without ``seal`` a sealed one is read as such, and asking for a seal where one lives in clear or otherwise
            sealed is a :class:`~layercache.errors.SealMismatchError` at the first use.
        :param quota: what it may take, in the words of ``budget``: when room is needed, who is over its quota pays
            first.
        :param floor: what it keeps whatever room is needed. Both are remembered until the namespace is purged.
        :param credentials: this tenant's own, for its registries and mirrors, instead of the cache's. Make them once
            and give the same object each time: with others, tokens are asked for anew.
        :param mirrors: by registry host, instead of those that the cache has for it (none, where the list is empty).
            Both hold for every handle of this name until others are given, or this cache is closed.
        """
        if seal not in (None, "ephemeral", "kms"):
            raise ValueError(f"no such seal: {seal!r}")
        namespace = self._namespace(NamespaceName(name), seal=seal)
        self._limit(namespace.binding, quota, floor)
        if credentials is not None or mirrors is not None:
            self._clients.supply(name, credentials, mirrors)
        return namespace

    def public_namespace(self, *, quota: int | str | None = None, floor: int | str = 0) -> Contents:
        """Return the public namespace, for its operator: what it holds, and how that is checked, dropped and purged.

        It fills from tenants' pulls of the repositories in ``public`` alone. A purge ends it for everybody: images that
        are open raise, and the next pull fetches again. ``quota`` and ``floor`` are as in :meth:`namespace`.
        """
        self._limit(self._public, quota, floor)
        return Contents(self._public, public=None, registry=self._clients.client)

    def _limit(self, binding: Binding, quota: int | str | None, floor: int | str) -> None:
        if quota is not None or floor:
            total = shutil.disk_usage(self.root).total if self.root.is_dir() else 0
            most = None if quota is None else Amount.parse(quota).of(total)
            binding.limit(Quota(most, Amount.parse(floor).of(total)))

    def namespaces(self) -> list[NamespaceInfo]:
        """Return the namespaces that are live or being purged. Reads every namespace's directories.

        :raises StoreError: when the root cannot be used.
        """
        found = []
        for tenancy in self.store().namespaces():
            blobs = size = 0
            stored = PUBLIC if tenancy.public else tenancy.name
            if stored is not None and tenancy.state == "live":
                binding = Binding(stored, self.store)
                # What it borrows is not its own, and counted where it lies.
                for info in Contents(binding, public=None, registry=self._clients.client).blobs():
                    blobs, size = blobs + 1, size + info.size
                binding.release()
            name = None if tenancy.name is None else tenancy.name.text
            found.append(
                NamespaceInfo(
                    name,
                    tenancy.slot,
                    tenancy.generation,
                    tenancy.state,
                    blobs,
                    size,
                    seal=tenancy.seal,
                    public=tenancy.public,
                )
            )
        return sorted(found, key=lambda info: (info.name or "", info.slot))

    def usage(self) -> Usage:
        """Return what the root takes, by namespace, and how much of that could go. Looks at every file of the root.

        :raises StoreError: when the root cannot be used.
        """
        store = self.store()
        counted, used = store.space.measure()
        names = self._names()
        limits = store.limits
        assert limits is not None  # noqa: S101 - this class always gives a budget
        found = [
            NamespaceUsage(
                names.get(one.slot),
                one.slot,
                one.blobs,
                one.bytes,
                one.reserved,
                one.evictable,
                one.pinned,
                one.leased,
                public=one.slot == store.public,
            )
            for one in store.holdings()
        ]
        found.sort(key=lambda one: (one.name or "", one.slot))
        return Usage(limits.most, used, max(0, counted - used), store.space.free(), limits.floor, tuple(found))

    def prune(
        self,
        namespace: str | None = None,
        *,
        public: bool = False,
        to: int | str | None = None,
        older_than: float = 0.0,
        dry_run: bool = False,
    ) -> list[Pruned]:
        """Evict what is neither open nor pinned, worth least first, and return what went.

        :param namespace: of this namespace only.
        :param public: of the public namespace only.
        :param to: no more than it takes for the root to use so much, in the words of ``budget``. Default: all of it.
        :param older_than: only what was not used for so many seconds.
        :param dry_run: nothing goes; blobs that are open may be among the answer.
        :raises NotFoundError: when there is no such namespace.
        :raises StoreError: when the root cannot be written, or somebody keeps a lock.
        """
        store = self.store()
        need = None
        if to is not None:
            need = store.space.measure()[1] - Amount.parse(to).of(shutil.disk_usage(self.root).total)
            if need <= 0:
                return []
        names = self._names()
        wanted = store.public if public else None
        if namespace is not None:
            wanted = next((slot for slot, name in names.items() if name == namespace and not public), None)
            if wanted is None:
                raise NotFoundError("the namespace holds nothing")
        if store.evictor is None:
            return []
        gone = []
        for victim, used in store.evictor.prune(need, slot=wanted, older_than=older_than, dry_run=dry_run):
            folder, _, blob = victim.key.partition("/")
            slot = folder.partition(".")[0]
            shared = slot == store.public
            gone.append(Pruned(names.get(slot), slot, blob, victim.size, victim.why, used, shared))
        return gone

    def _names(self) -> dict[str, str]:
        return {
            tenancy.slot: tenancy.name.text
            for tenancy in self.store().namespaces()
            if tenancy.name is not None and tenancy.state == "live"
        }

    def purge_matching(self, pattern: str, *, wait: float = 5.0, trim: bool = False) -> dict[str, Receipt]:
        """Purge every namespace whose name matches, and return a receipt for each by its name.

        All of them are fenced before any is waited for; ``wait`` is for all together. See :meth:`Namespace.purge`. The
        public namespace has no name and never matches.

        :param pattern: ``*``, ``?`` and ``[...]`` as in a shell, case counts; ``*`` also stands for ``/``. A sealed
            namespace whose key is gone has no name and never matches.
        :raises StoreError: when the root cannot be written.
        """
        names = [tenancy.name for tenancy in self.store().namespaces() if tenancy.name is not None]
        names = sorted((name for name in names if fnmatchcase(name.text, pattern)), key=lambda name: name.text)
        receipts = self.store().purge_all(names, wait=wait, trim=trim)
        return {name.text: receipt for name, receipt in zip(names, receipts, strict=True)}

    def resume_purges(self, *, wait: float = 5.0) -> list[Receipt]:
        """Go on with every purge of this root that is not at its end, and return what each has reached.

        :raises StoreError: when the root cannot be written.
        """
        return self.store().resume_purges(wait=wait)

    def keep_house(self, *, timeout: float | None = None, cancel: threading.Event | None = None) -> Housekeeping:
        """Do now what a process that has the root open does every quarter of an hour: for hosts without such a process.

        What crashes left is swept, purges of processes that died are finished, the root is brought below its low
        watermark where it is above the high one, and every blob not compared with its digest for fifteen days is read,
        at 16 MiB/s at most. Where another process is at one of these, that is left to it.

        :param timeout: seconds after which the scrub ends; the next call goes on there.
        :raises StoreError: when the root cannot be written.
        """
        return keep_house(self.store(), control=Control(timeout=timeout, cancel=cancel))

    def receipts(self) -> Iterator[Receipt]:
        """Yield every purge receipt of this root, oldest first.

        :raises StoreError: when the chain of receipts is broken.
        """
        return self.store().receipts()

    def verify_receipts(self, *, after: str = "") -> ReceiptsReport:
        """Return what is wrong with the receipts, and the hash of the last.

        Found are records that were changed, dropped, moved or added, and generations that ended without one. Who can
        write the root can write a whole new chain: to find that too, keep the last hash elsewhere and give it as
        ``after`` the next time.
        """
        return self.store().verify_receipts(after=after)

    def store(self) -> Store:
        """Return the store, opened now if it could not be opened before.

        :raises StoreError: when it cannot be used.
        """
        with self._lock:
            if self._closed:
                raise StoreClosedError("the cache is closed", hint="open it again")
            if self._store is None:
                self._store = Store(self.root, budget=self._budget, kms=self._kms)
                if self._housekeeping:
                    self._janitor = Janitor(self.store, let_go=self._let_go)
            return self._store

    def close(self) -> None:
        """Close connections and the root. Images that are still open stay readable. Closing twice is nothing."""
        with self._lock:
            self._closed = True
            store, self._store = self._store, None
            janitor, self._janitor = self._janitor, None
            namespaces = list(self._namespaces.values())
        if janitor is not None:
            janitor.stop()
        self._workers.close()
        self._clients.close()
        for binding in (self._public, *(namespace.binding for namespace in namespaces)):
            binding.release()
        if store is not None:
            store.close()

    def _namespace(self, name: NamespaceName, *, seal: Seal | None) -> Namespace:
        with self._lock:
            namespace = self._namespaces.get((name, seal))
            if namespace is None:  # one for all who ask: each has directories open, and nobody gives a handle back
                namespace = self._namespaces[name, seal] = self._handle(name, seal=seal)
            return namespace

    def _handle(self, name: NamespaceName, *, seal: Seal | None) -> Namespace:
        return Namespace(
            Binding(name, self.store, seal=seal),
            public=self._public,
            listed=self._listed,
            clients=self._clients,
            workers=self._workers,
            platform=self.platform,
            jobs=self.jobs,
            costs=self._costs,
        )

    def _let_go(self) -> None:
        with self._lock:
            namespaces = list(self._namespaces.values())
        for binding in (self._public, *(namespace.binding for namespace in namespaces)):
            binding.let_go()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._store = self._janitor = None
        self._clients.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def default_root() -> Path:
    """Return where the cache is when nobody says."""
    if named := os.environ.get("LAYERCACHE_ROOT"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/layercache")
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "layercache"
