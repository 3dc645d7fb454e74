"""One registry, spoken to from many threads."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator

from layercache.control import Control
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Digest, Reference, Repository, Tag
from layercache.registry import _flow
from layercache.registry._authority import Authority
from layercache.registry._driver import Driver, Session
from layercache.registry._effects import Site
from layercache.registry._flow import Document
from layercache.registry._pace import Pace
from layercache.registry._sockets import Patience
from layercache.registry._url import Url, Zone, zone_of
from layercache.registry.auth import Credentials
from layercache.registry.ecr import EcrCredentials

__all__ = ["Registry"]


class Registry:
    """A client for the registry ``host`` (``docker.io``, ``127.0.0.1:5000``), for use by many threads.

    ``plain_http`` speaks http instead of https; where it is not given, to loopback hosts only. ``credentials`` default
    to what docker and podman were logged in with. A password goes to the registry itself and to the known token
    endpoint of its operator; ``realm_hosts`` names further ones (``*`` for any that the registry names).

    Connections and tokens belong to the process: a forked child makes its own. Every operation blocks, ends within
    0.2 s of a cancel, and raises only errors of :mod:`layercache.errors`, without secrets or queries of URLs in them.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool | None = None,
        credentials: Credentials | None = None,
        realm_hosts: Collection[str] = (),
    ) -> None:
        self.host = host
        authority = Repository(host, "any").api_host
        base = Url.parse(f"https://{authority}/")
        if plain_http or (plain_http is None and (base.host == "localhost" or zone_of(base.host) is Zone.LOOPBACK)):
            base = Url.parse(f"http://{authority}/")
        self._site = Site(host, base)
        self._credentials = EcrCredentials() if credentials is None else credentials
        self._realm_hosts = frozenset(realm_hosts)
        self._patience = Patience()
        self._session: tuple[int, Session] | None = None

    def resolve(self, reference: Reference, *, control: Control, ledger: Ledger) -> Descriptor:
        """What ``reference`` names now: media type, digest and the size that the registry claims.

        :raises NotFoundError: if the registry has no such image.
        :raises RegistryError: if it refuses, or gives no usable answer.
        """
        return self._driver(control, ledger, "resolve").run(_flow.resolve(self._site, reference))

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
        flow = _flow.document(self._site, repository, target, expected=expected, tag=tag)
        return self._driver(control, ledger, "wire").run(flow)

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
        flow = _flow.fetch(self._site, repository, descriptor, offset=offset, length=length, parent=parent)
        return self._driver(control, ledger, "wire").stream(flow)

    def close(self) -> None:
        """Close the connections that are not in use. The registry stays usable; it connects anew."""
        if self._session is not None and self._session[0] == os.getpid():
            self._session[1].transport.close()

    def _driver(self, control: Control, ledger: Ledger, stage: str) -> Driver:
        pid = os.getpid()
        held = self._session
        if held is None or held[0] != pid:
            # urllib3 is imported when a registry is really asked: it takes 50 ms.
            from layercache.registry._transport import Transport  # noqa: PLC0415

            # Also in a forked child: its parent goes on using the sockets, and may have held a lock.
            authority = Authority(self._site, self._credentials, realm_hosts=self._realm_hosts)
            held = self._session = (
                pid,
                Session(pid, Transport(self._patience), authority, Pace(first=self._patience.pause)),
            )
        return Driver(held[1], control, ledger, stage)

    def __repr__(self) -> str:
        return f"Registry({self.host!r})"
