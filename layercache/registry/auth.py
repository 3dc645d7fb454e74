"""Where user names and passwords come from: given, none, or what docker and podman were logged in with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from layercache.control import Control
from layercache.errors import LayerCacheError, UnauthorizedError
from layercache.registry._helper import ask_helper
from layercache.registry._wire import parse_basic

__all__ = ["Anonymous", "Credential", "Credentials", "DockerConfig", "Password"]

_MOST = 4 << 20  # bytes of a config file
_HUB = "docker.io"
_HUB_KEY = "https://index.docker.io/v1/"
_HUB_NAMES = frozenset({_HUB, "index.docker.io", "registry-1.docker.io"})
_TOKEN_USER = "<token>"  # noqa: S105 -- how a helper marks an identity token, not a password


@dataclass(frozen=True, slots=True)
class Credential:
    """A user name with its ``password``, or with an ``identity`` token to trade for bearer tokens.

    ``source`` says where it was found, for messages; ``lifetime`` for how many seconds from now it may be used, where
    that is known. Neither ``repr`` nor ``pickle`` gives the secrets away.
    """

    username: str
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    source: str = ""
    lifetime: float | None = field(default=None, compare=False)

    @property
    def fingerprint(self) -> str:
        """Text that is equal for equal secrets and does not lead back to them; for keys in memory only."""
        parts = (self.username, self.password, self.identity)
        return hashlib.sha256(b"".join(b"%d:%s" % (len(p.encode()), p.encode()) for p in parts)).hexdigest()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a credential is not to be written down")


class Credentials(Protocol):
    """What a registry asks when it is asked who we are. Called from several threads at once."""

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:
        """Credential for a registry, ``None`` to stay anonymous. May block; then it watches ``control``.

        ``host`` is the registry as people write it (``docker.io``, ``127.0.0.1:5000``).

        :raises LayerCacheError: if there should be one but it cannot be had. The pull then goes on anonymously, and
            the text is part of the error if that is refused.
        """

    def eager(self, host: str) -> bool:
        """True where the credential is to be sent at once, as Basic, without waiting for a challenge (ECR)."""

    def refused(self, host: str, credential: Credential) -> None:
        """Told that the registry refused a credential: forget it, if it was remembered."""


class Anonymous:
    """No credentials, for any registry."""

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:  # noqa: ARG002
        """Nothing."""
        return None

    def eager(self, host: str) -> bool:  # noqa: ARG002
        """Never."""
        return False

    def refused(self, host: str, credential: Credential) -> None:
        """Nothing to forget."""


class Password:
    """One user name and password, for the registry ``host`` and no other."""

    def __init__(self, host: str, username: str, password: str) -> None:
        self._host = host
        self._credential = Credential(username, password, source="the given password")

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:  # noqa: ARG002
        """The given credential, if ``host`` is its registry."""
        return self._credential if host == self._host else None

    def eager(self, host: str) -> bool:  # noqa: ARG002
        """Never: the registry says how it wants to be shown it."""
        return False

    def refused(self, host: str, credential: Credential) -> None:
        """Nothing to forget: it was given."""

    def __repr__(self) -> str:
        return f"Password(host={self._host!r})"


class DockerConfig:
    """What ``docker login`` and ``podman login`` left behind, read anew each time.

    Looked up in ``DOCKER_AUTH_CONFIG`` (the JSON itself), ``$DOCKER_CONFIG/config.json`` or ``~/.docker/config.json``,
    ``$REGISTRY_AUTH_FILE``, ``$XDG_RUNTIME_DIR/containers/auth.json`` and ``$XDG_CONFIG_HOME/containers/auth.json``;
    the first that has something for the registry counts. In a file: ``credHelpers``, ``credsStore``, ``auths``. Entries
    that make no sense are passed over. ``file`` is read instead of all these, if given.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] | None = None) -> None:
        self._file = None if file is None else Path(file)
        self._environ = os.environ if environ is None else environ

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:
        """Credential of the first place that has one; may run a credential helper.

        :raises UnauthorizedError: if a helper failed, or the given ``file`` cannot be read, and no other place has one.
        """
        failure: LayerCacheError | None = None
        for source, config in self._configs():
            try:
                found = _from_config(
                    config, source, host, repository=repository, control=control, environ=self._environ
                )
            except UnauthorizedError as error:
                failure = failure or error
                continue
            if found is not None:
                return found
        if failure is not None:
            raise failure
        return None

    def eager(self, host: str) -> bool:  # noqa: ARG002
        """Never: the registry says how it wants to be shown it."""
        return False

    def refused(self, host: str, credential: Credential) -> None:
        """Nothing to forget: files and helpers are asked each time."""

    def _configs(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        if self._file is not None:
            config = _read(self._file)
            if config is None:
                raise UnauthorizedError(f"credentials file {self._file} is not a readable JSON object")
            yield str(self._file), config
            return
        inline = _object(self._environ.get("DOCKER_AUTH_CONFIG", ""))
        if inline is not None:
            yield "DOCKER_AUTH_CONFIG", inline
        for path in self._paths():
            config = _read(path)
            if config is not None:
                yield str(path), config

    def _paths(self) -> Iterator[Path]:
        environ = self._environ
        home = environ.get("HOME", "")
        if directory := environ.get("DOCKER_CONFIG"):
            yield Path(directory) / "config.json"
        elif home:
            yield Path(home) / ".docker" / "config.json"
        if file := environ.get("REGISTRY_AUTH_FILE"):
            yield Path(file)
        if directory := environ.get("XDG_RUNTIME_DIR"):
            yield Path(directory) / "containers" / "auth.json"
        if directory := environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else ""):
            yield Path(directory) / "containers" / "auth.json"


def _read(path: Path) -> Mapping[str, object] | None:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST + 1)
    except OSError:
        return None
    return _object(raw) if len(raw) <= _MOST else None


def _object(text: str | bytes) -> Mapping[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _from_config(
    config: Mapping[str, object],
    source: str,
    host: str,
    *,
    repository: str,
    control: Control,
    environ: Mapping[str, str],
) -> Credential | None:
    helpers = config.get("credHelpers")
    suffix = next(filter(None, (_of(helpers, key) for key in _keys(host))), None) or config.get("credsStore")
    failure: UnauthorizedError | None = None
    if isinstance(suffix, str) and suffix:
        try:
            found = _from_helper(suffix, host, control, environ)
        except UnauthorizedError as error:
            found, failure = None, error
        if found is not None:
            return found
    found = _from_auths(config.get("auths"), source, host, repository)
    if found is None and failure is not None:
        raise failure
    return found


def _from_helper(suffix: str, host: str, control: Control, environ: Mapping[str, str]) -> Credential | None:
    answer = ask_helper(suffix, _HUB_KEY if host in _HUB_NAMES else host, control=control, environ=environ)
    if answer is None:
        return None
    username, secret = answer
    source = f"docker-credential-{suffix}"
    if username == _TOKEN_USER:
        return Credential(username, identity=secret, source=source)
    return Credential(username, secret, source=source)


def _from_auths(auths: object, source: str, host: str, repository: str) -> Credential | None:
    if not isinstance(auths, dict):
        return None
    # containers-auth.json(5): a key may name a path; the longest that is a prefix of the repository counts.
    parts = repository.split("/") if repository else []
    for depth in range(len(parts), 0, -1):
        path = "/".join(parts[:depth])
        for name in _names(host):
            found = _entry(auths.get(f"{name}/{path}"), source)
            if found is not None:
                return found
    for key in _keys(host):
        found = _entry(auths.get(key), source)
        if found is not None:
            return found
    wanted = _names(host)
    for key, value in auths.items():
        if isinstance(key, str) and _bare(key) in wanted:
            found = _entry(value, source)
            if found is not None:
                return found
    return None


def _entry(value: object, source: str) -> Credential | None:
    if not isinstance(value, dict):
        return None
    auth, identity = _of(value, "auth"), _of(value, "identitytoken")
    pair = parse_basic(auth) if auth else (_of(value, "username"), _of(value, "password"))
    username, password = pair or ("", "")
    if identity:
        return Credential(username or _TOKEN_USER, password, identity=identity, source=source)
    return Credential(username, password, source=source) if username and password else None


def _of(mapping: object, key: str) -> str:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if isinstance(value, str) else ""


def _names(host: str) -> tuple[str, ...]:
    return (_HUB, "index.docker.io", "registry-1.docker.io") if host in _HUB_NAMES else (host,)


def _keys(host: str) -> tuple[str, ...]:
    """Keys under which a registry is found, the likeliest first."""
    names = _names(host)
    hub = (_HUB_KEY,) if host in _HUB_NAMES else ()
    return (*hub, *names, *(f"https://{name}" for name in names))


def _bare(key: str) -> str:
    """Host of a key such as ``https://host/v1/``, and of no other key with a path."""
    scheme, found, rest = key.partition("://")
    if not found:
        return ""
    host, _, path = rest.partition("/")
    return host if scheme in ("http", "https") and path.strip("/") in ("", "v1", "v2") else ""
