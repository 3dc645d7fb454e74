"""The public namespace: kept once, read by who was granted it, left by a tenant's purge, filled by no private pull."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from layercache import Descriptor, Digest, Image, LayerCache, Progress
from layercache import pull as pull_room
from layercache.cli import main
from layercache.errors import (
    IntegrityError,
    LayerCacheError,
    NamespacePurgedError,
    NoSpaceError,
    NotFoundError,
    ReadOnlyError,
    StoreError,
    UnauthorizedError,
)
from layercache.oci import OCI_LAYER, OCI_LAYER_GZIP, OCI_MANIFEST
from layercache.registry import Anonymous, Password
from layercache.store import PUBLIC, _grants, _removal, granted
from layercache.testing.images import BuiltImage, build_image, layer_tar
from layercache.testing.registry import BasicAuth, ScriptedRegistry, Status
from layercache.view import View
from tests import peers
from tests.peers import SECRET, USER
from tests.test_space import MIB, admit, content, taken

BASE, OWN = "base/python", "acme/private"


@pytest.fixture
def image() -> BuiltImage:
    """Two layers that nobody else has."""
    return build_image([layer_tar({f"layer/{n}": os.urandom(90_000 * n)}) for n in (1, 2)], platform="linux/amd64")


@pytest.fixture
def registry(scripted: ScriptedRegistry, image: BuiltImage) -> ScriptedRegistry:
    """A registry with the image in a public and in a private repository."""
    scripted.add(image, BASE, "1")
    scripted.add(image, OWN, "1")
    return scripted


def opened(root: Path, host: str, **options: Any) -> LayerCache:
    options.setdefault("credentials", Anonymous())
    return LayerCache(root, public=[f"{host}/base/*"], janitor=False, platform="linux/amd64", keep_free=0, **options)


@pytest.fixture
def cache(root: Path, registry: ScriptedRegistry) -> Iterator[LayerCache]:
    with opened(root, registry.host) as found:
        yield found


def base(registry: ScriptedRegistry) -> str:
    return f"{registry.host}/{BASE}:1"


def own(registry: ScriptedRegistry) -> str:
    return f"{registry.host}/{OWN}:1"


def parts(image: BuiltImage) -> set[Digest]:
    """The blobs that are kept once: the config and the layers."""
    return set(image.blobs)


def came(pulled: Image) -> dict[Digest, tuple[str, bool]]:
    """How each blob was come by, and whether it lies in the public namespace."""
    return {blob.digest: (blob.source, blob.public) for blob in pulled.report.blobs}


def places(root: Path, digest: Digest) -> list[str]:
    """The generations that hold a blob."""
    return sorted(path.parents[2].name for path in root.glob(f"data/*/blobs/*/{digest.encoded}"))


def slots(cache: LayerCache) -> dict[str, str]:
    """Directories of the generations that live, by name."""
    return {"(public)" if one.public else one.name or "?": f"{one.slot}.{one.generation}" for one in cache.namespaces()}


def read(pulled: Image) -> None:
    for layer in pulled.layers:
        with layer.uncompressed() as tar:
            while tar.read(1 << 20):
                pass


# -- kept once, read by all


def test_a_public_blob_is_kept_once_and_read_by_every_tenant(root, registry, cache, image):
    """The second tenant asks for the manifest, under its own permission, and for nothing else."""
    with cache.namespace("a").pull(base(registry)) as first:
        read(first)
        assert came(first) == {image.digest: ("miss", False)} | dict.fromkeys(parts(image), ("miss", True))
    registry.clear_requests()
    with cache.namespace("b").pull(base(registry)) as second:
        read(second)
        assert came(second) == {image.digest: ("miss", False)} | dict.fromkeys(parts(image), ("hit", True))
    assert registry.count("blobs/*") == 0
    assert registry.count("manifests/*", method="GET") == 1
    where = slots(cache)
    for digest in parts(image):
        assert places(root, digest) == [where["(public)"]]
    assert places(root, image.digest) == sorted([where["a"], where["b"]])


def test_the_next_pull_of_a_tenant_asks_nothing_and_writes_nothing(root, registry, cache, image):
    """By digest no request is made, also with the registry gone; by tag one, or the last answer."""
    namespace = cache.namespace("a")
    namespace.pull(base(registry)).close()
    namespace.pull(f"{registry.host}/{BASE}@{image.digest}").close()  # remembers the reference
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with namespace.pull(f"{registry.host}/{BASE}@{image.digest}") as again:
        assert set(came(again).values()) == {("hit", False), ("hit", True)}
        assert again.report.requests == 0
    with namespace.pull(base(registry)) as again:
        assert again.report.requests == 1
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    registry.fault("*", Status(503), times=None)
    with namespace.pull(base(registry)) as again:
        assert again.report.stale
        read(again)


def test_two_tenants_at_once_are_one_transfer(registry, cache, image):
    """Whoever is second waits for the first one's bytes."""
    start = threading.Barrier(6)

    def pull(number: int) -> dict[Digest, tuple[str, bool]]:
        namespace = cache.namespace(f"tenant {number}")
        start.wait()
        with namespace.pull(base(registry)) as pulled:
            read(pulled)
            return came(pulled)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(pull, range(6)))
    for digest in parts(image):
        assert sorted(one[digest] for one in found) == [("hit", True)] * 5 + [("miss", True)]
        assert registry.count(f"blobs/{digest}", method="GET") == 1


def test_what_a_namespace_borrows_is_there_for_every_other_call(registry, cache, image, tmp_path):
    """open, stat, contains, blobs, images, verify and export see it, and say that it is public."""
    namespace = cache.namespace("a")
    namespace.pull(base(registry)).close()
    (listed,) = namespace.images()
    assert listed.complete
    for digest in parts(image):
        assert namespace.contains(digest)
        assert namespace.stat(digest).public
    assert {blob.digest: blob.public for blob in namespace.blobs()} == dict.fromkeys(parts(image), True) | {
        image.digest: False
    }
    assert list(namespace.verify()) == []
    for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
        with namespace.open(layer.digest) as found, found.uncompressed() as tar:
            assert Digest.of(tar.read()) == found.diff_id == diff_id
    assert namespace.export(base(registry), tmp_path / "layout") == image.digest
    assert {path.name for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir()} == {
        digest.encoded for digest in (*parts(image), image.digest)
    }


# -- only after an authorised manifest


def test_a_tenant_without_permission_reads_nothing(root, tmp_path, registry, image):
    """With another's bytes on the disk it gets what the registry says: nothing. So does one whose proof was purged."""
    with ScriptedRegistry(auth=BasicAuth("alice", "secret")) as guarded:
        guarded.add(image, BASE, "1")
        allowed = Password(guarded.host, "alice", "secret")
        with opened(root, guarded.host, credentials=allowed) as alice, opened(root, guarded.host) as mallory:
            alice.namespace("alice").pull(base(guarded)).close()
            for reference in (base(guarded), f"{guarded.host}/{BASE}@{image.digest}"):
                with pytest.raises(UnauthorizedError):
                    mallory.namespace("mallory").pull(reference)
            mallory.namespace("mallory").put(__file__)
            for digest in parts(image):
                assert not mallory.namespace("mallory").contains(digest)
                with pytest.raises(NotFoundError):
                    mallory.namespace("mallory").open(digest)
                with (
                    pytest.raises(UnauthorizedError),
                    mallory.namespace("mallory").stream(
                        Descriptor(OCI_LAYER, digest, len(image.blobs[digest])), f"{guarded.host}/{BASE}"
                    ) as stream,
                ):
                    stream.read()
            # Of the same namespace, once its proof is gone:
            with mallory.namespace("alice").pull(f"{guarded.host}/{BASE}@{image.digest}") as pulled:
                assert pulled.report.requests == 0
            alice.namespace("alice").purge()
            with pytest.raises(UnauthorizedError):
                mallory.namespace("alice").pull(f"{guarded.host}/{BASE}@{image.digest}")


@pytest.mark.real
def test_a_real_registry_decides_who_may_borrow(root, docker_registry, tmp_path):
    """docker-registry with passwords over the same images: with one, the layers are hits; without, nothing."""
    auth = peers.passwords(tmp_path / "htpasswd")
    guarded = peers.PeerRegistry(tmp_path, docker_registry.store, docker_registry.pushed, auth=auth)
    guarded.start()
    try:
        public = [f"{guarded.host}/demo/*"]
        reference, pinned = guarded.reference("oci-zstd"), guarded.pinned("oci-zstd")
        right, wrong = Password(guarded.host, USER, SECRET), Password(guarded.host, USER, "wrong")
        with (
            LayerCache(root, public=public, credentials=right, janitor=False, platform="linux/amd64") as known,
            LayerCache(root, public=public, credentials=wrong, janitor=False, platform="linux/amd64") as stranger,
        ):
            with known.namespace("a").pull(reference) as first:
                assert {blob.source for blob in first.report.blobs} == {"miss"}
            for asked in (reference, pinned):
                with pytest.raises(UnauthorizedError):
                    stranger.namespace("b").pull(asked)
            guarded.forget_requests()
            with known.namespace("c").pull(reference) as second:
                read(second)
                assert {blob.source for blob in second.report.blobs if blob.public} == {"hit"}
            assert [path for _, path, _ in guarded.requests() if "/blobs/" in path] == []
    finally:
        guarded.stop()


def changed(document: bytes, **members: Any) -> bytes:
    return json.dumps(json.loads(document) | members).encode()


def test_a_manifest_that_a_tenant_brought_grants_nothing(root, registry, cache, image):
    """What names a digest must come from the repository: one that was put here is asked for there first."""
    cache.namespace("a").pull(base(registry)).close()
    mallory, forged = cache.namespace("mallory"), changed(image.manifest, annotations={"by": "mallory"})
    mallory.admit(
        Descriptor(OCI_MANIFEST, Digest.of(forged), len(forged)), io.BytesIO(forged), origin=f"{registry.host}/{BASE}"
    )
    with pytest.raises(NotFoundError):
        mallory.pull(f"{registry.host}/{BASE}@{Digest.of(forged)}")
    assert not any(map(mallory.contains, parts(image)))
    # The same of a manifest that the repository has: one request proves it.
    mallory.admit(Descriptor(OCI_MANIFEST, image.digest, len(image.manifest)), io.BytesIO(image.manifest))
    registry.clear_requests()
    with mallory.pull(f"{registry.host}/{BASE}@{image.digest}") as pulled:
        assert came(pulled) == {image.digest: ("hit", False)} | dict.fromkeys(parts(image), ("hit", True))
    assert [(one.method, one.resource) for one in registry.requests] == [("GET", f"manifests/{image.digest}")]


def test_a_reference_to_a_private_repository_grants_nothing(registry, cache, image):
    """The same manifest in a private repository: its blobs are fetched into the tenant's own namespace."""
    cache.namespace("a").pull(base(registry)).close()
    with cache.namespace("b").pull(own(registry)) as pulled:
        assert set(came(pulled).values()) == {("miss", False)}
        read(pulled)
    assert not cache.namespace("b").stat(image.layers[0].digest).public


def test_what_another_tenants_manifest_says_is_not_believed(registry, cache, image):
    """Media type and DiffID are those of one's own image; a manifest that lies spoils nobody's reads but its own."""
    config = changed(image.config, rootfs={"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"] * 2})
    digest = registry.put_blob("base/evil", config)
    document = json.loads(image.manifest)
    document["config"] |= {"digest": str(digest), "size": len(config)}
    for layer in document["layers"]:
        registry.put_blob("base/evil", image.blobs[Digest.parse(layer["digest"])])
        layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar"
    registry.put_manifest("base/evil", json.dumps(document).encode(), media_type=str(OCI_MANIFEST), tag="1")
    layer = image.layers[0].digest

    cache.namespace("mallory").pull(f"{registry.host}/base/evil:1").close()
    with cache.namespace("b").pull(base(registry)) as pulled:
        assert came(pulled)[layer] == ("hit", True)
        read(pulled)
    with cache.namespace("b").open(layer) as found, found.uncompressed() as tar:
        assert Digest.of(tar.read()) == image.diff_ids[0]
    assert cache.namespace("b").stat(layer).media_type == OCI_LAYER_GZIP
    with (
        cache.namespace("mallory").open(layer) as found,
        found.uncompressed() as tar,
        pytest.raises(IntegrityError, match="sha256:0000"),
    ):
        tar.read()


def test_a_manifest_with_a_wrong_size_fills_nothing(registry, cache, image):
    """What is stored has the size it was announced with, so a wrong one is an error for who announced it alone."""
    document = json.loads(image.manifest)
    for layer in (document["config"], *document["layers"]):
        registry.put_blob("base/evil", image.blobs[Digest.parse(layer["digest"])])
    document["layers"][0]["size"] += 1
    registry.put_manifest("base/evil", json.dumps(document).encode(), media_type=str(OCI_MANIFEST), tag="1")

    for _ in range(2):  # before and after somebody has it right
        with pytest.raises(LayerCacheError):
            cache.namespace("mallory").pull(f"{registry.host}/base/evil:1")
        assert not cache.namespace("mallory").contains(image.layers[0].digest)
        with cache.namespace("b").pull(base(registry)) as pulled:
            read(pulled)


# -- purges


def test_a_tenants_purge_leaves_what_is_public_and_ends_its_own_reads(root, registry, cache, image):
    """Nothing of the public namespace changes; the tenant's open layers and lookups end, and it must ask anew."""
    cache.namespace("b").pull(base(registry)).close()
    namespace = cache.namespace("a")
    pulled = namespace.pull(base(registry))
    where = slots(cache)

    def shared() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (root / "data" / where["(public)"]).rglob("*") if path.is_file()}

    before = shared()
    assert namespace.purge(wait=0.2).pending == (os.getpid(),)  # its manifest is open
    assert shared() == before
    for layer in pulled.layers:
        with pytest.raises(NamespacePurgedError), layer.compressed() as stream:
            stream.read()
    pulled.close()
    assert [one.level for one in cache.resume_purges()] in ([], ["unlinked"])
    with pytest.raises(NotFoundError):
        namespace.open(image.layers[0].digest)
    others = [where["(public)"], where["b"]]
    left = [path for path in root.rglob("*") if path.is_file() and not any(one in str(path) for one in others)]
    for digest in (image.digest, *parts(image)):
        assert [
            path for path in left if digest.encoded in path.name or digest.encoded.encode() in path.read_bytes()
        ] == []
    with cache.namespace("b").pull(f"{registry.host}/{BASE}@{image.digest}") as other:
        assert other.report.requests == 0
        read(other)
    registry.clear_requests()
    with namespace.pull(f"{registry.host}/{BASE}@{image.digest}") as again:
        assert {source for source, public in came(again).values() if public} == {"hit"}
    assert registry.count("manifests/*") == 1


def test_a_tenant_that_is_purged_between_open_and_read_gets_no_byte(registry, cache, image):
    """A blob that is borrowed looks at the fence of who borrows it, after each read."""
    namespace = cache.namespace("a")
    namespace.pull(base(registry)).close()
    digest = image.layers[0].digest
    with namespace.open(digest) as layer, layer.compressed() as stream:
        assert stream.read(10)
        namespace.purge()
        with pytest.raises(NamespacePurgedError):
            stream.read()


def test_the_operators_purge_ends_it_for_all_and_leaves_the_tenants(root, registry, cache, image):
    """A receipt, no byte left, open images end; a tenant's own stays, and its next pull brings the blobs again."""
    namespace = cache.namespace("a")
    admitted = admit(namespace, b"the tenant's own")
    pulled = namespace.pull(base(registry))
    receipt = cache.public_namespace().purge(wait=0.2)
    assert (receipt.level, receipt.pending) == ("fenced", (os.getpid(),))
    with pytest.raises(NamespacePurgedError), pulled.layers[0].compressed() as stream:
        stream.read()
    pulled.close()
    assert [one.level for one in cache.resume_purges()] in ([], ["unlinked"])
    assert [one.level for one in cache.receipts() if one.slot == receipt.slot][-1] == "unlinked"
    assert cache.verify_receipts().problems == ()
    for digest in parts(image):
        assert [path.parent.name for path in root.rglob(f"{digest.encoded}*")] == ["grants"]
    assert not any(map(namespace.contains, parts(image)))
    assert namespace.contains(admitted)
    assert namespace.contains(image.digest)
    (listed,) = namespace.images()
    assert set(listed.missing) == parts(image)
    registry.clear_requests()
    with namespace.pull(f"{registry.host}/{BASE}@{image.digest}") as again:
        assert {source for source, public in came(again).values() if public} == {"miss"}
        read(again)
    assert registry.count("manifests/*") == 0


def test_no_pattern_of_names_purges_what_is_public(registry, cache, image):
    """``*`` is every tenant, and nothing else."""
    cache.namespace("a").pull(base(registry)).close()
    assert set(cache.purge_matching("*")) == {"a"}
    assert [one.public for one in cache.namespaces()] == [True]
    assert cache.purge_matching("*") == {}


def test_a_pull_that_an_operators_purge_overtakes_goes_past_the_cache(registry, cache, image):
    """Its tenant was not purged: the bytes come, and the report says why they were not kept."""
    purged = threading.Event()

    def purge(step: Progress) -> None:
        if (step.digest, step.stage) == (image.layers[1].digest, "fetching") and not purged.is_set():
            purged.set()
            cache.public_namespace().purge(wait=0)

    with cache.namespace("a").pull(base(registry), progress=purge, jobs=1) as pulled:
        assert purged.is_set()
        assert came(pulled)[image.layers[1].digest] == ("bypass", False)
        (reason,) = {blob.reason for blob in pulled.report.blobs if blob.source == "bypass"}
        assert "the public namespace was purged" in reason
        with pulled.layers[1].uncompressed() as tar:
            assert Digest.of(tar.read()) == image.diff_ids[1]
    with cache.namespace("a").pull(base(registry)) as again:
        read(again)


# -- what is private stays so


def test_a_private_pull_never_fills_it(root, registry, cache, image):
    """Not even with blobs that a public repository has, too; and what is here of one's own is not moved there."""
    namespace = cache.namespace("a")
    namespace.pull(own(registry)).close()
    where = slots(cache)
    assert "(public)" not in where
    with namespace.pull(base(registry)) as pulled:
        assert set(came(pulled).values()) == {("hit", False)}
        read(pulled)
    assert "(public)" not in slots(cache)
    for digest in parts(image):
        assert places(root, digest) == [where["a"]]


@pytest.mark.parametrize("kind", ["admit", "stream"])
def test_no_other_way_in_fills_it(root, registry, cache, image, kind):
    """What is put here, or streamed without a grant, is the tenant's own."""
    namespace, digest = cache.namespace("a"), image.layers[0].digest
    descriptor = Descriptor(OCI_LAYER, digest, image.layers[0].size)
    if kind == "admit":
        namespace.admit(descriptor, io.BytesIO(image.blobs[digest]), origin=f"{registry.host}/{BASE}")
    else:
        with namespace.stream(descriptor, f"{registry.host}/{BASE}") as stream:
            stream.read()
    assert not namespace.stat(digest).public
    assert "(public)" not in slots(cache)


def test_a_granted_blob_streams_to_and_from_the_public_namespace(registry, cache, image):
    """Once it is granted; and only in the name of a public repository."""
    namespace, layer = cache.namespace("a"), image.layers[0]
    descriptor = Descriptor(OCI_LAYER, layer.digest, layer.size)
    namespace.pull(base(registry)).close()
    cache.public_namespace().purge()
    for transfers in (1, 1):
        with namespace.stream(descriptor, f"{registry.host}/{BASE}") as stream:
            assert Digest.of(stream.read()) == layer.digest
        assert namespace.stat(layer.digest).public
        assert registry.count(f"blobs/{layer.digest}") == 1 + transfers
    with namespace.stream(descriptor, f"{registry.host}/{OWN}") as stream:
        stream.read()
    assert registry.count(f"blobs/{layer.digest}") == 3
    assert not namespace.stat(layer.digest).public


def test_a_sealed_namespace_borrows_nothing_and_fills_nothing(root, registry, cache, image):
    """What is public lies in clear, and which of it a tenant uses would, too."""
    cache.namespace("a").pull(base(registry)).close()
    for name in ("sealed", "sealed"):
        with cache.namespace(name, seal="ephemeral").pull(base(registry)) as pulled:
            assert {public for _, public in came(pulled).values()} == {False}
            read(pulled)
    assert cache.namespace("sealed").stat(image.layers[0].digest).public is False  # as it was begun
    cache.namespace("a").purge()
    cache.public_namespace().purge()
    assert [path for path in root.rglob("*") if path.name in {digest.encoded for digest in parts(image)}] == []


def test_an_unlisted_cache_goes_on_reading_what_was_granted_and_grants_nothing(root, registry, cache, image):
    """A command without patterns shows the images whole; its pulls are private."""
    cache.namespace("a").pull(base(registry)).close()
    with LayerCache(root, janitor=False, platform="linux/amd64") as plain:
        (listed,) = plain.namespace("a").images()
        assert listed.complete
        with plain.namespace("b").pull(base(registry)) as pulled:
            assert {public for _, public in came(pulled).values()} == {False}


def test_when_others_had_it_first_is_not_told(registry, cache, image):
    """Times of a borrowed blob are from its grant on."""
    cache.namespace("a").pull(base(registry)).close()
    store = cache.store()
    public = store.generation(PUBLIC, create=False)
    assert public is not None
    created = cache.public_namespace().stat(image.layers[0].digest).created
    cache.namespace("b").pull(base(registry)).close()
    generation = store.generation(cache.namespace("b").binding.name, create=False)
    assert generation is not None
    found = granted(generation, image.layers[0].digest)
    assert found is not None
    info = cache.namespace("b").stat(image.layers[0].digest)
    assert info.created == found.created > created
    assert info.verified == 0.0
    assert list(cache.namespace("b").verify(image.layers[0].digest)) == []
    assert cache.namespace("b").stat(image.layers[0].digest).verified >= found.created
    public.close()
    generation.close()


# -- care


def test_a_namespace_drops_its_grant_and_the_operator_the_blob(registry, cache, image):
    """What a tenant removes stays for others; what is granted again costs a manifest."""
    a, b = cache.namespace("a"), cache.namespace("b")
    for namespace in (a, b):
        namespace.pull(base(registry)).close()
    digest = image.layers[0].digest
    assert a.remove(digest) == image.layers[0].size
    with pytest.raises(NotFoundError):
        a.remove(digest)
    assert not a.contains(digest)
    assert b.contains(digest)
    registry.clear_requests()
    with a.pull(f"{registry.host}/{BASE}@{image.digest}") as again:
        assert came(again)[digest] == ("hit", True)
    assert [one.resource for one in registry.requests] == [f"manifests/{image.digest}"]
    assert set(a.remove_image(base(registry))) <= {*parts(image), image.digest}
    a.remove_image(f"{registry.host}/{BASE}@{image.digest}")
    assert list(a.blobs()) == []
    assert cache.public_namespace().remove(digest) == image.layers[0].size
    assert not b.contains(digest)
    with b.pull(base(registry)) as again:
        assert came(again)[digest] == ("miss", True)


def damaged(root: Path, digest: Digest) -> None:
    (path,) = root.glob(f"data/*/blobs/*/{digest.encoded}")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_damage_to_what_is_public_is_found_by_a_reader_and_mended_for_all(root, registry, cache, image):
    """Never given out, moved aside, fetched again by the next pull of anybody."""
    digest = image.layers[1].digest
    for name in ("a", "b"):
        cache.namespace(name).pull(base(registry)).close()
    damaged(root, digest)
    with cache.namespace("a").open(digest) as layer, pytest.raises(IntegrityError), layer.compressed() as stream:
        stream.read()
    assert not cache.namespace("b").contains(digest)
    with cache.namespace("b").pull(base(registry)) as pulled:
        assert came(pulled)[digest] == ("miss", True)
    with cache.namespace("a").pull(base(registry)) as pulled:
        read(pulled)


@pytest.mark.parametrize("who", ["tenant", "operator"])
def test_damage_to_what_is_public_is_mended_by_verify(root, registry, cache, image, who):
    """Only the damaged chunk is fetched, from the repository it came from."""
    digest = image.layers[1].digest
    cache.namespace("a").pull(base(registry)).close()
    damaged(root, digest)
    contents = cache.namespace("a") if who == "tenant" else cache.public_namespace()
    (finding,) = contents.verify(repair=True)
    assert (finding.digest, finding.repaired) == (digest, True)
    assert cache.namespace("a").contains(digest)
    assert list(cache.namespace("a").verify()) == []
    assert places(root, digest) == [slots(cache)["(public)"]]


def test_a_damaged_grant_is_none(root, registry, cache, image):
    """It is made again by the next pull, for the price of a manifest."""
    namespace, digest = cache.namespace("a"), image.layers[0].digest
    namespace.pull(base(registry)).close()
    (path,) = root.glob(f"data/*/grants/{digest.encoded}")
    path.write_bytes(path.read_bytes()[:-1])
    assert not namespace.contains(digest)
    with namespace.pull(f"{registry.host}/{BASE}@{image.digest}") as pulled:
        assert came(pulled)[digest] == ("hit", True)
        assert pulled.report.requests == 1
    assert namespace.contains(digest)
    assert cache.store().recover() == ()
    assert namespace.contains(digest)


# -- room


def test_what_is_public_is_counted_once_and_evicted_like_all_else(root, registry, image):
    """Within the budget, told apart by df, ls and prune; an open one stays, one that went is fetched again."""
    budget = 24 * MIB
    with opened(root, registry.host, budget=budget) as cache:
        with cache.namespace("a").pull(base(registry)) as pulled:
            by_name = {("(public)" if one.public else one.name): one for one in cache.usage().namespaces}
            assert by_name["(public)"].blobs == 3
            assert by_name["(public)"].leased >= sum(layer.size for layer in image.layers)
            assert by_name["a"].blobs == 1
            listed = {("(public)" if one.public else one.name): one for one in cache.namespaces()}
            assert (listed["(public)"].blobs, listed["a"].blobs) == (3, 1)
            for seed in range(6):
                admit(cache.namespace("c"), content(4 * MIB, seed))
            assert taken(root) <= budget
            read(pulled)
        planned = cache.prune(public=True, dry_run=True)
        assert {one.public for one in planned} == {True}
        assert {one.blob for one in planned} == {digest.encoded for digest in parts(image)}
        assert len(cache.prune(public=True)) == 3
        assert not any(map(cache.namespace("a").contains, parts(image)))
        with cache.namespace("a").pull(base(registry)) as again:
            assert {source for source, public in came(again).values() if public} == {"miss"}


def press(cache: LayerCache) -> None:
    for seed in range(8):
        admit(cache.namespace("c"), content(4 * MIB, 100 + seed))


def test_a_tenants_pin_keeps_what_it_borrows(root, registry, image):
    """Through evictions and a restart, until it is unpinned or its namespace is purged."""
    with opened(root, registry.host, budget=24 * MIB) as cache:
        cache.namespace("a").pull(base(registry)).close()
        pin = cache.namespace("a").pin("release", base(registry))
        assert set(pin.blobs) == {*parts(image), image.digest}
        (public,) = [one for one in cache.usage().namespaces if one.public]
        assert public.evictable == 0 < public.pinned
        press(cache)
        assert cache.prune(public=True) == []
    with opened(root, registry.host, budget=24 * MIB) as cache:
        press(cache)
        (found,) = cache.namespace("a").pins()
        assert found.missing == ()
        cache.namespace("a").unpin("release")
        press(cache)
        assert not all(map(cache.namespace("a").contains, parts(image)))
        cache.namespace("a").pull(base(registry)).close()
        cache.namespace("a").pin("again", base(registry))
        cache.namespace("a").purge()
        assert len(cache.prune(public=True)) == 3


def test_a_pin_of_a_tenant_that_comes_after_the_choice_holds(root, registry, image, monkeypatch):
    """Who evicts looks at the pins of all tenants once nobody has the blob."""
    with opened(root, registry.host, budget=24 * MIB) as cache:
        cache.namespace("a").pull(base(registry)).close()
        evict, pinned = _removal.evict, list[Any]()

        def late(generation: Any, name: str, **options: Any) -> int:
            if not pinned:
                pinned.append(cache.namespace("a").pin("late", base(registry)))
            return evict(generation, name, **options)

        monkeypatch.setattr(_removal, "evict", late)
        assert cache.prune(public=True) == []
        assert all(map(cache.namespace("a").contains, parts(image)))


def test_a_damaged_pin_keeps_all_that_its_tenant_borrows(root, registry, image):
    """What it names cannot be told any more: it is one of those."""
    with opened(root, registry.host, budget=24 * MIB) as cache:
        cache.namespace("a").pull(base(registry)).close()
        cache.namespace("a").pin("release", base(registry))
        (path,) = root.glob("data/*/pins/*")
        path.write_bytes(b"?")
        assert cache.prune(public=True) == []


def test_pins_that_cannot_be_read_keep_all_and_those_of_a_purged_tenant_nothing(root, registry, image, monkeypatch):
    """A tenant that fails costs room, not what it pinned; one that is purged meanwhile costs neither."""
    with opened(root, registry.host, budget=24 * MIB) as cache:
        cache.namespace("a").pull(base(registry)).close()
        cache.namespace("a").pin("release", base(registry))
        for error, left in ((StoreError("the disk"), True), (NamespacePurgedError("gone"), False)):

            def fail(_: object, error: LayerCacheError = error) -> frozenset[str]:
                raise error

            monkeypatch.setattr(_grants, "_pinned", fail)
            assert (cache.prune(public=True) == []) == left
            assert all(map(cache.namespace("a").contains, parts(image))) == left


def test_a_private_copy_that_is_pinned_keeps_nothing_public(root, registry, image):
    """A pin reaches what was granted, no further."""
    with opened(root, registry.host, budget=24 * MIB) as cache:
        cache.namespace("a").pull(base(registry)).close()
        cache.namespace("b").pull(own(registry)).close()
        cache.namespace("b").pin("mine", own(registry))
        assert len(cache.prune(public=True)) == 3


def test_the_public_namespace_has_a_quota_and_a_floor(root, registry, image):
    """Over its quota it pays first; below its floor it is not asked."""
    with opened(root, registry.host, budget=24 * MIB) as cache:
        cache.public_namespace(floor="8MiB")
        cache.namespace("a").pull(base(registry)).close()
        press(cache)
        assert all(map(cache.namespace("a").contains, parts(image)))
        cache.public_namespace(quota=0)
        admit(cache.namespace("c"), content(4 * MIB, 7))
        press(cache)
        assert not all(map(cache.namespace("a").contains, parts(image)))


# -- where the store cannot help


def test_where_it_cannot_be_kept_the_bytes_come_all_the_same(root, registry, image, monkeypatch):
    """The public namespace cannot be begun or filled: verified bytes, and the report says why."""

    def refuse(*_: object, **__: object) -> None:
        raise NoSpaceError("no room")

    monkeypatch.setattr(View, "lender", refuse)
    with opened(root, registry.host) as cache, cache.namespace("a").pull(base(registry)) as pulled:
        read(pulled)
        assert came(pulled) == {image.digest: ("miss", False)} | dict.fromkeys(parts(image), ("bypass", False))
        assert {blob.reason for blob in pulled.report.blobs if blob.source == "bypass"} == {"full: no room"}


def test_a_grant_that_cannot_be_written_down_holds_for_its_pull(root, registry, image, monkeypatch):
    """A read-only root still lends; the next pull has to prove itself again."""

    def refuse(*_: object) -> None:
        raise ReadOnlyError("read-only")

    with opened(root, registry.host) as cache:
        cache.namespace("a").pull(base(registry)).close()
        b = cache.namespace("b")
        admit(b, b"begun")
        generation = b.binding.made()
        monkeypatch.setattr(pull_room, "grant", refuse)
        with b.pull(base(registry)) as pulled:
            assert {source for source, public in came(pulled).values() if public} == {"hit"}
            read(pulled)
        assert granted(generation, image.layers[0].digest) is None


# -- the command


def run(capsys: pytest.CaptureFixture[str], root: Path, *line: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["--root", str(root), *line]) == code
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in line else out


def test_the_command_fills_lists_checks_prunes_and_purges_it(root, registry, image, capsys):
    """A pull takes patterns; --public of the others is the namespace."""
    pattern = f"{registry.host}/base/*"
    pull = ("pull", base(registry), "--public", pattern, "--platform", "linux/amd64")
    found = run(capsys, root, *pull, "-n", "a", "--json")
    assert {blob["digest"] for blob in found["blobs"] if blob["public"]} == set(map(str, parts(image)))
    assert run(capsys, root, *pull, "-n", "b").count("hit   public") == 3
    assert [one["public"] for one in run(capsys, root, "ls", "--json")["namespaces"]].count(True) == 1
    assert "(public)" in run(capsys, root, "ls")
    assert "(public)" in run(capsys, root, "df")
    listed = run(capsys, root, "ls", "--public", "--json")
    assert {blob["digest"] for blob in listed["blobs"]} == set(map(str, parts(image)))
    assert run(capsys, root, "inspect", str(image.layers[0].digest), "--public", "--json")["size"]
    assert run(capsys, root, "inspect", str(image.layers[0].digest), "-n", "a", "--json")["public"]
    assert run(capsys, root, "verify", "--public", "--json") == {"findings": []}
    dry = run(capsys, root, "prune", "--public", "--dry-run", "--json")
    assert {one["public"] for one in dry["blobs"]} == {True}
    run(capsys, root, "rm", base(registry), "--public", code=2)
    assert run(capsys, root, "rm", str(image.layers[0].digest), "--public", "--json")["removed"]
    receipt = run(capsys, root, "purge", "--public", "--json")
    assert (receipt["level"], receipt["blobs"]) == ("unlinked", 2)
    assert [one["name"] for one in run(capsys, root, "ls", "--json")["namespaces"]] == ["a", "b"]
    run(capsys, root, "purge", "--public", "a", code=2)
    run(capsys, root, "ls", "--public", "-n", "a", code=2)
    run(capsys, root, "verify", code=2)
    run(capsys, root, "pull", base(registry), "--public", "*.com/x", "-n", "a", code=2)
