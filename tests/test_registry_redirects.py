"""Where a registry redirects to is remembered while it is good, and forgotten when it is not (one call a blob)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layercache import LayerCache
from layercache.control import Control
from layercache.errors import DeniedError, NotFoundError
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Repository
from layercache.registry import Anonymous, Password, Registry
from layercache.registry._effects import LostError
from layercache.registry._flow import fetch
from layercache.registry._url import Zone
from layercache.testing.registry import BasicAuth, Headers, Redirect, Reset, ScriptedRegistry, Status
from tests.registry_script import REPOSITORY, SITE, Reply, Script, blob, partial

DATA = os.urandom(400_000)
NAME = "demo/serving"
PART = 10_000


@pytest.fixture
def registry(scripted: ScriptedRegistry) -> Iterator[Callable[..., bytes]]:
    """Return a reader of parts of the blob, which the registry redirects to its storage."""
    scripted.put_blob(NAME, DATA)
    client = Registry(scripted.host, credentials=Anonymous())
    descriptor = Descriptor(OCTET_STREAM, Digest.of(DATA), len(DATA))

    def read(offset: int = 0, length: int | None = None) -> bytes:
        where = Repository(scripted.host, NAME)
        control = Control(timeout=20)
        pieces = client.fetch(where, descriptor, offset=offset, length=length, control=control, ledger=Ledger())
        return b"".join(pieces)

    yield read
    client.close()


def calls(scripted: ScriptedRegistry, listener: str) -> int:
    return sum(request.listener == listener for request in scripted.requests)


def test_many_parts_of_a_blob_take_one_call_of_the_registry(
    scripted: ScriptedRegistry, registry: Callable[..., bytes]
) -> None:
    """Forty parts: forty requests to the storage, one to the registry."""
    scripted.fault("blobs/*", Redirect(), times=None)
    assert b"".join(registry(at, PART) for at in range(0, len(DATA), PART)) == DATA
    assert (calls(scripted, "registry"), calls(scripted, "storage")) == (1, 40)


def test_a_url_that_expires_in_the_middle_takes_one_more_call(
    scripted: ScriptedRegistry, registry: Callable[..., bytes]
) -> None:
    """The storage refuses it (400 as well as 403), the registry gives a new one, nothing fails (rule 53)."""
    scripted.fault("blobs/*", Redirect(expires=600, session=True), times=None)
    got = []
    for at in range(0, len(DATA), PART):
        if at == len(DATA) // 2:
            scripted.advance(601)
        got.append(registry(at, PART))
    assert b"".join(got) == DATA
    assert (calls(scripted, "registry"), calls(scripted, "storage")) == (2, 41)


def test_a_url_that_says_it_ends_soon_is_not_kept(scripted: ScriptedRegistry, registry: Callable[..., bytes]) -> None:
    """It would be refused when it is used again."""
    scripted.fault("blobs/*", Redirect(expires=20), times=None)
    assert registry(0, PART) + registry(PART, PART) == DATA[: 2 * PART]
    assert calls(scripted, "registry") == 2


def test_a_break_goes_on_at_the_storage(scripted: ScriptedRegistry, registry: Callable[..., bytes]) -> None:
    """A resumed transfer needs the registry no more than a whole one."""
    scripted.fault("blobs/*", Redirect(), times=None)
    scripted.fault("storage/*", Reset(at=100_000))
    assert registry() == DATA
    assert (calls(scripted, "registry"), calls(scripted, "storage")) == (1, 2)


def test_what_was_taken_away_is_not_read_by_an_old_url_for_long() -> None:
    """A blob is remembered for five minutes at most, however long its URL is good."""
    data = b"x" * 1000
    location = "https://cdn.example/x?X-Amz-Date=20231114T221320Z&X-Amz-Expires=86400"
    script = Script(Reply(307, {"Location": location}), Reply(200, {}, data))
    script.run(fetch(SITE, REPOSITORY, blob(data)))
    assert script.lives == [300.0]


def test_a_straight_request_carries_nothing_and_reaches_no_nearer_than_before() -> None:
    """No credentials, the reach of the redirect that led there, the query as it was signed."""
    data = os.urandom(1000)
    script = Script(
        Reply(307, {"Location": "https://cdn.example/x?sig=abc"}),
        Reply(200, {}, [data[:400], LostError("broke")]),
        partial(data, 400),
    )
    script.run(fetch(SITE, REPOSITORY, blob(data)))
    first, straight = script.sent[1], script.sent[2]
    assert script.data == data
    assert straight.url == first.url
    assert (straight.grant, straight.reach) == (None, Zone.PUBLIC)
    assert straight.headers["Range"] == "bytes=400-999"


@pytest.mark.parametrize("answer", [Reply(400), Reply(403), Reply(404), Reply(500), Reply(416), LostError("gone")])
def test_whatever_the_storage_says_the_registry_is_asked_again(answer: Reply | LostError) -> None:
    """And its new answer counts: it is remembered in the place of the old one."""
    data = os.urandom(1000)
    script = Script(
        Reply(307, {"Location": "https://cdn.example/old"}),
        Reply(200, {}, [data[:400], LostError("broke")]),
        answer,
        Reply(307, {"Location": "https://cdn.example/new"}),
        partial(data, 400),
    )
    script.run(fetch(SITE, REPOSITORY, blob(data)))
    assert script.data == data
    assert [target.url.path for target in script.remembered.values()] == ["/new"]


def test_one_repository_or_client_never_uses_the_url_of_another(scripted: ScriptedRegistry) -> None:
    """Whose rights a URL was signed for is not whose rights are asked about (zot CVE-2024-39897)."""
    with ScriptedRegistry(auth=BasicAuth("a", "right")) as guarded:
        guarded.put_blob(NAME, DATA)
        guarded.fault("blobs/*", Redirect(), times=None)
        descriptor = Descriptor(OCTET_STREAM, Digest.of(DATA), len(DATA))

        def read(client: Registry, name: str) -> bytes:
            where = Repository(guarded.host, name)
            return b"".join(client.fetch(where, descriptor, control=Control(timeout=20), ledger=Ledger()))

        mine = Registry(guarded.host, credentials=Password(guarded.host, "a", "right"))
        other = Registry(guarded.host, credentials=Password(guarded.host, "b", "wrong"))
        assert read(mine, NAME) == DATA
        with pytest.raises(NotFoundError):
            read(mine, "demo/other")
        with pytest.raises(Exception, match="401"):
            read(other, NAME)
        mine.close()
        other.close()


def test_a_storage_that_refuses_for_good_is_an_error(
    scripted: ScriptedRegistry, registry: Callable[..., bytes]
) -> None:
    """Asked once more, and then told."""
    scripted.fault("blobs/*", Redirect(expires=-1), times=None)
    with pytest.raises(DeniedError):
        registry()
    scripted.clear_faults()
    scripted.fault("blobs/*", Status(403), times=None)
    with pytest.raises(DeniedError):
        registry()


def test_the_body_of_a_redirect_is_neither_decoded_nor_read_on(
    scripted: ScriptedRegistry, registry: Callable[..., bytes]
) -> None:
    """urllib3 CVE-2026-21441, CVE-2026-44432: the body of a redirect was decompressed, however large it became."""
    bomb = (("Content-Encoding", "gzip"),)
    scripted.fault("blobs/*", Redirect(), Headers(put=bomb), times=None)
    assert registry() == DATA


def test_urls_of_a_layer_are_never_asked(scripted: ScriptedRegistry, root: Path) -> None:
    """Containerd CVE-2020-15157, google/go-containerregistry#2259, #2293: not even where the blob is absent."""
    data = b"a layer"
    digest = Digest.of(data)
    config = scripted.put_blob(NAME, b"{}")
    entry = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": str(digest), "size": len(data)}
    with ScriptedRegistry() as foreign:
        foreign.put_blob(NAME, data)
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.example", "digest": str(config), "size": 2},
            "layers": [{**entry, "urls": [f"http://{foreign.host}/v2/{NAME}/blobs/{digest}"]}],
        }
        scripted.put_manifest(NAME, json.dumps(document).encode(), media_type=None, tag="1")
        with (
            LayerCache(root, janitor=False, credentials=Anonymous()) as cache,
            pytest.raises(NotFoundError),
        ):
            cache.namespace("a").pull(f"{scripted.host}/{NAME}:1", platform="linux/amd64")
        assert foreign.requests == ()


def test_a_link_is_not_followed() -> None:
    """oras-project/oras-go GHSA-h7vf-4x9w-h99v, GHSA-298f-872v-2rcx: a header sent the client anywhere, for ever."""
    data = b"{}"
    script = Script(Reply(200, {"Link": "<https://elsewhere.example/v2/>; rel=next"}, data))
    script.run(fetch(SITE, REPOSITORY, blob(data)))
    assert [send.url.authority for send in script.sent] == ["reg.example"]
