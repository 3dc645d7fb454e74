"""The scripted registry is a registry: by the specification, as docker-registry answers, for real clients."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from layercache.oci import MANIFEST_TYPES, Digest
from layercache.testing._reply import asked_range
from layercache.testing.images import BuiltImage, BuiltIndex, build_image, layer_tar
from layercache.testing.registry import (
    BasicAuth,
    BearerAuth,
    Hold,
    Raw,
    Redirect,
    ScriptedRegistry,
    Stall,
    Status,
    Truncate,
)
from tests import peers

ACCEPT = ", ".join(map(str, MANIFEST_TYPES))
IMAGE = build_image([layer_tar({"a": bytes(range(256)) * 20})], platform="linux/amd64")
BLOB = b"0123456789" * 100


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    url: str, method: str = "GET", headers: Mapping[str, str] | None = None, *, body: bytes | None = None
) -> Answer:
    """Send one request over a connection of its own."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        # docker-registry promises the length of the whole blob with a 416 and sends a short error.
        content = b"" if response.status == 416 else response.read()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, content)
    finally:
        connection.close()


@pytest.fixture
def blob(scripted: ScriptedRegistry) -> str:
    """Return the URL of a blob of 1,000 bytes."""
    return f"http://{scripted.host}/v2/demo/x/blobs/{scripted.put_blob('demo/x', BLOB)}"


def storage_url(url: str, method: str = "GET") -> str:
    """Return where the registry redirects ``url`` to."""
    return ask(url, method).headers["location"]


# As docker-registry does

REQUESTS: list[tuple[str, str, dict[str, str]]] = [
    ("GET", "/v2/", {}),
    ("GET", "manifests/{tag}", {"Accept": ACCEPT}),
    ("HEAD", "manifests/{tag}", {"Accept": ACCEPT}),
    ("GET", "manifests/{digest}", {"Accept": ACCEPT}),
    ("GET", "manifests/nothing", {"Accept": ACCEPT}),
    ("GET", "manifests/sha256:" + "0" * 64, {"Accept": ACCEPT}),
    ("GET", "blobs/sha256:" + "0" * 64, {}),
    ("HEAD", "blobs/sha256:" + "0" * 64, {}),
    ("GET", "blobs/{layer}", {}),
    ("HEAD", "blobs/{layer}", {}),
    ("GET", "blobs/{layer}", {"Range": "bytes=0-0"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=500-1499"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=500-"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=-500"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=-99999999"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=2000-99999999"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=500-0"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=99999999-"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=99999998-99999999"}),
    ("GET", "blobs/{layer}", {"Range": "bytes=0-4", "If-Range": '"other"'}),
    ("GET", "blobs/{layer}", {"Range": "bytes=0-4", "If-Range": '"{layer}"'}),
    ("GET", "blobs/{layer}", {"If-None-Match": '"{layer}"'}),
    ("GET", "manifests/{digest}", {"Accept": ACCEPT, "If-None-Match": '"{digest}"'}),
]
COMPARED = ("content-type", "content-length", "content-range", "docker-content-digest", "etag", "accept-ranges")


@pytest.mark.parametrize(("method", "path", "headers"), REQUESTS)
def test_it_answers_as_docker_registry_does(
    docker_registry: peers.PeerRegistry,
    scripted: ScriptedRegistry,
    method: str,
    path: str,
    headers: dict[str, str],
) -> None:
    """Status, body, length, type, range, digest and ETag are those of the real one, request by request."""
    pushed = docker_registry.pushed["oci-gzip"]
    assert isinstance(pushed.source, BuiltImage)
    for kind, other in docker_registry.pushed.items():
        scripted.add(other.source, peers.REPOSITORY, kind)
    names = {"tag": pushed.kind, "digest": pushed.digest, "layer": str(pushed.source.layers[1].digest)}
    if not path.startswith("/"):
        path = f"/v2/{peers.REPOSITORY}/{path.format(**names)}"
    headers = {name: value.format(**names) for name, value in headers.items()}

    real, ours = (ask(f"http://{host}{path}", method, headers) for host in (docker_registry.host, scripted.host))

    assert ours.status == real.status
    if real.status < 300:
        assert {n: ours.headers.get(n) for n in COMPARED} == {n: real.headers.get(n) for n in COMPARED}
        assert ours.body == real.body
    elif real.body and real.status == 404:
        assert json.loads(ours.body)["errors"][0]["code"] == json.loads(real.body)["errors"][0]["code"]
    elif real.status == 416:
        assert ours.headers.get("content-range") == f"bytes */{pushed.source.layers[1].size}"


def test_it_lists_tags_as_docker_registry_does(docker_registry: peers.PeerRegistry, scripted: ScriptedRegistry) -> None:
    """The same document with the same tags, in whatever order."""
    for kind, pushed in docker_registry.pushed.items():
        scripted.add(pushed.source, peers.REPOSITORY, kind)
    path = f"/v2/{peers.REPOSITORY}/tags/list"

    real, ours = (ask(f"http://{host}{path}") for host in (docker_registry.host, scripted.host))

    assert real.headers["content-type"] == ours.headers["content-type"]
    assert json.loads(ours.body) | {"tags": None} == json.loads(real.body) | {"tags": None}
    assert json.loads(ours.body)["tags"] == sorted(json.loads(real.body)["tags"])


def test_it_is_read_only(scripted: ScriptedRegistry) -> None:
    """Writes are refused with the code of the specification."""
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = ask(f"http://{scripted.host}/v2/demo/x/blobs/uploads/", method, body=b"x")

        assert answer.status == 405
        assert json.loads(answer.body)["errors"][0]["code"] == "UNSUPPORTED"


def test_tags_come_in_pages(scripted: ScriptedRegistry) -> None:
    """``n`` and ``last`` cut the sorted list, with a link to the rest while there is some."""
    for tag in ("b", "a", "c"):
        scripted.add(IMAGE, "demo/x", tag)
    url = f"http://{scripted.host}/v2/demo/x/tags/list"

    first, last = ask(f"{url}?n=2"), ask(f"{url}?n=2&last=b")

    assert json.loads(first.body)["tags"] == ["a", "b"]
    assert first.headers["link"] == '</v2/demo/x/tags/list?n=2&last=b>; rel="next"'
    assert json.loads(last.body)["tags"] == ["c"]
    assert "link" not in last.headers
    assert json.loads(ask(f"{url}?n=many").body)["tags"] == ["a", "b", "c"]


def test_a_repository_holds_its_own(scripted: ScriptedRegistry) -> None:
    """What one repository holds is not found in another."""
    digest = scripted.put_blob("tenant/a", BLOB)
    scripted.add(IMAGE, "tenant/a", "1.0")

    assert ask(f"{scripted.host}/v2/tenant/b/blobs/{digest}").status == 404
    assert ask(f"{scripted.host}/v2/tenant/b/manifests/1.0").status == 404
    assert ask(f"{scripted.host}/v2/tenant/b/manifests/{IMAGE.digest}").status == 404


def test_manifests_are_any_bytes_under_any_name(scripted: ScriptedRegistry) -> None:
    """Bytes, media type (or none) and digest are served as they were put."""
    raw = b'{"layers":1,"layers":2}'
    named = scripted.put_manifest("demo/x", raw, media_type=None, tag="odd")
    other = Digest.of(raw, algorithm="sha512")
    scripted.put_manifest("demo/x", raw, media_type="text/plain", digest=other)

    by_tag = ask(f"{scripted.host}/v2/demo/x/manifests/odd")
    by_name = ask(f"{scripted.host}/v2/demo/x/manifests/{other}")

    assert (by_tag.body, by_tag.headers["docker-content-digest"]) == (raw, str(named))
    assert "content-type" not in by_tag.headers
    assert (by_name.body, by_name.headers["docker-content-digest"]) == (raw, str(other))
    assert by_name.headers["content-type"] == "text/plain"


def test_a_tag_moves(scripted: ScriptedRegistry) -> None:
    """The tag leads to the new image, the old one stays under its digest."""
    newer = build_image([layer_tar({"b": b"2"})], platform="linux/amd64")
    scripted.add(IMAGE, "demo/x", "1.0")
    scripted.add(newer, "demo/x", "1.0")

    assert ask(f"{scripted.host}/v2/demo/x/manifests/1.0").body == newer.manifest
    assert ask(f"{scripted.host}/v2/demo/x/manifests/{IMAGE.digest}").body == IMAGE.manifest


def test_a_blob_may_live_in_a_file(scripted: ScriptedRegistry, tmp_path: Path) -> None:
    """Files are served from disk, whole and in ranges; a percent-encoded digest is the same digest."""
    path = tmp_path / "blob"
    path.write_bytes(BLOB)
    digest = scripted.put_blob("demo/x", path)
    url = f"http://{scripted.host}/v2/demo/x/blobs/{digest}"

    assert ask(url).body == BLOB
    assert ask(url.replace("sha256:", "sha256%3A"), "GET", {"Range": "bytes=10-19"}).body == BLOB[10:20]


def test_the_zero_byte_blob_is_a_blob(scripted: ScriptedRegistry) -> None:
    """It is served whole with a length of 0, and no range of it exists."""
    url = f"http://{scripted.host}/v2/demo/x/blobs/{scripted.put_blob('demo/x', b'')}"

    assert (ask(url).status, ask(url).headers["content-length"]) == (200, "0")
    assert ask(url, "GET", {"Range": "bytes=0-0"}).status == 416


@pytest.mark.parametrize("header", ["", "bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,4-5", "items=0-1", "bytes=1"])
def test_what_is_not_a_single_range_is_the_whole(header: str) -> None:
    """Headers that ask for something else are left alone, as RFC 9110 allows."""
    assert asked_range(header, 100) is None


# For real clients


@pytest.mark.parametrize("kind", ["oci-gzip", "oci-zstd", "oci-plain", "odd", "index", "docker-list"])
@pytest.mark.parametrize("to_storage", [False, True])
def test_skopeo_pulls_from_it(
    scripted: ScriptedRegistry,
    real_images: dict[str, BuiltImage | BuiltIndex],
    skopeo: Callable[..., bytes],
    tmp_path: Path,
    kind: str,
    *,
    to_storage: bool,
) -> None:
    """Skopeo copies every kind of image, straight and through redirects to storage, and every digest is right."""
    scripted.add(real_images[kind], "demo/serving", "1.0")
    if to_storage:
        scripted.fault("blobs/*", Redirect(), times=None)
    source = f"docker://{scripted.host}/demo/serving:1.0"

    skopeo("copy", "--all", "--preserve-digests", "--src-tls-verify=false", source, f"oci:{tmp_path}/layout:1.0")

    assert skopeo("inspect", "--raw", f"oci:{tmp_path}/layout:1.0") == real_images[kind].manifest
    stored = [request for request in scripted.requests if request.listener == "storage"]
    assert bool(stored) == to_storage
    assert not any("authorization" in request.headers for request in stored)


def test_skopeo_pulls_docker_schema_2_and_inspects(
    scripted: ScriptedRegistry, skopeo: Callable[..., bytes], tmp_path: Path
) -> None:
    """A schema 2 image is one for skopeo too, with its tags and layers."""
    image = build_image([layer_tar({"a": b"1"})], style="docker", platform="linux/amd64")
    scripted.add(image, "demo/serving", "1.0")
    source = f"docker://{scripted.host}/demo/serving:1.0"

    seen = json.loads(skopeo("inspect", "--tls-verify=false", source))
    skopeo("copy", "--preserve-digests", "--src-tls-verify=false", source, f"dir:{tmp_path}/copy")

    assert (seen["Digest"], seen["RepoTags"]) == (str(image.digest), ["1.0"])
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == image.manifest


AUTHS = [
    BasicAuth("user", "pass:word"),
    BearerAuth(),
    BearerAuth("user", "pass:word"),
    BearerAuth("user", "pass:word", name="access_token", expires_in=None),
]


@pytest.mark.parametrize("auth", AUTHS)
def test_skopeo_authenticates(auth: BasicAuth | BearerAuth, skopeo: Callable[..., bytes]) -> None:
    """With the right credentials skopeo gets the image; with wrong ones it does not."""
    with ScriptedRegistry(auth=auth) as registry:
        registry.add(IMAGE, "demo/serving", "1.0")
        source = f"docker://{registry.host}/demo/serving:1.0"

        assert skopeo("inspect", "--raw", "--tls-verify=false", "--creds=user:pass:word", source) == IMAGE.manifest
        if auth.username:
            with pytest.raises(AssertionError, match=r"401|unauthorized|authentication required"):
                skopeo("inspect", "--raw", "--tls-verify=false", "--creds=user:wrong", source)


# Credentials


def basic(username: str, password: str) -> str:
    return f"Basic {b64encode(f'{username}:{password}'.encode()).decode()}"


def test_basic_is_asked_for_and_checked() -> None:
    """Without the right user name and password everything is a 401 with a challenge."""
    with ScriptedRegistry(auth=BasicAuth("user", "word", realm="here")) as registry:
        for header in ({}, {"Authorization": basic("user", "other")}, {"Authorization": "Basic !!!"}):
            answer = ask(f"{registry.host}/v2/", "GET", header)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Basic realm="here"')

        assert ask(f"{registry.host}/v2/", "GET", {"Authorization": basic("user", "word")}).status == 200
        assert ask(f"{registry.host}/token").status == 404


def token_of(answer: Answer) -> str:
    token = json.loads(answer.body)["token"]
    assert isinstance(token, str)
    return token


def test_a_bearer_token_is_for_its_scope_and_its_time() -> None:
    """The challenge names endpoint, service and scope; the token opens that repository until it is over or revoked."""
    with ScriptedRegistry(auth=BearerAuth(expires_in=100)) as registry:
        registry.add(IMAGE, "demo/a", "1")
        registry.add(IMAGE, "demo/b", "1")
        url = f"http://{registry.host}/v2/demo/a/manifests/1"
        challenge = ask(url).headers["www-authenticate"]
        assert challenge == (
            f'Bearer realm="http://{registry.host}/token",service="scripted",scope="repository:demo/a:pull"'
        )
        endpoint = f"http://{registry.host}/token?service=scripted&scope=repository:demo/a:pull"
        header = f"Bearer {token_of(ask(endpoint))}"

        assert ask(url, "GET", {"Authorization": header}).status == 200
        assert ask(f"http://{registry.host}/v2/demo/b/manifests/1", "GET", {"Authorization": header}).status == 401
        registry.advance(101)
        assert ask(url, "GET", {"Authorization": header}).status == 401
        again = f"Bearer {token_of(ask(endpoint))}"
        assert ask(url, "GET", {"Authorization": again}).status == 200
        registry.revoke_tokens()
        assert ask(url, "GET", {"Authorization": again}).status == 401


def test_the_token_endpoint_checks_who_asks() -> None:
    """A password by GET, a refresh token by POST where there is one, a scope of the registry's own, another port."""
    auth = BearerAuth("user", "word", identity_token="idt", scope="aws", elsewhere=True)
    with ScriptedRegistry(auth=auth) as registry:
        registry.add(IMAGE, "demo/a", "1")
        realm = f"http://{registry.storage_host}/token"
        assert (
            f'realm="{realm}",service="scripted",scope="aws"' in ask(f"{registry.host}/v2/").headers["www-authenticate"]
        )
        form = b"grant_type=refresh_token&refresh_token=idt&scope=aws"

        assert ask(f"{realm}?scope=aws").status == 401
        assert ask(realm, "POST", body=form.replace(b"idt", b"other")).status == 401
        tokens = [
            token_of(ask(f"{realm}?scope=other&scope=aws", "GET", {"Authorization": basic("user", "word")})),
            token_of(ask(realm, "POST", body=form)),
        ]

        assert [
            ask(f"{registry.host}/v2/demo/a/manifests/1", "GET", {"Authorization": f"Bearer {t}"}).status
            for t in tokens
        ] == [
            200,
            200,
        ]
        assert registry.count("token", method="POST") == 2
    with ScriptedRegistry(auth=BearerAuth()) as registry:
        assert ask(f"{registry.host}/token", "POST", body=form).status == 405


def test_a_refusal_uses_up_no_fault() -> None:
    """A fault waits for a request that has its credentials."""
    with ScriptedRegistry(auth=BasicAuth("user", "word")) as registry:
        url = f"{registry.host}/v2/demo/x/blobs/{registry.put_blob('demo/x', BLOB)}"
        registry.fault("blobs/*", Status(503))

        assert [ask(url).status, ask(url, "GET", {"Authorization": basic("user", "word")}).status] == [401, 503]


# Storage


def test_a_redirect_leads_to_storage_on_another_port(scripted: ScriptedRegistry, blob: str) -> None:
    """The URL is signed, gives the blob in ranges, and shows neither digest header nor the registry's ETag."""
    scripted.fault("blobs/*", Redirect(), times=None)
    moved = ask(blob)
    url = moved.headers["location"]

    assert moved.status == 307
    assert urlsplit(url).netloc == scripted.storage_host != scripted.host
    assert "X-Amz-Signature=" in url
    whole, part = ask(url), ask(url, "GET", {"Range": "bytes=3-7"})
    assert (whole.status, whole.body) == (200, BLOB)
    assert (part.status, part.body, part.headers["content-range"]) == (206, BLOB[3:8], "bytes 3-7/1000")
    assert "docker-content-digest" not in whole.headers
    assert whole.headers["etag"] == part.headers["etag"]


def test_storage_refuses_a_second_kind_of_credentials(scripted: ScriptedRegistry, blob: str) -> None:
    """An Authorization header beside the signature is a 400, as S3 has it."""
    scripted.fault("blobs/*", Redirect(), times=None)

    answer = ask(storage_url(blob), "GET", {"Authorization": "Bearer x"})

    assert answer.status == 400
    assert b"<Code>InvalidArgument</Code><Message>Only one auth mechanism allowed" in answer.body
    assert answer.headers["content-type"] == "application/xml"


@pytest.mark.parametrize(("session", "status", "code"), [(False, 403, b"AccessDenied"), (True, 400, b"ExpiredToken")])
def test_storage_urls_expire(scripted: ScriptedRegistry, blob: str, *, session: bool, status: int, code: bytes) -> None:
    """A URL works until its time is over, then gives the XML of its kind; one may be expired from the start."""
    scripted.fault("blobs/*", Redirect(expires=60, session=session))
    scripted.fault("blobs/*", Redirect(expires=0, session=session))
    url, expired = storage_url(blob), storage_url(blob)

    assert ask(url).status == 200
    assert ask(expired).status == status
    scripted.advance(61)
    answer = ask(url)
    assert answer.status == status
    assert b"<Code>" + code + b"</Code>" in answer.body


def test_storage_urls_are_for_one_method_and_one_object(scripted: ScriptedRegistry, blob: str) -> None:
    """A HEAD on a URL signed for GET, a changed path or query, and no signature at all are refused."""
    scripted.fault("blobs/*", Redirect(), times=None)
    url = storage_url(blob)
    path, _, query = url.partition("?")

    assert ask(url, "HEAD").status == 403
    assert ask(storage_url(blob, "HEAD"), "HEAD").status == 200
    assert b"SignatureDoesNotMatch" in ask(f"{path}0?{query}").body
    assert b"SignatureDoesNotMatch" in ask(url.replace("Expires=3600", "Expires=9999")).body
    assert b"<Code>AccessDenied</Code>" in ask(path).body


# Scripts


def test_a_count_is_used_up(scripted: ScriptedRegistry, blob: str) -> None:
    """So many requests get the fault, the next one the right reply."""
    scripted.fault("blobs/*", Status(503), times=2)

    assert [ask(blob).status for _ in range(3)] == [503, 503, 200]


def test_counted_scripts_come_in_order_and_before_the_lasting(scripted: ScriptedRegistry, blob: str) -> None:
    """The oldest with turns left answers; those without a count answer when nothing else does."""
    scripted.fault("blobs/*", Status(500), times=None)
    scripted.fault("blobs/*", Status(501))
    scripted.fault("blobs/*", Status(502))

    assert [ask(blob).status for _ in range(4)] == [501, 502, 500, 500]
    scripted.clear_faults()
    assert ask(blob).status == 200


def test_skip_lets_requests_pass(scripted: ScriptedRegistry, blob: str) -> None:
    """The fault begins after so many matching requests, which may get the fault of another script."""
    scripted.fault("blobs/*", Status(503), skip=2)
    scripted.fault("blobs/*", Status(429))

    assert [ask(blob).status for _ in range(4)] == [429, 200, 503, 200]


def test_a_script_takes_only_what_it_matches(scripted: ScriptedRegistry, blob: str) -> None:
    """Pattern, whole path, method and predicate narrow a script; what does not match does not count."""
    scripted.fault("manifests/*", Status(500))
    scripted.fault("/v2/other/*", Status(501))
    scripted.fault("/v2/demo/*", Status(502), method="HEAD")
    scripted.fault("*", Status(503), when=lambda request: "x-mark" in request.headers)

    assert ask(blob).status == 200
    assert ask(blob, "HEAD").status == 502
    assert ask(blob, "GET", {"X-Mark": "1"}).status == 503
    assert ask(blob.replace("blobs", "manifests")).status == 500
    assert ask(blob.replace("demo/x", "other/y")).status == 501


def test_faults_apply_one_after_another(scripted: ScriptedRegistry, blob: str) -> None:
    """Two faults of one script show in one reply."""
    scripted.fault("blobs/*", Status(500, body=b"x" * 50), Truncate(at=10))

    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(blob)
    assert caught.value.partial == b"x" * 10


def test_a_script_without_a_fault_is_refused(scripted: ScriptedRegistry) -> None:
    """It would use up turns and do nothing."""
    with pytest.raises(ValueError, match="without a fault"):
        scripted.fault("blobs/*")


# The log


def test_the_log_says_what_was_asked_and_sent(scripted: ScriptedRegistry, blob: str) -> None:
    """Method, path, query, headers, resource, status and bytes are there as soon as the client has its answer."""
    ask(f"{blob}?ns=docker.io", "GET", {"Range": "bytes=0-9", "X-Trace": "abc"})
    ask(blob, "HEAD")
    ask(f"{scripted.host}/v2/")
    first, head, ping = scripted.requests

    digest = blob.rpartition("/")[2]
    assert (first.method, first.path, first.query) == ("GET", f"/v2/demo/x/blobs/{digest}", "ns=docker.io")
    assert (first.repository, first.resource, first.status, first.sent) == ("demo/x", f"blobs/{digest}", 206, 10)
    assert (first.headers["x-trace"], first.headers["range"]) == ("abc", "bytes=0-9")
    assert (head.method, head.status, head.sent) == ("HEAD", 200, 0)
    assert ping.resource == "ping"
    assert len({request.connection for request in scripted.requests}) == 3
    assert scripted.count("blobs/*") == 2
    assert scripted.count("blobs/*", method="HEAD") == 1
    scripted.clear_requests()
    assert scripted.requests == ()


def test_the_log_shows_replies_under_way(scripted: ScriptedRegistry, blob: str) -> None:
    """A stalled reply is in the log with what it has sent; clearing the log meanwhile is harmless."""
    gate = threading.Event()
    scripted.fault("blobs/*", Stall(at=400, gate=gate))
    asking = threading.Thread(target=ask, args=(blob,))
    asking.start()
    try:
        wait_for(lambda: [(r.status, r.sent) for r in scripted.requests] == [(200, 400)])
        scripted.clear_requests()
    finally:
        gate.set()
        asking.join()

    assert scripted.requests == ()


def test_requests_share_a_connection(scripted: ScriptedRegistry, blob: str) -> None:
    """A client that keeps its connection is served over it, and the log shows that."""
    connection = http.client.HTTPConnection(scripted.host, timeout=10)
    for method in ("GET", "HEAD", "GET"):
        connection.request(method, urlsplit(blob).path)
        connection.getresponse().read()
    connection.close()

    assert [request.connection for request in scripted.requests] == [1, 1, 1]


# Sockets and threads


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds, which must be soon."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.005)


def test_stop_ends_whatever_is_under_way(blob: str, scripted: ScriptedRegistry) -> None:
    """Idle connections, stalled bodies, held replies and clients that do not read end at once, with their threads."""
    threads = threading.active_count()
    with ScriptedRegistry() as registry:
        big = registry.put_blob("demo/x", bytes(32 << 20))
        held = registry.put_blob("demo/x", BLOB)
        registry.fault(f"blobs/{held}", Stall(at=10))
        registry.fault(f"blobs/{held}", Hold(threading.Event()))
        clients = [socket.create_connection(("127.0.0.1", int(registry.host.split(":")[1]))) for _ in range(5)]
        for client, digest in zip(clients[1:4], (big, held, held), strict=True):
            client.sendall(f"GET /v2/demo/x/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        clients[4].sendall(b"GET /v2/ HTTP/1.1\r\nHo")
        wait_for(lambda: len(registry.requests) == 3)
        start = time.monotonic()
        registry.stop()
        took = time.monotonic() - start

        assert took < 5  # a join that waits in vain gives up after ten
        assert threading.active_count() == threads
        with pytest.raises(ConnectionRefusedError):
            ask(f"{registry.host}/v2/")
        for client in clients:
            client.close()


def test_it_starts_again_where_it_was(scripted: ScriptedRegistry, blob: str) -> None:
    """The second start has the same ports, content, scripts and log; starting twice is a mistake, stopping is not."""
    scripted.fault("blobs/*", Status(503), skip=1)
    hosts = scripted.host, scripted.storage_host
    ask(blob)

    scripted.stop()
    scripted.stop()
    scripted.start()

    assert (scripted.host, scripted.storage_host) == hosts
    assert [ask(blob).status for _ in range(2)] == [503, 200]
    assert len(scripted.requests) == 3
    with pytest.raises(RuntimeError, match="runs already"):
        scripted.start()


def test_a_taken_storage_port_leaves_nothing_running() -> None:
    """A start that fails half way is no start."""
    registry = ScriptedRegistry()
    registry.start()
    registry.stop()
    with socket.create_server(("127.0.0.1", int(registry.storage_host.split(":")[1]))):
        with pytest.raises(OSError, match="in use"):
            registry.start()

        with pytest.raises(ConnectionRefusedError):
            ask(f"{registry.host}/v2/")


def test_many_clients_at_once(scripted: ScriptedRegistry, blob: str) -> None:
    """Forty clients asking together all get their bytes, and each request is logged once."""
    found: list[bytes] = []
    clients = [threading.Thread(target=lambda: found.append(ask(blob).body)) for _ in range(40)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()

    assert found == [BLOB] * 40
    assert len(scripted.requests) == 40


@pytest.mark.parametrize(
    "call",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / SMTP\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"POST /token HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
        b"POST /token HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\xff" * 70000,
    ],
)
def test_nonsense_ends_the_connection(scripted: ScriptedRegistry, call: bytes) -> None:
    """What is not a request this server reads is not answered, and the server goes on."""
    with socket.create_connection(("127.0.0.1", int(scripted.host.split(":")[1])), timeout=5) as client:
        client.sendall(call)
        with suppress(ConnectionResetError):  # it closed before it had read everything
            assert client.recv(100) == b""

    assert ask(f"{scripted.host}/v2/").status == 200


def test_a_raw_reply_is_exactly_its_bytes(scripted: ScriptedRegistry, blob: str) -> None:
    """Nothing is added, and the log says that no status was sent."""
    scripted.fault("blobs/*", Raw(b"what?"))
    with socket.create_connection(("127.0.0.1", int(scripted.host.split(":")[1])), timeout=5) as client:
        client.sendall(f"GET {urlsplit(blob).path} HTTP/1.1\r\n\r\n".encode())

        assert client.makefile("rb").read() == b"what?"
    assert scripted.requests[-1].status == 0
