"""Sockets that keep an eye on the operation they serve.

A blocking receive is cut into slices; between two slices it looks whether the caller has cancelled, whether the other
side has fallen silent, and whether it sends far too slowly or far too much. A connection that breaks reads as ended, so
that what arrived before is not lost with the buffer it sits in; the transport then finds the reason in the
:class:`Watch`. Names are resolved, checked and connected to in one place: the address that was checked is the one used.
"""

from __future__ import annotations

import contextlib
import ipaddress
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from layercache.control import Control
from layercache.errors import LayerCacheError, PolicyError
from layercache.registry._effects import LostError
from layercache.registry._proxy import Proxy
from layercache.registry._url import Zone, zone_of

__all__ = ["SLICE", "Patience", "PlainSocket", "TlsSocket", "Watch", "dial", "look_up", "watching"]

SLICE = 0.1
"""Seconds a receive blocks at a time: a cancel takes effect within it."""

_SLACK = 64 << 10

_local = threading.local()


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds to wait for another side.

    ``connect``: for a name and a connection, and again for TLS. ``head``: from a request to the whole head of its
    reply. ``stall``: without a byte of a body. In each ``window`` of a body ``floor`` bytes a second must come: a byte
    now and then is no sign of life. ``pause``: before the first repetition; the next ones double.
    """

    connect: float = 5.0
    head: float = 30.0
    stall: float = 30.0
    window: float = 60.0
    floor: float = 1024.0
    pause: float = 0.2


class Watch:
    """The state of one request and its reply: what the sockets check, and what they found."""

    __slots__ = (
        "_checked",
        "_left",
        "_since",
        "_start",
        "_taken",
        "_until",
        "broken",
        "control",
        "patience",
        "proxy",
        "reach",
        "sock",
        "stop",
        "zone",
    )

    def __init__(self, control: Control, patience: Patience, *, reach: Zone | None = None) -> None:
        self.control = control
        self.patience = patience
        self.reach = reach
        self.proxy: Proxy | None = None
        self.zone: Zone | None = None
        self.sock: PlainSocket | TlsSocket | None = None
        self.broken = ""
        self.stop: LayerCacheError | None = None
        self._until: float | None = None
        self._left = 0
        self._since = self._start = self._checked = time.monotonic()
        self._taken = 0

    @contextlib.contextmanager
    def at_work(self, *, most: int, within: float | None = None) -> Iterator[None]:
        """Let this thread's sockets look here; ``most`` bytes of body are asked for, ``within`` so many seconds."""
        now = time.monotonic()
        self._until = None if within is None else now + within
        # Chunked framing may take several bytes for one of the body, but not any number.
        self._left = 16 * most + _SLACK
        self._start += now - self._checked  # the time the reader was busy elsewhere is not the server's
        self._since = self._checked = now
        previous = watching()
        _local.watch = self
        try:
            yield
        finally:
            _local.watch = previous
            self._checked = time.monotonic()

    def check(self) -> None:
        """Raise if the caller wants the operation to end; note it, since the layers between wrap what they catch."""
        try:
            self.control.checkpoint()
        except LayerCacheError as error:
            self.stop = error
            raise

    def drop(self) -> None:
        """Close the socket for good, also where a half-made reply still holds on to it."""
        sock, self.sock = self.sock, None
        descriptor = -1 if sock is None else sock.detach()
        if descriptor >= 0:
            socket.close(descriptor)

    def idle(self) -> None:
        """A slice went by without a byte."""
        self.check()
        now = time.monotonic()
        if self._until is not None and now >= self._until:
            self.broken = "no answer in time"
        elif now - self._since >= self.patience.stall:
            self.broken = f"nothing arrived for {self.patience.stall:g} seconds"

    def took(self, count: int) -> None:
        """``count`` bytes arrived. Called for each record of TLS, so it does little, and the rest once a slice."""
        now = time.monotonic()
        self._since = now
        self._taken += count
        self._left -= count
        if self._left < 0:
            self.broken = "far more arrived than was asked for"
        elif now - self._checked >= SLICE:
            self._checked = now
            self.check()
            self._judge(now)

    def _judge(self, now: float) -> None:
        if self._until is not None:
            if now >= self._until:
                self.broken = "no answer in time"
        elif now - self._start >= self.patience.window:
            if self._taken < self.patience.floor * (now - self._start):
                self.broken = f"less than {self.patience.floor:g} bytes a second arrived"
            self._start, self._taken = now, 0


def watching() -> Watch | None:
    """The watch of the operation that this thread is in, if it is in one."""
    found: Watch | None = getattr(_local, "watch", None)
    return found


def _receive(sock: Any, receive: Callable[..., Any], *how: Any) -> Any:
    watch = watching()
    if watch is None:
        return receive(sock, *how)
    watch.sock = sock
    while not watch.broken:
        try:
            got = receive(sock, *how)
        except TimeoutError:
            watch.idle()
        except OSError as error:
            watch.broken = "the connection was reset" if isinstance(error, ConnectionError) else "the connection failed"
        else:
            watch.took(got)
            return got
    return 0


class PlainSocket(socket.socket):
    """A TCP socket whose receives are watched. ``zone`` is that of its peer."""

    zone: Zone | None = None

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive as :meth:`socket.socket.recv_into`, under the watch of this thread."""
        got: int = _receive(self, socket.socket.recv_into, buffer, nbytes, flags)
        return got


class TlsSocket(ssl.SSLSocket):
    """The same over TLS, the handshake included; for :attr:`ssl.SSLContext.sslsocket_class`."""

    zone: Zone | None = None

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:  # noqa: ARG002 -- TLS has none
        """Receive as :meth:`ssl.SSLSocket.recv_into`, under the watch of this thread."""
        got: int = _receive(self, ssl.SSLSocket.read, nbytes or len(buffer), buffer)
        return got

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 -- the parent's signature
        """Shake hands in time, in slices."""
        watch = watching()
        if watch is None:
            super().do_handshake(block)
            return
        watch.sock = self  # ssl closes it after an error of its own, but not after one of ours
        until = time.monotonic() + watch.patience.connect
        self.settimeout(SLICE)
        while True:
            try:
                super().do_handshake()
            except TimeoutError:
                watch.check()
                if time.monotonic() >= until:
                    raise LostError("no TLS handshake in time") from None
            else:
                return


def dial(host: str, port: int) -> PlainSocket:
    """Connection to an address of ``host`` within the reach of this thread's watch.

    :raises PolicyError: if the name has addresses, but none within reach.
    :raises LostError: if there is none, or none takes the connection.
    """
    watch = watching()
    assert watch is not None  # noqa: S101 -- only the transport dials
    until = time.monotonic() + watch.patience.connect
    found = _resolve(host, port, watch, until)
    # A proxy is the operator's own choice, wherever it is.
    reach = watch.reach if watch.proxy is None else None
    near = [(family, where, zone_of(where[0])) for family, where in found]
    if reach is not None:
        near = [item for item in near if item[2] is not None and item[2] <= reach]
        if not near:
            raise PolicyError(
                f"{host} is at an address that this registry must not lead to", host=host, hint="nothing was sent there"
            )
    lost = LostError(f"{host} has no address", tries=1)
    for number, (family, where, zone) in enumerate(near):
        share = (until - time.monotonic()) / (len(near) - number)  # a dead address must not use up the others' time
        try:
            sock = _connect(family, where, watch, time.monotonic() + max(share, SLICE))
        except LostError as error:
            lost = error
            continue
        watch.zone = sock.zone = zone
        return sock
    raise lost


def look_up(host: str, port: int) -> list[str]:
    """Numeric addresses of ``host``, as :func:`dial` would try them.

    :raises LostError: if there is none.
    """
    watch = watching()
    assert watch is not None  # noqa: S101 -- only the transport asks
    found = _resolve(host, port, watch, time.monotonic() + watch.patience.connect)
    return list(dict.fromkeys(str(where[0]) for _, where in found))


def _resolve(host: str, port: int, watch: Watch, until: float) -> list[tuple[int, tuple[Any, ...]]]:
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host)
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        return [(family, (str(ip), port) if ip.version == 4 else (str(ip), port, 0, 0))]
    answers: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error if isinstance(error, OSError) else OSError("not a name"))

    # The resolver of the C library knows no deadline and no cancel: it is left behind in a thread of its own.
    threading.Thread(target=ask, name="layercache-dns", daemon=True).start()
    while True:
        watch.check()
        try:
            answer = answers.get(timeout=SLICE / 2)
        except queue.Empty:
            if time.monotonic() >= until:
                raise LostError(f"the name {host} was not resolved in time") from None
            continue
        if isinstance(answer, OSError):
            again = isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_AGAIN
            raise LostError(f"the name {host} cannot be resolved", tries=3 if again else 1) from answer
        return [(family, where) for family, _, _, _, where in answer]


def _connect(family: int, where: tuple[Any, ...], watch: Watch, until: float) -> PlainSocket:
    shown = f"{where[0]}:{where[1]}" if family == socket.AF_INET else f"[{where[0]}]:{where[1]}"
    sock = PlainSocket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(where)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while not poll.poll(SLICE * 1000):
            watch.check()
            if time.monotonic() >= until:
                raise LostError(f"{shown} took no connection in time")
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, "connection failed")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(SLICE)
    except ConnectionRefusedError as error:
        sock.close()
        raise LostError(f"{shown} refused the connection", tries=3) from error
    except OSError as error:
        sock.close()
        raise LostError(f"{shown} cannot be reached ({error.strerror})", tries=3) from error
    except BaseException:
        sock.close()
        raise
    return sock
