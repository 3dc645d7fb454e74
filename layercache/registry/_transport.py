"""The only place that sends and receives: urllib3's pools over watched sockets, one reply at a time.

urllib3 neither repeats, nor redirects, nor decodes here; the flows decide.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import os
import re
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import urllib3
import urllib3.connection
import urllib3.connectionpool
import urllib3.exceptions

from layercache.control import Control
from layercache.errors import InvalidError, LayerCacheError, PolicyError
from layercache.registry._effects import Head, LostError, Send
from layercache.registry._proxy import Proxies, Proxy
from layercache.registry._sockets import SLICE, Patience, PlainSocket, TlsSocket, Watch, dial, look_up, watching
from layercache.registry._url import Url, Zone, zone_of
from layercache.registry._wire import Headers
from layercache.registry.sources import Tls

__all__ = ["Line", "Reply", "Transport"]

_AGENT = "layercache"
_DRAIN = 4096  # bytes that are cheaper to read than a connection is to make
_HEAD_BYTES = 512 << 10  # times sixteen: the most that 100 fields of 64 KiB can be
_PROXY_HEAD = 16 << 10
_TIMEOUT = urllib3.Timeout(connect=SLICE, read=SLICE)


class _Dialling:
    """What makes a connection of urllib3 dial with :func:`dial`."""

    host: str
    port: int

    def _new_conn(self) -> PlainSocket:
        return dial(self.host.strip("[]"), self.port)


class _Tunnelling(_Dialling):
    """The same, through the proxy of this thread's watch, if there is one."""

    def _new_conn(self) -> PlainSocket:
        watch = watching()
        proxy = None if watch is None else watch.proxy
        if proxy is None:
            return super()._new_conn()
        sock = dial(proxy.host, proxy.port)
        try:
            _connect_through(sock, proxy, self.host.strip("[]"), self.port)
        except BaseException:
            sock.close()
            raise
        return sock


def _connect_through(sock: PlainSocket, proxy: Proxy, host: str, port: int) -> None:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    shown = f"Proxy-Authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{shown}\r\n".encode("ascii"))
    head = bytearray()
    byte = bytearray(1)
    while not head.endswith(b"\r\n\r\n"):  # byte by byte: what follows belongs to TLS
        if not sock.recv_into(byte, 1) or len(head) > _PROXY_HEAD:
            raise LostError(f"the proxy {proxy.host}:{proxy.port} gave no answer", tries=3)
        head += byte
    status = re.match(rb"HTTP/1\.[01] ([0-9]{3})", head)
    if status is None or status[1] != b"200":
        said = status[1].decode() if status else "with what is not HTTP"
        raise LostError(f"the proxy {proxy.host}:{proxy.port} answered {said}", tries=1)


class _PlainConnection(_Dialling, urllib3.connection.HTTPConnection):
    pass


class _TlsConnection(_Tunnelling, urllib3.connection.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        # The TLS socket took over from the plain one that knew its peer.
        watch = watching()
        if watch is not None and isinstance(self.sock, TlsSocket):
            self.sock.zone = watch.zone


class _PlainPool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection

    def _validate_conn(self, conn: Any) -> None:
        # Not the inherited method: it warns of what verify=False asked for.
        if conn.is_closed:
            conn.connect()


class Reply:
    """An open reply. Used by one thread at a time; :meth:`release` it."""

    def __init__(self, head: Head, response: urllib3.BaseHTTPResponse, watch: Watch, url: Url) -> None:
        self.head = head
        self._response = response
        self._watch = watch
        self._url = url
        self._ended = False
        self._pid = os.getpid()

    def read(self, most: int) -> bytes:
        """Next bytes of the body: ``most``, fewer before its end or a break, ``b""`` at its end.

        :raises LostError: if the connection broke, stalled or ended too early; the bytes before that were given.
        """
        watch = self._watch
        with watch.at_work(most=most):
            watch.check()
            try:
                data = self._response.read(most, decode_content=False)
            except Exception as error:  # noqa: BLE001 -- whatever a strange reply makes of the layers below
                _raise(error, watch, self._url)
        if not data:
            if watch.broken:
                raise LostError(f"{self._url.authority}: {watch.broken}")
            self._ended = True
        return data

    def release(self) -> None:
        """Give the connection back if little or nothing is left unread, else close it. Blocks for at most 0.2 s."""
        response = self._response
        if os.getpid() != self._pid:
            return  # the parent of this process uses it
        left = response.length_remaining
        if not self._ended and not self._watch.broken and left is not None and left <= _DRAIN:
            # Also where nothing is left (HEAD): only a read tells http.client that the reply is over.
            drain = Watch(Control(timeout=0.2), self._watch.patience)
            try:
                with drain.at_work(most=_DRAIN):
                    self._ended = len(response.read(left + 1, decode_content=False)) == left
            except Exception:  # noqa: BLE001 -- it was only worth a try
                self._ended = False
        if not self._ended:
            response.close()
        response.release_conn()


@dataclass(frozen=True, slots=True)
class Line:
    """A connection as it was made: to ``peer``, under which version of TLS, whose certificate, good until when.

    ``until`` is Unix time; without TLS the other three are empty. So they are of a certificate that was not looked at.
    """

    peer: str
    tls: str = ""
    issuer: str = ""
    until: float | None = None


class Transport:
    """Connections to the hosts of one registry, for use by many threads of one process.

    ``tls`` is for the registry at ``home``; other hosts get its authorities, not its client certificate, and are always
    verified. Proxies are those of the environment, as it is when this is made.

    :raises InvalidError: for a proxy that is none.
    """

    def __init__(self, patience: Patience, tls: Tls | None = None, home: Url | None = None) -> None:
        self._patience = patience
        self._tls = Tls() if tls is None else tls
        self._home = home
        self._proxies = Proxies.of(os.environ)
        self._managers: dict[tuple[Zone | None, Proxy | None, bool], urllib3.PoolManager] = {}
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._lock = threading.Lock()
        _hide_queries()

    def send(self, request: Send, control: Control) -> Reply:
        """Send a request and wait for the head of its reply.

        :raises LostError: if there is none.
        :raises PolicyError: if the host's addresses are out of the request's reach.
        """
        watch = Watch(control, self._patience, reach=request.reach)
        url = request.url
        headers = {"User-Agent": _AGENT, **request.headers}
        if request.grant is not None:
            headers["Authorization"] = request.grant.header()
        proxy = watch.proxy = self._proxies.of_url(url)
        if proxy is not None and request.reach is not None and _is_numeric(url.host):
            # A name is the proxy's to resolve; an address can be judged here.
            zone = zone_of(url.host)
            if zone is None or zone > request.reach:
                raise PolicyError(f"{url.host} is an address that this registry must not lead to", host=url.host)
        if proxy is not None and proxy.authorization and url.scheme == "http":
            headers["Proxy-Authorization"] = proxy.authorization
        home = self._home is not None and url.origin == self._home.origin
        manager = self._manager(request.reach, url.scheme, proxy, home=home)
        with watch.at_work(most=_HEAD_BYTES, within=self._patience.head):
            watch.check()
            try:
                sender: Any = manager
                if proxy is not None and url.scheme == "http":
                    sender = manager.connection_from_host(proxy.host, proxy.port, "http")
                response = sender.urlopen(
                    request.method,
                    f"{url.scheme}://{url.authority}{url.target}",
                    body=request.form,
                    headers=headers,
                    redirect=False,
                    assert_same_host=False,
                    retries=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=_TIMEOUT,
                )
            except Exception as error:  # noqa: BLE001 -- every foreign error is mapped here
                watch.drop()
                _raise(error, watch, url)
        zone = None if watch.sock is None or proxy is not None else watch.sock.zone
        head = Head(response.status, Headers(response.headers.items()), zone, time.time())
        return Reply(head, response, watch, url)

    def proxy(self, url: Url) -> str:
        """Host and port of the proxy for ``url``, empty where there is none."""
        proxy = self._proxies.of_url(url)
        return "" if proxy is None else f"{proxy.host}:{proxy.port}"

    def addresses(self, url: Url, control: Control) -> list[str]:
        """Numeric addresses to connect to for ``url``: its host's, or its proxy's.

        :raises LostError: if there is none.
        """
        proxy = self._proxies.of_url(url)
        watch = Watch(control, self._patience)
        with watch.at_work(most=0):
            return look_up(url.host, url.port) if proxy is None else look_up(proxy.host, proxy.port)

    def line(self, url: Url, control: Control, *, tls: bool) -> Line:
        """What a new connection to ``url`` is like, shaking hands with ``tls``; it is closed again. For a diagnosis.

        :raises LostError: if there is none.
        """
        watch = Watch(control, self._patience)
        proxy = watch.proxy = self._proxies.of_url(url)
        with watch.at_work(most=_HEAD_BYTES, within=self._patience.head):
            sock: Any = None
            try:
                sock = dial(url.host, url.port) if proxy is None else dial(proxy.host, proxy.port)
                peer = _shown(sock.getpeername())
                if not tls:
                    return Line(peer)
                if proxy is not None:
                    _connect_through(sock, proxy, url.host, url.port)
                sock = _context(self._tls, home=True).wrap_socket(sock, server_hostname=url.host)
                certificate = sock.getpeercert() or {}
                names = {key: value for part in certificate.get("issuer", ()) for key, value in part}
                issuer = names.get("organizationName") or names.get("commonName", "")
                ends = certificate.get("notAfter")
                until = None if ends is None else float(ssl.cert_time_to_seconds(ends))
                return Line(peer, sock.version() or "", issuer, until)
            except Exception as error:  # noqa: BLE001 -- every foreign error is mapped here
                _raise(error, watch, url)
            finally:
                if sock is not None:
                    sock.close()

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            managers, self._managers = self._managers, {}
        for manager in managers.values():
            manager.clear()

    def _manager(self, reach: Zone | None, scheme: str, proxy: Proxy | None, *, home: bool) -> urllib3.PoolManager:
        """Pools of one reach: a connection that was made under a wider one is never used under a narrower."""
        with self._lock:
            key = (reach, proxy, home)
            manager = self._managers.get(key)
            if manager is None:
                manager = urllib3.PoolManager(num_pools=16, maxsize=32, block=False)
                manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
                self._managers[key] = manager
            if scheme == "https" and "ssl_context" not in manager.connection_pool_kw:
                if home not in self._contexts:  # costs some milliseconds: made when first needed
                    self._contexts[home] = _context(self._tls, home=home)
                manager.connection_pool_kw["ssl_context"] = self._contexts[home]
            return manager


def _context(tls: Tls, *, home: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = TlsSocket
    context.set_alpn_protocols(["http/1.1"])  # as urllib3 does; a connection that is only looked at is no other
    try:
        for file in tls.ca:
            context.load_verify_locations(file)
        if home and tls.cert:
            context.load_cert_chain(tls.cert, tls.key or None, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise InvalidError("a certificate file cannot be used", value=f"{tls.ca} {tls.cert}") from error
    if home and not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _shown(where: Any) -> str:
    return f"[{where[0]}]:{where[1]}" if ":" in where[0] else f"{where[0]}:{where[1]}"


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _raise(error: Exception, watch: Watch, url: Url) -> NoReturn:
    """Raise what an error means. Its own text and object stay behind: they may hold the URL."""
    if watch.stop is not None:
        raise watch.stop from None
    if isinstance(error, LayerCacheError | LostError):
        raise error
    root: BaseException | None = error
    chain: list[BaseException] = []
    while root is not None and root not in chain and len(chain) < 10:
        chain.append(root)
        inner = root.args[-1] if root.args and isinstance(root.args[-1], BaseException) else None
        root = root.__cause__ or inner or root.__context__
    reason, tries = watch.broken, 100
    cause = next(
        (e for e in reversed(chain) if isinstance(e, OSError) and not isinstance(e, urllib3.exceptions.HTTPError)), None
    )
    certificate = next((e for e in chain if isinstance(e, ssl.SSLCertVerificationError)), None)
    if certificate is not None:
        reason, tries = f"its certificate is not trusted: {certificate.verify_message}", 1
    elif any(_is_http2(e) for e in chain):
        reason, tries = "it speaks HTTP/2 and no HTTP/1.1", 1
    elif any(isinstance(e, ssl.SSLError) for e in chain):
        reason = reason or "TLS failed"
        tries = 3
    elif not reason and any(isinstance(e, http.client.RemoteDisconnected) for e in chain):
        reason = "closed the connection without an answer"
    elif not reason and any(
        isinstance(e, http.client.IncompleteRead | urllib3.exceptions.IncompleteRead) for e in chain
    ):
        reason = "ended too early"
    elif not reason and cause is not None:
        reason = "the connection broke"
    raise LostError(f"{url.authority}: {reason or 'answered with what is not HTTP'}", tries=tries) from cause


def _is_http2(error: BaseException) -> bool:
    """Tell a handshake refused since h2 was not offered, or a first line that is a SETTINGS frame (RFC 9113, 3.4)."""
    if isinstance(error, ssl.SSLError):
        return "no application protocol" in str(error).lower()  # alert 120 (RFC 7301), for which ssl has no name
    return isinstance(error, http.client.BadStatusLine) and str(error.args[0])[3:9] == "\x04\0\0\0\0\0"


_QUERY = re.compile(r"\?\S*")


class _NoQueries(logging.Filter):
    """urllib3 writes the target of each request into its debug log; ours may be signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        if watching() is not None and isinstance(record.args, tuple):
            record.args = tuple(_QUERY.sub("?...", a) if isinstance(a, str) else a for a in record.args)
        return True


_FILTER = _NoQueries()


def _hide_queries() -> None:
    logger = logging.getLogger("urllib3.connectionpool")
    if _FILTER not in logger.filters:
        logger.addFilter(_FILTER)
