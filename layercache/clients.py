"""The registry clients of one cache: one for each tenant and registry, for all threads.

What they need is imported when there is one: sockets, TLS and more, which a hit does not need.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from layercache.errors import StoreClosedError
from layercache.oci import Repository

if TYPE_CHECKING:
    from layercache.registry import Credentials, Mirror, Pace, Registry, Tls

__all__ = ["Clients"]


class Clients:
    """Makes clients as they are needed and keeps them, with their connections and tokens.

    Tokens are never shared between tenants; what a host asks to wait holds for all. The parameters are those of
    :class:`~layercache.cache.LayerCache`.
    """

    def __init__(
        self,
        *,
        credentials: Credentials | None = None,
        mirrors: Mapping[str, Sequence[Mirror | str]] | None = None,
        hosts_dir: str | os.PathLike[str] | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.hosts_dir, self.tls = hosts_dir, tls
        self._all = credentials
        self._mirrors = dict(mirrors or {})
        self._supplies: dict[str, tuple[Credentials | None, Mapping[str, Sequence[Mirror | str]]]] = {}  # by tenant
        self._closed = False
        self._known: dict[tuple[str, str, bool | None], Registry] = {}
        self._pace: Pace | None = None
        self.forget()

    def supply(
        self, tenant: str, credentials: Credentials | None, mirrors: Mapping[str, Sequence[Mirror | str]] | None
    ) -> None:
        """Let a tenant have its own credentials, and its own mirrors of some hosts; ``None`` leaves what it had."""
        with self._lock:
            had = self._supplies.get(tenant, (None, {}))
            now = (credentials or had[0], had[1] if mirrors is None else dict(mirrors))
            if now == had:
                return
            self._supplies[tenant] = now
            stale = [self._known.pop(key) for key in list(self._known) if key[0] == tenant]
        for client in stale:  # a pull that runs goes on with it
            client.close()

    def credentials(self, tenant: str) -> Credentials:
        """What a tenant's clients ask who they are."""
        from layercache.registry import EcrCredentials  # noqa: PLC0415

        with self._lock:
            own = self._supplies.get(tenant, (None, {}))[0]
            if own is None and self._all is None:
                self._all = EcrCredentials()  # of all: ECR's tokens go by the AWS credential they are for
            return own or self._all or EcrCredentials()

    def mirrors(self, tenant: str, host: str) -> tuple[Mirror, ...]:
        """What a tenant's clients ask before the registry of that host."""
        from layercache.registry import Mirror  # noqa: PLC0415

        found = {**self._mirrors, **self._supplies.get(tenant, (None, {}))[1]}.get(host, ())
        return tuple(one if isinstance(one, Mirror) else Mirror(one) for one in found)

    def client(self, repository: Repository, plain_http: bool | None, *, tenant: str = "") -> Registry:  # noqa: FBT001
        """Return the client for a repository's registry.

        :raises StoreClosedError: once all are closed.
        """
        from layercache.registry import Pace, Registry  # noqa: PLC0415

        credentials, mirrors = self.credentials(tenant), self.mirrors(tenant, repository.host)
        key = (tenant, repository.api_host, plain_http)
        with self._lock:
            if self._closed:
                raise StoreClosedError("the cache is closed", hint="open it again")
            if self._pace is None:
                self._pace = Pace()  # one: a host that has said "later" has said it to everybody
            if key not in self._known:
                self._known[key] = Registry(
                    key[1],
                    plain_http=plain_http,
                    credentials=credentials,
                    mirrors=mirrors,
                    hosts_dir=self.hosts_dir,
                    tls=self.tls,
                    pace=self._pace,
                )
            return self._known[key]

    def close(self) -> None:
        """Close every connection. Closing twice is nothing."""
        with self._lock:
            self._closed = True
            known, self._known = list(self._known.values()), {}
        for client in known:
            client.close()

    def forget(self) -> None:
        """Begin anew, in a forked child: the connections are its parent's, and so may be a lock."""
        self._lock = threading.Lock()
        self._known = {}
        self._pace = None
