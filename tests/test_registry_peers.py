"""The client against real programs: docker-registry with passwords, tokens, as a cache; nginx; credential helpers."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest

from layercache import LayerCache, diagnose
from layercache.control import Control
from layercache.errors import DeniedError, UnauthorizedError, UnreachableError
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Digest, Manifest, Reference, parse_document
from layercache.registry import Anonymous, Credentials, Password, Registry, Tls
from layercache.registry._helper import ask_helper
from tests import peers

USER, SECRET = "user", "pass-canary"
HASH = "$2y$05$ZEo70udsIwNDr2eovINWgeq8Rafj6tJ6yDgC8dIbnMILT/j5XO4OC"  # bcrypt of SECRET


@pytest.fixture
def peer(docker_registry: peers.PeerRegistry, tmp_path: Path) -> Iterator[Callable[..., peers.PeerRegistry]]:
    """Return a starter of further registries over the same images."""
    started: list[peers.PeerRegistry] = []

    def start(*, store: Path = docker_registry.store, **sections: Any) -> peers.PeerRegistry:
        home = tmp_path / f"registry-{len(started)}"
        home.mkdir()
        started.append(peers.PeerRegistry(home, store, docker_registry.pushed, **sections))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., peers.Nginx]]:
    """Return a starter of nginx."""
    started: list[peers.Nginx] = []

    def start(*servers: str, tls: tuple[Path, ...] = ()) -> peers.Nginx:
        started.append(peers.Nginx(tmp_path / f"nginx-{len(started)}", *servers, tls=tls))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.close()


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
    (tmp_path / "htpasswd").write_text(f"{USER}:{HASH}\n")
    registry = peer(auth={"htpasswd": {"realm": "a realm", "path": str(tmp_path / "htpasswd")}})

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
    (tmp_path / "htpasswd").write_text(f"{USER}:{HASH}\n")
    guarded = peer(auth={"htpasswd": {"realm": "r", "path": str(tmp_path / "htpasswd")}})
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


# --- credential helpers ---


@pytest.mark.skipif(not shutil.which("docker-credential-ecr-login"), reason="needs amazon-ecr-credential-helper")
@pytest.mark.parametrize("host", ["reg.example", "123456789012.dkr-ecr.us-west-2.on.aws"])
def test_the_helper_of_amazon_has_nothing_for_a_host_it_does_not_know(tmp_path: Path, host: str) -> None:
    """It ends with 1 and says so on standard output; Debian's is too old to know dual-stack names."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    assert ask_helper("ecr-login", host, control=Control(timeout=30), environ=environ) is None


@pytest.mark.skipif(not shutil.which("docker-credential-pass"), reason="needs golang-docker-credential-helpers")
def test_the_helper_of_pass_has_nothing_where_nothing_was_stored(tmp_path: Path) -> None:
    """It ends with 0, and user and secret are empty: that is nobody, not somebody without a name."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    assert ask_helper("pass", "reg.example", control=Control(timeout=30), environ=environ) is None


@pytest.mark.skipif(
    not shutil.which("docker-credential-secretservice"), reason="needs golang-docker-credential-helpers"
)
def test_a_helper_that_fails_says_why(tmp_path: Path) -> None:
    """Without a desktop there is no secret service: an error that names the helper, never a silent nobody."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with pytest.raises(UnauthorizedError, match="docker-credential-secretservice failed: "):
        ask_helper("secretservice", "reg.example", control=Control(timeout=30), environ=environ)
