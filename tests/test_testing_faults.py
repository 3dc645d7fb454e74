"""Each fault of the scripted registry does to a client exactly what its name says, and nothing else."""

from __future__ import annotations

import gzip
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, field, replace
from hashlib import sha256

import pytest

from layercache.testing import _faults
from layercache.testing.registry import (
    Chunked,
    Delay,
    Disconnect,
    Drip,
    Encoded,
    Endless,
    Fault,
    Headers,
    Hold,
    IgnoreRange,
    Multipart,
    Raw,
    Redirect,
    Reply,
    Reset,
    ScriptedRegistry,
    Stall,
    Status,
    Substitute,
    Truncate,
    WrongBytes,
    WrongContentRange,
    WrongLength,
)

BLOB = bytes(range(256)) * 16
SIZE = len(BLOB)
DIGEST = f"sha256:{sha256(BLOB).hexdigest()}"
PATH = f"/v2/demo/x/blobs/{DIGEST}"


@dataclass
class Client:
    """One connection, read to the byte: what a client sees, however wrong it is."""

    host: str
    socket: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        host, port = self.host.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5)

    def send(self, method: str = "GET", path: str = PATH, **headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        self.socket.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())

    def head(self) -> tuple[int, http.client.HTTPMessage]:
        """Status and headers, leaving the body unread."""
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            byte = self.socket.recv(1)
            assert byte, f"the connection ended after {data!r}"
            data += byte
        status, _, rest = data.partition(b"\r\n")
        lines = iter(rest.splitlines(keepends=True))

        class Lines:
            def readline(self, _limit: int = -1) -> bytes:
                return next(lines, b"")

        return int(status.split()[1]), http.client.parse_headers(Lines())

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes, or fewer where the connection ends in order."""
        data = b""
        while len(data) < count and (piece := self.socket.recv(count - len(data))):
            data += piece
        return data

    def ends(self) -> bool:
        """Whether the next thing is the orderly end of the connection."""
        return self.socket.recv(1) == b""

    def quiet(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes for ``seconds``."""
        return not select.select([self.socket], [], [], seconds)[0]


@pytest.fixture
def client(scripted: ScriptedRegistry) -> Iterator[Client]:
    """Return a connection to a registry that holds the blob."""
    scripted.put_blob("demo/x", BLOB)
    made = Client(scripted.host)
    yield made
    made.socket.close()


def answered(client: Client, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and, by Content-Length, body of one request."""
    client.send(method, **headers)
    status, found = client.head()
    body = b"" if method == "HEAD" else client.read(int(found["Content-Length"] or 0))
    return status, found, body


def test_wrong_bytes_keep_size_and_headers(scripted: ScriptedRegistry, client: Client) -> None:
    """Only the named bytes differ, also counted from the end and in a range, and the connection goes on."""
    scripted.fault("blobs/*", WrongBytes(at=100, count=3))
    scripted.fault("blobs/*", WrongBytes(at=-1))
    scripted.fault("blobs/*", WrongBytes(at=5))

    _, headers, middle = answered(client)
    _, _, end = answered(client)
    _, _, part = answered(client, Range="bytes=1000-1009")

    assert [i for i in range(SIZE) if middle[i] != BLOB[i]] == [100, 101, 102]
    assert headers["Docker-Content-Digest"] == DIGEST
    assert (end[:-1], end[-1]) == (BLOB[:-1], BLOB[-1] ^ 1)
    assert [i for i in range(10) if part[i] != BLOB[1000 + i]] == [5]
    assert answered(client)[2] == BLOB


def test_wrong_bytes_reach_across_pieces(scripted: ScriptedRegistry, client: Client) -> None:
    """A damage over the border of two pieces is whole."""
    big = bytes(3 << 20)
    path = f"/v2/demo/x/blobs/{scripted.put_blob('demo/x', big)}"
    scripted.fault("blobs/*", WrongBytes(at=(1 << 20) - 1, count=2))

    client.send(path=path)
    client.head()
    body = client.read(len(big))

    assert body == bytes((1 << 20) - 1) + b"\1\1" + bytes((2 << 20) - 1)


def test_a_substitute_is_consistent_with_itself(scripted: ScriptedRegistry, client: Client) -> None:
    """Length, digest header and ETag are those of the other bytes, unless a digest is given."""
    other = b'{"schemaVersion":2}'
    scripted.fault("blobs/*", Substitute(other, content_type="application/json"))
    scripted.fault("blobs/*", Substitute(other, digest=DIGEST))

    status, headers, body = answered(client, Range="bytes=0-9")
    _, second, _ = answered(client)

    assert (status, body, headers["Content-Type"]) == (200, other, "application/json")
    assert headers["Docker-Content-Digest"] == f"sha256:{sha256(other).hexdigest()}" == headers["ETag"].strip('"')
    assert (second["Docker-Content-Digest"], second["Content-Type"]) == (DIGEST, "application/octet-stream")


@pytest.mark.parametrize("at", [0, 1, 2000, -1])
def test_a_truncated_body_promises_all_and_ends_in_order(scripted: ScriptedRegistry, client: Client, at: int) -> None:
    """The full length, the first bytes, then the end of the connection; the next request is whole."""
    scripted.fault("blobs/*", Truncate(at=at))
    sent = at if at >= 0 else SIZE + at

    client.send()
    _, headers = client.head()

    assert int(headers["Content-Length"]) == SIZE
    assert client.read(SIZE) == BLOB[:sent]
    assert scripted.requests[-1].sent == sent
    again = Client(scripted.host)
    assert answered(again)[2] == BLOB
    again.socket.close()


@pytest.mark.parametrize("at", [0, 1, 2000, -1])
def test_a_reset_comes_after_its_bytes(scripted: ScriptedRegistry, client: Client, at: int) -> None:
    """Every byte before it arrives; then the connection is reset, not ended."""
    scripted.fault("blobs/*", Reset(at=at))
    sent = at if at >= 0 else SIZE + at

    client.send()
    client.head()

    assert client.read(sent) == BLOB[:sent]
    with pytest.raises(ConnectionResetError):
        client.socket.recv(1)


def test_a_reset_waits_for_a_slow_client(scripted: ScriptedRegistry, client: Client) -> None:
    """Bytes that are still under way when the reset is due arrive before it, also at a client that takes its time."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    big = bytes(4 << 20)
    path = f"/v2/demo/x/blobs/{scripted.put_blob('demo/x', big)}"
    scripted.fault("blobs/*", Reset(at=3 << 20))

    client.send(path=path)
    client.head()
    time.sleep(0.1)

    assert len(client.read(3 << 20)) == 3 << 20
    with pytest.raises(ConnectionResetError):
        client.socket.recv(1)


@pytest.mark.parametrize("reset", [False, True])
def test_a_disconnect_comes_before_the_status(scripted: ScriptedRegistry, client: Client, *, reset: bool) -> None:
    """Not a byte is sent, a HEAD gets it as well, and the log has no status."""
    scripted.fault("blobs/*", Disconnect(reset=reset))

    client.send("HEAD")

    if reset:
        with pytest.raises(ConnectionResetError):
            client.socket.recv(1)
    else:
        assert client.ends()
    assert (scripted.requests[-1].status, scripted.requests[-1].sent) == (0, 0)


@pytest.mark.parametrize("at", [0, 10, -1, SIZE])
def test_a_stall_is_a_silence_in_the_body(scripted: ScriptedRegistry, client: Client, at: int) -> None:
    """Bytes up to it come, then nothing until the gate opens, then the rest."""
    gate = threading.Event()
    scripted.fault("blobs/*", Stall(at=at, gate=gate))
    sent = at if at >= 0 else SIZE + at

    client.send()
    client.head()

    assert client.read(sent) == BLOB[:sent]
    assert client.quiet()
    gate.set()
    assert client.read(SIZE - sent) == BLOB[sent:]
    assert answered(client)[2] == BLOB


def test_a_stall_lasts_for_its_seconds(scripted: ScriptedRegistry, client: Client) -> None:
    """Without a gate it ends by itself."""
    scripted.fault("blobs/*", Stall(at=10, seconds=0.2))
    start = time.monotonic()

    assert answered(client)[2] == BLOB
    assert time.monotonic() - start >= 0.2


def test_a_stall_ends_when_the_client_goes(scripted: ScriptedRegistry, client: Client) -> None:
    """A stall without an end holds no thread once the client has hung up."""
    answered(client)  # its own connection has its thread by now
    threads = threading.active_count()
    scripted.fault("blobs/*", Stall(at=10))
    other = Client(scripted.host)
    other.send()
    other.head()
    assert other.read(10) == BLOB[:10]
    other.socket.close()

    end = time.monotonic() + 5
    while threading.active_count() > threads:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_delay_is_before_the_headers(scripted: ScriptedRegistry, client: Client) -> None:
    """Nothing comes for so long, and then the right reply; a pipelined request waits its turn."""
    scripted.fault("blobs/*", Delay(0.2))

    client.send("HEAD")
    client.send("HEAD")

    assert client.quiet(0.15)
    assert client.head()[0] == 200
    assert client.head()[0] == 200


def test_a_gate_holds_several_together(scripted: ScriptedRegistry, client: Client) -> None:
    """Requests wait until the gate opens; until then they have a status in mind but sent nothing."""
    gate = threading.Event()
    scripted.fault("blobs/*", Hold(gate), times=2)
    other = Client(scripted.host)

    client.send()
    other.send()

    end = time.monotonic() + 5
    while scripted.count("blobs/*") < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert client.quiet()
    assert other.quiet(0)
    gate.set()
    for each in (client, other):
        each.head()
        assert each.read(SIZE) == BLOB
    other.socket.close()


def test_a_drip_is_slow(scripted: ScriptedRegistry, client: Client) -> None:
    """The body comes in small pieces at its rate."""
    scripted.fault("blobs/*", Drip(rate=1000, size=20))
    start = time.monotonic()

    status, _, body = answered(client, Range="bytes=0-199")

    assert (status, body) == (206, BLOB[:200])
    assert time.monotonic() - start > 0.17  # nine pauses of 20 ms


@pytest.mark.parametrize("chunked", [False, True])
def test_an_endless_body_has_no_length_and_no_end(scripted: ScriptedRegistry, client: Client, *, chunked: bool) -> None:
    """More than the blob comes, as long as the client reads; then the server notices that it has gone."""
    scripted.fault("blobs/*", Endless(chunked=chunked))

    client.send()
    _, headers = client.head()
    body = client.read(SIZE + (4 << 20))

    assert headers["Content-Length"] is None
    assert (headers["Transfer-Encoding"] == "chunked") == chunked
    assert len(body) == SIZE + (4 << 20)
    assert BLOB[:1000] in body[:1100]


def test_an_endless_body_may_claim_a_length(scripted: ScriptedRegistry, client: Client) -> None:
    """Together with a wrong length it is a blob that claims to be enormous."""
    scripted.fault("blobs/*", Endless(), WrongLength(by=1 << 40))

    client.send()

    assert client.head()[1]["Content-Length"] == str(1 << 40)
    assert client.read(SIZE + 1000) == BLOB + bytes(1000)


def test_a_chunked_body_is_whole(scripted: ScriptedRegistry) -> None:
    """Every byte comes in chunks without a length, and the connection can be used again."""
    scripted.put_blob("demo/x", BLOB)
    scripted.fault("blobs/*", Chunked())
    connection = http.client.HTTPConnection(scripted.host, timeout=5)
    for length in (None, str(SIZE)):
        connection.request("GET", PATH)
        response = connection.getresponse()

        assert response.headers["Content-Length"] == length
        assert response.read() == BLOB
    connection.close()
    assert {request.connection for request in scripted.requests} == {1}


@pytest.mark.parametrize("by", [-7, 7])
def test_a_wrong_length_ends_the_connection(scripted: ScriptedRegistry, client: Client, by: int) -> None:
    """The header is off by so much, the bytes are all there, and nothing else follows them."""
    scripted.fault("blobs/*", WrongLength(by=by))

    client.send()
    _, headers = client.head()

    assert int(headers["Content-Length"]) == SIZE + by
    assert client.read(SIZE + 10) == BLOB


def test_a_wrong_length_of_a_head_is_only_said(scripted: ScriptedRegistry, client: Client) -> None:
    """A HEAD shows the wrong length and the connection goes on: HEAD and GET may differ."""
    scripted.fault("blobs/*", WrongLength(by=-7), method="HEAD")

    _, headers, _ = answered(client, "HEAD")

    assert int(headers["Content-Length"]) == SIZE - 7
    assert answered(client)[2] == BLOB


def test_headers_go_and_come(scripted: ScriptedRegistry, client: Client) -> None:
    """Named headers are left out, put in place of others, or sent twice."""
    scripted.fault("blobs/*", Headers(drop=("docker-content-digest", "Content-Type"), put=(("X-A", "1"), ("X-A", "2"))))

    status, headers, body = answered(client)

    assert (status, body) == (200, BLOB)
    assert headers["Docker-Content-Digest"] is None
    assert headers["Content-Type"] is None
    assert headers.get_all("X-A") == ["1", "2"]


def test_an_encoded_body_decodes_to_the_blob(scripted: ScriptedRegistry, client: Client) -> None:
    """A content-coding changes the bytes on the wire, their length and a header, also of a range."""
    scripted.fault("blobs/*", Encoded(), times=2)

    _, headers, body = answered(client)
    status, _, part = answered(client, Range="bytes=0-99")

    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == BLOB
    assert (status, gzip.decompress(part)) == (206, BLOB[:100])


def test_an_ignored_range_is_the_whole(scripted: ScriptedRegistry, client: Client) -> None:
    """A range gets a 200; a request without one does not use it up."""
    scripted.fault("blobs/*", IgnoreRange())

    assert answered(client)[0] == 200
    status, headers, body = answered(client, Range="bytes=100-199")
    assert (status, body, headers["Content-Range"]) == (200, BLOB, None)
    assert answered(client, Range="bytes=100-199")[0] == 206


def test_a_multipart_reply_wraps_the_range(scripted: ScriptedRegistry, client: Client) -> None:
    """The part is inside a body of another type, and no Content-Range stands outside."""
    scripted.fault("blobs/*", Multipart())

    status, headers, body = answered(client, Range="bytes=100-199")

    assert (status, headers["Content-Range"]) == (206, None)
    assert headers.get_content_type() == "multipart/byteranges"
    assert f"Content-Range: bytes 100-199/{SIZE}\r\n\r\n".encode() + BLOB[100:200] + b"\r\n--part--" in body


CONTENT_RANGES: dict[_faults.ContentRangeFault, tuple[list[str] | None, bytes]] = {
    "missing": (None, BLOB[100:200]),
    "garbage": (["bytes what"], BLOB[100:200]),
    "unit": ([f"octets 100-199/{SIZE}"], BLOB[100:200]),
    "twice": ([f"bytes 100-199/{SIZE}"] * 2, BLOB[100:200]),
    "reversed": ([f"bytes 200-100/{SIZE}"], BLOB[100:200]),
    "total": ([f"bytes 100-199/{SIZE + 1}"], BLOB[100:200]),
    "unsatisfied": ([f"bytes */{SIZE}"], BLOB[100:200]),
    "later": ([f"bytes 101-200/{SIZE}"], BLOB[101:201]),
    "longer": ([f"bytes 100-200/{SIZE}"], BLOB[100:201]),
    "shorter": ([f"bytes 100-198/{SIZE}"], BLOB[100:199]),
    "length": ([f"bytes 100-199/{SIZE}"], BLOB[100:200]),
}


@pytest.mark.parametrize(("kind", "expected"), CONTENT_RANGES.items())
def test_each_wrong_content_range(
    scripted: ScriptedRegistry,
    client: Client,
    kind: _faults.ContentRangeFault,
    expected: tuple[list[str] | None, bytes],
) -> None:
    """Each kind is a 206 with its own header and bytes; a request without a range does not use it up."""
    scripted.fault("blobs/*", WrongContentRange(kind))

    assert answered(client)[2] == BLOB
    status, headers, body = answered(client, Range="bytes=100-199")

    assert (status, headers.get_all("Content-Range"), body) == (206, *expected)
    assert int(headers["Content-Length"]) == len(body) + (kind == "length") or kind == "length"


@pytest.mark.parametrize(("kind", "length"), [("longer", 101), ("later", 100), ("shorter", 99)])
def test_a_wrong_range_at_the_end_claims_what_is_not_there(
    scripted: ScriptedRegistry, client: Client, kind: _faults.ContentRangeFault, length: int
) -> None:
    """Past the end of the blob no bytes are made up: the connection ends short of the claim."""
    scripted.fault("blobs/*", WrongContentRange(kind))
    client.send(Range=f"bytes={SIZE - 100}-{SIZE - 1}")
    _, headers = client.head()
    claimed = int(headers["Content-Length"])

    body = client.read(claimed)

    assert len(body) == min(length, {"longer": 100, "later": 99, "shorter": 99}[kind])
    assert body == BLOB[SIZE - 100 + (kind == "later") :][: len(body)]


def test_a_wrong_range_leaves_other_replies_alone(scripted: ScriptedRegistry, client: Client) -> None:
    """A 416 stays a 416."""
    scripted.fault("blobs/*", WrongContentRange("missing"))

    status, headers, _ = answered(client, Range=f"bytes={SIZE}-")

    assert (status, headers["Content-Range"]) == (416, f"bytes */{SIZE}")


def test_a_status_has_an_error_document(scripted: ScriptedRegistry, client: Client) -> None:
    """The code follows from the status unless given, the message is repeated, and a HEAD gets it without a body."""
    scripted.fault("blobs/*", Status(429, retry_after=7))
    scripted.fault("blobs/*", Status(403, code="DENIED", message="token has expired"))
    scripted.fault("blobs/*", Status(599))

    status, headers, body = answered(client)
    assert (status, headers["Retry-After"]) == (429, "7")
    assert json.loads(body)["errors"][0]["code"] == "TOOMANYREQUESTS"
    _, _, body = answered(client)
    assert json.loads(body)["errors"] == [{"code": "DENIED", "message": "token has expired", "detail": None}]
    assert answered(client, "HEAD")[0] == 599


@pytest.mark.parametrize("retry_after", ["120", "Fri, 31 Dec 1999 23:59:59 GMT", "abc", "-1"])
def test_a_retry_hint_goes_out_as_it_stands(scripted: ScriptedRegistry, client: Client, retry_after: str) -> None:
    """Every form can be sent, the senseless ones as well."""
    scripted.fault("blobs/*", Status(503, retry_after=retry_after))

    assert answered(client)[1]["Retry-After"] == retry_after


def test_a_status_may_have_any_body_and_challenges(scripted: ScriptedRegistry, client: Client) -> None:
    """HTML, nothing at all, several challenges in several headers, headers of one's own."""
    challenges = ("Negotiate", 'Basic realm="x, y", Bearer realm="http://a/"')
    scripted.fault("blobs/*", Status(502, body=b"<html>bad</html>"))
    scripted.fault("blobs/*", Status(500, body=b""))
    scripted.fault("blobs/*", Status(401, challenges=challenges, headers=(("Warning", '299 - "x"'),)))

    _, html, body = answered(client)
    _, _, nothing = answered(client)
    status, headers, _ = answered(client)

    assert (html["Content-Type"], body, nothing) == ("text/html", b"<html>bad</html>", b"")
    assert (status, headers["Warning"]) == (401, '299 - "x"')
    assert headers.get_all("WWW-Authenticate") == list(challenges)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_goes_where_it_is_told(scripted: ScriptedRegistry, client: Client, status: int) -> None:
    """Any location with any redirect status, relative ones and those of a forbidden host as they stand."""
    for to in ("http://169.254.169.254/latest", "../elsewhere", PATH):
        scripted.fault("blobs/*", Redirect(to, status=status))

        found, headers, _ = answered(client)

        assert (found, headers["Location"]) == (status, to)


def test_what_is_not_there_is_not_redirected_to_storage(scripted: ScriptedRegistry, client: Client) -> None:
    """A missing blob stays a 404."""
    scripted.fault("blobs/*", Redirect())
    client.send(path="/v2/demo/x/blobs/sha256:" + "0" * 64)

    assert client.head()[0] == 404


def test_a_fault_of_the_body_waits_for_a_body(scripted: ScriptedRegistry, client: Client) -> None:
    """A HEAD gets the right reply and leaves the turn to the next GET."""
    scripted.fault("blobs/*", Truncate(at=0))

    assert answered(client, "HEAD")[0] == 200
    client.send()
    client.head()
    assert client.ends()


def test_waits_survive_other_faults(scripted: ScriptedRegistry, client: Client) -> None:
    """A late error is late: faults of one script add up."""
    scripted.fault("blobs/*", Delay(0.1), Status(503))
    scripted.fault("blobs/*", Delay(0.1), Redirect("/x"))

    for status in (503, 307):
        client.send()
        assert client.quiet(0.05)
        found, headers = client.head()
        assert found == status
        client.read(int(headers["Content-Length"]))


def test_users_can_write_their_own(scripted: ScriptedRegistry, client: Client) -> None:
    """A frozen value with ``apply`` is a fault."""

    @dataclass(frozen=True, slots=True)
    class Teapot(Fault):
        def apply(self, reply: Reply) -> Reply:
            return replace(reply, status=418)

    scripted.fault("blobs/*", Teapot())

    assert answered(client)[0] == 418


@pytest.mark.parametrize(
    "fault", [Truncate(1), Status(500), WrongBytes(), Raw(b"x"), Redirect(), Headers(), Drip(1.0), Substitute(b"x")]
)
def test_faults_are_values(fault: Fault) -> None:
    """They compare by content, can be shared between scripts, and cannot be changed."""
    name = next(iter(fault.__dataclass_fields__))  # type: ignore[attr-defined]

    assert replace(fault) == fault  # type: ignore[type-var]
    with pytest.raises(FrozenInstanceError):
        setattr(fault, name, None)
