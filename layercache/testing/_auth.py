"""Who may pull from a scripted registry: Basic, or Bearer with a token endpoint."""

from __future__ import annotations

import binascii
import json
import threading
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs

from layercache.testing._reply import Reply, Request, error

__all__ = ["Auth", "BasicAuth", "BearerAuth", "Gate"]


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """Every request carries this user name and password."""

    username: str
    password: str = field(repr=False)
    realm: str = "scripted"


@dataclass(frozen=True, slots=True)
class BearerAuth:
    """Every request carries a token from the token endpoint, which is ``/token``.

    The endpoint gives tokens to ``username`` with ``password`` (Basic, on a GET), to everybody where ``username`` is
    empty, and to who posts ``identity_token`` as a refresh token, where there is one; any other POST is a 405.
    ``scope`` is the one asked for in the challenge, ``repository:NAME:pull`` unless given; a token is good for the
    scopes it was asked for. ``expires_in`` ``None`` leaves the life out of the reply (the token lives 60 seconds).
    ``name`` is the member of the reply that holds the token. ``realm`` is the endpoint's URL in the challenge,
    if not the true one; ``elsewhere`` puts the endpoint on the storage's port.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    service: str = "scripted"
    scope: str | None = None
    expires_in: int | None = 300
    name: Literal["token", "access_token"] = "token"
    realm: str | None = None
    elsewhere: bool = False


Auth = BasicAuth | BearerAuth


class Gate:
    """Lets requests pass, or says how to come back. ``now`` is the registry's clock."""

    def __init__(self, auth: Auth | None, now: Callable[[], float]) -> None:
        self.auth = auth
        self._now = now
        self._lock = threading.Lock()
        self._tokens: dict[str, tuple[float, frozenset[str]]] = {}

    def refuse(self, request: Request, realm: str) -> Reply | None:
        """Return the challenge ``request`` earns, or nothing. ``realm`` is the URL of the token endpoint."""
        auth = self.auth
        header = request.headers.get("authorization", "")
        if auth is None:
            return None
        if isinstance(auth, BasicAuth):
            if _basic(header) == (auth.username, auth.password):
                return None
            return _challenged(f'Basic realm="{auth.realm}"')
        scope = auth.scope or (f"repository:{request.repository}:pull" if request.repository else "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() == "bearer" and self._covers(token, scope):
            return None
        challenge = f'Bearer realm="{auth.realm or realm}",service="{auth.service}"'
        return _challenged(f'{challenge},scope="{scope}"' if scope else challenge)

    def token(self, request: Request) -> Reply:
        """Return what the token endpoint says to ``request``."""
        auth = self.auth
        if not isinstance(auth, BearerAuth):
            return error(404, "NOT_FOUND", "there is no token endpoint")
        if request.method == "POST":
            form = parse_qs(request.body.decode("latin-1"))
            if not auth.identity_token:
                return error(405, "UNSUPPORTED", "no tokens by POST")
            if form.get("refresh_token") != [auth.identity_token]:
                return error(401, "UNAUTHORIZED", "not this refresh token")
        else:
            form = parse_qs(request.query)
            header = request.headers.get("authorization", "")
            if auth.username and _basic(header) != (auth.username, auth.password):
                return error(401, "UNAUTHORIZED", "not this user name and password")
        # One scope parameter may hold several, separated by spaces, and there may be several parameters.
        scopes = frozenset(scope for value in form.get("scope", []) for scope in value.split())
        with self._lock:
            token = f"scripted-{len(self._tokens)}"
            self._tokens[token] = (self._now() + (60 if auth.expires_in is None else auth.expires_in), scopes)
        life = {} if auth.expires_in is None else {"expires_in": auth.expires_in}
        body = json.dumps({auth.name: token, **life}).encode()
        headers = (("Content-Type", "application/json"), ("Content-Length", str(len(body))))
        return Reply(200, headers, (body,), len(body))

    def revoke(self) -> None:
        """End every token given out so far."""
        with self._lock:
            self._tokens = {token: (0.0, scopes) for token, (_, scopes) in self._tokens.items()}

    def _covers(self, token: str, scope: str) -> bool:
        with self._lock:
            end, scopes = self._tokens.get(token, (0.0, frozenset[str]()))
        return self._now() < end and (not scope or scope in scopes)


def _basic(header: str) -> tuple[str, str]:
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        username, _, password = b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return username, password


def _challenged(challenge: str) -> Reply:
    return error(401, "UNAUTHORIZED", "authentication required").put(("WWW-Authenticate", challenge))
