"""One source of a registry's content, spoken to from many threads."""

from __future__ import annotations

import os
from collections.abc import Generator

from layercache.control import Control
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Digest, Reference, Repository, Tag
from layercache.registry import _flow, _referrers
from layercache.registry._authority import Authority
from layercache.registry._driver import Driver, Session
from layercache.registry._effects import Site
from layercache.registry._flow import Document
from layercache.registry._pace import Pace
from layercache.registry._parts import WORTH, in_parts
from layercache.registry._sockets import Patience
from layercache.registry.auth import Credentials
from layercache.registry.sources import Tls

__all__ = ["Upstream"]


class Upstream:
    """The registry itself, or a mirror of it: conversations with one host. What :class:`Registry` chains."""

    def __init__(
        self,
        site: Site,
        credentials: Credentials,
        *,
        realm_hosts: frozenset[str],
        tls: Tls,
        resolves: bool = True,
        pulls: bool = True,
        pace: Pace | None = None,
        patience: Patience,
    ) -> None:
        self.site = site
        self.resolves = resolves
        self.pulls = pulls
        self.patience = patience
        self.credentials = credentials
        self._realm_hosts = realm_hosts
        self._tls = tls
        self._pace = pace
        self._made_in = os.getpid()
        self._session: tuple[int, Session] | None = None

    def has_credentials(self) -> bool:
        """Whether credentials for it were found since it was made."""
        held = self._session
        return held is not None and held[1].authority.has_credentials()

    def resolve(self, reference: Reference, *, control: Control, ledger: Ledger) -> Descriptor:
        """What ``reference`` names now; see :meth:`Registry.resolve`."""
        return self._driver(control, ledger, "resolve").run(_flow.resolve(self.site, reference))

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
        """Manifest or index; see :meth:`Registry.document`."""
        flow = _flow.document(self.site, repository, target, expected=expected, tag=tag)
        return self._driver(control, ledger, "wire").run(flow)

    def referrers(
        self, repository: Repository, subject: Digest, *, control: Control, ledger: Ledger
    ) -> tuple[Descriptor, ...]:
        """What refers to a manifest; see :meth:`Registry.referrers`."""
        return self._driver(control, ledger, "wire").run(_referrers.referrers(self.site, repository, subject))

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
        """Bytes of a blob; see :meth:`Registry.fetch`."""
        session = self.session()

        def ask(
            offset: int, length: int | None, *, strict: bool = False, control: Control = control
        ) -> Generator[bytes, None, None]:
            flow = _flow.fetch(
                self.site, repository, descriptor, offset=offset, length=length, parent=parent, strict=strict
            )
            try:
                yield from Driver(session, control, ledger, "wire").stream(flow)
            except _flow.RangesError:
                session.give_up_ranges()
                raise

        end = descriptor.size if length is None else min(descriptor.size, offset + length)
        if end - offset < WORTH or not session.ranges:
            return ask(offset, length)
        return in_parts(ask, offset, end, spare=session.pace.spare, control=control)

    def close(self) -> None:
        """Close the connections that are not in use. The registry stays usable; it connects anew."""
        if self._session is not None and self._session[0] == os.getpid():
            self._session[1].transport.close()

    def _driver(self, control: Control, ledger: Ledger, stage: str) -> Driver:
        return Driver(self.session(), control, ledger, stage)

    def session(self) -> Session:
        """What its operations share in this process.

        :raises InvalidError: for a proxy of the environment that is none.
        """
        pid = os.getpid()
        held = self._session
        if held is None or held[0] != pid:
            # urllib3 is imported when a registry is really asked: it takes 50 ms.
            from layercache.registry._transport import Transport  # noqa: PLC0415

            # Also in a forked child: its parent goes on using the sockets, and may have held a lock.
            authority = Authority(self.site, self.credentials, realm_hosts=self._realm_hosts)
            pace = self._pace if self._pace is not None and pid == self._made_in else Pace(first=self.patience.pause)
            held = self._session = (
                pid,
                Session(pid, Transport(self.patience, self._tls, self.site.base), authority, pace),
            )
        return held[1]

    def __repr__(self) -> str:
        return f"Upstream({self.site.host!r})"
