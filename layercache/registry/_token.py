"""The exchange of credentials for a bearer token (distribution token authentication specification). Pure."""

from __future__ import annotations

import urllib.parse

from layercache.errors import LayerCacheError, PolicyError, RegistryError, UnauthorizedError, UnreachableError
from layercache.registry._effects import Flow, Grant, LostError, Pause, Site
from layercache.registry._follow import ERROR_CAP, Hop, delay_of, follow, problem_of, refusal, small_body
from layercache.registry._url import Url, UrlError, Zone
from layercache.registry._wire import Problem, Token, parse_token

__all__ = ["RETRYABLE", "exchange", "realm_of"]

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

_ATTEMPTS = 4
_LONGEST = 60.0
_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity"}


def realm_of(site: Site, text: str) -> Url:
    """Where to ask for a token.

    :raises PolicyError: unless it is https, or http where the registry itself is spoken to over plain http.
    """
    try:
        realm = Url.parse(text)
    except UrlError as error:
        raise PolicyError(f"token realm of {site.host} refused: {error}", host=site.host) from None
    if realm.scheme == "http" and site.base.scheme != "http":
        raise PolicyError(f"token realm of {site.host} refused: it is plain http", host=site.host)
    return realm


def exchange(
    site: Site,
    realm: Url,
    service: str,
    scopes: tuple[str, ...],
    *,
    grant: Grant | None = None,
    identity: str = "",
    reach: Zone | None = None,
    hint: str = "",
) -> Flow[Token]:
    """Token for ``scopes``. ``grant`` is the Basic one of the realm, if any; ``identity`` an identity token.

    ``reach`` is the zone of the registry: its realm may not lie nearer to this machine, but for the registry itself.

    :raises UnauthorizedError: if the token endpoint refuses.
    """
    asked = [("service", service)] if service else []
    hop: Hop | None = None
    what = f"token for {site.host}"
    if identity:
        form = urllib.parse.urlencode(
            [
                ("grant_type", "refresh_token"),
                ("refresh_token", identity),
                ("client_id", "layercache"),
                *asked,
                ("scope", " ".join(scopes)),
            ]
        ).encode("ascii")
        shown = Grant("identity", "", secrets=(identity,))
        headers = {**_HEADERS, "Content-Type": "application/x-www-form-urlencoded"}
        hop, problem = yield from _try(site, "POST", realm, headers, reach=reach, what=what, form=form)
        if hop.head.status not in (404, 405):
            return (yield from _token(hop, problem, shown, what, hint))
    url = realm.asking([*asked, *(("scope", scope) for scope in scopes)])
    hop, problem = yield from _try(site, "GET", url, _HEADERS, reach=reach, what=what, grant=grant)
    return (yield from _token(hop, problem, grant, what, hint))


def _try(
    site: Site,
    method: str,
    url: Url,
    headers: dict[str, str],
    *,
    reach: Zone | None,
    what: str,
    grant: Grant | None = None,
    form: bytes | None = None,
) -> Flow[tuple[Hop, Problem | None]]:
    """Reply of the token endpoint, still open if it is a good one, else with what it said."""
    attempt = 0
    while True:
        attempt += 1
        try:
            hop = yield from follow(method, url, headers, home=site.base, reach=reach, grant=grant, form=form)
        except LostError as lost:
            if attempt >= min(_ATTEMPTS, lost.tries) or not (yield Pause(url.authority, attempt)):
                raise UnreachableError(f"{what}: {lost.reason}", host=url.authority) from lost
            continue
        if hop.head.status == 200:
            return hop, None
        problem = yield from problem_of(method, hop)
        delay = delay_of(hop.head)
        if hop.head.status in RETRYABLE and attempt < _ATTEMPTS and delay <= _LONGEST:
            shut = hop.head.status in (429, 503)
            if (yield Pause(hop.url.authority, attempt, least=delay, shut=shut)):
                continue
        return hop, problem


def _token(hop: Hop, problem: Problem | None, grant: Grant | None, what: str, hint: str) -> Flow[Token]:
    host = hop.url.authority
    if problem is not None:
        error: LayerCacheError = refusal(what, hop, problem, grant=grant, hint=hint)
        if hop.head.status in (400, 401, 403):
            error = UnauthorizedError(error.what, host=host, status=hop.head.status, code=problem.code, hint=hint)
        elif hop.head.status == 404:  # the endpoint is absent, which says nothing about what was asked for
            error = RegistryError(error.what, host=host, status=404, code=problem.code)
        raise error
    try:
        body = yield from small_body(hop.head, cap=ERROR_CAP, what=f"the reply of {host} to a token request")
    except LostError as lost:
        raise UnreachableError(f"{what}: {lost.reason}", host=host) from lost
    token = parse_token(body)
    if token is None:
        raise RegistryError(f"{what}: {host} answered without a token", host=host, status=200)
    return token
