"""Which proxy a request goes through, by the variables that curl and Go read. Pure."""

from __future__ import annotations

import base64
import ipaddress
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field

from layercache.errors import InvalidError
from layercache.registry._url import Url, Zone, zone_of

__all__ = ["Proxies", "Proxy"]

_PORT = re.compile(r"[0-9]{1,5}")  # not isdigit(), which takes what int() refuses


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. ``authorization`` is the value of its ``Proxy-Authorization`` field, if it wants one."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Proxies:
    """``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``, in either case, as they were when this was made."""

    http: Proxy | None = None
    https: Proxy | None = None
    bypass: tuple[str, ...] = ()

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Proxies:
        """Proxies of an environment.

        :raises InvalidError: for one that is not ``http://[user:password@]host[:port]``.
        """

        def value(name: str) -> str:
            return environ.get(name.lower()) or environ.get(name, "")

        bypass = tuple(part.strip().lower() for part in value("NO_PROXY").split(",") if part.strip())
        return cls(_proxy(value("HTTP_PROXY")), _proxy(value("HTTPS_PROXY")), bypass)

    def of_url(self, url: Url) -> Proxy | None:
        """The proxy for ``url``; never one for loopback."""
        proxy = self.https if url.scheme == "https" else self.http
        if proxy is None or url.host == "localhost" or zone_of(url.host) is Zone.LOOPBACK:
            return None
        return None if any(_covers(rule, url) for rule in self.bypass) else proxy


def _covers(rule: str, url: Url) -> bool:
    if rule == "*":
        return True
    try:
        return ipaddress.ip_address(url.host) in ipaddress.ip_network(rule, strict=False)
    except ValueError:
        pass
    name, colon, port = rule.rpartition(":")
    if colon and _PORT.fullmatch(port) and ":" not in name:
        if int(port) != url.port:
            return False
        rule = name
    rule = rule.removeprefix("*")
    if rule.startswith("."):
        return url.host.endswith(rule)
    return url.host == rule or url.host.endswith(f".{rule}")


def _proxy(text: str) -> Proxy | None:
    if not text:
        return None
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urllib.parse.urlsplit("")
    if not host or parts.scheme != "http":
        raise InvalidError("the proxy of the environment is not http://[user:password@]host[:port]")
    shown = ""
    if parts.username is not None:
        user = urllib.parse.unquote(parts.username)
        pair = f"{user}:{urllib.parse.unquote(parts.password or '')}"
        shown = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    return Proxy(host, port or 80, shown)
