"""Who we are to one registry: answers to its challenges, tokens kept while they live, one exchange at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError, LayerCacheError, UnauthorizedError
from layercache.registry._ecr_host import PUBLIC_HOSTS
from layercache.registry._effects import Authorise, Flow, Grant, Site
from layercache.registry._flight import Flights
from layercache.registry._token import exchange, realm_of
from layercache.registry._url import Url, Zone
from layercache.registry._wire import Token, basic, parse_scopes
from layercache.registry.auth import Credential, Credentials

__all__ = ["Authority"]

_CREDENTIAL_LIFE = 300.0  # seconds an answer of a file or helper is reused
_FAILURE_LIFE = 5.0
_MOST_TOKENS = 1024
_PAIRS = {"registry-1.docker.io": "auth.docker.io", "registry.gitlab.com": "gitlab.com"}
"""Registries whose token endpoint is known to be another host of the same operator."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How a registry wants to be asked, learnt from its last challenge."""

    basic: bool
    realm: Url | None = None
    service: str = ""
    scopes: tuple[str, ...] = ()
    zone: Zone | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    credential: Credential | None
    problem: str
    until: float


class Authority:
    """Grants for one registry, shared by all threads of a process.

    A password goes to the registry itself, to the known token endpoint of its operator and to ``realm_hosts``
    (``host`` or ``host:port``; ``*`` for any), and nowhere else: a token elsewhere is asked for anonymously.
    """

    def __init__(
        self,
        site: Site,
        credentials: Credentials,
        *,
        realm_hosts: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site = site
        self._credentials = credentials
        self._realm_hosts = realm_hosts
        self._clock = clock
        self._lock = threading.Lock()
        self._flights = Flights()
        self._scheme: _Scheme | None = None
        self._tokens: dict[tuple[object, ...], tuple[Grant, float]] = {}
        self._found: dict[str, _Found] = {}

    def grant(self, ask: Authorise, run: Callable[[Flow[Token]], Token], control: Control) -> Grant | None:
        """Answer to ``ask``. ``run`` performs an exchange; it is called by one thread at a time for one key.

        :raises UnauthorizedError: if a refusal cannot be answered.
        """
        if ask.challenges is None:
            scheme = self._scheme
            if scheme is None:
                return self._basic(ask, control) if self._credentials.eager(self._site.host) else None
        else:
            scheme = self._learn(ask)
            self._forget(ask)
        if scheme.basic:
            grant = self._basic(ask, control)
            if grant is not None and ask.refused is not None and grant.header() == ask.refused.header():
                raise UnauthorizedError(
                    f"{ask.reason}; the credentials of {grant.source} were refused",
                    host=self._site.host,
                    status=401,
                    hint=_login(self._site),
                )
            return grant
        return self._bearer(ask, scheme, run, control)

    def has_credentials(self) -> bool:
        """Whether any were found for this registry."""
        with self._lock:
            return any(found.credential is not None for found in self._found.values())

    # --- challenges ---

    def _learn(self, ask: Authorise) -> _Scheme:
        challenges = ask.challenges or ()
        found = next((c for c in challenges if c.scheme == "bearer" and c.parameters.get("realm")), None)
        if found is not None:
            realm = realm_of(self._site, found.parameters["realm"])
            scopes = parse_scopes(found.parameters.get("scope", ""))
            scheme = _Scheme(False, realm, found.parameters.get("service", ""), scopes, ask.zone)
        elif any(c.scheme == "basic" for c in challenges):
            scheme = _Scheme(True)
        elif self._scheme is not None:
            return self._scheme  # a refusal without a challenge: as last time (an expired token of ECR)
        elif self._credentials.eager(self._site.host):
            return _Scheme(True)
        else:
            raise UnauthorizedError(
                f"{ask.reason}; it did not say how to log in", host=self._site.host, status=401, hint=_login(self._site)
            )
        self._scheme = scheme
        return scheme

    def _forget(self, ask: Authorise) -> None:
        """Drop what was refused, unless another thread has replaced it already."""
        if ask.refused is None:
            return
        with self._lock:
            for key, (grant, _) in list(self._tokens.items()):
                if grant is ask.refused:
                    del self._tokens[key]
        if ask.refused.scheme == "Basic":
            with self._lock:
                found = self._found.get(ask.repository)
                stale = found is not None and found.credential is not None
                stale = stale and _header(found) == ask.refused.header()
                if stale:
                    del self._found[ask.repository]
            if stale and found is not None and found.credential is not None:
                self._credentials.refused(self._site.host, found.credential)

    # --- grants ---

    def _basic(self, ask: Authorise, control: Control) -> Grant | None:
        found = self._credential(ask.repository, control)
        credential = found.credential
        if credential is None or not credential.password:
            if ask.challenges is None:
                return None
            raise UnauthorizedError(
                f"{ask.reason}; {found.problem or 'no credentials for it were found'}",
                host=self._site.host,
                status=401,
                hint=_login(self._site),
            )
        return _sealed(credential)

    def _bearer(self, ask: Authorise, scheme: _Scheme, run: Callable[[Flow[Token]], Token], control: Control) -> Grant:
        realm = scheme.realm
        assert realm is not None  # noqa: S101 -- a scheme that is not Basic has one
        wanted = parse_scopes(f"repository:{ask.repository}:pull")
        scopes = scheme.scopes or wanted
        if ask.challenges is None and any(scope.startswith("repository:") for scope in scopes):
            scopes = wanted  # the scope learnt belongs to the repository it was learnt for
        found = self._credential(ask.repository, control)
        credential = found.credential if self._trusts(realm) else None
        hint = ""
        if found.credential is not None and credential is None:
            hint = (
                f"the password was not sent to {realm.authority}: allow it in realm_hosts if it belongs to the registry"
            )
        elif credential is not None:
            hint = f"used the credentials of {credential.source}"
        elif found.problem:
            hint = found.problem
        fingerprint = "" if credential is None else credential.fingerprint
        key = (self._site.host, realm.origin, realm.target, scheme.service, scopes, fingerprint)

        def work() -> Grant:
            kept = self._kept(key)
            if kept is not None:
                return kept
            source = "anonymous" if credential is None else credential.source

            def asked(who: Credential | None) -> Token:
                return run(
                    exchange(
                        self._site,
                        realm,
                        scheme.service,
                        scopes,
                        grant=_sealed(who) if who is not None and who.password else None,
                        identity="" if who is None else who.identity,
                        reach=scheme.zone,
                        hint=hint or _login(self._site),
                    )
                )

            try:
                token = asked(credential)
            except UnauthorizedError:
                if credential is None or self._site.host not in PUBLIC_HOSTS:
                    raise
                token, source = asked(None), "anonymous"  # stale credentials are no reason not to read what all may
            grant = Grant("Bearer", f"Bearer {token.value}", source=source)
            now = self._clock()
            with self._lock:
                if len(self._tokens) >= _MOST_TOKENS:
                    self._tokens = {k: v for k, v in self._tokens.items() if v[1] > now}
                if len(self._tokens) >= _MOST_TOKENS:
                    self._tokens.clear()
                # Renewed before it ends, so that a request on its way does not meet the end.
                self._tokens[key] = (grant, now + token.lifetime - min(30.0, token.lifetime / 5))
            return grant

        return self._kept(key) or self._flights.once(key, work, control)

    def _kept(self, key: tuple[object, ...]) -> Grant | None:
        with self._lock:
            grant, until = self._tokens.get(key, (None, 0.0))
        return grant if self._clock() < until else None

    def _trusts(self, realm: Url) -> bool:
        base = self._site.base
        return (
            realm.origin == base.origin
            or (realm.scheme == "https" and realm.port == 443 and _PAIRS.get(base.authority) == realm.host)
            or not self._realm_hosts.isdisjoint(("*", realm.authority, realm.host))
        )

    def _credential(self, repository: str, control: Control) -> _Found:
        found = self._found.get(repository)
        if found is not None and self._clock() < found.until:
            return found

        def work() -> _Found:
            problem = ""
            credential: Credential | None = None
            try:
                credential = self._credentials.basic(self._site.host, repository=repository, control=control)
            except (CancelledError, DeadlineError):
                raise
            except LayerCacheError as error:
                problem = str(error)
            life = _FAILURE_LIFE if problem else _CREDENTIAL_LIFE
            if credential is not None and credential.lifetime is not None:
                life = min(life, credential.lifetime)
            found = _Found(credential, problem, self._clock() + life)
            with self._lock:
                if len(self._found) >= _MOST_TOKENS:
                    self._found.clear()
                self._found[repository] = found
            return found

        return self._flights.once(("credential", repository), work, control)


def _sealed(credential: Credential) -> Grant:
    header = basic(credential.username, credential.password)
    return Grant("Basic", header, secrets=(credential.password,), source=credential.source)


def _header(found: _Found | None) -> str:
    return (
        "" if found is None or found.credential is None else basic(found.credential.username, found.credential.password)
    )


def _login(site: Site) -> str:
    return f"log in with 'docker login {site.host}' or pass credentials"
