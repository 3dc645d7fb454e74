"""Names of images: registry host, repository, tag, digest (distribution-spec "Pulling manifests")."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import NewType

from layercache.errors import InvalidDigestError, InvalidReferenceError
from layercache.oci._digest import Digest

__all__ = ["Reference", "Repository", "Tag", "parse_tag"]

Tag = NewType("Tag", str)
"""A tag of the distribution grammar; :func:`parse_tag` and :meth:`Reference.parse` make them."""

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
_HOST = re.compile(rf"(?P<name>{_LABEL}(?:\.{_LABEL})*|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[1-9][0-9]{{0,4}}))?")
_ALGORITHMS = frozenset({"sha256", "sha512", "blake3"})
_HEX64 = re.compile(r"[0-9a-f]{64}")

_HUB = "docker.io"
_HUB_NAMES = frozenset({_HUB, "index.docker.io"})
_HUB_API = "registry-1.docker.io"
_MAX_NAME = 255


def parse_tag(text: str) -> Tag:
    """Tag, if ``text`` is one.

    :raises InvalidReferenceError: if it is not 1 to 128 letters, digits, dots, hyphens and underscores, the first a
        letter, digit or underscore.
    """
    if not isinstance(text, str) or _TAG.fullmatch(text) is None:
        raise InvalidReferenceError("not a tag", value=text)
    return Tag(text)


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository on a registry. ``host`` is in lower case, with its port if one was given.

    A value exists only if it is valid: its parts are safe in a URL.
    """

    host: str
    name: str

    def __post_init__(self) -> None:
        fault = _fault(self.host, self.name)
        if fault is not None:
            raise InvalidReferenceError(fault, value=f"{self.host}/{self.name}")

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Repository written as ``[host/]name``; the inverse of ``str``.

        The first component is a host if it holds a dot or a colon or is ``localhost``, else the host is ``docker.io``,
        where a name of one component means ``library/name``.

        :raises InvalidReferenceError: if it is not of that form.
        """
        if not isinstance(text, str):
            raise InvalidReferenceError("not a repository", value=text)
        return _repository(text, text)

    @property
    def api_host(self) -> str:
        """Host to talk to: ``host``, but for ``docker.io``, whose registry lives elsewhere."""
        return _HUB_API if self.host == _HUB else self.host

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"


@dataclass(frozen=True, slots=True)
class Reference:
    """What a user calls an image: a repository with a tag, a digest, or both. With both, the digest decides."""

    repository: Repository
    tag: Tag | None = None
    digest: Digest | None = None

    def __post_init__(self) -> None:
        if self.tag is None and self.digest is None:
            raise InvalidReferenceError("neither tag nor digest", value=str(self.repository))
        if self.tag is not None:
            parse_tag(self.tag)

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reference written as ``[docker://][host[:port]/]name[:tag][@digest]``; the inverse of ``str``.

        Without tag and digest, the tag is ``latest``. Hosts as in :meth:`Repository.parse`.

        :raises InvalidReferenceError: if it is not of that form. Nothing has been asked of the network by then.
        :raises UnsupportedError: if its digest is of another algorithm than sha256 and sha512.
        """
        if not isinstance(text, str):
            raise InvalidReferenceError("not a reference", value=text)
        rest, at, after = text.removeprefix("docker://").partition("@")
        digest = _digest(after, text) if at else None
        name, colon, label = rest.rpartition(":")
        tag: Tag | None = None
        if colon and "/" not in label:  # else the colon belongs to the port of the host
            rest = name
            if _TAG.fullmatch(label) is None:
                raise InvalidReferenceError("the tag is not of the grammar", value=_shown(text))
            tag = Tag(label)
        # Docker would look for an image of this name on its hub.
        if _HEX64.fullmatch(rest) or rest in _ALGORITHMS:
            raise InvalidReferenceError(
                "a digest alone names no image", value=_shown(text), hint="write NAME@sha256:..."
            )
        repository = _repository(rest, text)
        return cls(repository, Tag("latest") if tag is None and digest is None else tag, digest)

    @property
    def target(self) -> Digest | Tag:
        """What to ask the registry for: the digest where there is one, else the tag."""
        if self.digest is not None:
            return self.digest
        assert self.tag is not None  # noqa: S101 -- the constructor saw to it
        return self.tag

    def with_digest(self, digest: Digest) -> Reference:
        """Same repository and tag, pinned to ``digest``."""
        return Reference(self.repository, self.tag, digest)

    def __str__(self) -> str:
        text = str(self.repository)
        if self.tag is not None:
            text += f":{self.tag}"
        return text if self.digest is None else f"{text}@{self.digest}"


def _repository(text: str, whole: str) -> Repository:
    first, slash, rest = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host, name = _host(first) or "", rest  # an empty host is refused below
    else:
        host, name = _HUB, text
    if host == _HUB and "/" not in name:
        name = f"library/{name}"
    fault = _fault(host, name)
    if fault is not None:
        raise InvalidReferenceError(fault, value=_shown(whole), hint=_hint(whole))
    return Repository(host, name)


def _fault(host: object, name: object) -> str | None:
    if not isinstance(host, str) or _host(host) != host:
        return "not the host of a registry"
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        return "not the name of a repository"
    if len(host) + 1 + len(name) > _MAX_NAME:
        return f"host and repository are longer than {_MAX_NAME} characters"
    return None


def _host(text: str) -> str | None:
    """Canonical spelling of a host with an optional port, or ``None``."""
    match = _HOST.fullmatch(text)
    if match is None:
        return None
    name, port = match["name"].lower(), match["port"]
    if port is not None and int(port) > 65535:
        return None
    if match["ipv6"] is not None:
        try:
            name = f"[{ipaddress.IPv6Address(match['ipv6'])}]"
        except ValueError:
            return None
    if name in _HUB_NAMES and port is None:
        return _HUB
    return name if port is None else f"{name}:{port}"


def _digest(text: str, whole: str) -> Digest:
    try:
        return Digest.parse(text)
    except InvalidDigestError:
        # Without the cause: its text may hold a password.
        what = "what follows @ is not a digest"
        raise InvalidReferenceError(what, value=_shown(whole), hint="write NAME@sha256:...") from None


def _hint(text: str) -> str:
    if "://" in text:
        return "leave out http:// and https://"
    return "a name has lower-case letters and digits, with . _ - / between them"


def _shown(text: str) -> str:
    """``text`` for a message, without what may be a secret: the user information and the query of a URL."""
    text, query, _ = text.partition("?")
    _, at, after = text.partition("@")
    if at and not after.startswith(("sha256:", "sha512:")):
        text = f"...@{text.rpartition('@')[2]}"
    return f"{text}?..." if query else text
