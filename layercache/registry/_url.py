"""URLs that cannot leak, and how far a redirect may reach.

``str()`` of a :class:`Url` leaves out the query, which may be a signature; only the transport asks for :attr:`target`.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import urllib.parse
from dataclasses import dataclass

__all__ = ["Url", "UrlError", "Zone", "zone_of"]

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_LOOSE = re.compile(r"[ \"<>^`{|}\x80-\U0010ffff]")  # what servers forget to encode
_MOST = 16 << 10  # characters of a URL; a presigned one with a session token has about two thousand


class UrlError(ValueError):
    """Not a URL to send a request to. The text says why, never which URL: its query may be a secret."""


@dataclass(frozen=True, slots=True)
class Url:
    """An absolute http or https URL. ``host`` is lower case, without the brackets of an IPv6 address."""

    scheme: str
    host: str
    port: int
    path: str
    query: str = ""

    @classmethod
    def parse(cls, text: str) -> Url:
        """URL written as ``scheme://host[:port][/path][?query]``; a fragment is dropped.

        :raises UrlError: for another scheme, a user name or password, control characters or a wrong host or port.
        """
        if len(text) > _MOST:
            raise UrlError("the URL is too long")
        # Headers arrive as Latin-1; the bytes of another encoding are sent back as they came.
        text = _LOOSE.sub(lambda m: "".join(f"%{b:02X}" for b in _bytes(m[0])), text.strip(" \t"))
        if _UNSAFE.search(text):
            raise UrlError("the URL holds a character that does not belong there")
        try:
            parts = urllib.parse.urlsplit(text)
            port = parts.port
            host = parts.hostname
        except ValueError:
            raise UrlError("the URL has a wrong host or port") from None
        scheme = parts.scheme.lower()
        if scheme not in _PORTS:
            raise UrlError("the URL is neither http nor https")
        if "@" in parts.netloc:
            raise UrlError("the URL carries a user name or password")
        if not host or port == 0 or not _is_host(host):
            raise UrlError("the URL has a wrong host or port")
        return cls(scheme, host.lower(), _PORTS[scheme] if port is None else port, parts.path or "/", parts.query)

    def join(self, location: str) -> Url:
        """Where ``location``, absolute or relative (RFC 3986 section 5), leads from here.

        :raises UrlError: as :meth:`parse`.
        """
        try:
            return Url.parse(
                urllib.parse.urljoin(f"{self.scheme}://{self.authority}{self.target}", location.strip(" \t"))
            )
        except UrlError:
            raise
        except ValueError:
            raise UrlError("the URL has a wrong host or port") from None

    def at(self, path: str) -> Url:
        """URL of another path of the same origin."""
        return Url(self.scheme, self.host, self.port, path)

    def asking(self, parameters: list[tuple[str, str]]) -> Url:
        """The same URL with ``parameters`` added to its query."""
        query = "&".join(part for part in (self.query, urllib.parse.urlencode(parameters)) if part)
        return Url(self.scheme, self.host, self.port, self.path, query)

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: the bound that credentials do not cross."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """Host as it is written in a URL, with its port where that is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """Path and query as they are sent. May be a secret."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}{'?...' if self.query else ''}"

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"


def _bytes(character: str) -> bytes:
    return character.encode("latin-1") if character < "\u0100" else character.encode("utf-8", "replace")


def _is_host(host: str) -> bool:
    if ":" not in host:
        return len(host) <= 253 and _HOST.fullmatch(host) is not None and ".." not in host
    try:
        return ipaddress.ip_address(host).version == 6 and "%" not in host
    except ValueError:
        return False


class Zone(enum.IntEnum):
    """How near to this machine an address is. A host may redirect to its own zone and to those below it.

    Link-local and metadata addresses, unspecified, multicast and reserved ones are in no zone: nothing may lead there.
    """

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2


_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10")
)
# Addresses that answer with a machine's credentials and would pass as private or public (AWS over IPv6, Alibaba, Azure,
# Oracle).
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("fd00:ec2::254", "fd00:ec2::23", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


def zone_of(address: str) -> Zone | None:
    """Zone of a numeric address, ``None`` for one that nothing may lead to (and for what is no address)."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    inner = _embedded(ip)
    if inner is not None:
        ip = inner
    if ip in _METADATA:
        return None
    if ip.is_loopback:
        return Zone.LOOPBACK
    if any(ip in network for network in _PRIVATE):
        return Zone.PRIVATE
    if ip.is_multicast or not ip.is_global:
        return None
    return Zone.PUBLIC


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """IPv4 address that an IPv6 one stands for: mapped, 6to4, Teredo, NAT64."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip.teredo is not None:
        return ip.teredo[1]
    if any(ip in network for network in _NAT64) or (int(ip) >> 32 == 0 and int(ip) > 1):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None
