"""One loopback port speaking HTTP/1.1: a thread to accept, a thread a connection, none of them left after ``stop``."""

from __future__ import annotations

import fcntl
import http.client
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from io import BufferedReader

from layercache.testing._reply import Drop, Reply, Step, Wait, reason

__all__ = ["Call", "Listener"]

_MAX_BODY = 1 << 20
_TICK = 0.02
_JOIN = 10.0


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it stands on the wire. Names of ``headers`` are lower case; repeated ones are joined."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int


Answer = Callable[[Call], tuple[Reply, Callable[[int], None]]]
"""Finds the reply to a call, and who is told how many more of the body's bytes were handed over (less: were not)."""


class _GoneError(ConnectionError):
    """The client hung up, or the listener stops."""


class Listener:
    """Serves calls on a free port of 127.0.0.1 with what ``answer`` returns, from :meth:`start` to :meth:`stop`."""

    def __init__(self, name: str, answer: Answer) -> None:
        self._name = name
        self._answer = answer
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._connections: list[tuple[threading.Thread, socket.socket]] = []
        self._count = 0
        self.port = 0

    def start(self) -> None:
        """Listen; on the same port as before if this is not the first time."""
        if self._socket is not None:
            raise RuntimeError(f"the {self._name} listener runs already")
        self._socket = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._socket.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(self._socket,), name=f"{self._name}-accept")
        self._acceptor.start()

    def stop(self) -> None:
        """Refuse new connections, end those there are, and return when their threads have ended."""
        with self._lock:
            listening, self._socket = self._socket, None
            connections, self._connections = self._connections, []
        if listening is None or self._acceptor is None:
            return
        listening.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
        for _, connection in connections:
            _shut(connection)
        for thread in (self._acceptor, *(thread for thread, _ in connections)):
            thread.join(_JOIN)
            if thread.is_alive():
                raise RuntimeError(f"{thread.name} does not end")
        listening.close()

    @property
    def running(self) -> bool:
        """Whether connections are accepted."""
        return self._socket is not None

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with self._lock:
                if self._socket is not listening:  # stopped since: nobody would join the thread
                    connection.close()
                    return
                self._count += 1
                thread = threading.Thread(
                    target=self._serve, args=(connection, self._count), name=f"{self._name}-{self._count}"
                )
                self._connections = [pair for pair in self._connections if pair[0].is_alive()]
                thread.start()
                self._connections.append((thread, connection))

    def _serve(self, connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The reader holds the socket open after close(), so it must be closed as well, and first.
        with connection, connection.makefile("rb") as reader:
            try:
                while (call := _read_call(reader, number)) is not None:
                    reply, sent = self._answer(call)
                    if not _Sender(connection, sent).send(reply, call):
                        return
            except OSError:
                return


def _read_call(reader: BufferedReader, connection: int) -> Call | None:
    line = reader.readline(65537)
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None  # the end of the connection, or nothing that can be answered
    try:
        parsed = http.client.parse_headers(reader)
    except http.client.HTTPException:
        return None
    headers: dict[str, str] = {}
    for name, value in parsed.items():
        key = name.lower()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isdigit() or int(length) > _MAX_BODY:
        return None
    return Call(words[0], words[1], headers, reader.read(int(length)), connection)


class _Sender:
    """Sends one reply and knows afterwards whether the connection can take another."""

    def __init__(self, connection: socket.socket, sent: Callable[[int], None]) -> None:
        self._connection = connection
        self._sent = sent

    def send(self, reply: Reply, call: Call) -> bool:
        for step in reply.before:
            if not self._special(step):
                return False
        if reply.raw is not None:
            self._connection.sendall(reply.raw)
            return False
        head = [f"HTTP/1.1 {reply.status} {reason(reply.status)}"]
        if reply.header("Date") is None:
            head.append(f"Date: {formatdate(usegmt=True)}")
        head += [f"{name}: {value}" for name, value in reply.headers]
        if reply.chunked:
            head.append("Transfer-Encoding: chunked")
        bodiless = call.method == "HEAD" or reply.status in (204, 304)
        length = reply.header("Content-Length")
        if length is None and not reply.chunked and not bodiless:
            head.append("Connection: close")
        self._connection.sendall("".join(f"{line}\r\n" for line in (*head, "")).encode("latin-1"))
        if bodiless:
            return True
        total = 0
        for step in self._framed(reply):
            if not isinstance(step, bytes):
                if not self._special(step):
                    return False
                continue
            total += len(step)
            self._give(step, chunked=reply.chunked)
        if reply.chunked:
            self._connection.sendall(b"0\r\n\r\n")
            return True
        return str(total) == length and call.headers.get("connection", "").lower() != "close"

    def _framed(self, reply: Reply) -> Iterator[Step]:
        return (step for step in reply.steps if step != b"")  # an empty chunk would end a chunked body

    def _give(self, data: bytes, *, chunked: bool) -> None:
        # Counted before it is sent: who has read the bytes must find them counted.
        self._sent(len(data))
        given = 0
        try:
            if chunked:
                self._connection.sendall(b"%x\r\n" % len(data))
            with memoryview(data) as view:
                while given < len(data):
                    given += self._connection.send(view[given:])
            if chunked:
                self._connection.sendall(b"\r\n")
        except OSError:
            self._sent(given - len(data))
            raise

    def _special(self, step: Step) -> bool:
        """Do a step that is not part of the body; false where it ends the connection."""
        if isinstance(step, Wait):
            self._wait(step)
        elif isinstance(step, Drop):
            if step.reset:
                self._settle()
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        return True

    def _wait(self, wait: Wait) -> None:
        end = None if wait.seconds is None else time.monotonic() + wait.seconds
        poll = select.poll()  # not select(): a test may hold more than 1024 descriptors
        poll.register(self._connection, select.POLLIN)
        most = 60.0 if wait.gate is None else _TICK
        while wait.gate is None or not wait.gate.is_set():
            left = most if end is None else end - time.monotonic()
            if left <= 0:
                return
            # The socket becomes readable when the client goes, and when stop() shuts it down.
            if poll.poll(min(left, most) * 1000):
                if not self._connection.recv(1, socket.MSG_PEEK):
                    raise _GoneError
                time.sleep(min(left, _TICK))  # the next request is here already; it waits its turn

    def _settle(self) -> None:
        """Wait until the client's kernel has all that was sent: a reset throws away what is still under way."""
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            (waiting,) = struct.unpack("i", fcntl.ioctl(self._connection, termios.TIOCOUTQ, b"\0" * 4))
            if not waiting:
                return
            time.sleep(0.001)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # gone already
