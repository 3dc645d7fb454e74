"""The registry client over real sockets, against a registry that misbehaves on request."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layercache.control import Control
from layercache.errors import (
    CancelledError,
    DeadlineError,
    DeniedError,
    IntegrityError,
    InvalidReferenceError,
    LayerCacheError,
    LimitError,
    NotFoundError,
    PolicyError,
    RateLimitedError,
    RegistryError,
    UnauthorizedError,
    UnreachableError,
    UnsupportedError,
)
from layercache.metrics import Ledger
from layercache.oci import (
    OCI_MANIFEST,
    OCTET_STREAM,
    Descriptor,
    Digest,
    Reference,
    Repository,
    parse_document,
    parse_tag,
)
from layercache.registry import Anonymous, Credentials, Pace, Password, Registry
from layercache.registry._sockets import Patience
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import (
    BasicAuth,
    BearerAuth,
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
    Reset,
    ScriptedRegistry,
    Stall,
    Status,
    Substitute,
    Truncate,
    WrongContentRange,
)
from tests import peers

MIB = 1 << 20
NAME = "demo/serving"
DATA = os.urandom(3 * MIB + 12_345)
IMAGE = build_image([layer_tar({"a": bytes(range(256)) * 20})], platform="linux/amd64")
TAG = parse_tag("1.0")
QUICK = Patience(connect=1.0, head=0.5, stall=0.3, window=0.5, floor=1000.0, pause=0.01)


class Client:
    """A registry client with its ledger, for one repository."""

    def __init__(self, host: str, credentials: Credentials | None = None, patience: Patience | None = None) -> None:
        self.registry = Registry(host, credentials=credentials or Anonymous())
        if patience is not None:
            self.registry._upstreams[0].patience = patience
        self.repository = Repository(host, NAME)
        self.ledger = Ledger()

    def resolve(self, tag: str = TAG, *, control: Control | None = None) -> Descriptor:
        reference = Reference(self.repository, parse_tag(tag))
        return self.registry.resolve(reference, control=control or Control(), ledger=self.ledger)

    def document(self, target: Digest | None = None, *, control: Control | None = None) -> bytes:
        found = self.registry.document(self.repository, target or TAG, control=control or Control(), ledger=self.ledger)
        return found.raw

    def pieces(
        self,
        descriptor: Descriptor,
        *,
        offset: int = 0,
        length: int | None = None,
        control: Control | None = None,
    ) -> Iterator[bytes]:
        return self.registry.fetch(
            self.repository, descriptor, offset=offset, length=length, control=control or Control(), ledger=self.ledger
        )

    def fetch(self, descriptor: Descriptor, **options: int) -> bytes:
        return b"".join(self.pieces(descriptor, **options))  # type: ignore[arg-type]


@pytest.fixture
def make(scripted: ScriptedRegistry) -> Iterator[Callable[..., Client]]:
    """Return a maker of clients of the scripted registry, which are closed."""
    made: list[Client] = []

    def client(credentials: Credentials | None = None, patience: Patience | None = None) -> Client:
        made.append(Client(scripted.host, credentials, patience))
        return made[-1]

    yield client
    for one in made:
        one.registry.close()


@pytest.fixture
def client(make: Callable[..., Client]) -> Client:
    """Return a client of the scripted registry."""
    return make()


@pytest.fixture
def blob(scripted: ScriptedRegistry) -> Descriptor:
    """Return the descriptor of a blob of three pieces and a bit, held by the scripted registry."""
    return put(scripted, DATA)


def put(scripted: ScriptedRegistry, data: bytes) -> Descriptor:
    return Descriptor(media_type=OCTET_STREAM, digest=scripted.put_blob(NAME, data), size=len(data))


# --- what works ---


@pytest.mark.parametrize("kind", ["oci-gzip", "index", "docker-gzip", "docker-list", "odd"])
def test_a_real_registry_is_read(docker_registry: peers.PeerRegistry, kind: str) -> None:
    """Debian's docker-registry: resolve, documents, every blob, each with its digest; then what is not there."""
    client = Client(docker_registry.host)
    pushed = docker_registry.pushed[kind]

    descriptor = client.resolve(kind)
    assert (str(descriptor.digest), descriptor.size) == (pushed.digest, len(pushed.manifest))
    assert client.document(descriptor.digest) == pushed.manifest
    parsed = parse_document(pushed.manifest)
    manifests = [pushed.manifest]
    if descriptor.media_type.is_index:
        manifests = [client.document(child.digest) for child in parsed.manifests]  # type: ignore[union-attr]
    for raw in manifests:
        manifest = parse_document(raw)
        for layer in (manifest.config, *manifest.layers):  # type: ignore[union-attr]
            assert Digest.of(client.fetch(layer)) == layer.digest
            half = layer.size // 2
            assert len(client.fetch(layer, offset=half)) == layer.size - half
    with pytest.raises(NotFoundError):
        client.resolve("absent")
    with pytest.raises(NotFoundError):
        client.fetch(Descriptor(media_type=OCTET_STREAM, digest=Digest.of(b"absent"), size=6))
    client.registry.close()


def test_a_blob_comes_in_pieces_over_one_connection(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor
) -> None:
    """Of a mebibyte each; several blobs and their errors share the connection."""
    sizes = [len(piece) for piece in client.pieces(blob)]
    with pytest.raises(NotFoundError):
        client.resolve("absent")
    client.fetch(put(scripted, b""))

    assert sizes == [MIB, MIB, MIB, 12_345]
    assert len({request.connection for request in scripted.requests}) == 1


def test_a_redirect_is_followed_without_credentials(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor
) -> None:
    """To a storage on another port that refuses a second kind of credentials, as S3 does."""
    scripted._gate.auth = BasicAuth("user", "canary")
    scripted.fault("blobs/*", Redirect(), times=None)
    client = make(Password(scripted.host, "user", "canary"))

    assert client.fetch(blob) == DATA

    stored = [request for request in scripted.requests if request.listener == "storage"]
    assert stored
    assert not any({"authorization", "cookie", "referer"} & set(request.headers) for request in stored)


def test_the_ledger_counts_requests_and_bytes_by_host(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor
) -> None:
    """The bytes of a redirected blob are the storage's."""
    scripted.fault("blobs/*", Redirect(), times=None)

    client.fetch(blob)

    assert client.ledger.requests == 2
    assert client.ledger.bytes_by_source[scripted.storage_host] == len(DATA)
    assert set(client.ledger.seconds_by_stage) <= {"wire", "resolve", "auth", "wait"}


def test_a_chunked_blob_is_read(scripted: ScriptedRegistry, client: Client, blob: Descriptor) -> None:
    """Its length is known from the descriptor."""
    scripted.fault("blobs/*", Chunked(), times=None)

    assert client.fetch(blob) == DATA


# --- what breaks ---


@pytest.mark.parametrize("at", [0, 1, MIB - 1, MIB, 2 * MIB + 7, len(DATA) - 1])
@pytest.mark.parametrize("fault", [Truncate, Reset])
def test_a_broken_transfer_is_resumed_and_no_byte_is_lost(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor, at: int, fault: type[Truncate | Reset]
) -> None:
    """What arrived before the break is used: the registry sends hardly more than the blob."""
    scripted.fault("blobs/*", fault(at=at))

    assert client.fetch(blob) == DATA

    sent = sum(request.sent for request in scripted.requests)
    assert sent <= len(DATA) * 1.05 + MIB


@pytest.mark.parametrize(
    "fault",
    [
        IgnoreRange(),
        Multipart(),
        *(
            WrongContentRange(kind)
            for kind in (
                "missing",
                "garbage",
                "unit",
                "twice",
                "later",
                "longer",
                "reversed",
                "total",
                "unsatisfied",
                "length",
            )
        ),
        Status(416),
        Encoded(),
    ],
    ids=str,
)
def test_a_registry_that_lies_about_ranges_is_read_all_the_same(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor, fault: Fault
) -> None:
    """Never a wrong byte, never a byte at the wrong place."""
    scripted.fault("blobs/*", Truncate(at=MIB + 5))
    scripted.fault("blobs/*", fault, times=None, when=lambda request: "range" in request.headers)

    assert client.fetch(blob) == DATA


@pytest.mark.parametrize("chunked", [True, False])
def test_an_endless_body_ends_at_the_size(scripted: ScriptedRegistry, client: Client, chunked: bool) -> None:
    """A byte too many is an error; the registry cannot send much more than it should."""
    descriptor = put(scripted, DATA[:1000])
    scripted.fault("blobs/*", Endless(chunked=chunked), times=None)

    with pytest.raises(IntegrityError, match="too many bytes"):
        client.fetch(descriptor)

    assert client.ledger.bytes_fetched <= 1001


@pytest.mark.parametrize("what", ["manifests/*", "blobs/*", "token"])
def test_no_small_body_is_read_without_end(scripted: ScriptedRegistry, make: Callable[..., Client], what: str) -> None:
    """Manifests, token replies and error texts have caps."""
    scripted._gate.auth = BearerAuth() if what == "token" else None
    scripted.add(IMAGE, NAME, TAG)
    scripted.fault(what, Endless(), times=None)
    client = make()

    with pytest.raises(LimitError):
        client.document() if what != "blobs/*" else client.document(put(scripted, b"{}").digest)

    assert client.ledger.bytes_fetched <= 4 * MIB + 1 + 1000


def test_an_endless_error_text_is_left(scripted: ScriptedRegistry, client: Client) -> None:
    """The status counts."""
    scripted.fault("manifests/*", Status(403), Endless(), times=None)

    with pytest.raises(DeniedError):
        client.document()

    assert client.ledger.bytes_fetched <= MIB + 1


def test_other_content_under_the_asked_digest_is_refused(scripted: ScriptedRegistry, client: Client) -> None:
    """Though its own headers agree with it."""
    scripted.add(IMAGE, NAME, TAG)
    scripted.fault("manifests/*", Substitute(b'{"schemaVersion":2}'), times=None)

    with pytest.raises(IntegrityError, match="wrong digest"):
        client.document(IMAGE.digest)


def test_a_stalled_body_is_left_and_resumed(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor
) -> None:
    """After the patience for a silent host; what had come is kept."""
    scripted.fault("blobs/*", Stall(at=MIB + 100))
    client = make(patience=QUICK)

    assert client.fetch(blob) == DATA

    second = scripted.requests[-1]
    assert second.headers["range"] == f"bytes={MIB + 100}-{len(DATA) - 1}"


def test_a_body_that_drips_is_not_alive(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor
) -> None:
    """A byte now and then does not keep a connection (containerd #11650): the rate counts."""
    scripted.fault("blobs/*", Drip(rate=100, size=5))
    client = make(patience=QUICK)

    assert b"".join(client.pieces(blob, control=Control(timeout=20))) == DATA
    assert len(scripted.requests) == 2


def test_late_headers_are_given_up(scripted: ScriptedRegistry, make: Callable[..., Client]) -> None:
    """And asked for again."""
    scripted.add(IMAGE, NAME, TAG)
    scripted.fault("manifests/*", Delay(5))

    assert make(patience=QUICK).resolve().digest == IMAGE.digest


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 nonsense\r\n\r\n",
        b"\x16\x03\x01",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200,
    ],
)
def test_what_is_not_http_is_unreachable(scripted: ScriptedRegistry, make: Callable[..., Client], raw: bytes) -> None:
    """Whatever it sends: a typed error that names the host, after some tries."""
    scripted.fault("manifests/*", Raw(raw), times=None)

    with pytest.raises(UnreachableError, match=scripted.host) as caught:
        make(patience=QUICK).document(control=Control(timeout=20))

    assert caught.value.retryable
    assert scripted.count("manifests/*") == 5


@pytest.mark.parametrize("length", [b"-1", b"a", b"5, 6", b"99999999999999999999"])
def test_a_senseless_length_is_no_reason_to_wait_or_to_store(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor, length: bytes
) -> None:
    """Typed, and soon."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\nabc" % length
    scripted.fault("blobs/*", Raw(reply), times=None)

    with pytest.raises(LayerCacheError):
        make(patience=QUICK).fetch(blob)


@pytest.mark.parametrize("chunk", [b"-1\r\n", b"-ff\r\n", b"zz\r\n", b"ffffffffffffffffffff\r\n"])
def test_a_chunk_of_senseless_size_fills_no_memory(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor, chunk: bytes
) -> None:
    """http.client reads a chunk of size -1 to the end of the stream, whatever its length."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    scripted.fault("blobs/*", Raw(head + chunk + bytes(64 * MIB)), times=None)

    before = _peak()
    with pytest.raises(LayerCacheError):
        make(patience=QUICK).fetch(blob)

    assert _peak() - before < 48 * MIB


def test_a_repeated_disconnect_is_survived(scripted: ScriptedRegistry, client: Client) -> None:
    """The next try gets through."""
    scripted.add(IMAGE, NAME, TAG)
    scripted.fault("manifests/*", Disconnect(), times=2)

    assert client.document() == IMAGE.manifest


def test_a_connection_that_was_closed_while_idle_is_replaced(scripted: ScriptedRegistry, client: Client) -> None:
    """A registry that was started anew in between."""
    scripted.add(IMAGE, NAME, TAG)
    client.resolve()
    scripted.stop()
    scripted.start()

    assert client.resolve().digest == IMAGE.digest


def test_a_stopped_registry_is_unreachable_soon(scripted: ScriptedRegistry, client: Client) -> None:
    """Three tries, in about half a second."""
    scripted.stop()

    start = time.monotonic()
    with pytest.raises(UnreachableError, match="refused the connection"):
        client.resolve()

    assert time.monotonic() - start < 3


# --- authorisation ---


def test_basic_is_shown_after_a_challenge_and_up_front_from_then_on(
    scripted: ScriptedRegistry, make: Callable[..., Client]
) -> None:
    """One refusal in all."""
    scripted._gate.auth = BasicAuth("user", "canary")
    scripted.add(IMAGE, NAME, TAG)
    client = make(Password(scripted.host, "user", "canary"))

    client.resolve()
    client.document()

    assert [request.status for request in scripted.requests] == [401, 200, 200]


@pytest.mark.parametrize(
    "auth",
    [
        BearerAuth(),
        BearerAuth(name="access_token", expires_in=None),
        BearerAuth(username="user", password="canary"),
        BearerAuth(scope="aws"),
    ],
)
def test_a_token_is_exchanged_once(scripted: ScriptedRegistry, make: Callable[..., Client], auth: BearerAuth) -> None:
    """Anonymous or with the password, in every form of the reply."""
    scripted._gate.auth = auth
    scripted.add(IMAGE, NAME, TAG)
    client = make(Password(scripted.host, "user", "canary"))

    client.resolve()
    client.document()

    assert scripted.count("token") == 1
    assert "auth" in client.ledger.seconds_by_stage


def test_64_blobs_at_once_take_one_token(scripted: ScriptedRegistry, make: Callable[..., Client]) -> None:
    """And come whole."""
    scripted._gate.auth = BearerAuth()
    blobs = [put(scripted, DATA[n : n + 5000]) for n in range(64)]
    client = make()

    def one(number: int) -> None:
        assert client.fetch(blobs[number]) == DATA[number : number + 5000]

    in_threads(64, one)

    assert scripted.count("token") == 1


def test_revoked_tokens_are_renewed_in_the_middle_of_work(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor
) -> None:
    """A long pull outlives its token."""
    scripted._gate.auth = BearerAuth()
    scripted.fault("blobs/*", Truncate(at=MIB), times=1)
    client = make()
    pieces = client.pieces(blob)

    data = next(pieces)
    scripted.revoke_tokens()

    assert data + b"".join(pieces) == DATA
    assert scripted.count("token") == 2


def test_wrong_credentials_are_refused_once(scripted: ScriptedRegistry, make: Callable[..., Client]) -> None:
    """With a word about whose they were."""
    scripted._gate.auth = BasicAuth("user", "right")
    scripted.add(IMAGE, NAME, TAG)

    with pytest.raises(UnauthorizedError, match="given password were refused") as caught:
        make(Password(scripted.host, "user", "wrong")).document()

    assert caught.value.status == 401
    assert len(scripted.requests) == 2


def test_the_token_endpoint_on_another_port_gets_no_password(
    scripted: ScriptedRegistry, make: Callable[..., Client]
) -> None:
    """Unless it is allowed."""
    scripted._gate.auth = BearerAuth("user", "canary", elsewhere=True)
    scripted.add(IMAGE, NAME, TAG)
    given = Password(scripted.host, "user", "canary")

    with pytest.raises(UnauthorizedError, match="realm_hosts"):
        make(given).document()
    assert not any("authorization" in request.headers for request in scripted.requests)

    allowed = Registry(scripted.host, credentials=given, realm_hosts=[scripted.storage_host])
    allowed.document(Repository(scripted.host, NAME), TAG, control=Control(), ledger=Ledger())
    allowed.close()


# --- safety ---


def test_a_loopback_registry_may_redirect_to_loopback_only_because_it_is_there_itself(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor
) -> None:
    """A metadata address is out of reach from anywhere."""
    scripted.fault("blobs/*", Redirect(to="http://169.254.169.254/latest/meta-data/?sig=canary"))

    with pytest.raises(PolicyError, match=r"169\.254\.169\.254") as caught:
        client.fetch(blob)

    assert "canary" not in str(caught.value)


def test_secrets_are_in_no_error_log_repr_or_report(
    scripted: ScriptedRegistry, make: Callable[..., Client], blob: Descriptor, caplog: pytest.LogCaptureFixture
) -> None:
    """Password, its Basic form, tokens and signatures, with every logger at its most talkative."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("urllib3").setLevel(logging.DEBUG)
    scripted._gate.auth = BearerAuth("user", "canary-password")
    scripted.fault("blobs/*", Redirect(), times=None)
    scripted.fault("storage/*", Truncate(at=100))
    scripted.fault("storage/*", Status(503, b"<Error><Message>see ?X-Amz-Signature=canary</Message></Error>"))
    scripted.fault("storage/*", Reset(at=5))
    scripted.fault("storage/*", Status(403, b"<Error><Code>AccessDenied</Code></Error>"), times=None)
    client = make(Password(scripted.host, "user", "canary-password"))

    texts: list[str] = []
    try:
        client.fetch(blob)
    except LayerCacheError as error:
        texts += ["".join(traceback.format_exception(error)), repr(error), repr(error.__dict__)]
    texts += [record.getMessage() + repr(record.args) for record in caplog.records]
    texts += [repr(client.registry), repr(client.ledger.bytes_by_source), repr(client.ledger.seconds_by_stage)]

    said = "\n".join(texts)
    assert "AccessDenied" in said
    assert "?..." in said, "urllib3 wrote its log, with the query taken out"
    for secret in ("canary", "dXNlcjpjYW5hcnk", "scripted-0", "X-Amz-Signature=", "X-Amz-Credential"):
        assert secret not in said


def test_warnings_of_the_registry_are_logged_once(
    scripted: ScriptedRegistry, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Each text once, four kibibytes in all."""
    scripted.add(IMAGE, NAME, TAG)
    scripted.fault("manifests/*", Headers(put=(("Warning", '299 - "tag is old"'),)), times=2)
    for number in range(20):
        text = f"{number}{'x' * 500}"
        scripted.fault("manifests/*", Headers(put=(("Warning", f'299 - "{text}"'),)))

    for _ in range(22):
        client.resolve()

    warnings = [record.getMessage() for record in caplog.records if record.name == "layercache.registry"]
    assert sum("tag is old" in text for text in warnings) == 1
    assert sum(map(len, warnings)) < 4096 + 40 * len(warnings)


# --- ends ---


@pytest.mark.parametrize("where", ["head", "body", "gate", "backoff"])
def test_a_cancel_takes_effect_at_once_wherever_it_waits(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor, where: str
) -> None:
    """From another thread, within 0.2 s: in the wait for a head, for a body, for a retry."""
    gate = threading.Event()
    faults: dict[str, Fault] = {
        "head": Hold(gate),
        "body": Stall(at=MIB + 5),
        "gate": Status(429, retry_after=30),
        "backoff": Status(500),
    }
    scripted.fault("blobs/*", faults[where], times=None)
    cancel = threading.Event()
    cancelled: list[float] = []

    def later() -> None:
        cancelled.append(time.monotonic())
        cancel.set()

    timer = threading.Timer(0.25, later)
    timer.start()
    with pytest.raises((CancelledError, RegistryError)) as caught:
        for _ in client.pieces(blob, control=Control(cancel=cancel)):
            pass
    took = time.monotonic() - cancelled[0]
    gate.set()
    timer.join()

    assert isinstance(caught.value, CancelledError)
    assert took < 0.5  # 0.1 by construction, and some for a busy machine


def test_a_deadline_takes_effect_in_the_middle_of_a_body(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor
) -> None:
    """As the error that says so."""
    scripted.fault("blobs/*", Stall(at=MIB + 5), times=None)

    start = time.monotonic()
    with pytest.raises(DeadlineError):
        for _ in client.pieces(blob, control=Control(timeout=0.3)):
            pass

    assert time.monotonic() - start < 1


def test_a_wait_longer_than_the_deadline_is_not_begun(scripted: ScriptedRegistry, client: Client) -> None:
    """The registry's own words come at once, with the seconds it asked for."""
    scripted.fault("manifests/*", Status(429, retry_after=20), times=None)

    start = time.monotonic()
    with pytest.raises(RateLimitedError) as caught:
        client.document(control=Control(timeout=5))

    assert caught.value.retry_after == 20
    assert time.monotonic() - start < 1


def test_closing_a_transfer_gives_its_connection_back(
    scripted: ScriptedRegistry, client: Client, blob: Descriptor
) -> None:
    """In the middle, at its start, and when it is merely dropped; nothing stays open."""
    before = _descriptors()
    for _ in range(20):
        pieces = client.pieces(blob)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    dropped = client.pieces(blob)
    next(dropped)
    del dropped
    client.pieces(blob)

    client.registry.close()
    assert _until(lambda: _descriptors() <= before + 1)  # the server's side may lag


def test_many_failures_leave_nothing_behind(scripted: ScriptedRegistry, client: Client, blob: Descriptor) -> None:
    """Then a good transfer starts at once."""
    scripted.fault("blobs/*", Status(404), times=100)
    scripted.fault("blobs/*", Status(403, b"x" * 100_000), times=100)
    scripted.fault("blobs/*", Redirect(to="ftp://x/"), times=100)
    before = _descriptors()
    for _ in range(300):
        with pytest.raises(LayerCacheError):
            client.fetch(blob)

    start = time.monotonic()
    assert client.fetch(blob) == DATA
    assert time.monotonic() - start < 2
    assert _until(lambda: _descriptors() <= before + 4)
    assert client.registry._upstreams[0].session().pace.lines.in_use == 0


def test_one_who_transfers_much_keeps_nobody_else_waiting(scripted: ScriptedRegistry) -> None:
    """One tenant with more huge blobs under way than there are connections, then fifty small pulls of others."""
    gate, pace, name = threading.Event(), Pace(), Repository(scripted.host, NAME)
    huge, small = put(scripted, DATA), [put(scripted, b"%d" % number) for number in range(50)]
    scripted.fault(f"blobs/{huge.digest}", Hold(gate), times=None)

    def fetch(registry: Registry, what: Descriptor) -> None:
        assert Digest.of(b"".join(registry.fetch(name, what, control=Control(), ledger=Ledger()))) == what.digest

    big = Registry(scripted.host, credentials=Anonymous(), pace=pace)
    threads = [threading.Thread(target=fetch, args=(big, huge)) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert _until(lambda: scripted.count(f"blobs/{huge.digest}") == 16)
    start = time.monotonic()
    others = [Registry(scripted.host, credentials=Anonymous(), pace=pace) for _ in small]
    try:
        in_threads(50, lambda number: fetch(others[number], small[number]))
        assert time.monotonic() - start < 10
        assert scripted.count(f"blobs/{huge.digest}") == 16
    finally:
        gate.set()
        for thread in threads:
            thread.join()
        for registry in (big, *others):
            registry.close()
    assert pace.lines.in_use == 0


def test_many_threads_share_a_registry(scripted: ScriptedRegistry, client: Client) -> None:
    """With breaks among them, every byte arrives in its place."""
    scripted.fault("blobs/*", Truncate(at=300_000), times=None, when=lambda request: "range" not in request.headers)
    blobs = [put(scripted, DATA[n * 1000 : n * 1000 + MIB]) for n in range(12)]

    def one(number: int) -> None:
        assert Digest.of(client.fetch(blobs[number])) == blobs[number].digest

    in_threads(12, one)


def test_a_forked_child_makes_its_own_connections(scripted: ScriptedRegistry, client: Client, blob: Descriptor) -> None:
    """The parent's transfer goes on undisturbed; the child cannot go on with it."""
    pieces = client.pieces(blob)
    data = next(pieces)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            mine = Client.fetch(client, blob)
            try:
                next(pieces)
            except RegistryError:
                code = 0 if mine == DATA else 2
            pieces.close()  # type: ignore[attr-defined]
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert data + b"".join(pieces) == DATA


# --- names ---


@pytest.mark.parametrize(
    ("host", "plain", "expected"),
    [
        ("127.0.0.1:5000", None, "http://127.0.0.1:5000/"),
        ("127.9.9.9", None, "http://127.9.9.9/"),
        ("[::1]:5000", None, "http://[::1]:5000/"),
        ("localhost:5000", None, "http://localhost:5000/"),
        ("127.0.0.1:5000", False, "https://127.0.0.1:5000/"),
        ("reg.example", None, "https://reg.example/"),
        ("reg.example:80", None, "https://reg.example:80/"),
        ("localhost.example", None, "https://localhost.example/"),
        ("reg.example", True, "http://reg.example/"),
        ("docker.io", None, "https://registry-1.docker.io/"),
    ],
)
def test_plain_http_is_for_loopback_or_by_request(host: str, plain: bool | None, expected: str) -> None:
    """A password never goes over http unless the host is one of these."""
    assert str(Registry(host, plain_http=plain)._upstreams[-1].site.base) == expected


@pytest.mark.parametrize(
    "host", ["", "reg.example/x", "http://reg.example", "a b", "user@reg.example", "reg.example:99999"]
)
def test_a_host_that_is_none_is_refused(host: str) -> None:
    """Before anything is asked of the network."""
    with pytest.raises(InvalidReferenceError):
        Registry(host)


def test_schema_1_is_unsupported(scripted: ScriptedRegistry, client: Client) -> None:
    """By tag and by digest, with HEAD before or not."""
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    digest = scripted.put_manifest(NAME, b'{"schemaVersion":1,"fsLayers":[]}', media_type=kind, tag=TAG)

    for ask in (client.resolve, client.document, lambda: client.document(digest)):
        with pytest.raises(UnsupportedError):
            ask()


def test_a_manifest_is_typed_by_its_body_where_the_header_says_nothing(
    scripted: ScriptedRegistry, client: Client
) -> None:
    """Neither header nor digest field: ECR sends the one only with HEAD, some send no type."""
    scripted.add(IMAGE, NAME, TAG)
    scripted.fault("manifests/*", Headers(drop=("Content-Type", "Docker-Content-Digest")), times=None)

    descriptor = client.resolve()

    assert descriptor == Descriptor(media_type=OCI_MANIFEST, digest=IMAGE.digest, size=len(IMAGE.manifest))


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures[0]


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 3
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")
