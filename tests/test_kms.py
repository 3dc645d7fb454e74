"""Namespaces whose key is wrapped by a key service: what it gives, what it refuses, and what is said of it."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from layercache import KmsKey, LayerCache, Namespace
from layercache.errors import DeadlineError, KmsError, LayerCacheError, SealMismatchError
from layercache.integrity import CHUNK
from layercache.oci import Digest
from layercache.store import NamespaceName
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import ScriptedRegistry
from tests.moto_process import Moto, point

pytest.importorskip("moto")

NAME = "acme/canary-tenant"
CANARY = b"CANARY-7f3a91c2-"
GENERATE, DECRYPT = "TrentService.GenerateDataKey", "TrentService.Decrypt"


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    server = Moto(tmp_path_factory.mktemp("moto"), None)
    yield server
    server.stop()


@pytest.fixture
def service(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of KMS, and point boto3 there."""
    import boto3

    point(monkeypatch, moto)
    monkeypatch.setattr("layercache.store._kms._PATIENCE", 60.0)  # on a busy machine moto takes its time
    client = boto3.client("kms", region_name="ap-south-1")
    yield client
    client.close()


@pytest.fixture
def key(service: Any) -> str:
    return str(service.create_key()["KeyMetadata"]["KeyId"])


def fill(namespace: Namespace, tmp_path: Path) -> Digest:
    (tmp_path / "file").write_bytes(CANARY * (2 * CHUNK // len(CANARY)))
    return namespace.put(tmp_path / "file").digest


def read(namespace: Namespace, digest: Digest) -> bytes:
    with namespace.open(digest) as layer, layer.compressed() as stream:
        return stream.read()


def test_it_reads_back_and_nothing_is_in_clear(tmp_path, moto, key):
    """Also in another handle, which asks for the key anew; two of one process ask once."""
    root = tmp_path / "root"
    before = len(moto.calls(DECRYPT))
    with LayerCache(root, kms=KmsKey(key), janitor=False) as cache:
        namespace = cache.namespace(NAME, seal="kms")
        digest = fill(namespace, tmp_path)
        assert cache.namespaces()[0].seal == "kms"
    asked = len(moto.calls(DECRYPT))
    with LayerCache(root, kms=KmsKey(key), janitor=False) as cache:
        namespace, other = cache.namespace(NAME), cache.namespace(NAME)
        assert read(namespace, digest) == (tmp_path / "file").read_bytes()
        assert read(other, digest) == (tmp_path / "file").read_bytes()
    assert len(moto.calls(DECRYPT)) == asked + 1
    assert asked == before  # whoever begins a namespace has its key already
    found = b"".join(str(p).encode() + (p.read_bytes() if p.is_file() else b"") for p in root.rglob("*"))
    for secret in (CANARY, NAME.encode(), digest.encoded.encode(), b"acme"):
        assert secret not in found


def test_the_key_is_bound_to_its_place_by_what_names_no_tenant(tmp_path, service, key):
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        fill(cache.namespace(NAME, seal="kms"), tmp_path)
        store = cache.store()
        slot = store.namespaces()[0]
        context = store._keys._context(f"{slot.slot}.{slot.generation}")
    (record,) = (tmp_path / "root").glob("data/*/key")
    wrapped = base64.b64decode(json.loads(record.read_text())["wrapped"])
    assert "acme" not in json.dumps(context)
    secret = service.decrypt(CiphertextBlob=wrapped, EncryptionContext=context)["Plaintext"]
    assert secret not in wrapped
    for wrong in ({}, {**context, "layercache-generation": f"{slot.slot}.2"}):
        with pytest.raises(service.exceptions.ClientError, match="InvalidCiphertext"):
            service.decrypt(CiphertextBlob=wrapped, EncryptionContext=wrong)


def test_a_reboot_leaves_it_readable(tmp_path, key, monkeypatch):
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        digest = fill(cache.namespace(NAME, seal="kms"), tmp_path)
    monkeypatch.setattr("layercache.store._proc.boot_id", lambda: "0" * 12)
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        assert not cache.store().recover()
        assert cache.namespace(NAME).contains(digest)


def test_its_purge_never_says_that_the_key_is_erased(tmp_path, key):
    """The wrapped key was on the disk, and the service still has what unwraps it. Purging asks the service nothing."""
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        namespace = cache.namespace(NAME, seal="kms")
        fill(namespace, tmp_path)
        receipt = namespace.purge()
        assert (receipt.level, receipt.complete) == ("unlinked", True)
        assert not list((tmp_path / "root").glob("**/key"))


def test_how_a_namespace_is_sealed_cannot_be_changed(tmp_path, key):
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        fill(cache.namespace(NAME, seal="kms"), tmp_path)
        with pytest.raises(SealMismatchError, match="otherwise"):
            cache.namespace(NAME, seal="ephemeral").contains(Digest.of(b""))


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.dumps({"__type": self.path.strip("/"), "message": NAME}).encode()
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def answering(service: Any) -> Iterator[Callable[[str], KmsKey]]:
    """Make keys whose service says no with a code of AWS's: moto decrypts under keys that are disabled, too."""
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield lambda code: KmsKey("k", endpoint=f"http://127.0.0.1:{server.server_port}/{code}")
    server.shutdown()
    server.server_close()
    thread.join()


_REFUSALS = (
    *("DisabledException", "KMSInvalidStateException", "AccessDeniedException", "IncorrectKeyException"),
    *("another key", "no such key", "no key"),
)


@pytest.mark.parametrize("refusal", _REFUSALS)
def test_without_the_key_nothing_is_read_and_a_pull_goes_past_the_cache(  # noqa: PLR0917 - fixtures
    tmp_path, service, key, scripted: ScriptedRegistry, answering: Callable[[str], KmsKey], refusal
):
    """The start is not hindered, the refusal is typed and says nothing of who it is, what is there stays."""
    image = build_image([layer_tar({"weights": CANARY * 1000})])
    scripted.add(image, "acme/serving", "1.0")
    reference = f"{scripted.host}/acme/serving:1.0"
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        digest = fill(cache.namespace(NAME, seal="kms"), tmp_path)
    held = sorted((tmp_path / "root").rglob("*"))
    keys = {
        "another key": lambda: KmsKey(service.create_key()["KeyMetadata"]["KeyId"]),
        "no such key": lambda: KmsKey("alias/nobody-has-this"),
        "no key": KmsKey,
    }
    refused = keys.get(refusal, lambda: answering(refusal))()
    with LayerCache(tmp_path / "root", kms=refused, janitor=False) as cache:
        namespace = cache.namespace(NAME, seal="kms")
        with pytest.raises(KmsError) as raised:
            read(namespace, digest)
        assert not raised.value.retryable
        assert raised.value.hint
        assert raised.value.code == refusal or refusal in keys
        assert not {NAME, key, "123456789012"} & set(str(raised.value).replace(":", " ").split())
        with namespace.pull(reference) as pulled:
            assert {blob.source for blob in pulled.report.blobs} == {"bypass"}
            assert CANARY in pulled.layers[0].uncompressed().read()
        assert not cache.store().recover()
        assert cache.namespaces()[0].name is None
    assert sorted((tmp_path / "root").rglob("*")) == held


def test_a_service_that_fails_is_not_asked_for_a_while(tmp_path, moto, key):
    """By nobody of this cache: a miss must not wait for it each time."""
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        moto.down()
        try:
            with pytest.raises(KmsError) as raised:
                fill(cache.namespace(NAME, seal="kms"), tmp_path)
            assert raised.value.retryable
        finally:
            moto.down(is_down=False)
        asked = len(moto.calls(GENERATE))
        for name in (NAME, "another"):
            with pytest.raises(KmsError) as raised:
                fill(cache.namespace(name, seal="kms"), tmp_path)
            assert raised.value.retryable
        assert len(moto.calls(GENERATE)) == asked
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        fill(cache.namespace(NAME, seal="kms"), tmp_path)


def test_a_service_that_asks_to_wait_is_told_as_such(tmp_path, answering):
    key = answering("ThrottlingException")
    with LayerCache(tmp_path / "root", kms=key, janitor=False) as cache, pytest.raises(KmsError) as raised:
        fill(cache.namespace(NAME, seal="kms"), tmp_path)
    assert (raised.value.code, raised.value.retryable) == ("ThrottlingException", True)
    assert NAME not in str(raised.value)


def test_a_service_that_does_not_answer_is_given_up(tmp_path, service, monkeypatch):
    """Whatever it is that boto3 waits for."""
    monkeypatch.setattr("layercache.store._kms._PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        key = KmsKey("k", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with LayerCache(tmp_path / "root", kms=key, janitor=False) as cache, pytest.raises(KmsError) as raised:
            fill(cache.namespace(NAME, seal="kms"), tmp_path)
    assert (raised.value.code, raised.value.retryable) == ("timeout", True)


@pytest.fixture
def hanging(service: Any) -> Iterator[tuple[KmsKey, threading.Event]]:
    """A key whose service takes a question and never answers; the event says that it has one."""
    asked, over = threading.Event(), threading.Event()

    def take() -> None:
        held = []
        while not over.is_set():
            connection, _ = listener.accept()
            held.append(connection)
            asked.set()
        for connection in held:
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=take)
        thread.start()
        yield KmsKey("k", endpoint=f"http://127.0.0.1:{port}"), asked
        over.set()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join()


def in_thread(call: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with suppress(LayerCacheError):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_purge_does_not_wait_for_a_service_that_is_asked_for_a_new_key(tmp_path, hanging):
    """Neither that of the namespace that is to be begun, nor that of others in the same call."""
    key, asked = hanging
    with LayerCache(tmp_path / "root", kms=key, janitor=False) as cache:
        fill(cache.namespace("acme/other"), tmp_path)
        cancel = threading.Event()
        asking = in_thread(lambda: cache.namespace(NAME, seal="kms").pull("127.0.0.1:1/a/b:1", cancel=cancel))
        assert asked.wait(60)
        receipts = cache.store().purge_all([NamespaceName(NAME), NamespaceName("acme/other")])
        assert [(one.generation, one.complete) for one in receipts] == [(0, True), (1, True)]
        assert asking.is_alive()
        cancel.set()
        asking.join()


def test_a_purge_does_not_wait_for_a_service_that_is_asked_for_its_key(tmp_path, key, hanging):
    """It ends while somebody else still waits for the key of what it has taken away."""
    with LayerCache(tmp_path / "root", kms=KmsKey(key), janitor=False) as cache:
        fill(cache.namespace(NAME, seal="kms"), tmp_path)
    away, asked = hanging
    with LayerCache(tmp_path / "root", kms=away, janitor=False) as cache:
        namespace, cancel = cache.namespace(NAME), threading.Event()
        asking = in_thread(lambda: namespace.pull("127.0.0.1:1/a/b:1", cancel=cancel))
        assert asked.wait(60)
        assert namespace.purge(wait=60.0).level == "unlinked"
        assert asking.is_alive()
        cancel.set()
        asking.join()


def test_a_service_that_hangs_takes_no_more_than_half_of_a_callers_time(tmp_path, hanging, scripted: ScriptedRegistry):
    """So that a pull comes to its end past the cache, and others are not told that the service is away."""
    image = build_image([layer_tar({"weights": CANARY * 1000})])
    scripted.add(image, "acme/serving", "1.0")
    key, _ = hanging
    with LayerCache(tmp_path / "root", kms=key, janitor=False) as cache:
        with cache.namespace(NAME, seal="kms").pull(f"{scripted.host}/acme/serving:1.0", timeout=6.0) as pulled:
            assert {blob.source for blob in pulled.report.blobs} == {"bypass"}
        assert not key._failed


def test_who_waits_behind_a_question_keeps_to_his_own_deadline(tmp_path, hanging):
    key, asked = hanging
    with LayerCache(tmp_path / "root", kms=key, janitor=False) as cache:
        namespace, cancel = cache.namespace(NAME, seal="kms"), threading.Event()
        asking = in_thread(lambda: namespace.pull("127.0.0.1:1/a/b:1", cancel=cancel))
        assert asked.wait(60)
        with pytest.raises(DeadlineError):
            namespace.pull("127.0.0.1:1/a/b:1", timeout=0.2)
        assert asking.is_alive()
        cancel.set()
        asking.join()


def test_without_network_or_credentials_it_is_said(tmp_path, service, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(KmsError) as raised:
        KmsKey("k", endpoint=f"http://127.0.0.1:{port}").generate({})
    assert raised.value.retryable
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KmsError, match="credentials") as raised:
        KmsKey("k").generate({})
    assert not raised.value.retryable


def test_it_asks_in_the_region_of_the_key(moto, service):
    arn = service.create_key()["KeyMetadata"]["Arn"].replace("ap-south-1", "eu-west-1")
    with pytest.raises(LayerCacheError):  # it is not there
        KmsKey(arn).generate({})
    assert moto.calls(GENERATE)[-1].split("/")[2] == "eu-west-1"
    assert arn not in repr(KmsKey(arn))
