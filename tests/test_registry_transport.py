"""Sockets of the registry client: which addresses are connected to, TLS, and how waits end."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError, PolicyError, UnreachableError
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Repository
from layercache.registry import Anonymous, Registry
from layercache.registry._effects import LostError, Send
from layercache.registry._sockets import Patience
from layercache.registry._transport import Transport
from layercache.registry._url import Url, Zone

DATA = bytes(range(256)) * 8192
BLOB = Descriptor(media_type=OCTET_STREAM, digest=Digest.of(DATA), size=len(DATA))
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
QUICK = Patience(connect=0.2, head=0.2, stall=0.2)

# For localhost and 127.0.0.1, until 2126; made for this test, secret from nobody.
KEY = """-----BEGIN EC PRIVATE KEY-----
MHcCAQEEINXMTIvOnEd8Rb70mNbzRSJgnRZld12C9BlCcN80xUxMoAoGCCqGSM49
AwEHoUQDQgAEAiF7E9e51sGqmdDnByft6sSprShdpIr8t5EnMXiOdbWOEFb634Ae
tlnlS4+ar4ZdJA/00yP+Uz9aRcXf1oMGiA==
-----END EC PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBpjCCAU2gAwIBAgIUKfD3QYYeccRQDD0qE8gdt0YdjOowCgYIKoZIzj0EAwIw
GjEYMBYGA1UEAwwPbGF5ZXJjYWNoZSB0ZXN0MCAXDTI2MTEyNDA1MjY0NFoYDzIx
MjYxMDMxMDUyNjQ0WjAaMRgwFgYDVQQDDA9sYXllcmNhY2hlIHRlc3QwWTATBgcq
hkjOPQIBBggqhkjOPQMBBwNCAAQCIXsT17nWwaqZ0OcHJ+3qxKmtKF2kivy3kScx
eI51tY4QVvrfgB62WeVLj5qvhl0kD/TTI/5TP1pFxd/WgwaIo28wbTAdBgNVHQ4E
FgQU+RnBX9B4HAv+Is4iX/UU8qwNl4YwHwYDVR0jBBgwFoAU+RnBX9B4HAv+Is4i
X/UU8qwNl4YwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMA8GA1UdEwEB/wQF
MAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgH6CTplGcvAwm7NghxwxlCjVzbrgUBnT4
qbDM/7eZxtECIGlkodyVSha3u2fhbqH7N1QyDboCdKNd1a1KT0U3V6nm
-----END CERTIFICATE-----
"""


class Line:
    """A listener that runs a script for each connection, and counts them."""

    def __init__(self, script: Callable[[socket.socket], None], address: str = "127.0.0.1") -> None:
        self.script = script
        self.accepted = 0
        self._socket = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.port: int = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._run, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self.script(connection)


def hello(connection: socket.socket) -> None:
    while read_request(connection):
        connection.sendall(OK)


def read_request(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        data = connection.recv(4096)
        if not data:
            return b""
        request += data
    return request


@pytest.fixture
def lines() -> Iterator[Callable[..., Line]]:
    """Return a maker of listeners, which are closed."""
    with ExitStack() as stack:

        def make(script: Callable[[socket.socket], None] = hello, address: str = "127.0.0.1") -> Line:
            line = Line(script, address)
            stack.callback(line.close)
            return line

        yield make


@pytest.fixture
def transport() -> Iterator[Transport]:
    """Return a transport with little patience."""
    made = Transport(QUICK)
    yield made
    made.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Return a table of names and their addresses, in place of the resolver; each look-up is noted in ``asked``."""
    table: dict[str, list[str]] = {"asked": []}

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[Any]:
        table["asked"].append(host)
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "no")
        found = table[host]
        address = found.pop(0) if len(found) > 1 and host.startswith("turning") else None
        addresses = [address] if address else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


def get(transport: Transport, url: str, *, reach: Zone | None = None, control: Control | None = None) -> bytes:
    reply = transport.send(Send("GET", Url.parse(url), {}, reach=reach), control or Control())
    try:
        return reply.read(100)
    finally:
        reply.release()


# --- addresses ---


@pytest.mark.parametrize(
    ("reach", "allowed"), [(None, True), (Zone.LOOPBACK, True), (Zone.PRIVATE, False), (Zone.PUBLIC, False)]
)
def test_an_address_out_of_reach_is_not_connected_to(
    transport: Transport, lines: Callable[..., Line], reach: Zone | None, allowed: bool
) -> None:
    """The listener sees no connection at all."""
    line = lines()

    if allowed:
        assert get(transport, f"http://127.0.0.1:{line.port}/", reach=reach) == b"hello"
    else:
        with pytest.raises(PolicyError, match="must not lead to"):
            get(transport, f"http://127.0.0.1:{line.port}/", reach=reach)

    assert line.accepted == allowed


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"],
)
def test_no_spelling_of_a_loopback_address_is_within_public_reach(
    transport: Transport, lines: Callable[..., Line], host: str
) -> None:
    """Decimal, octal, hexadecimal, short, mapped, unspecified: the resolved address counts."""
    line = lines()

    with pytest.raises((PolicyError, LostError)):
        get(transport, f"http://{host}:{line.port}/", reach=Zone.PUBLIC)

    assert line.accepted == 0


def test_a_name_is_judged_by_its_addresses(
    transport: Transport, lines: Callable[..., Line], names: dict[str, list[str]]
) -> None:
    """One that points to this machine is out of public reach; of several only those within reach are tried."""
    line = lines()
    names["inside.example"] = ["127.0.0.1"]
    names["both.example"] = ["169.254.169.254", "127.0.0.1"]

    with pytest.raises(PolicyError, match=r"inside\.example"):
        get(transport, f"http://inside.example:{line.port}/", reach=Zone.PUBLIC)
    assert line.accepted == 0
    assert get(transport, f"http://both.example:{line.port}/", reach=Zone.LOOPBACK) == b"hello"


def test_the_address_that_was_checked_is_the_one_connected_to(
    transport: Transport, lines: Callable[..., Line], names: dict[str, list[str]]
) -> None:
    """A name that turns to another address after the check changes nothing: it is resolved once."""
    line = lines()
    names["turning.example"] = ["127.0.0.1", "169.254.169.254"]

    assert get(transport, f"http://turning.example:{line.port}/", reach=Zone.LOOPBACK) == b"hello"
    assert names["asked"] == ["turning.example"]


def test_a_connection_of_a_wide_reach_is_not_used_under_a_narrow_one(
    transport: Transport, lines: Callable[..., Line]
) -> None:
    """Though it is to the same host and idle."""
    line = lines()
    url = f"http://127.0.0.1:{line.port}/"
    get(transport, url, reach=None)

    with pytest.raises(PolicyError):
        get(transport, url, reach=Zone.PUBLIC)

    get(transport, url, reach=None)
    assert line.accepted == 1


def test_the_zone_of_a_reply_is_that_of_its_address(transport: Transport, lines: Callable[..., Line]) -> None:
    """Also over a connection that is used again."""
    url = Url.parse(f"http://127.0.0.1:{lines().port}/")

    for _ in range(2):
        reply = transport.send(Send("GET", url, {}), Control())
        assert reply.head.zone is Zone.LOOPBACK
        reply.read(10)
        reply.release()


def test_a_registry_may_have_an_ipv6_address(transport: Transport, lines: Callable[..., Line]) -> None:
    """Written in brackets."""
    try:
        line = lines(address="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")

    assert get(transport, f"http://[::1]:{line.port}/", reach=Zone.LOOPBACK) == b"hello"
    with pytest.raises(PolicyError):
        get(transport, f"http://[::1]:{line.port}/", reach=Zone.PRIVATE)


def test_a_dead_address_does_not_hide_a_living_one(lines: Callable[..., Line], names: dict[str, list[str]]) -> None:
    """One that takes no connection leaves time for the next; one that refuses costs none."""
    line = lines()
    full, _ = full_queue("127.0.0.2", line.port)
    names["several.example"] = ["127.0.0.3", "127.0.0.2", "127.0.0.1"]

    transport = Transport(Patience(connect=1.0))
    start = time.monotonic()
    with full:
        assert get(transport, f"http://several.example:{line.port}/") == b"hello"
    transport.close()

    assert time.monotonic() - start < 0.8  # half of the time for a connection, shared by the two that are left


def test_an_unknown_name_is_not_asked_for_again(transport: Transport, names: dict[str, list[str]]) -> None:
    """One look-up, one error."""
    with pytest.raises(LostError, match=r"nowhere\.example cannot be resolved") as caught:
        get(transport, "http://nowhere.example/")

    assert caught.value.tries == 1


# --- waits ---


def full_queue(address: str = "127.0.0.1", port: int = 0) -> tuple[ExitStack, int]:
    """A listener that takes no more connections: further ones wait for ever."""
    stack = ExitStack()
    listener = stack.enter_context(socket.socket())
    listener.bind((address, port))
    listener.listen(0)
    port = listener.getsockname()[1]
    for _ in range(3):
        filler = stack.enter_context(socket.socket())
        filler.setblocking(False)
        with suppress(BlockingIOError):
            filler.connect((address, port))
    return stack, port


def slow_resolver(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    def getaddrinfo(*_: object, **__: object) -> list[Any]:
        gate.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("how", ["cancel", "deadline", "patience"])
@pytest.mark.parametrize("where", ["name", "connect", "tls", "head", "headers drip", "body"])
def test_every_wait_ends(lines: Callable[..., Line], monkeypatch: pytest.MonkeyPatch, where: str, how: str) -> None:
    """By a cancel within 0.2 s, by the deadline, by patience: for a name, a connection, TLS, a head, a body."""
    gate = threading.Event()

    def silent(connection: socket.socket) -> None:
        gate.wait(10)

    def drips(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not gate.wait(0.02):
            connection.sendall(b"x")

    def stops(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK[:-2])
        gate.wait(10)

    with ExitStack() as stack:
        stack.callback(gate.set)
        scheme, host = "http", "127.0.0.1"
        if where == "name":
            slow_resolver(monkeypatch, gate)
            host, port = "slow.example", 80
        elif where == "connect":
            full, port = full_queue()
            stack.enter_context(full)
        else:
            script = {"tls": silent, "head": silent, "headers drip": drips, "body": stops}[where]
            port = lines(script).port
            scheme = "https" if where == "tls" else "http"
        cancel = threading.Event()
        patience = QUICK if how == "patience" else Patience()
        control = Control(timeout=0.15 if how == "deadline" else None, cancel=cancel)
        transport = Transport(patience)
        stack.callback(transport.close)
        if how == "cancel":
            timer = threading.Timer(0.15, cancel.set)
            timer.start()
            stack.callback(timer.join)

        def twice() -> None:  # of a body the first bytes come
            reply = transport.send(Send("GET", Url.parse(f"{scheme}://{host}:{port}/"), {}), control)
            stack.callback(reply.release)
            reply.read(5)
            reply.read(5)

        start = time.monotonic()
        expected = {"cancel": CancelledError, "deadline": DeadlineError, "patience": LostError}[how]
        with pytest.raises((CancelledError, DeadlineError, LostError)) as caught:
            twice()
        took = time.monotonic() - start

    assert isinstance(caught.value, expected)
    assert 0.12 < took < 1.0  # 0.15 or 0.2, a slice, and some for a busy machine


@pytest.mark.parametrize("how", ["stall", "reset", "end"])
def test_a_body_without_a_length_ends_by_an_end_only(
    lines: Callable[..., Line], transport: Transport, how: str
) -> None:
    """Silence and a reset are breaks, though all there is to tell them apart is how the connection ended."""
    gate = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
        if how == "stall":
            gate.wait(10)
        elif how == "reset":
            time.sleep(0.1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        else:
            connection.shutdown(socket.SHUT_RDWR)

    reply = transport.send(Send("GET", Url.parse(f"http://127.0.0.1:{lines(script).port}/"), {}), Control())
    assert reply.read(100) == b"hello"
    if how == "end":
        assert reply.read(100) == b""
    else:
        with pytest.raises(LostError, match="nothing arrived" if how == "stall" else "reset"):
            reply.read(100)
    gate.set()
    reply.release()


def test_a_silent_name_server_leaves_no_thread_waiting_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up is left behind; it ends by itself."""
    gate = threading.Event()
    slow_resolver(monkeypatch, gate)
    transport = Transport(QUICK)

    with pytest.raises(LostError, match="not resolved in time"):
        get(transport, "http://slow.example/")

    assert any(thread.name == "layercache-dns" and thread.daemon for thread in threading.enumerate())
    gate.set()


# --- TLS ---


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the test's certificate, which is trusted like those of the system."""
    (tmp_path / "key.pem").write_text(KEY)
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    return tmp_path


def tls(directory: Path, script: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")

    def wrapped(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            script(secured)

    return wrapped


def serve_blob(break_at: int | None) -> Callable[[socket.socket], None]:
    """A registry of one blob that knows ranges; its first reply breaks off at ``break_at``."""
    breaks = [break_at]

    def script(connection: socket.socket) -> None:
        while request := read_request(connection):
            first = 0
            for line in request.decode().split("\r\n"):
                if line.lower().startswith("range: bytes="):
                    first = int(line[13:].split("-")[0])
            if first:
                head = f"HTTP/1.1 206 P\r\nContent-Range: bytes {first}-{len(DATA) - 1}/{len(DATA)}\r\n"
            else:
                head = "HTTP/1.1 200 OK\r\n"
            connection.sendall(f"{head}Content-Length: {len(DATA) - first}\r\n\r\n".encode())
            stop = breaks.pop() if breaks else None
            connection.sendall(DATA[first:stop])
            if stop is not None:
                return

    return script


@pytest.mark.parametrize("break_at", [None, 1, 300_000, len(DATA) - 1])
def test_a_blob_comes_over_tls_and_survives_a_break(
    lines: Callable[..., Line], trusted: Path, break_at: int | None
) -> None:
    """The same promises as over plain http."""
    line = lines(tls(trusted, serve_blob(break_at)))
    host = f"127.0.0.1:{line.port}"
    registry = Registry(host, plain_http=False, credentials=Anonymous())
    ledger = Ledger()

    pieces = registry.fetch(Repository(host, "demo/x"), BLOB, control=Control(), ledger=ledger)

    assert b"".join(pieces) == DATA
    assert ledger.bytes_fetched == len(DATA)
    assert line.accepted == (1 if break_at is None else 2)
    registry.close()


def test_a_certificate_nobody_vouches_for_ends_it_at_once(lines: Callable[..., Line], tmp_path: Path) -> None:
    """One connection, no retry, and the reason."""
    (tmp_path / "key.pem").write_text(KEY)
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    line = lines(tls(tmp_path, hello))
    host = f"127.0.0.1:{line.port}"
    registry = Registry(host, plain_http=False, credentials=Anonymous())

    with pytest.raises(UnreachableError, match=r"certificate is not trusted: self.signed"):
        next(registry.fetch(Repository(host, "demo/x"), BLOB, control=Control(), ledger=Ledger()))

    assert line.accepted == 1


def test_a_certificate_of_another_host_ends_it_at_once(
    lines: Callable[..., Line], trusted: Path, transport: Transport, names: dict[str, list[str]]
) -> None:
    """The name is checked, not the pinned address."""
    line = lines(tls(trusted, hello))
    names["other.example"] = ["127.0.0.1"]

    assert get(transport, f"https://127.0.0.1:{line.port}/") == b"hello"
    with pytest.raises(LostError, match=r"certificate is not trusted: .*other\.example") as caught:
        get(transport, f"https://other.example:{line.port}/")
    assert caught.value.tries == 1


def test_a_server_without_tls_is_unreachable_over_https(lines: Callable[..., Line], transport: Transport) -> None:
    """As a registry that should have been called with plain http."""

    def plain(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with pytest.raises(LostError, match="TLS failed"):
        get(transport, f"https://127.0.0.1:{lines(plain).port}/")


def test_the_zone_is_known_over_tls(lines: Callable[..., Line], trusted: Path, transport: Transport) -> None:
    """On the first request and on a connection that is used again."""
    url = Url.parse(f"https://127.0.0.1:{lines(tls(trusted, hello)).port}/")

    for _ in range(2):
        reply = transport.send(Send("GET", url, {}), Control())
        assert reply.head.zone is Zone.LOOPBACK
        reply.read(10)
        reply.release()


# --- connections ---


def test_a_short_rest_is_read_to_keep_the_connection_and_a_long_one_is_not(
    lines: Callable[..., Line], transport: Transport
) -> None:
    """Four kibibytes are cheaper to read than a connection is to make."""
    bodies = {"short": 4096, "long": 5000, "empty": 0}

    def script(connection: socket.socket) -> None:
        while request := read_request(connection):
            size = bodies[request.split()[1].decode()[1:]]
            connection.sendall(b"HTTP/1.1 404 No\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))

    line = lines(script)
    for name, connections in (("short", 1), ("empty", 1), ("short", 1), ("long", 1), ("short", 2)):
        transport.send(Send("GET", Url.parse(f"http://127.0.0.1:{line.port}/{name}"), {}), Control()).release()
        assert line.accepted == connections


def test_a_rest_that_does_not_come_is_not_waited_for(lines: Callable[..., Line], transport: Transport) -> None:
    """Releasing takes 0.2 s at most."""
    gate = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 100\r\n\r\n")
        gate.wait(10)

    reply = transport.send(Send("GET", Url.parse(f"http://127.0.0.1:{lines(script).port}/"), {}), Control())
    start = time.monotonic()
    reply.release()
    took = time.monotonic() - start
    gate.set()

    assert took < 0.6


def test_a_head_reply_frees_its_connection(lines: Callable[..., Line], transport: Transport) -> None:
    """It has a length and no body."""

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")

    line = lines(script)
    for _ in range(3):
        transport.send(Send("HEAD", Url.parse(f"http://127.0.0.1:{line.port}/"), {}), Control()).release()

    assert line.accepted == 1


def test_neither_netrc_nor_proxy_variables_change_a_request(
    lines: Callable[..., Line], transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials come from one place; a proxy is not taken from the environment behind the caller's back."""
    seen: list[bytes] = []

    def script(connection: socket.socket) -> None:
        seen.append(read_request(connection))
        connection.sendall(OK)

    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password canary\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")

    assert get(transport, f"http://127.0.0.1:{lines(script).port}/a%2Fb?q=%2f") == b"hello"
    assert b"authorization" not in seen[0].lower()
    assert seen[0].startswith(b"GET /a%2Fb?q=%2F HTTP/1.1\r\n")


def test_a_forked_child_leaves_the_bytes_of_its_parent(lines: Callable[..., Line], transport: Transport) -> None:
    """It does not read the rest of a reply that is not its own, however short."""
    gate = threading.Event()

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        gate.wait(10)
        connection.sendall(b"world")

    reply = transport.send(Send("GET", Url.parse(f"http://127.0.0.1:{lines(script).port}/"), {}), Control())
    assert reply.read(5) == b"hello"
    gate.set()
    child = os.fork()
    if child == 0:
        try:
            reply.release()
        finally:
            os._exit(0)
    os.waitpid(child, 0)

    assert reply.read(5) == b"world"
    reply.release()


def test_endless_interim_replies_end(lines: Callable[..., Line], transport: Transport) -> None:
    """http.client skips any number of 100s; the time and the bytes of a head are bounded."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        while True:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    start = time.monotonic()
    with pytest.raises(LostError):
        get(transport, f"http://127.0.0.1:{lines(script).port}/")

    assert time.monotonic() - start < 2
