"""Mirrors before the registry: what falls through and what does not, whose credentials go where, files that say so."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from layercache import LayerCache
from layercache.control import Control
from layercache.errors import (
    CancelledError,
    DeniedError,
    IntegrityError,
    InvalidError,
    LayerCacheError,
    NotFoundError,
    PolicyError,
    RateLimitedError,
    RegistryError,
    UnauthorizedError,
    UnreachableError,
)
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, Reference
from layercache.registry import Anonymous, DockerConfig, Mirror, Password, Registry, Tls, read_hosts
from layercache.registry._chain import Health, falls_through, in_order
from layercache.registry._proxy import Proxies
from layercache.registry._url import Url
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import (
    BasicAuth,
    BearerAuth,
    Fault,
    Redirect,
    Reset,
    ScriptedRegistry,
    Status,
    WrongBytes,
)
from tests.test_registry_transport import BLOB, CERTIFICATE, DATA, KEY, Line, lines, serve_blob

__all__ = ["lines"]  # a fixture

NAME = "demo/x"
IMAGE = build_image([layer_tar({"a": bytes(range(256)) * 9000})], platform="linux/amd64")


@pytest.fixture
def mirror() -> Iterator[ScriptedRegistry]:
    """Return a mirror that holds the image."""
    with ScriptedRegistry() as registry:
        registry.add(IMAGE, NAME, "1")
        yield registry


@pytest.fixture
def origin(scripted: ScriptedRegistry) -> ScriptedRegistry:
    """Return the registry itself, with the image."""
    scripted.add(IMAGE, NAME, "1")
    return scripted


def biggest() -> Descriptor:
    digest, data = max(((d, c) for d, c in IMAGE.blobs.items() if isinstance(c, bytes)), key=lambda pair: len(pair[1]))
    return Descriptor(OCTET_STREAM, digest, len(data))


def fetch(registry: Registry, host: str) -> bytes:
    blob = biggest()
    pieces = registry.fetch(Reference.parse(f"{host}/{NAME}:1").repository, blob, control=Control(), ledger=Ledger())
    return b"".join(pieces)


def resolve(registry: Registry, host: str) -> str:
    found = registry.resolve(Reference.parse(f"{host}/{NAME}:1"), control=Control(), ledger=Ledger())
    return str(found.digest)


# --- decisions ---


@pytest.mark.parametrize(
    ("error", "anonymous", "known"),
    [
        (NotFoundError("x"), True, True),
        (UnreachableError("x"), True, True),
        (RateLimitedError("x"), True, True),
        (RegistryError("x", status=503), True, True),
        (RegistryError("x", status=400), True, True),
        (PolicyError("x"), True, True),
        (UnauthorizedError("x", status=401), True, False),
        (DeniedError("x", status=403), True, False),
        (IntegrityError("x"), False, False),
        (CancelledError("x"), False, False),
        (InvalidError("x"), False, False),
    ],
)
def test_what_an_error_means_for_the_next_source(error: LayerCacheError, anonymous: bool, known: bool) -> None:
    """With and without credentials that were configured for the source."""
    assert falls_through(error, credentials=False) is anonymous
    assert falls_through(error, credentials=True) is known


def test_a_source_that_keeps_failing_or_is_slow_is_asked_last() -> None:
    """From the third failure in a row on, for half a minute; one good answer forgives it."""
    healths = [Health(), Health(), Health()]
    assert in_order(healths, 0.0) == [0, 1, 2]
    for _ in range(3):
        healths[0].failed(10.0)
    assert in_order(healths, 11.0) == [1, 2, 0]
    assert in_order(healths, 41.0) == [0, 1, 2]
    healths[0].served(0.1)
    healths[1].served(5.0)
    assert in_order(healths, 11.0) == [0, 2, 1]


# --- conversations ---


def test_a_mirror_is_asked_first_and_told_which_registry_is_meant(
    mirror: ScriptedRegistry, origin: ScriptedRegistry
) -> None:
    """For tags, manifests and blobs; the registry itself hears nothing."""
    registry = Registry(origin.host, credentials=Anonymous(), mirrors=[mirror.host])

    assert resolve(registry, origin.host) == str(IMAGE.digest)
    assert len(fetch(registry, origin.host)) == biggest().size
    registry.close()

    assert not origin.requests
    assert {request.query for request in mirror.requests} == {f"ns={origin.host.replace(':', '%3A')}"}


@pytest.mark.parametrize("fault", [Status(404), Status(500), Status(429, retry_after="120"), Status(400), Status(401)])
def test_what_a_mirror_cannot_give_comes_from_the_registry(
    mirror: ScriptedRegistry, origin: ScriptedRegistry, fault: Fault
) -> None:
    """Whatever its reason, as long as no credentials of ours were refused."""
    mirror.fault("*", fault, times=None)
    registry = Registry(origin.host, credentials=Anonymous(), mirrors=[mirror.host])

    assert resolve(registry, origin.host) == str(IMAGE.digest)
    assert len(fetch(registry, origin.host)) == biggest().size
    registry.close()


def test_a_mirror_that_is_not_there_is_passed_over_and_then_asked_last(
    mirror: ScriptedRegistry, origin: ScriptedRegistry
) -> None:
    """After three failures the registry is asked at once."""
    mirror.stop()
    registry = Registry(origin.host, credentials=Anonymous(), mirrors=[mirror.host])
    for _ in range(4):
        resolve(registry, origin.host)
    assert [health.strikes for health in registry._healths] == [3, 0]
    registry.close()


def test_a_mirror_that_dies_in_the_middle_is_gone_on_with_where_it_stopped(
    mirror: ScriptedRegistry, origin: ScriptedRegistry
) -> None:
    """No byte is given out twice."""
    half = biggest().size // 2
    mirror.fault("blobs/*", Reset(at=half))
    mirror.fault("blobs/*", Status(404), times=None)
    registry = Registry(origin.host, credentials=Anonymous(), mirrors=[mirror.host])

    assert fetch(registry, origin.host) == IMAGE.blobs[biggest().digest]
    registry.close()

    assert origin.requests[0].headers["range"] == f"bytes={half}-{biggest().size - 1}"


def test_a_namespace_has_mirrors_of_its_own(mirror: ScriptedRegistry, origin: ScriptedRegistry, root: Path) -> None:
    """They stand in the place of the cache's, an empty list for none; no other namespace notices."""
    reference = f"{origin.host}/{NAME}@{IMAGE.digest}"
    with (
        ScriptedRegistry() as second,
        LayerCache(root, janitor=False, credentials=Anonymous(), mirrors={origin.host: [mirror.host]}) as cache,
    ):
        second.add(IMAGE, NAME, "1")

        def pull(name: str, **supply: Any) -> tuple[bool, bool, bool]:
            before = [len(one.requests) for one in (mirror, second, origin)]
            with cache.namespace(name, **supply).pull(reference, platform="linux/amd64") as image:
                assert {blob.source for blob in image.report.blobs} == {"miss"}
            after = [len(one.requests) for one in (mirror, second, origin)]
            return after[0] > before[0], after[1] > before[1], after[2] > before[2]

        assert pull("as the cache") == (True, False, False)
        assert pull("own", mirrors={origin.host: [second.host]}) == (False, True, False)
        assert pull("none", mirrors={origin.host: []}) == (False, False, True)
        assert pull("of another registry", mirrors={"docker.io": [second.host]}) == (True, False, False)
        cache.namespace("own").purge()
        assert pull("own") == (False, True, False)  # as it was given
        cache.namespace("own").purge()
        assert pull("own", mirrors={}) == (True, False, False)


def test_a_namespace_has_credentials_of_its_own(root: Path) -> None:
    """With the tenant's own password it pulls where the cache's does not; nobody else does. A new one counts."""
    with ScriptedRegistry(auth=BasicAuth("user", "right")) as guarded:
        guarded.add(IMAGE, NAME, "1")
        reference = f"{guarded.host}/{NAME}@{IMAGE.digest}"
        right, wrong = Password(guarded.host, "user", "right"), Password(guarded.host, "user", "wrong")
        cache = LayerCache(root, janitor=False, credentials=wrong, platform="linux/amd64")
        with pytest.raises(UnauthorizedError):
            cache.namespace("other").pull(reference)
        own = cache.namespace("own", credentials=right)
        own.pull(reference).close()
        with pytest.raises(UnauthorizedError):
            cache.namespace("other").pull(reference)
        own.purge()
        cache.namespace("own", mirrors={}).pull(reference).close()  # they stay
        own.purge()
        assert cache.namespace("own", credentials=wrong) is own
        with pytest.raises(UnauthorizedError):
            own.pull(reference)
        cache.close()


def test_the_same_credentials_keep_their_tokens(root: Path) -> None:
    """Naming them at each request, as a server does, asks for no second token."""
    with (
        ScriptedRegistry(auth=BearerAuth("user", "right")) as guarded,
        LayerCache(root, janitor=False, platform="linux/amd64") as cache,
    ):
        guarded.add(IMAGE, NAME, "1")
        right = Password(guarded.host, "user", "right")
        for _ in range(3):
            namespace = cache.namespace("own", credentials=right, mirrors={})
            namespace.pull(f"{guarded.host}/{NAME}@{IMAGE.digest}").close()
            namespace.purge()
        assert [request.path for request in guarded.requests].count("/token") == 1


def test_wrong_bytes_of_a_mirror_end_the_pull(mirror: ScriptedRegistry, origin: ScriptedRegistry, root: Path) -> None:
    """Somebody lies; nothing of it is stored, and the registry is not asked behind anybody's back."""
    mirror.fault("blobs/*", WrongBytes(at=10), times=None)
    with LayerCache(root, janitor=False, mirrors={origin.host: [mirror.host]}, credentials=Anonymous()) as cache:
        with pytest.raises(IntegrityError):
            cache.namespace("a").pull(f"{origin.host}/{NAME}:1", platform="linux/amd64")
        assert not [request for request in origin.requests if "blobs" in request.path]


def test_the_registrys_credentials_never_reach_a_mirror(mirror: ScriptedRegistry, origin: ScriptedRegistry) -> None:
    """Not even where it asks for them; then the registry gets them."""
    mirror._gate.auth = BasicAuth("user", "canary")
    origin._gate.auth = BasicAuth("user", "canary")
    registry = Registry(origin.host, credentials=Password(origin.host, "user", "canary"), mirrors=[mirror.host])

    assert resolve(registry, origin.host) == str(IMAGE.digest)
    registry.close()

    assert mirror.requests
    assert not any("authorization" in request.headers for request in mirror.requests)
    assert any("authorization" in request.headers for request in origin.requests)


def test_refused_credentials_of_a_mirror_end_the_pull(
    mirror: ScriptedRegistry, origin: ScriptedRegistry, tmp_path: Path
) -> None:
    """Who configured them wants to know."""
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {mirror.host: {"username": "user", "password": "wrong"}}}))
    mirror._gate.auth = BasicAuth("user", "right")
    registry = Registry(origin.host, credentials=DockerConfig(file), mirrors=[mirror.host])

    with pytest.raises(UnauthorizedError):
        resolve(registry, origin.host)
    registry.close()
    assert not origin.requests


def test_the_registrys_own_error_is_the_one_that_is_raised(mirror: ScriptedRegistry, origin: ScriptedRegistry) -> None:
    """A mirror's troubles are not the answer to whether an image exists."""
    mirror.fault("*", Status(400), times=None)
    registry = Registry(origin.host, credentials=Anonymous(), mirrors=[mirror.host])
    with pytest.raises(NotFoundError):
        registry.resolve(Reference.parse(f"{origin.host}/{NAME}:absent"), control=Control(), ledger=Ledger())
    registry.close()


def test_a_mirror_without_resolve_gives_digests_only(mirror: ScriptedRegistry, origin: ScriptedRegistry) -> None:
    """What a tag means is asked of the registry; its headers go to the mirror alone, also where it redirects."""
    mirror.fault("blobs/*", Redirect(), times=None)
    one = Mirror(f"http://{mirror.host}/", resolve=False, headers=(("X-Canary", "yes"),))
    registry = Registry(origin.host, credentials=Anonymous(), mirrors=[one])

    resolve(registry, origin.host)
    fetch(registry, origin.host)
    registry.close()

    assert [request.method for request in origin.requests] == ["HEAD"]
    assert [("x-canary" in r.headers) for r in mirror.requests] == [True, False]
    assert not any("x-canary" in r.headers for r in origin.requests)


def test_two_tenants_make_two_exchanges(root: Path) -> None:
    """Tokens are kept by tenant, whoever they are for."""
    with ScriptedRegistry(auth=BearerAuth()) as registry:
        registry.add(IMAGE, NAME, "1")
        with LayerCache(root, janitor=False, credentials=Anonymous()) as cache:
            for tenant in ("a", "b", "a"):
                cache.namespace(tenant).pull(f"{registry.host}/{NAME}:1", platform="linux/amd64").close()
        assert registry.count("token") == 2


# --- hosts.toml ---


def test_a_hosts_directory_is_read_as_containerd_does(tmp_path: Path) -> None:
    """Order, capabilities, certificates relative to the file, durations, paths."""
    place = tmp_path / "reg.example_5000_"
    place.mkdir()
    (place / "hosts.toml").write_text(
        'server = "https://reg.example:5000"\nca = "/etc/ca.pem"\n'
        '[host."https://one.example/v2/cache"]\ncapabilities = ["pull"]\noverride_path = true\ndial_timeout = "1m3s"\n'
        'ca = ["a.pem", "/b.pem"]\nclient = [["c.pem", "c.key"], ["d.pem", ""]]\n'
        '[host."https://one.example/v2/cache".header]\nx-one = ["1", "2"]\n'
        '[host."http://two.example/sub"]\nskip_verify = true\nclient = "e.pem"\n'
    )

    (one, two), server = read_hosts(tmp_path, "reg.example:5000")

    assert (one.resolve, one.pull, one.prefix, one.dial_timeout) == (False, True, "/v2/cache", 63.0)
    assert one.tls == Tls((str(place / "a.pem"), "/b.pem"), str(place / "c.pem"), str(place / "c.key"))
    assert one.headers == (("x-one", "1"), ("x-one", "2"))
    assert (two.resolve, two.prefix, two.tls) == (True, "/sub/v2", Tls((), str(place / "e.pem"), "", verify=False))
    assert server is not None
    assert (server.base.authority, server.tls.ca) == ("reg.example:5000", ("/etc/ca.pem",))


def test_the_default_and_dockers_certificates_are_found(tmp_path: Path) -> None:
    """``_default`` is for hosts without a directory; one without ``hosts.toml`` has certificates only."""
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text('[host."https://all.example"]\n')
    docker = tmp_path / "reg.example"
    docker.mkdir()
    for name in ("ca.crt", "client.cert", "client.key"):
        (docker / name).touch()

    assert [one.url for one in read_hosts(tmp_path, "other.example")[0]] == ["https://all.example"]
    mirrors, server = read_hosts(tmp_path, "reg.example")
    assert mirrors == ()
    assert server is not None
    assert server.tls == Tls((str(docker / "ca.crt"),), str(docker / "client.cert"), str(docker / "client.key"))
    assert read_hosts(tmp_path / "absent", "reg.example") == ((), None)


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "host = 1",
        "server = 1",
        '[host."ftp://x"]',
        '[host."https://x"]\ncapabilities = 1',
        '[host."https://x"]\nca = 1',
        '[host."https://x"]\nclient = 1',
        '[host."https://x"]\ndial_timeout = "soon"',
        '[host."https://x".header]\n"a b" = "c"',
        f"client = {'[' * 5000}",
    ],
)
def test_a_hosts_file_that_makes_no_sense_is_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    """Silence would send a pull elsewhere than the operator thinks."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "hosts.toml").write_text(text)

    with pytest.raises(InvalidError, match=r"hosts\.toml"):
        read_hosts(tmp_path, "x")


def test_a_cache_uses_its_hosts_directory(
    mirror: ScriptedRegistry, origin: ScriptedRegistry, root: Path, tmp_path: Path
) -> None:
    """From the file to the report: where the bytes came from."""
    place = tmp_path / origin.host
    place.mkdir()
    (place / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
    with (
        LayerCache(root, janitor=False, hosts_dir=tmp_path, credentials=Anonymous()) as cache,
        cache.namespace("a").pull(f"{origin.host}/{NAME}:1", platform="linux/amd64") as image,
    ):
        assert set(image.report.bytes_by_source) == {mirror.host}


# --- certificates ---


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a file with a certificate and its key, which nobody trusts."""
    file = tmp_path / "both.pem"
    file.write_text(CERTIFICATE + KEY)
    return file


def secured(file: Path, script: Callable[[socket.socket], None], *, client: bool) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(file)

    def wrapped(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as inner:
            script(inner)

    return wrapped


@pytest.mark.parametrize("how", ["authority", "client", "unverified"])
def test_certificates_of_ones_own_are_used(lines: Callable[..., Line], certificate: Path, how: str) -> None:
    """An authority, a client certificate that the server insists on, and no verification at all."""
    line = lines(secured(certificate, serve_blob(None), client=how == "client"))
    tls = {
        "authority": Tls((str(certificate),)),
        "client": Tls((str(certificate),), str(certificate)),
        "unverified": Tls(verify=False),
    }[how]
    host = f"127.0.0.1:{line.port}"
    registry = Registry(host, plain_http=False, credentials=Anonymous(), tls=tls)
    repository = Reference.parse(f"{host}/{NAME}:1").repository
    assert b"".join(registry.fetch(repository, BLOB, control=Control(), ledger=Ledger())) == DATA
    registry.close()


def test_a_certificate_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    """Before anything is sent."""
    registry = Registry("127.0.0.1:9", plain_http=False, tls=Tls((str(tmp_path / "absent"),)), credentials=Anonymous())
    with pytest.raises(InvalidError, match="certificate file"):
        resolve(registry, "127.0.0.1:9")


# --- proxies ---


@pytest.mark.parametrize(
    ("rules", "url", "through"),
    [
        ("", "https://reg.example/", True),
        ("*", "https://reg.example/", False),
        ("example", "https://reg.example/", False),
        (".example", "https://reg.example/", False),
        ("*.example", "https://reg.example/", False),
        ("eg.example", "https://reg.example/", True),
        ("reg.example:443", "https://reg.example/", False),
        ("reg.example:444", "https://reg.example/", True),
        ("reg.example:\u00b9", "https://reg.example/", True),
        (f"reg.example:{'4' * 5000}", "https://reg.example/", True),
        ("10.0.0.0/8", "https://10.1.2.3/", False),
        ("10.0.0.0/8", "https://11.1.2.3/", True),
        ("", "https://127.0.0.1:5000/", False),
        ("", "http://reg.example/", False),
    ],
)
def test_which_requests_go_through_a_proxy(rules: str, url: str, through: bool) -> None:
    """Loopback never does; the variable of the scheme counts."""
    proxies = Proxies.of({"https_proxy": "http://user:p%40ss@proxy.example:3128", "NO_PROXY": rules})

    proxy = proxies.of_url(Url.parse(url))

    assert (proxy is not None) is through
    assert "p@ss" not in repr(proxies)
    assert "dXNlcjp" not in repr(proxies)


def test_a_proxy_that_is_none_is_an_error() -> None:
    """It would be silently left out else. Its password is not repeated."""
    with pytest.raises(InvalidError) as caught:
        Proxies.of({"HTTPS_PROXY": "socks5://user:canary@proxy.example"})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_registry_is_reached_through_the_proxy_of_the_environment(
    lines: Callable[..., Line],
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    """Over TLS by CONNECT, else by the whole URL; the name is the proxy's to resolve, TLS ends at the registry."""
    script = serve_blob(None)
    line = lines(secured(certificate, script, client=False) if scheme == "https" else script)
    seen: list[bytes] = []

    def proxying(connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        seen.append(head)
        with socket.create_connection(("127.0.0.1", line.port)) as onward:
            if head.startswith(b"CONNECT"):
                connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                onward.sendall(head)
            back = threading.Thread(target=_pump, args=(onward, connection))
            back.start()
            _pump(connection, onward)
            with suppress(OSError):
                onward.shutdown(socket.SHUT_RDWR)
            back.join()

    proxy = lines(proxying)
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://user:canary@127.0.0.1:{proxy.port}")
    tls = Tls(verify=False)  # the certificate is of 127.0.0.1, the name another one
    registry = Registry("reg.invalid", plain_http=scheme == "http", credentials=Anonymous(), tls=tls)
    repository = Reference.parse(f"reg.invalid/{NAME}:1").repository

    assert b"".join(registry.fetch(repository, BLOB, control=Control(), ledger=Ledger())) == DATA
    registry.close()

    assert b"Proxy-Authorization: Basic dXNlcjpjYW5hcnk=" in seen[0]
    assert seen[0].startswith(b"CONNECT reg.invalid:443 " if scheme == "https" else b"GET http://reg.invalid/v2/")


def test_a_proxy_that_refuses_ends_it_at_once(
    lines: Callable[..., Line],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its status, and without its password."""

    def refusing(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    proxy = lines(refusing)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:canary@127.0.0.1:{proxy.port}")
    registry = Registry("reg.invalid", credentials=Anonymous())
    with pytest.raises(UnreachableError, match="answered 407") as caught:
        resolve(registry, "reg.invalid")
    registry.close()
    assert "canary" not in str(caught.value)
    assert proxy.accepted == 1


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return
