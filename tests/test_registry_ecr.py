"""Amazon ECR: hosts known by their names, tokens from a real boto3 and moto's server, registries that ask for them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layercache.control import Control
from layercache.errors import CancelledError, DeniedError, NotFoundError, UnauthorizedError
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Reference
from layercache.registry import Anonymous, EcrCredentials, Password, Registry
from layercache.registry._ecr_host import EcrHost, parse_ecr_host
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import BasicAuth, BearerAuth, ScriptedRegistry, Status
from tests import peers
from tests.moto_process import Moto, point

pytest.importorskip("moto")

ACCOUNT = "123456789012"
HOST = f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com"
PASSWORD = f"{ACCOUNT}-auth-token"
IMAGE = build_image([layer_tar({"a": b"b" * 100_000})], platform="linux/amd64")


# --- hosts ---


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("dkr.ecr.us-west-2.amazonaws.com", ("us-west-2", "aws", False, False)),
        ("dkr.ecr.cn-north-1.amazonaws.com.cn", ("cn-north-1", "aws-cn", False, False)),
        ("dkr.ecr.us-gov-west-1.amazonaws.com", ("us-gov-west-1", "aws-us-gov", False, False)),
        ("dkr.ecr-fips.us-east-1.amazonaws.com", ("us-east-1", "aws", True, False)),
        ("dkr-ecr.eu-central-1.on.aws", ("eu-central-1", "aws", False, True)),
        ("dkr-ecr-fips.us-gov-east-1.on.aws", ("us-gov-east-1", "aws-us-gov", True, True)),
        ("dkr-ecr.cn-northwest-1.on.amazonwebservices.com.cn", ("cn-northwest-1", "aws-cn", False, True)),
        ("dkr.ecr.cn-northwest-1.on.amazonwebservices.com.cn", ("cn-northwest-1", "aws-cn", False, True)),
        ("dkr.ecr.eusc-de-east-1.amazonaws.eu", ("eusc-de-east-1", "aws-eusc", False, False)),
        ("dkr.ecr.us-iso-east-1.c2s.ic.gov", ("us-iso-east-1", "aws-iso", False, False)),
        ("dkr.ecr.us-isob-east-1.sc2s.sgov.gov", ("us-isob-east-1", "aws-iso-b", False, False)),
        ("dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk", ("eu-isoe-west-1", "aws-iso-e", False, False)),
        ("dkr.ecr.us-isof-south-1.csp.hci.ic.gov", ("us-isof-south-1", "aws-iso-f", False, False)),
    ],
)
def test_a_private_host_says_region_partition_and_kind(host: str, expected: tuple[str, str, bool, bool]) -> None:
    """In every partition, plain, FIPS and dual stack; upper case is the same host."""
    region, partition, fips, dual = expected

    assert parse_ecr_host(f"{ACCOUNT}.{host}") == EcrHost(ACCOUNT, region, partition, fips, dual)
    assert parse_ecr_host(f"{ACCOUNT}.{host}".upper()) is not None


@pytest.mark.parametrize(
    "host",
    [
        f"{HOST}.fake.example.com",
        f"x{HOST}",
        f"x.{HOST}",
        f"{HOST}:443",
        "12345678901.dkr.ecr.us-west-2.amazonaws.com",
        f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com.example",
        f"{ACCOUNT}.dkr.ecr.us-west-2.amazonawsxcom",
        f"{ACCOUNT}.dkr.ecr.cn-north-1.amazonaws.com",
        f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com.cn",
        f"{ACCOUNT}.dkr.ecr.amazonaws.com",
        f"{ACCOUNT}.dkr.ecr.us-west-2.evil.amazonaws.com",
        "public.ecr.aws",
        "docker.io",
        "",
    ],
)
def test_a_look_alike_is_not_ecr(host: str) -> None:
    """The whole name counts: a token must not go to somebody who owns a longer one."""
    assert parse_ecr_host(host) is None
    assert not EcrCredentials(otherwise=Anonymous()).eager(host)


def test_other_hosts_are_asked_of_docker_and_import_no_boto3(tmp_path: Path) -> None:
    """In an interpreter of its own: neither another host nor ECR Public without credentials of AWS loads boto3."""
    program = (
        "import sys; from layercache.control import Control; from layercache.registry import EcrCredentials\n"
        "e = EcrCredentials(); assert e.basic('ghcr.io', control=Control()) is None\n"
        "assert e.basic('public.ecr.aws', control=Control()) is None; assert not e.eager('public.ecr.aws')\n"
        "print('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


# --- tokens ---


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    """Return moto with tokens that live for twelve hours."""
    server = Moto(tmp_path_factory.mktemp("moto"), 12 * 3600)
    yield server
    server.stop()


@pytest.fixture
def aws(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Moto:
    """Return moto, and point boto3 to it."""
    point(monkeypatch, moto)
    return moto


def test_a_token_is_of_the_region_of_the_host_and_kept_for_all_its_accounts(aws: Moto) -> None:
    """One call for two accounts of a region and another one for the next region; FIPS has its own."""
    before = len(aws.calls())
    credentials = EcrCredentials(otherwise=Anonymous())

    found = [credentials.basic(host, control=Control()) for host in (HOST, HOST, HOST.replace("1", "2", 1))]
    other = credentials.basic(HOST.replace("us-west-2", "eu-west-1"), control=Control())
    credentials.basic(HOST.replace(".ecr.", ".ecr-fips."), control=Control())

    assert {(c.username, c.password) for c in found if c is not None} == {("AWS", PASSWORD)}
    assert other is not None
    scopes = [scope.split("/") for scope in aws.calls()[before:]]
    assert [(scope[0], scope[2], scope[3]) for scope in scopes] == [
        ("AKIACANARY", region, "ecr") for region in ("us-west-2", "eu-west-1", "us-west-2")
    ]
    assert credentials.eager(HOST)
    assert "canary" not in repr(credentials) + repr(found)


def test_many_threads_make_one_call(aws: Moto) -> None:
    """Sixty-four at once."""
    before = len(aws.calls())
    credentials = EcrCredentials(otherwise=Anonymous())
    threads = [
        threading.Thread(target=credentials.basic, args=(HOST,), kwargs={"control": Control()}) for _ in range(64)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(aws.calls()) - before == 1


def test_a_token_is_renewed_by_one_thread_from_half_of_its_life_on(aws: Moto) -> None:
    """The others go on with it meanwhile; nothing is asked for before that."""
    now = [1000.0]
    credentials = EcrCredentials(otherwise=Anonymous(), clock=lambda: now[0])
    credentials.basic(HOST, control=Control())
    before = len(aws.calls())

    now[0] += 5.9 * 3600
    credentials.basic(HOST, control=Control())
    assert len(aws.calls()) == before
    now[0] += 0.2 * 3600
    for _ in range(20):
        assert credentials.basic(HOST, control=Control()) is not None
    settle(lambda: len(aws.calls()) == before + 1)
    now[0] += 5.8 * 3600
    credentials.basic(HOST, control=Control())
    assert len(aws.calls()) == before + 1


def test_a_failed_renewal_leaves_the_old_token_until_its_end_and_not_longer(aws: Moto) -> None:
    """It is not tried again at every pull; after its end the token is not given out, whatever AWS says."""
    now = [1000.0]
    credentials = EcrCredentials(otherwise=Anonymous(), clock=lambda: now[0])
    credentials.basic(HOST, control=Control())
    before = len(aws.calls())
    aws.down()
    try:
        now[0] += 7 * 3600
        for _ in range(5):
            found = credentials.basic(HOST, control=Control())
            assert found is not None
            assert found.lifetime is not None
            assert 0 < found.lifetime <= 5 * 3600
        settle(lambda: not any(t.name == "layercache-ecr" for t in threading.enumerate()), seconds=60)
        assert before < len(aws.calls()) <= before + 4  # one renewal, with boto3's own repetitions
        now[0] += 5 * 3600
        with pytest.raises(UnauthorizedError, match="no token"):
            credentials.basic(HOST, control=Control())
    finally:
        aws.down(is_down=False)


def test_a_rotated_credential_has_a_token_of_its_own(aws: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of temporary credentials can end with them."""
    import boto3

    sessions = [boto3.Session(aws_access_key_id=f"AKIA{n}", aws_secret_access_key="x") for n in (1, 2)]

    class Rotating:
        now = sessions[0]

        def get_credentials(self) -> object:
            return self.now.get_credentials()

        def client(self, *args: object, **options: object) -> object:
            return self.now.client(*args, **options)

    rotating = Rotating()
    credentials = EcrCredentials(rotating, otherwise=Anonymous())
    before = len(aws.calls())
    credentials.basic(HOST, control=Control())
    rotating.now = sessions[1]
    credentials.basic(HOST, control=Control())
    credentials.basic(HOST, control=Control())

    assert [scope.partition("/")[0] for scope in aws.calls()[before:]] == ["AKIA1", "AKIA2"]


def test_a_role_is_assumed_once_and_used(aws: Moto) -> None:
    """With the default chain's credentials; the token is asked for as the role."""
    before = len(aws.calls())
    credentials = EcrCredentials(role=f"arn:aws:iam::{ACCOUNT}:role/puller", otherwise=Anonymous())

    credentials.basic(HOST, control=Control())
    credentials.basic(HOST, control=Control())

    scopes = aws.calls()[before:]
    assert len(scopes) == 1
    assert not scopes[0].startswith("AKIACANARY")


def test_a_profile_is_used(aws: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no second way to say who we are beside it."""
    file = tmp_path / "credentials"
    file.write_text("[puller]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    before = len(aws.calls())

    EcrCredentials(profile="puller", otherwise=Anonymous()).basic(HOST, control=Control())

    assert aws.calls()[before].startswith("AKIAPROFILE/")
    with pytest.raises(UnauthorizedError, match="absent"):
        EcrCredentials(profile="absent", otherwise=Anonymous()).basic(HOST, control=Control())
    with pytest.raises(ValueError, match="not both"):
        EcrCredentials(object(), profile="puller")


def test_an_endpoint_of_ones_own_is_asked(aws: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface endpoint without private DNS."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    before = len(aws.calls())

    for host in (HOST, HOST.replace(".ecr.", ".ecr-fips."), f"{ACCOUNT}.dkr-ecr.us-west-2.on.aws"):
        EcrCredentials(endpoint=aws.url, otherwise=Anonymous()).basic(host, control=Control())

    assert len(aws.calls()) == before + 3


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (HOST, "https://api.ecr.us-west-2.amazonaws.com/"),
        (f"{ACCOUNT}.dkr.ecr-fips.us-east-1.amazonaws.com", "https://ecr-fips.us-east-1.amazonaws.com/"),
        (f"{ACCOUNT}.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "https://ecr-fips.us-gov-west-1.amazonaws.com/"),
        (f"{ACCOUNT}.dkr-ecr.us-east-1.on.aws", "https://ecr.us-east-1.api.aws/"),
        (f"{ACCOUNT}.dkr-ecr-fips.us-east-1.on.aws", "https://ecr-fips.us-east-1.api.aws/"),
        (f"{ACCOUNT}.dkr.ecr.cn-north-1.amazonaws.com.cn", "https://api.ecr.cn-north-1.amazonaws.com.cn/"),
        (f"{ACCOUNT}.dkr.ecr.eusc-de-east-1.amazonaws.eu", "https://api.ecr.eusc-de-east-1.amazonaws.eu/"),
        (f"{ACCOUNT}.dkr.ecr.us-iso-east-1.c2s.ic.gov", "https://api.ecr.us-iso-east-1.c2s.ic.gov/"),
        ("public.ecr.aws", "https://api.ecr-public.us-east-1.amazonaws.com/"),
    ],
)
def test_the_api_that_is_asked_belongs_to_the_host(host: str, url: str) -> None:
    """The URL of the request as it would go out, not what boto3 says of its client: for FIPS the two differ."""
    import boto3

    seen: list[str] = []
    session = boto3.Session(aws_access_key_id="a", aws_secret_access_key="b")

    def stop(request: object, **_: object) -> None:
        seen.append(request.url)  # type: ignore[attr-defined]
        raise RuntimeError("not sent")

    session.events.register("before-send.*", stop)
    with pytest.raises(UnauthorizedError):
        EcrCredentials(session, otherwise=Anonymous()).basic(host, control=Control())

    assert set(seen) == {url}


def test_fips_is_refused_for_ecr_public(aws: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS lists no such endpoint; boto3 would make up a name."""
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")

    with pytest.raises(UnauthorizedError, match="no FIPS endpoint"):
        EcrCredentials(otherwise=Anonymous()).basic("public.ecr.aws", control=Control())


def test_ecr_public_has_a_token_where_aws_credentials_were_placed(aws: Moto) -> None:
    """From us-east-1, and to be traded for a bearer token: it is not sent before a challenge."""
    credentials = EcrCredentials(otherwise=Anonymous())

    found = credentials.basic("public.ecr.aws", control=Control())

    assert found is not None
    assert (found.username, found.password) == ("AWS", "public-token")
    assert "/us-east-1/" in aws.calls("SpencerFrontendService.GetAuthorizationToken")[-1]
    assert not credentials.eager("public.ecr.aws")


def test_without_aws_credentials_docker_is_asked_and_the_reason_is_kept(
    aws: Moto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a login left counts; with neither, the error says what AWS lacks."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    found = EcrCredentials(otherwise=Password(HOST, "AWS", "from docker")).basic(HOST, control=Control())
    assert found is not None
    assert found.password == "from docker"
    with pytest.raises(UnauthorizedError, match="no AWS credentials"):
        EcrCredentials(otherwise=Anonymous()).basic(HOST, control=Control())


def test_a_token_that_has_ended_when_it_comes_is_an_error_and_no_storm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As moto gives them out (expired in 2015). Failures are remembered by who asks, for some seconds."""
    moto = Moto(tmp_path, None)
    try:
        point(monkeypatch, moto)
        with ScriptedRegistry(auth=BasicAuth("AWS", PASSWORD)) as registry:
            steer(monkeypatch, registry.host)
            client = Registry(HOST, plain_http=True, credentials=EcrCredentials(otherwise=Anonymous()))
            for _ in range(5):
                with pytest.raises(UnauthorizedError, match="expired already"):
                    client.resolve(Reference.parse(f"{HOST}/demo/x:1"), control=Control(), ledger=Ledger())
            client.close()
        assert len(moto.calls()) == 1
    finally:
        moto.stop()


def test_a_cancel_ends_the_wait_for_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 knows no cancel; whoever waits for it does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        cancel = threading.Event()
        threading.Timer(0.3, cancel.set).start()
        start = time.monotonic()
        with pytest.raises(CancelledError):
            EcrCredentials(otherwise=Anonymous()).basic(HOST, control=Control(cancel=cancel))
        assert time.monotonic() - start < 5
        connection, _ = silent.accept()
        connection.close()
    settle(lambda: not any(t.name == "layercache-ecr" for t in threading.enumerate()), seconds=30)


# --- registries that ask for them ---


def steer(monkeypatch: pytest.MonkeyPatch, host: str, *names: str) -> None:
    """Let the names of ECR lead to a loopback port."""
    address, port = host.split(":")
    real = socket.getaddrinfo

    def resolve(name: str, *rest: object, **options: object) -> object:
        if name in (HOST, "public.ecr.aws"):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port)))]
        return real(name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def settle(true: Callable[[], bool], *, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def test_private_ecr_is_shown_its_token_without_being_asked(aws: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round trip less; and its reply needs no digest header on a GET (as ECR's has none)."""
    with ScriptedRegistry(auth=BasicAuth("AWS", PASSWORD)) as registry:
        registry.add(IMAGE, "demo/x", "1")
        steer(monkeypatch, registry.host)
        client = Registry(HOST, plain_http=True)
        reference = Reference.parse(f"{HOST}/demo/x:1")

        found = client.resolve(reference, control=Control(), ledger=Ledger())
        client.close()

        assert found.digest == IMAGE.digest
        assert [request.status for request in registry.requests] == [200]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "DENIED", "Your authorization token has expired. Reauthenticate and try again."),
        (401, "UNAUTHORIZED", "no challenge"),
    ],
)
def test_an_expired_private_token_is_replaced_once(
    aws: Moto, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    """ECR says it with 403 and no challenge (SOCI #1148). The clock moves past the ``young`` seconds first."""
    now = [1000.0]
    with ScriptedRegistry() as registry:
        registry.add(IMAGE, "demo/x", "1")
        steer(monkeypatch, registry.host)
        credentials = EcrCredentials(otherwise=Anonymous(), clock=lambda: now[0])
        client = Registry(HOST, plain_http=True, credentials=credentials)
        reference = Reference.parse(f"{HOST}/demo/x:1")
        client.document(reference.repository, IMAGE.digest, control=Control(), ledger=Ledger())
        before = len(aws.calls())
        now[0] += 60
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        registry.fault("manifests/*", Status(status, body=body))

        # moto gives the same text again, which is then refused for good; what counts here is that it was asked for.
        with pytest.raises(UnauthorizedError):
            client.document(reference.repository, IMAGE.digest, control=Control(), ledger=Ledger())
        client.close()

        assert len(aws.calls()) == before + 1


def test_a_permanent_403_is_tried_once(aws: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of the repository says no: no new token will help."""
    with ScriptedRegistry() as registry:
        steer(monkeypatch, registry.host)
        registry.fault("manifests/*", Status(403), times=None)
        client = Registry(HOST, plain_http=True)
        before = len(aws.calls())
        with pytest.raises(DeniedError):
            client.document(
                Reference.parse(f"{HOST}/demo/x:1").repository, IMAGE.digest, control=Control(), ledger=Ledger()
            )
        client.close()

        assert len(registry.requests) == 1
        assert len(aws.calls()) == before + 1


def test_ecr_public_is_read_without_credentials_where_they_are_stale(
    aws: Moto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scope is ``aws``; an endpoint that refuses the password is asked once more as nobody (eksdemo #68)."""
    auth = BearerAuth(scope="aws", service="public.ecr.aws")
    with ScriptedRegistry(auth=auth) as registry:
        registry.add(IMAGE, "demo/x", "1")
        registry.fault("token", Status(400), times=None, when=lambda request: "authorization" in request.headers)
        object.__setattr__(auth, "realm", "http://public.ecr.aws/token")
        steer(monkeypatch, registry.host)
        client = Registry("public.ecr.aws", plain_http=True)
        found = client.resolve(Reference.parse("public.ecr.aws/demo/x:1"), control=Control(), ledger=Ledger())
        client.close()

        assert found.digest == IMAGE.digest
        tokens = [request for request in registry.requests if request.resource == "token"]
        assert ["authorization" in request.headers for request in tokens] == [True, False]
        assert "scope=aws" in tokens[-1].query


def test_an_expired_token_of_ecr_public_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so with 400 DENIED and no challenge (oras-go #1227)."""
    auth = BearerAuth(scope="aws", service="public.ecr.aws")
    with ScriptedRegistry(auth=auth) as registry:
        registry.add(IMAGE, "demo/x", "1")
        object.__setattr__(auth, "realm", "http://public.ecr.aws/token")
        steer(monkeypatch, registry.host)
        client = Registry("public.ecr.aws", plain_http=True, credentials=Anonymous())
        reference = Reference.parse("public.ecr.aws/demo/x:1")
        client.resolve(reference, control=Control(), ledger=Ledger())
        said = {"errors": [{"code": "DENIED", "message": "Your Authorization Token is invalid."}]}
        registry.fault("manifests/*", Status(400, body=json.dumps(said).encode()), method="GET")

        client.document(reference.repository, IMAGE.digest, control=Control(), ledger=Ledger())
        client.close()

        assert registry.count("token") == 2


def test_a_pull_through_cache_is_asked_for_the_tag_where_it_does_not_know_the_digest() -> None:
    """It imports an image when a tag of it is asked for; a blob it knows only after that (rattler #2653)."""
    with ScriptedRegistry() as registry:
        registry.add(IMAGE, "demo/x", "1")
        imported: list[bool] = []

        def unknown(request: object) -> bool:
            if request.resource == "manifests/1":  # type: ignore[attr-defined]
                imported.append(True)
                return False
            return not imported

        registry.fault("*", Status(404), times=None, when=unknown)
        client = Registry(registry.host, credentials=Anonymous())
        reference = Reference.parse(f"{registry.host}/demo/x:1")
        repository = reference.repository
        with pytest.raises(NotFoundError):
            client.document(repository, IMAGE.digest, control=Control(), ledger=Ledger())
        found = client.document(repository, IMAGE.digest, tag=reference.tag, control=Control(), ledger=Ledger())
        assert found.raw == IMAGE.manifest

        imported.clear()
        digest, data = next((d, c) for d, c in IMAGE.blobs.items() if isinstance(c, bytes))
        blob = Descriptor(OCTET_STREAM, digest, len(data))
        got = client.fetch(repository, blob, parent=reference.tag, control=Control(), ledger=Ledger())
        assert Digest.of(b"".join(got)) == digest
        client.close()
        assert all(request.method == "GET" for request in registry.requests if "blobs" in request.path)


@pytest.mark.skipif(not shutil.which("docker-registry"), reason="needs docker-registry")
def test_an_image_comes_from_a_registry_and_storage_shaped_like_ecr(
    aws: Moto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path
) -> None:
    """docker-registry with its S3 driver on moto: each blob is a 307 to a signed URL."""
    import boto3

    from layercache import LayerCache

    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="layers")
    storage = {
        "s3": {
            "region": "us-east-1",
            "regionendpoint": aws.url,
            "bucket": "layers",
            "forcepathstyle": True,
            "accesskey": "a",
            "secretkey": "b",
        }
    }
    registry = peers.PeerRegistry(tmp_path, tmp_path / "store", storage=storage)
    registry.start()
    try:
        registry.push("1", IMAGE)
        steer(monkeypatch, registry.host)
        with (
            LayerCache(root, janitor=False) as cache,
            cache.namespace("a").pull(f"{HOST}/{peers.REPOSITORY}:1", plain_http=True, platform="linux/amd64") as image,
        ):
            assert image.digest == IMAGE.digest
            assert [blob.source for blob in image.report.blobs] == ["miss"] * 3
            moto_host = aws.url.removeprefix("http://")
            assert image.report.bytes_by_source[moto_host] > 0
        blobs = [(method, status) for method, path, status in registry.requests() if "/blobs/sha256" in path]
        assert ("GET", 307) in blobs
    finally:
        registry.stop()


def test_a_diagnosis_says_who_aws_thinks_we_are(
    aws: Moto, monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    """The identity behind the token, from AWS itself; no key and no token is in it. Without credentials: why."""
    from layercache import diagnose

    with ScriptedRegistry(auth=BasicAuth("AWS", PASSWORD)) as registry:
        registry.add(IMAGE, "demo/x", "1")
        steer(monkeypatch, registry.host)
        reference = f"{HOST}/demo/x:1"
        checks = list(diagnose(reference, root=root, plain_http=True, platform="linux/amd64"))
        found = {check.step: check for check in checks}
        assert {check.state for check in checks} == {"ok"}
        assert found["host"].detail.startswith("Amazon ECR, account 123456789012 in ")
        assert found["identity"].detail.startswith("arn:aws:sts::123456789012:")
        assert found["auth"].detail.startswith("Basic, with the password from Amazon ECR in ")
        for secret in ("AKIACANARY", "secret-canary", PASSWORD):
            assert secret not in repr(checks)

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        checks = list(diagnose(reference, root=root, plain_http=True))
        found = {check.step: check for check in checks}
        assert [found[step].state for step in ("credentials", "identity", "auth")] == ["warn", "warn", "fail"]
        assert "no AWS credentials" in found["identity"].detail
