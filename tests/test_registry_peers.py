"""The client against real programs: docker-registry with passwords, tokens, as a cache; nginx as a proxy."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest

from layercache import LayerCache, diagnose
from layercache.control import Control
from layercache.errors import DeniedError, RegistryError, UnauthorizedError, UnreachableError
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Digest, Manifest, Reference, parse_document
from layercache.registry import Anonymous, Credentials, Password, Registry, Tls
from tests import peers
from tests.peers import SECRET, USER


def pull(root: Path, host: str, credentials: Credentials | None = None, **options: Any) -> list[str]:
    """Pull the image ``oci-gzip``; how each blob was come by."""
    with (
        LayerCache(root, janitor=False, credentials=credentials or Anonymous(), **options) as cache,
        cache.namespace("a").pull(f"{host}/{peers.REPOSITORY}:oci-gzip", platform="linux/amd64") as image,
    ):
        return [blob.source for blob in image.report.blobs]


def layer_of(registry: peers.PeerRegistry) -> Descriptor:
    manifest = parse_document(registry.pushed["oci-gzip"].manifest)
    assert isinstance(manifest, Manifest)
    return max(manifest.layers, key=lambda layer: layer.size)


def read(client: Registry, blob: Descriptor, offset: int = 0) -> bytes:
    where = Reference.parse(f"{client.host}/{peers.REPOSITORY}:1").repository
    return b"".join(client.fetch(where, blob, offset=offset, control=Control(timeout=30), ledger=Ledger()))


# --- docker-registry ---


def test_a_registry_with_passwords_wants_the_right_one(
    peer: Callable[..., peers.PeerRegistry], root: Path, tmp_path: Path
) -> None:
    """Its htpasswd challenge is Basic: answered with the password, and refused without one or with a wrong one."""
    registry = peer(auth=peers.passwords(tmp_path / "htpasswd"))

    assert pull(root, registry.host, Password(registry.host, USER, SECRET)) == ["miss"] * 4
    for credentials in (Anonymous(), Password(registry.host, USER, "wrong")):
        with pytest.raises(UnauthorizedError):
            pull(root.parent / "other", registry.host, credentials)


def test_a_registry_with_tokens_gets_one_token_for_all_blobs(
    peer: Callable[..., peers.PeerRegistry], root: Path, tmp_path: Path
) -> None:
    """Signed tokens that the registry itself verifies; an own small token server gives them to who may pull."""
    with TokenServer(tmp_path / "root.pem") as tokens:
        registry = peer(auth={"token": tokens.section})
        credentials = Password(registry.host, USER, SECRET)
        trusting = Registry(registry.host, credentials=credentials, realm_hosts=[tokens.host])
        reference = Reference.parse(f"{registry.host}/{peers.REPOSITORY}:oci-gzip")

        found = trusting.resolve(reference, control=Control(timeout=30), ledger=Ledger())
        blob = layer_of(registry)
        threads = [threading.Thread(target=read, args=(trusting, blob)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert str(found.digest) == registry.pushed["oci-gzip"].digest
        assert tokens.asked == [(USER, f"repository:{peers.REPOSITORY}:pull")]
        trusting.close()

        # The same without trust in the token server: the password stays here, and an anonymous token may do nothing.
        with pytest.raises((UnauthorizedError, DeniedError), match="the password was not sent to"):
            pull(root, registry.host, credentials)
        assert {user for user, _ in tokens.asked[1:]} == {""}


def test_a_pull_through_cache_ignores_ranges_while_it_is_cold(
    docker_registry: peers.PeerRegistry, peer: Callable[..., peers.PeerRegistry], tmp_path: Path, root: Path
) -> None:
    """200 for a cold blob, 206 for a warm one: nothing is appended at the wrong place (containerd #12291, #2364)."""
    cache = peer(store=tmp_path / "cached", proxy={"remoteurl": f"http://{docker_registry.host}"})
    client = Registry(cache.host, credentials=Anonymous())
    blob = layer_of(docker_registry)
    rest = read(client, blob, 1000)
    whole = read(client, blob)
    statuses = [status for method, path, status in cache.requests() if str(blob.digest) in path and method == "GET"]
    client.close()

    assert Digest.of(whole) == blob.digest
    assert rest == whole[1000:]
    assert statuses[0] == 200
    end = time.monotonic() + 20  # it stores what it has sent in its own time
    while time.monotonic() < end:
        client = Registry(cache.host, credentials=Anonymous())
        cache.forget_requests()
        assert read(client, blob, 1000) == rest
        client.close()
        if [status for _, path, status in cache.requests() if str(blob.digest) in path][-1] == 206:
            break
    else:
        pytest.fail("the blob did not become warm")
    assert pull(root, cache.host) == ["miss"] * 4


class TokenServer:
    """Gives tokens as docker-registry verifies them: RS256, with the certificate it trusts in the header."""

    def __init__(self, bundle: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import padding, rsa

        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tokens")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
        self.asked: list[tuple[str, str]] = []
        outer = self

        def token(scope: str) -> str:
            kind, repository, _ = scope.split(":")
            start = int(time.time()) - 10
            header = {"typ": "JWT", "alg": "RS256", "x5c": chain}
            access = [{"type": kind, "name": repository, "actions": ["pull"]}]
            claims = {"iss": "layercache tests", "sub": USER, "aud": "peer", "nbf": start, "iat": start, "jti": "1"}
            parts = (header, {**claims, "exp": start + 600, "access": access})
            signed = b".".join(_base64url(json.dumps(part).encode()) for part in parts)
            return (signed + b"." + _base64url(key.sign(signed, padding.PKCS1v15(), hashes.SHA256()))).decode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                scope = parse_qs(urlsplit(self.path).query).get("scope", [""])[0]
                shown = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
                outer.asked.append((shown.partition(":")[0], scope))
                body = json.dumps({"token": token(scope), "expires_in": 600}).encode()
                self.send_response(200 if shown == f"{USER}:{SECRET}" else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if shown else b"x" * len(body))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.section = {
            "realm": f"http://{self.host}/token",
            "service": "peer",
            "issuer": "layercache tests",
            "rootcertbundle": str(bundle),
        }
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def test_a_real_registry_without_referrers_has_none(docker_registry: peers.PeerRegistry) -> None:
    """Debian's docker-registry does not know the API: it says 404, as it does to the tag."""
    client = Registry(docker_registry.host, credentials=Anonymous())
    where = Reference.parse(f"{docker_registry.host}/{peers.REPOSITORY}:1").repository
    subject = Digest.of(docker_registry.pushed["oci-gzip"].manifest)
    assert client.referrers(where, subject, control=Control(timeout=30), ledger=Ledger()) == ()
    client.close()


# --- nginx ---


@peers.needs_nginx
def test_a_proxy_that_drops_ranges_is_read_from_the_start(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx]
) -> None:
    """It answers 200 for a range: what is here already is dropped from the reply."""
    box = nginx(
        f"location / {{{{ proxy_pass http://{docker_registry.host}; proxy_set_header Range ''; max_ranges 0; }}}}"
    )
    client = Registry(box.hosts[0], credentials=Anonymous())
    blob = layer_of(docker_registry)
    whole = read(client, blob)
    assert read(client, blob, 12_345) == whole[12_345:]
    assert Digest.of(whole) == blob.digest
    client.close()
    assert [line.split()[3] for line in box.log(least=2) if "/blobs/" in line] == ["200", "200"]


@peers.needs_nginx
def test_a_redirect_to_another_port_carries_no_password(
    peer: Callable[..., peers.PeerRegistry],
    docker_registry: peers.PeerRegistry,
    nginx: Callable[..., peers.Nginx],
    root: Path,
    tmp_path: Path,
) -> None:
    """Bug 13 on a real proxy: the second server sees the blob requests, and no Authorization in any of them."""
    guarded = peer(auth=peers.passwords(tmp_path / "htpasswd"))
    box = nginx(
        "location ~ /blobs/ {{ return 307 http://{1}$request_uri; }} "
        f"location / {{{{ proxy_pass http://{guarded.host}; }}}}",
        f"location / {{{{ proxy_pass http://{docker_registry.host}; }}}}",
    )
    assert pull(root, box.hosts[0], Password(box.hosts[0], USER, SECRET)) == ["miss"] * 4
    second = [line for line in box.log() if line.startswith(box.hosts[1].partition(":")[2])]
    assert second
    assert all("[-] [" in line for line in second)
    assert any("[Basic " in line for line in box.log())


@peers.needs_nginx
def test_a_mirror_that_is_killed_in_the_middle_is_gone_on_with_at_the_registry(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx]
) -> None:
    """The slow body of nginx breaks off; the rest comes by one bounded range from the registry itself."""
    blob = layer_of(docker_registry)
    box = nginx(f"location / {{{{ proxy_pass http://{docker_registry.host}; limit_rate 20k; limit_rate_after 32k; }}}}")
    client = Registry(docker_registry.host, credentials=Anonymous(), mirrors=[f"http://{box.hosts[0]}"])
    docker_registry.forget_requests()
    timer = threading.Timer(0.5, box.stop)
    timer.start()
    data = read(client, blob)
    timer.join()
    client.close()
    assert Digest.of(data) == blob.digest
    assert [status for _, path, status in docker_registry.requests() if str(blob.digest) in path] == [200, 206]


@peers.needs_nginx
def test_a_host_that_counts_requests_is_waited_for(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx]
) -> None:
    """429 from limit_req: thirty requests at once all succeed, later."""
    limit = "limit_req zone=few burst=4 nodelay; limit_req_status 429;"
    box = nginx(f"location / {{{{ {limit} proxy_pass http://{docker_registry.host}; }}}}")
    client = Registry(box.hosts[0], credentials=Anonymous())
    blob = layer_of(docker_registry)
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(len(read(client, blob)))) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    assert got == [blob.size] * 30
    assert any(" 429 " in line for line in box.log())


@peers.needs_nginx
def test_an_authority_of_ones_own_is_trusted_where_it_is_given(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx], tmp_path: Path, root: Path
) -> None:
    """Over TLS: with ``tls=`` the pull works and the diagnosis names the certificate; without, it ends at TLS."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    peers.run_openssl(certificate, key)
    box = nginx(f"location / {{{{ proxy_pass http://{docker_registry.host}; }}}}", tls=(certificate, key))
    tls = Tls((str(certificate),))
    reference = f"{box.hosts[0]}/{peers.REPOSITORY}:oci-gzip"

    assert pull(root, box.hosts[0], tls=tls) == ["miss"] * 4
    checks = {
        one.step: one for one in diagnose(reference, root=root, tls=tls, plain_http=False, platform="linux/amd64")
    }
    assert [checks[step].state for step in ("tls", "range")] == ["warn", "ok"]  # warn: it ends within a week
    assert checks["tls"].detail.startswith("TLSv1.")
    assert ", certificate by layercache tests until " in checks["tls"].detail

    with (
        LayerCache(tmp_path / "other", janitor=False) as cache,
        pytest.raises(UnreachableError, match="certificate is not trusted"),
    ):
        cache.namespace("a").pull(reference, plain_http=False)
    last = list(diagnose(reference, root=root, plain_http=False))[-1]
    assert (last.step, last.state) == ("tls", "fail")
    assert "certificate is not trusted" in last.detail


@peers.needs_nginx
def test_a_server_of_http_2_is_spoken_to_in_http_1(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx], tmp_path: Path, root: Path
) -> None:
    """The handshake offers http/1.1 and nothing else, so nginx, which prefers h2, speaks that."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    peers.run_openssl(certificate, key)
    box = nginx(f"location / {{{{ proxy_pass http://{docker_registry.host}; }}}}", tls=(certificate, key), http2=True)
    context = ssl.create_default_context(cafile=str(certificate))
    context.set_alpn_protocols(["http/1.1", "h2"])
    with (
        socket.create_connection(("127.0.0.1", int(box.hosts[0].partition(":")[2]))) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as other,
    ):
        assert other.selected_alpn_protocol() == "h2"  # what a client gets that offers both

    tls = Tls((str(certificate),))
    assert pull(root, box.hosts[0], tls=tls) == ["miss"] * 4
    reference = f"{box.hosts[0]}/{peers.REPOSITORY}:oci-gzip"
    checks = {
        one.step: one.state for one in diagnose(reference, root=root, tls=tls, plain_http=False, platform="linux/amd64")
    }
    assert checks["range"] == "ok"
    assert {line.split()[-1] for line in box.log(least=6)} == {"HTTP/1.1"}


def test_a_server_that_accepts_http_2_alone_is_named(tmp_path: Path, root: Path) -> None:
    """It refuses the handshake (RFC 7301): one try, and an error that says why. The diagnosis ends at TLS."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    peers.run_openssl(certificate, key)
    command = [
        "openssl",
        "s_server",
        "-accept",
        "127.0.0.1:0",
        "-cert",
        str(certificate),
        "-key",
        str(key),
        "-alpn",
        "h2",
        "-www",
    ]
    with subprocess.Popen(
        command, env=peers.environment(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            host = next(line for line in server.stdout if line.startswith("ACCEPT ")).split()[1]
            tls = Tls((str(certificate),))
            start = time.monotonic()
            with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:[0-9]+: it speaks HTTP/2 and no HTTP/1\.1"):
                pull(root, host, tls=tls)
            assert time.monotonic() - start < 10
            last = list(diagnose(f"{host}/a:1", root=root, tls=tls, plain_http=False))[-1]
        finally:
            server.kill()
    assert (last.step, last.state) == ("tls", "fail")
    assert "speaks HTTP/2" in last.detail


@peers.needs_nginx
def test_a_server_that_answers_in_http_2_is_named(nginx: Callable[..., peers.Nginx], root: Path) -> None:
    """With ``http2`` and no TLS nginx knows nothing else, and greets with frames."""
    box = nginx("return 200;", http2=True)
    with pytest.raises(UnreachableError, match="it speaks HTTP/2 and no HTTP/1\\.1"):
        pull(root, box.hosts[0])


_GZIP = "gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1; gzip_http_version 1.0;"


@peers.needs_nginx
def test_a_proxy_that_compresses_for_who_accepts_it_changes_nothing(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx], root: Path
) -> None:
    """``gzip on`` for every type: others get coded manifests, here digests and sizes are those of the stored bytes."""
    box = nginx(f"location / {{{{ {_GZIP} proxy_pass http://{docker_registry.host}; }}}}")
    url = f"http://{box.hosts[0]}/v2/{peers.REPOSITORY}/manifests/{docker_registry.pushed['oci-gzip'].digest}"
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json", "Accept-Encoding": "gzip"}
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        urllib.request.Request(url, headers=accept), timeout=10
    ) as other:
        assert other.headers["Content-Encoding"] == "gzip"

    assert pull(root, box.hosts[0]) == ["miss"] * 4
    client = Registry(box.hosts[0], credentials=Anonymous())
    blob = layer_of(docker_registry)
    assert Digest.of(read(client, blob)) == blob.digest
    assert Digest.of(read(client, blob)[:7] + read(client, blob, 7)) == blob.digest  # the second is a range
    client.close()


@peers.needs_nginx
@pytest.mark.parametrize("what", ["manifests", "blobs"])
def test_a_proxy_that_compresses_whoever_asks_is_refused(
    docker_registry: peers.PeerRegistry, nginx: Callable[..., peers.Nginx], tmp_path: Path, root: Path, what: str
) -> None:
    """``gzip_static always`` looks at no Accept-Encoding: no manifest and no blob is taken from it, nor decoded."""
    files = tmp_path / "files"
    pushed = docker_registry.pushed["oci-gzip"]
    coded = gzip.compress(pushed.manifest)
    blob = layer_of(docker_registry)
    name = pushed.digest if what == "manifests" else blob.digest
    place = files / "v2" / peers.REPOSITORY / what
    place.mkdir(parents=True)
    (place / f"{name}.gz").write_bytes(coded)
    type_ = "application/vnd.oci.image.manifest.v1+json"
    box = nginx(
        f"root {files}; default_type {type_}; location /v2/{peers.REPOSITORY}/{what}/ {{{{ gzip_static always; }}}} "
        f"location / {{{{ proxy_pass http://{docker_registry.host}; }}}}"
    )
    client = Registry(box.hosts[0], credentials=Anonymous())
    where = Reference.parse(f"{box.hosts[0]}/{peers.REPOSITORY}@{pushed.digest}")
    ask: Callable[[], object] = partial(read, client, blob)
    if what == "manifests":
        ask = partial(client.document, where.repository, where.target, control=Control(timeout=30), ledger=Ledger())
    with pytest.raises(RegistryError, match="a content coding nobody asked for") as refused:
        ask()
    client.close()
    assert "recompresses" in refused.value.hint
