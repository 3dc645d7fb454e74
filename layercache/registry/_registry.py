"""A registry and its mirrors, asked one after the other."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from layercache.control import Control
from layercache.errors import LayerCacheError
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Digest, Platform, Reference, Repository, Tag
from layercache.registry._chain import Health, falls_through, in_order, is_outage
from layercache.registry._effects import Site
from layercache.registry._flow import Document
from layercache.registry._pace import Pace
from layercache.registry._probe import probe
from layercache.registry._sockets import Patience
from layercache.registry._upstream import Upstream
from layercache.registry._url import Url, Zone, zone_of
from layercache.registry.auth import Credentials
from layercache.registry.ecr import EcrCredentials
from layercache.registry.hosts import read_hosts
from layercache.registry.sources import Mirror, Tls
from layercache.reports import Check

__all__ = ["Registry"]

_T = TypeVar("_T")

_log = logging.getLogger("layercache.registry")


class Registry:
    """A client for the registry ``host`` (``docker.io``, ``127.0.0.1:5000``), for use by many threads.

    ``plain_http`` speaks http instead of https; where it is not given, to loopback hosts only, and not where ``tls``
    has certificates for them. ``credentials`` default to AWS's for the hosts of Amazon ECR and to what docker and
    podman were logged in with. A password goes to the registry itself and to the known token endpoint of its operator;
    ``realm_hosts`` names further ones (``*`` for any that the registry names).

    ``mirrors`` are asked first, in their order, then those of ``hosts_dir`` (containerd's ``certs.d``), then the
    registry itself. A mirror is told which registry is meant (``?ns=``) and gets its own credentials, never the
    registry's. What it does not have or cannot give is asked of the next; wrong bytes, and refused credentials, end it.
    One that failed three times in a row, or is much slower than another, is asked last for a while.

    Connections and tokens belong to the process: a forked child makes its own. Every operation blocks, ends within
    0.2 s of a cancel, and raises only errors of :mod:`layercache.errors`, without secrets or queries of URLs in them.

    :raises InvalidError: for a mirror that is no URL, and a ``hosts.toml`` that makes no sense.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool | None = None,
        credentials: Credentials | None = None,
        realm_hosts: Collection[str] = (),
        mirrors: Sequence[Mirror | str] = (),
        hosts_dir: str | os.PathLike[str] | None = None,
        tls: Tls | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.host = host
        credentials = EcrCredentials() if credentials is None else credentials
        found, server = ((), None) if hosts_dir is None else read_hosts(hosts_dir, _namespace(host))
        chain = [one if isinstance(one, Mirror) else Mirror(one) for one in (*mirrors, *found)]

        def upstream(site: Site, mirror: Mirror) -> Upstream:
            patience = Patience() if mirror.dial_timeout is None else Patience(connect=mirror.dial_timeout)
            return Upstream(
                site,
                credentials,
                realm_hosts=frozenset(realm_hosts),
                tls=mirror.tls,
                resolves=mirror.resolve,
                pulls=mirror.pull,
                pace=pace,
                patience=patience,
            )

        def as_mirror(mirror: Mirror) -> Upstream:
            base = mirror.base
            site = Site(base.authority, base, ns=_namespace(host), prefix=mirror.prefix, headers=mirror.headers)
            return upstream(site, mirror)

        self._upstreams = [as_mirror(mirror) for mirror in chain]
        authority = Repository(host, "any").api_host
        if server is not None and server.url and server.base.authority != authority:
            self._upstreams.append(as_mirror(server))  # another server in the registry's place is a mirror, too
        else:
            base = Url.parse(f"https://{authority}/")
            near = base.host == "localhost" or zone_of(base.host) is Zone.LOOPBACK
            if plain_http or (plain_http is None and near and (tls is None or not (tls.ca or tls.cert))):
                base = Url.parse(f"http://{authority}/")
            own = Mirror(authority) if server is None else server
            own = own if tls is None else replace(own, tls=tls)
            self._upstreams.append(upstream(Site(host, base, headers=own.headers), own))
        self._healths = [Health() for _ in self._upstreams]
        self._lock = threading.Lock()

    def resolve(self, reference: Reference, *, control: Control, ledger: Ledger) -> Descriptor:
        """What ``reference`` names now: media type, digest and the size that the registry claims.

        :raises NotFoundError: if the registry has no such image.
        :raises RegistryError: if it refuses, or gives no usable answer.
        """
        return self._try(
            lambda one: one.resolve(reference, control=control, ledger=ledger),
            self._usable(tag=reference.digest is None),
        )

    def document(
        self,
        repository: Repository,
        target: Digest | Tag,
        *,
        expected: Descriptor | None = None,
        tag: Tag | None = None,
        control: Control,
        ledger: Ledger,
    ) -> Document:
        """Manifest or index, with the proven digest and size of its bytes.

        ``expected`` is the descriptor that named it, if any: its size and media type must hold, too. ``tag`` is one
        that led here; where a pull-through cache does not know the digest yet, it is asked for the tag first.

        :raises IntegrityError: if the bytes are not those that ``target`` names.
        :raises InvalidManifestError: if they are no manifest or index.
        :raises UnsupportedError: for Docker schema 1.
        :raises NotFoundError: if the registry has no such document.
        :raises RegistryError: if it refuses, or gives no usable answer.
        """
        return self._try(
            lambda one: one.document(repository, target, expected=expected, tag=tag, control=control, ledger=ledger),
            self._usable(tag=not isinstance(target, Digest)),
        )

    def referrers(
        self, repository: Repository, subject: Digest, *, control: Control, ledger: Ledger
    ) -> tuple[Descriptor, ...]:
        """Manifests that have ``subject`` as theirs: signatures, bills of materials, attestations. None is no error.

        Their descriptors are what the registry says: fetch each by its digest, which proves it.

        :raises LimitError: over 10,000 of them.
        :raises RegistryError: if the registry refuses, or gives no usable answer.
        """
        return self._try(
            lambda one: one.referrers(repository, subject, control=control, ledger=ledger), self._usable(tag=False)
        )

    def fetch(
        self,
        repository: Repository,
        descriptor: Descriptor,
        *,
        offset: int = 0,
        length: int | None = None,
        parent: Digest | Tag | None = None,
        control: Control,
        ledger: Ledger,
    ) -> Generator[bytes, None, None]:
        """Bytes of a blob from ``offset`` on, in pieces of a mebibyte; the last, and those before a break, are shorter.

        A break is resumed where it happened. Never more bytes come than asked for. They are not verified: the receiver
        does that. ``parent`` is a manifest that led here; where a pull-through cache does not know the blob yet, it is
        asked for that first. Nothing is sent before the first ``next``; closing the generator gives the connection
        back.

        :raises IntegrityError: if the registry has more or fewer bytes than the descriptor says.
        :raises NotFoundError: if it has no such blob.
        :raises RegistryError: if it refuses, or gives no usable answer.
        """
        at = offset
        end = descriptor.size if length is None else min(descriptor.size, offset + length)
        numbers = self._usable(tag=False)
        telling: LayerCacheError | None = None
        for number in numbers:
            start, served = time.monotonic(), False
            pieces = self._upstreams[number].fetch(
                repository,
                descriptor,
                offset=at,
                length=length if at == offset else end - at,
                parent=parent,
                control=control,
                ledger=ledger,
            )
            try:
                with contextlib.closing(pieces):
                    for piece in pieces:
                        if not served:
                            self._served(number, time.monotonic() - start)
                            served = True
                        at += len(piece)
                        yield piece
            except LayerCacheError as error:
                telling = self._failed(number, error, telling)
            else:
                return
        if telling is not None:
            raise telling

    def probe(self, reference: Reference, platform: Platform, *, control: Control) -> Iterator[Check]:
        """Steps of a pull of ``reference``, source by source, as they are taken; nothing is kept.

        :raises CancelledError: on a cancel, as :class:`DeadlineError` at the deadline.
        """
        served = False
        for number, upstream in enumerate(self._upstreams):
            last = number == len(self._upstreams) - 1 and not served
            end = yield from probe(upstream, reference, platform, last=last, control=control)
            if end == "fail":
                return
            served = served or end == "ok"

    def close(self) -> None:
        """Close the connections that are not in use. The registry stays usable; it connects anew."""
        for upstream in self._upstreams:
            upstream.close()

    def __repr__(self) -> str:
        return f"Registry({self.host!r})"

    # --- the chain ---

    def _usable(self, *, tag: bool) -> list[int]:
        with self._lock:
            order = in_order(self._healths, time.monotonic())
        return [n for n in order if (self._upstreams[n].resolves if tag else self._upstreams[n].pulls)] or [
            len(self._upstreams) - 1
        ]

    def _try(self, ask: Callable[[Upstream], _T], numbers: list[int]) -> _T:
        telling: LayerCacheError | None = None
        for number in numbers:
            start = time.monotonic()
            try:
                answer = ask(self._upstreams[number])
            except LayerCacheError as error:
                telling = self._failed(number, error, telling)
            else:
                self._served(number, time.monotonic() - start)
                return answer
        assert telling is not None  # noqa: S101 -- there is at least one source, and it raised
        raise telling

    def _served(self, number: int, seconds: float) -> None:
        with self._lock:
            self._healths[number].served(seconds)

    def _failed(self, number: int, error: LayerCacheError, telling: LayerCacheError | None) -> LayerCacheError:
        """The more telling of two errors, the registry's own before a mirror's; raises one that ends the matter."""
        upstream = self._upstreams[number]
        if not falls_through(error, credentials=upstream.has_credentials()):
            raise error
        if is_outage(error):
            with self._lock:
                self._healths[number].failed(time.monotonic())
        if len(self._upstreams) > 1:
            _log.warning("%s cannot help: %s", upstream.site.host, error.what)
        return error if telling is None or number == len(self._upstreams) - 1 else telling


def _namespace(host: str) -> str:
    return "docker.io" if host == "registry-1.docker.io" else host
