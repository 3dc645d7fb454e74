"""The main job: pull, hit, read, admit, purge, and what happens when the store or the registry cannot help."""

import errno
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layercache import Descriptor, Digest, Image, LayerCache, MediaType, Namespace, Progress
from layercache.errors import (
    CancelledError,
    CorruptStreamError,
    DeadlineError,
    FormatError,
    IntegrityError,
    InvalidDescriptorError,
    InvalidDigestError,
    InvalidManifestError,
    InvalidReferenceError,
    LayerCacheError,
    LimitError,
    NamespacePurgedError,
    NotFoundError,
    RegistryError,
    StoreClosedError,
    UnreachableError,
    UnsafeRootError,
    UnsupportedError,
)
from layercache.oci import OCI_LAYER, OCI_LAYER_ZSTD, OCI_MANIFEST, OCTET_STREAM
from layercache.store._disk import PosixDisk
from layercache.testing.images import build_image, build_index, layer_tar
from layercache.testing.registry import (
    ScriptedRegistry,
    Stall,
    Status,
    Substitute,
    Truncate,
    WrongBytes,
)

KINDS = ["oci-gzip", "oci-zstd", "oci-plain", "odd", "index", "docker-gzip", "docker-list"]
PLATFORM = "linux/amd64"


@pytest.fixture
def cache(root: Path) -> Iterator[LayerCache]:
    with LayerCache(root, platform=PLATFORM) as opened:
        yield opened


@pytest.fixture
def namespace(cache: LayerCache) -> Namespace:
    return cache.namespace("acme/endpoint-7")


@pytest.fixture
def image():
    tars = [layer_tar({f"layer/{n}": os.urandom(70_000 * n)}) for n in (1, 2, 3)]
    return build_image(tars, platform=PLATFORM)


@pytest.fixture
def served(scripted: ScriptedRegistry, image) -> str:
    scripted.add(image, "demo/serving", "1.0")
    return f"{scripted.host}/demo/serving:1.0"


def sources(pulled: Image) -> set[str]:
    return {blob.source for blob in pulled.report.blobs}


def blobs_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("data/*/blobs/*/*"))


def unfinished(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("data/*/in/*"))


# -- pull and hit, against a real registry


@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_brings_every_layer_and_the_next_one_is_a_hit(docker_registry, namespace, kind):
    """Whatever the format, the layers are the pushed ones, their tars have the config's DiffIDs, and stay."""
    with namespace.pull(docker_registry.reference(kind)) as pulled:
        assert str(pulled.digest) == docker_registry.pushed[kind].digest
        assert sources(pulled) == {"miss"}
        assert pulled.report.bytes_fetched == sum(blob.size for blob in pulled.report.blobs)
        assert len(pulled.layers) == len(pulled.manifest.layers) == len(pulled.config.diff_ids)
        for layer, descriptor, diff_id in zip(
            pulled.layers, pulled.manifest.layers, pulled.config.diff_ids, strict=True
        ):
            with layer.compressed() as wire:
                assert Digest.of(wire.read()) == descriptor.digest
            with layer.uncompressed() as tar:
                assert Digest.of(tar.read()) == diff_id
            with layer.uncompressed() as tar, tarfile.open(fileobj=tar, mode="r|") as archive:
                assert all(member.name for member in archive)

    docker_registry.forget_requests()
    with namespace.pull(docker_registry.pinned(kind)) as again:
        assert sources(again) == {"hit"}
        assert again.report.requests == again.report.bytes_fetched == 0
    assert docker_registry.requests() == []
    with namespace.pull(docker_registry.reference(kind)) as again:
        assert sources(again) == {"hit"}
        assert again.report.requests == 1
    assert len(docker_registry.requests()) == 1


def test_the_same_digest_twice_is_one_download(docker_registry, namespace):
    """A manifest that names a layer twice keeps both places and fetches once."""
    docker_registry.forget_requests()
    with namespace.pull(docker_registry.reference("odd")) as pulled:
        digests = [layer.digest for layer in pulled.layers]

    asked = [path for _, path, _ in docker_registry.requests() if "/blobs/" in path]
    assert len(digests) == 4
    assert digests[0] == digests[3]
    assert len(asked) == len(set(asked)) == len({*digests}) + 1  # and the config


def test_the_platform_chooses_the_image(docker_registry, namespace):
    """The image is the one for the platform asked for; a platform that is not there is named."""
    reference = docker_registry.reference("index")
    with namespace.pull(reference, platform="linux/arm64") as arm, namespace.pull(reference) as amd:
        assert arm.config.platform.architecture == "arm64"
        assert amd.config.platform.architecture == "amd64"
        assert arm.digest == amd.digest
        assert arm.report.manifest != amd.report.manifest

    with pytest.raises(NotFoundError, match="linux/amd64"):
        namespace.pull(reference, platform="linux/riscv64")


def test_a_single_image_is_checked_against_an_explicit_platform(served, namespace):
    """An image for something else is not handed to a caller who said what they want."""
    with pytest.raises(NotFoundError, match="linux/amd64"):
        namespace.pull(served, platform="linux/s390x")


def test_with_the_registry_stopped_digests_work_and_tags_are_stale(stoppable_registry, cache, namespace):
    """Without a registry a digest is a hit, a tag gives its last digest and says so, unless fresh was asked for."""
    reference = stoppable_registry.reference("oci-zstd")
    namespace.pull(reference).close()
    stoppable_registry.stop()

    with namespace.pull(stoppable_registry.pinned("oci-zstd")) as pulled:
        assert not pulled.report.stale
        assert sources(pulled) == {"hit"}
    with namespace.pull(reference) as pulled:
        assert pulled.report.stale
        assert str(pulled.digest) == stoppable_registry.pushed["oci-zstd"].digest
        with pulled.layers[0].uncompressed() as tar:
            assert tar.read()
    with pytest.raises(UnreachableError):
        namespace.pull(reference, fresh=True)
    with pytest.raises(UnreachableError):
        cache.namespace("other").pull(reference)


def test_a_tag_that_is_gone_is_not_stale(scripted, served, namespace):
    """A registry that answers is believed: a removed tag is not found."""
    namespace.pull(served).close()
    scripted.fault("manifests/1.0", Status(404), times=None)

    with pytest.raises(NotFoundError):
        namespace.pull(served)


def test_a_moved_tag_is_followed(scripted, served, namespace):
    """A tag is asked for each time, so a new image is seen at once, and the old one stays readable by digest."""
    with namespace.pull(served) as old:
        newer = build_image([layer_tar({"new": b"new"})], platform=PLATFORM)
        scripted.add(newer, "demo/serving", "1.0")
        with namespace.pull(served) as new:
            assert new.digest == newer.digest != old.digest
    with namespace.pull(f"{scripted.host}/demo/serving@{old.digest}") as again:
        assert sources(again) == {"hit"}
    (info,) = [one for one in namespace.images() if one.reference.tag == "1.0"]
    assert info.digest == newer.digest


def test_layers_come_in_parallel(scripted, namespace):
    """Several layers are on the way at once."""
    image = build_image([layer_tar({str(n): os.urandom(200_000)}) for n in range(3)], platform=PLATFORM)
    scripted.add(image, "demo/par", "1")
    together = threading.Barrier(3, timeout=20)
    seen: set[Digest] = set()

    def progress(step: Progress) -> None:
        if step.stage == "fetching" and step.size > 100_000 and step.digest not in seen:
            seen.add(step.digest)
            together.wait()  # passes only when three transfers stand here at the same time

    namespace.pull(f"{scripted.host}/demo/par:1", jobs=3, progress=progress).close()
    assert len(seen) == 3


def test_many_threads_make_one_download(scripted, served, cache, image):
    """However many pull one image into one namespace at once, each blob is fetched once."""
    with ThreadPoolExecutor(8) as pool:
        pulls = list(pool.map(lambda _: cache.namespace("ns").pull(served), range(8)))
    for pulled in pulls:
        pulled.close()

    for layer in image.layers:
        assert scripted.count(f"blobs/{layer.digest}") == 1


def test_a_report_says_where_everything_came_from(scripted, served, namespace):
    """The JSON form has every field of the contract, with plain values."""
    with namespace.pull(served) as pulled:
        report = json.loads(json.dumps(pulled.report.to_json()))

    assert {"reference", "digest", "stale", "blobs", "bytes_fetched", "requests", "seconds"} <= report.keys()
    assert report["reference"] == served
    assert all({"digest", "media_type", "size", "source"} <= blob.keys() for blob in report["blobs"])
    assert {blob["origin"] for blob in report["blobs"]} == {scripted.host}
    assert report["bytes_by_source"] == {scripted.host: report["bytes_fetched"]}
    assert {"resolve", "wire", "flush"} <= report["stages"].keys()


# -- reading


def test_a_flipped_bit_on_disk_is_an_error_and_heals(root, docker_registry, namespace):
    """A damaged chunk is never given out; the next pull fetches that blob again and only that."""
    reference = docker_registry.pinned("oci-plain")
    with namespace.pull(reference) as pulled:
        layer = pulled.layers[0]
        (path,) = root.glob(f"data/*/blobs/*/{layer.digest.encoded}")
        with path.open("r+b") as file:
            file.seek(layer.size // 2)
            byte = file.read(1)
            file.seek(layer.size // 2)
            file.write(bytes([byte[0] ^ 0x10]))
        with layer.uncompressed() as tar, pytest.raises(IntegrityError) as caught:
            tar.read()
        assert caught.value.offset is not None
        assert caught.value.length is not None
        assert caught.value.offset <= layer.size // 2 < caught.value.offset + caught.value.length

    with namespace.pull(reference) as healed:
        assert [blob.digest for blob in healed.report.blobs if blob.source == "miss"] == [layer.digest]
        with healed.layers[0].uncompressed() as tar:
            assert Digest.of(tar.read()) == healed.layers[0].diff_id


def test_a_manifest_that_lies_about_what_is_here_is_refused(scripted, namespace, image):
    """A hit is held to the size that the manifest gives, as a fetch is."""
    namespace.admit(image.layers[0], io.BytesIO(bytes(image.blobs[image.layers[0].digest])))
    manifest = json.loads(image.manifest)
    manifest["layers"][0]["size"] += 1
    scripted.add(image, "demo/lie")
    scripted.put_manifest("demo/lie", json.dumps(manifest).encode(), tag="1", media_type=str(OCI_MANIFEST))

    with pytest.raises(InvalidDescriptorError):
        namespace.pull(f"{scripted.host}/demo/lie:1")


@pytest.mark.parametrize("which", ["manifest", "config"])
def test_rot_in_a_manifest_or_config_does_not_fail_a_pull(root, scripted, namespace, image, which):
    """What the pull itself must read is fetched again at once; the start is not the one to pay for it."""
    scripted.add(image, "demo/serving", "1.0")
    namespace.pull(f"{scripted.host}/demo/serving:1.0").close()
    digest = image.digest if which == "manifest" else Digest.of(image.config)
    (path,) = root.glob(f"data/*/blobs/*/{digest.encoded}")
    path.write_bytes(b"?" + path.read_bytes()[1:])

    with namespace.pull(f"{scripted.host}/demo/serving@{image.digest}") as pulled:
        assert [blob.digest for blob in pulled.report.blobs if blob.source == "miss"] == [digest]
        assert pulled.config.raw == image.config
    assert list(namespace.verify()) == []


def test_an_index_that_lies_about_a_manifest_is_refused(scripted, namespace, image):
    """What an index says of a manifest must hold: its size is checked like its digest."""
    index = json.loads(build_index([image]).manifest)
    index["manifests"][0]["size"] += 1
    scripted.add(image, "demo/index")
    scripted.put_manifest("demo/index", json.dumps(index).encode(), tag="1", media_type=index["mediaType"])

    with pytest.raises(IntegrityError):
        namespace.pull(f"{scripted.host}/demo/index:1")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_layer_whose_stream_is_cut_is_an_error(namespace, compression):
    """A blob whose digest is right but whose compressed stream ends early is damaged, not short."""
    built = build_image([layer_tar({"a": os.urandom(300_000)})], compression=compression)
    layer = built.layers[0]
    whole = bytes(built.blobs[layer.digest])
    for cut in (whole[:-1], whole[: len(whole) // 2], whole + b"garbage"):
        descriptor = Descriptor(layer.media_type, Digest.of(cut), len(cut))
        namespace.admit(descriptor, io.BytesIO(cut))
        with namespace.open(descriptor.digest) as opened, opened.uncompressed() as stream:
            with pytest.raises(CorruptStreamError):
                stream.read()
            with pytest.raises(CorruptStreamError):
                stream.read(1)  # never a quiet end after an error


def test_a_wrong_diff_id_is_an_error_at_the_end(namespace):
    """A layer that is not what the config says raises before it reports its end."""
    tar = layer_tar({"a": b"x" * 200_000})
    descriptor = Descriptor(OCI_LAYER, Digest.of(tar), len(tar))
    namespace.admit(descriptor, io.BytesIO(tar), diff_id=Digest.of(b"another"))

    with namespace.open(descriptor.digest) as layer, layer.uncompressed() as stream, pytest.raises(IntegrityError):
        stream.read()


def test_a_bomb_ends_in_a_limit(namespace):
    """A blob that expands beyond all reason is stopped."""
    import zstandard

    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 30))
    descriptor = Descriptor(OCI_LAYER_ZSTD, Digest.of(bomb), len(bomb))
    namespace.admit(descriptor, io.BytesIO(bomb))

    with namespace.open(descriptor.digest) as layer, layer.uncompressed() as stream, pytest.raises(LimitError):  # noqa: PT012
        while stream.read(1 << 20):
            pass


# -- admit and put


def test_admit_takes_a_blob_without_a_registry(namespace):
    """A blob comes out as it was admitted, and a second time nothing is read."""
    data = os.urandom(5 << 20)
    descriptor = Descriptor(OCTET_STREAM, Digest.of(data), len(data))

    info = namespace.admit(descriptor, io.BytesIO(data), origin="disk image")

    assert (info.digest, info.size, info.origin) == (descriptor.digest, len(data), "disk image")
    with namespace.open(descriptor.digest) as layer, layer.compressed() as stream:
        assert stream.read() == data
    namespace.admit(descriptor, io.BytesIO(b""))


@pytest.mark.parametrize("data", [b"wrong!", b"wron", b"wrong and long", b""])
def test_admit_leaves_nothing_of_a_wrong_blob(root, namespace, data):
    """Wrong size or digest is an error, and no file of it stays."""
    descriptor = Descriptor(OCTET_STREAM, Digest.of(b"right!"), 6)

    with pytest.raises(IntegrityError):
        namespace.admit(descriptor, io.BytesIO(data))
    assert blobs_in(root) == unfinished(root) == []


def test_put_stores_a_file_under_its_digest(namespace, tmp_path):
    """The digest of a local file is computed, and what is stored is the file."""
    path = tmp_path / "weights"
    path.write_bytes(b"weights")

    info = namespace.put(path, media_type="application/vnd.example.weights")

    assert info.digest == Digest.of(b"weights")
    assert namespace.stat(str(info.digest)).media_type == MediaType.parse("application/vnd.example.weights")


# -- namespaces and purge


def test_namespaces_never_see_each_other(docker_registry, cache):
    """One tenant's pull is no hit for another, and its blobs cannot be opened there."""
    reference = docker_registry.pinned("oci-gzip")
    one, two = cache.namespace("one"), cache.namespace("two")
    with one.pull(reference) as pulled:
        assert not two.contains(pulled.layers[0].digest)
        with pytest.raises(NotFoundError):
            two.open(pulled.layers[0].digest)
    with two.pull(reference) as pulled:
        assert sources(pulled) == {"miss"}
    one.purge()
    with two.pull(reference) as pulled:
        assert sources(pulled) == {"hit"}


def test_a_purge_ends_every_reader_and_the_next_use_is_empty(root, served, cache, namespace):
    """Streams fail at their next read, nothing is left on disk, and the namespace can be used again."""
    with namespace.pull(served) as pulled:
        stream = pulled.layers[-1].compressed()
        stream.read(10)
        receipt = namespace.purge()
        assert receipt.level == "fenced"
        assert receipt.pending == (os.getpid(),)
        with pytest.raises(NamespacePurgedError):
            stream.read()
        with pytest.raises(NamespacePurgedError), pulled.layers[0].uncompressed() as tar:
            tar.read()
        stream.close()
    assert namespace.purge(wait=1).level == "unlinked"
    assert blobs_in(root) == []

    assert list(namespace.blobs()) == list(namespace.images()) == []
    with namespace.pull(served) as again:
        assert sources(again) == {"miss"}
    assert [info.generation for info in cache.namespaces()] == [2]


def test_a_purge_stops_a_pull_that_is_under_way(root, scripted, served, image, cache):
    """A pull overtaken by a purge fails, and publishes nothing into the next generation."""
    namespace = cache.namespace("acme/endpoint-7")
    scripted.fault(f"blobs/{image.layers[2].digest}", Stall(at=1000, seconds=1.0))
    arrived = threading.Event()

    def progress(step: Progress) -> None:
        if step.digest == image.layers[2].digest:
            arrived.set()

    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(namespace.pull, served, progress=progress)
        assert arrived.wait(10)
        cache.namespace("acme/endpoint-7").purge()
        with pytest.raises(NamespacePurgedError):
            pulling.result(30)
    assert namespace.purge().level == "unlinked"
    assert blobs_in(root) == unfinished(root) == []


# -- images


def test_images_tell_whether_they_are_complete(served, namespace, image):
    """A reference that lost a blob shows as incomplete, and a pull completes it."""
    namespace.pull(served).close()
    (info,) = namespace.images()
    assert info.complete
    assert info.size == sum(namespace.stat(digest).size for digest in info.blobs)

    namespace.remove(image.layers[1].digest)
    (info,) = namespace.images()
    assert info.missing == (image.layers[1].digest,)
    with namespace.pull(served) as pulled:
        assert [blob.digest for blob in pulled.report.blobs if blob.source == "miss"] == [image.layers[1].digest]


def test_removing_an_image_keeps_what_others_need(scripted, namespace):
    """A reference goes with what only it needs."""
    base, first, second = (layer_tar({name: os.urandom(9000)}) for name in ("base", "first", "second"))
    for tag, top in (("1", first), ("2", second)):
        scripted.add(build_image([base, top], platform=PLATFORM), "demo/a", tag)
        namespace.pull(f"{scripted.host}/demo/a:{tag}").close()
    shared = {layer.digest for layer in build_image([base], platform=PLATFORM).layers}

    removed = namespace.remove_image(f"{scripted.host}/demo/a:1")

    assert len(removed) == 3  # manifest, config and its own layer
    assert not shared & {*removed}
    assert [str(info.reference.tag) for info in namespace.images() if info.complete] == ["2"]
    with pytest.raises(NotFoundError):
        namespace.remove_image(f"{scripted.host}/demo/a:1")


def test_an_export_is_a_layout_that_skopeo_reads(docker_registry, namespace, skopeo, tmp_path):
    """Other tools open what export writes, and copy all of it."""
    for kind in ("oci-zstd", "index"):
        reference = docker_registry.reference(kind)
        namespace.pull(reference).close()
        digest = namespace.export(reference, tmp_path / "layout")
        seen = json.loads(skopeo("inspect", f"oci:{tmp_path / 'layout'}:{kind}"))
        assert seen["Digest"] == str(digest)
        skopeo("copy", f"oci:{tmp_path / 'layout'}:{kind}", f"dir:{tmp_path / kind}")
        with namespace.pull(reference) as pulled:
            assert {layer.digest.encoded for layer in pulled.layers} <= {p.name for p in (tmp_path / kind).iterdir()}


def test_an_export_of_an_incomplete_image_writes_nothing(served, namespace, image, tmp_path):
    """A missing blob is found before the first byte is written."""
    namespace.pull(served).close()
    namespace.remove(image.layers[1].digest)

    with pytest.raises(NotFoundError):
        namespace.export(served, tmp_path / "layout")
    assert not (tmp_path / "layout").exists()


def test_verify_names_what_is_damaged(root, served, namespace, image):
    """Verification finds rot that no read has touched, once."""
    namespace.pull(served).close()
    assert list(namespace.verify()) == []
    (path,) = root.glob(f"data/*/blobs/*/{image.layers[0].digest.encoded}")
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    (finding,) = namespace.verify()

    assert (finding.kind, finding.digest) == ("content", image.layers[0].digest)
    assert list(namespace.verify()) == []
    with pytest.raises(NotFoundError):
        list(namespace.verify(image.layers[0].digest))


def test_repair_fetches_only_the_damaged_chunks(root, scripted, namespace):
    """Sound chunks are taken from the disk, damaged ones from where the blob came from."""
    image = build_image([layer_tar({"big": os.urandom(6 << 20)})], platform=PLATFORM, compression="none")
    scripted.add(image, "demo/big", "1")
    namespace.pull(f"{scripted.host}/demo/big:1").close()
    layer = image.layers[0]
    (path,) = root.glob(f"data/*/blobs/*/{layer.digest.encoded}")
    with path.open("r+b") as file:
        for offset in (3 << 20, (4 << 20) + 5, 100):
            file.seek(offset)
            file.write(b"damage")
    scripted.clear_requests()

    (finding,) = namespace.verify(repair=True)

    assert (finding.digest, finding.repaired) == (layer.digest, True)
    assert sum(request.sent for request in scripted.requests) == (2 << 20) + (64 << 10)
    with namespace.open(layer.digest) as again, again.compressed() as stream:
        assert Digest.of(stream.read()) == layer.digest
    assert list(namespace.verify()) == []


def test_repair_says_when_it_cannot(root, scripted, served, namespace, image):
    """Without a source the damaged blob is a miss, as without repair."""
    namespace.pull(served).close()
    info = namespace.admit(Descriptor(OCTET_STREAM, Digest.of(b"local"), 5), io.BytesIO(b"local"))
    for digest in (info.digest, image.layers[0].digest):
        (path,) = root.glob(f"data/*/blobs/*/{digest.encoded}")
        path.write_bytes(b"x" * path.stat().st_size)
    scripted.stop()

    found = {finding.digest: finding.repaired for finding in namespace.verify(repair=True)}

    assert found == {info.digest: False, image.layers[0].digest: False}
    assert not namespace.contains(info.digest)


# -- when the store cannot help


@pytest.fixture(params=["full", "failing sync", "read-only"])
def broken(request, monkeypatch) -> str:
    """A disk on which nothing can be published."""
    code = {"full": errno.ENOSPC, "failing sync": errno.EIO, "read-only": errno.EROFS}[request.param]
    verb = {"full": "reserve", "failing sync": "sync", "read-only": "create"}[request.param]
    real = getattr(PosixDisk, verb)

    def fail(self, handle, *args, **options):
        if verb == "create" and args[0].endswith("lock"):
            return real(self, handle, *args, **options)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(PosixDisk, verb, fail)
    return {"full": "full", "failing sync": "failing", "read-only": "read-only"}[request.param]


def test_a_store_that_cannot_take_a_blob_is_bypassed(root, served, image, broken):
    """The caller gets verified bytes all the same, and the report says bypass and why."""
    with LayerCache(root, platform=PLATFORM) as cache, cache.namespace("ns").pull(served) as pulled:
        assert sources(pulled) == {"bypass"}
        assert {blob.reason.split(":")[0] for blob in pulled.report.blobs} == {broken}
        assert len(pulled.layers) == 3
        for layer, diff_id in zip(pulled.layers, image.diff_ids, strict=True):
            assert layer.bypass
            with layer.uncompressed() as tar:
                assert Digest.of(tar.read()) == diff_id
    assert blobs_in(root) == []


def test_a_bypass_does_not_give_out_wrong_bytes(root, scripted, served, image, broken):
    """The last piece of a layer is held back until its digest is right."""
    with LayerCache(root, platform=PLATFORM) as cache, cache.namespace("ns").pull(served) as pulled:
        scripted.fault("blobs/*", WrongBytes(), times=None)
        with pulled.layers[0].compressed() as stream, pytest.raises(IntegrityError):
            stream.read()


def test_a_root_that_cannot_be_made_is_bypassed(tmp_path, served):
    """A read-only place for the root does not stop a pull."""
    with LayerCache("/proc/no-root-here", platform=PLATFORM) as cache, cache.namespace("ns").pull(served) as pulled:
        assert sources(pulled) == {"bypass"}
        with pulled.layers[0].uncompressed() as tar:
            assert tar.read()


def test_the_store_is_used_again_when_it_recovers(root, served, monkeypatch):
    """A pull past the cache leaves no state: the next one stores."""
    with LayerCache(root, platform=PLATFORM) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(PosixDisk, "sync", lambda self, handle: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
            cache.namespace("ns").pull(served).close()
        with cache.namespace("ns").pull(served) as pulled:
            assert sources(pulled) == {"miss"}


def test_an_unsafe_root_is_an_error_not_a_bypass(root, tmp_path):
    """A root that must not be used is told to whoever configured it."""
    root.chmod(0o777)
    with pytest.raises(UnsafeRootError):
        LayerCache(root)
    with pytest.raises(FormatError):
        LayerCache(tmp_path)


# -- stream


def test_stream_gives_bytes_as_they_come_and_stores_them(scripted, served, namespace, image):
    """Pass-through reads the whole blob and leaves it in the store."""
    layer = image.layers[2]
    repository = f"{scripted.host}/demo/serving"
    with namespace.stream(layer, repository) as stream:
        assert Digest.of(stream.read()) == layer.digest
    assert namespace.contains(layer.digest)
    scripted.stop()
    with namespace.stream(layer, repository) as stream:
        assert Digest.of(stream.read()) == layer.digest


def test_stream_never_gives_the_last_piece_of_a_wrong_blob(root, scripted, served, namespace, image):
    """Whoever read to the end has read the blob; a wrong one raises instead."""
    layer = image.layers[2]
    scripted.fault("blobs/*", WrongBytes(), times=None)
    got = b""
    with namespace.stream(layer, f"{scripted.host}/demo/serving") as stream, pytest.raises(IntegrityError):  # noqa: PT012
        while piece := stream.read(10_000):
            got += piece
    assert len(got) < layer.size
    assert blobs_in(root) == []


def test_stream_works_past_a_broken_store(root, scripted, served, image, broken):
    """A store that fails, also in the middle, does not end the stream."""
    layer = image.layers[1]
    with LayerCache(root) as cache, cache.namespace("ns").stream(layer, f"{scripted.host}/demo/serving") as stream:
        assert Digest.of(stream.read()) == layer.digest


def test_a_stream_that_is_not_read_to_its_end_leaves_nothing_visible(scripted, namespace, root):
    """Closing early publishes nothing."""
    data = os.urandom(3 << 20)
    descriptor = Descriptor(OCTET_STREAM, scripted.put_blob("demo/big", data), len(data))
    for size in (0, 1000):
        with namespace.stream(descriptor, f"{scripted.host}/demo/big") as stream:
            assert len(stream.read(size)) == size
        assert blobs_in(root) == unfinished(root) == []


# -- errors from the registry


def test_a_transfer_that_breaks_goes_on(scripted, served, namespace, image):
    """A cut body is resumed, and the image is whole."""
    scripted.fault(f"blobs/{image.layers[2].digest}", Truncate(at=50_000))

    with namespace.pull(served) as pulled, pulled.layers[2].uncompressed() as tar:
        assert Digest.of(tar.read()) == image.diff_ids[2]


def test_wrong_content_fails_the_pull_and_stores_nothing_of_it(root, scripted, served, namespace, image):
    """A registry that lies is an error; the other blobs stay, the wrong one leaves nothing."""
    bad = image.layers[2].digest
    scripted.fault(f"blobs/{bad}", WrongBytes(), times=None)

    with pytest.raises(IntegrityError) as caught:
        namespace.pull(served)
    assert caught.value.digest == str(bad)
    assert bad.encoded not in blobs_in(root)
    assert unfinished(root) == []


def test_a_wrong_manifest_for_a_digest_is_refused(root, scripted, served, namespace, image):
    """A document that is consistent with itself but not with the digest asked for is never believed."""
    other = build_image([layer_tar({"evil": b"evil"})], platform=PLATFORM)
    scripted.fault("manifests/*", Substitute(other.manifest), times=None)

    with pytest.raises(IntegrityError):
        namespace.pull(f"{scripted.host}/demo/serving@{image.digest}")
    assert blobs_in(root) == []


def test_an_absent_image_is_not_found(scripted, namespace):
    """An unknown repository or tag is absence."""
    with pytest.raises(NotFoundError):
        namespace.pull(f"{scripted.host}/no/such:thing")


def test_cancel_ends_a_pull_and_its_partial_is_gone_on_with(root, scripted, namespace):
    """A cancelled pull ends soon and leaves only what the next one can use."""
    image = build_image([layer_tar({"big": os.urandom(12 << 20)})], platform=PLATFORM, compression="none")
    scripted.add(image, "demo/big", "1")
    reference = f"{scripted.host}/demo/big:1"
    scripted.fault(f"blobs/{image.layers[0].digest}", Stall(at=9 << 20, seconds=20))
    cancel = threading.Event()

    def progress(step: Progress) -> None:
        if step.stage == "fetching" and step.done >= 8 << 20:
            cancel.set()

    with pytest.raises(CancelledError):
        namespace.pull(reference, cancel=cancel, progress=progress)
    assert image.layers[0].digest.encoded not in blobs_in(root)
    scripted.clear_requests()
    scripted.clear_faults()
    with namespace.pull(reference) as pulled, pulled.layers[0].uncompressed() as tar:
        assert pulled.report.bytes_fetched < 6 << 20
        assert Digest.of(tar.read()) == image.diff_ids[0]


def test_a_timeout_ends_a_pull(scripted, served, namespace, image):
    """The time given is for all of it."""
    scripted.fault(f"blobs/{image.layers[0].digest}", Stall(at=10, seconds=20), times=None)

    with pytest.raises(DeadlineError):
        namespace.pull(served, timeout=0.5)


def test_a_failing_progress_callback_ends_the_pull(served, namespace):
    """What the caller's function raises is what the caller gets."""

    def progress(step: Progress) -> None:
        raise KeyError(str(step.digest))

    with pytest.raises(KeyError):
        namespace.pull(served, progress=progress)


# -- bad input


@pytest.mark.parametrize(
    "reference", ["", "UPPER/case", "a b", "host/../x", "h.example/a:", "h.example/a@sha256:../../x", "x" * 300]
)
def test_a_malformed_reference_is_refused_before_any_request(scripted, namespace, reference, root):
    """Nothing is asked and nothing is made for a reference that cannot be one."""
    with pytest.raises(InvalidReferenceError):
        namespace.pull(reference)
    assert scripted.requests == ()
    assert not list(root.glob("data/*"))


@pytest.mark.parametrize(
    ("digest", "error"),
    [
        ("sha256:../../x", InvalidDigestError),
        ("sha256:" + "A" * 64, InvalidDigestError),
        ("sha256:" + "a" * 63, InvalidDigestError),
        ("blake3:" + "a" * 64, UnsupportedError),
        ("", InvalidDigestError),
    ],
)
def test_a_malformed_digest_is_refused_everywhere(namespace, digest, error):
    """Every verb that takes a digest checks it first."""
    for verb in (namespace.open, namespace.stat, namespace.contains, namespace.remove):
        with pytest.raises(error):
            verb(digest)
    with pytest.raises(error):
        list(namespace.verify(digest))


def _manifest(**changes: object) -> bytes:
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": str(Digest.of(b"{}")), "size": 2}
    fields = {"schemaVersion": 2, "mediaType": str(OCI_MANIFEST), "config": empty, "layers": [empty]}
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"not json", InvalidManifestError),
        (b"[]", InvalidManifestError),
        (_manifest(manifests=[]), InvalidManifestError),
        (_manifest().replace(b'{"schemaVersion": 2,', b'{"schemaVersion": 2, "layers": [],', 1), InvalidManifestError),
        (_manifest(layers="none"), InvalidManifestError),
        (_manifest(layers=[{"mediaType": "a/b", "digest": "sha256:../../x", "size": 1}]), LayerCacheError),
        (_manifest(layers=[{"mediaType": "a/b", "digest": str(Digest.of(b"")), "size": -1}]), InvalidDescriptorError),
        (_manifest(layers=[{"mediaType": "a/b", "digest": str(Digest.of(b"")), "size": 1 << 70}]), LayerCacheError),
        (_manifest(layers=[{"mediaType": "a/b", "digest": str(Digest.of(b"")), "size": True}]), LayerCacheError),
        (_manifest(annotations={"x": "y" * (4 << 20)}), LimitError),
        (_manifest(schemaVersion=1), UnsupportedError),
    ],
    ids=["json", "array", "both", "twice", "type", "path", "negative", "huge", "bool", "4 MiB", "schema 1"],
)
def test_a_malformed_manifest_is_a_typed_error_and_leaves_nothing(root, scripted, namespace, raw, error):
    """Whatever a registry answers, the error is ours, and nothing of it is on disk."""
    scripted.put_manifest("demo/bad", raw, tag="1", media_type=str(OCI_MANIFEST))

    with pytest.raises(error):
        namespace.pull(f"{scripted.host}/demo/bad:1")
    assert unfinished(root) == []
    assert blobs_in(root) == []


def test_a_config_that_does_not_fit_its_manifest_is_refused(scripted, namespace):
    """As many DiffIDs as layers, or the image makes no sense."""
    image = build_image([layer_tar({"a": b"a"})], platform=PLATFORM)
    config = json.loads(image.config)
    config["rootfs"]["diff_ids"] *= 2
    raw = json.dumps(config).encode()
    manifest = json.loads(image.manifest)
    manifest["config"] |= {"digest": str(Digest.of(raw)), "size": len(raw)}
    scripted.add(image, "demo/bad")
    scripted.put_blob("demo/bad", raw)
    scripted.put_manifest("demo/bad", json.dumps(manifest).encode(), tag="1", media_type=str(OCI_MANIFEST))

    with pytest.raises(InvalidManifestError, match="DiffIDs"):
        namespace.pull(f"{scripted.host}/demo/bad:1")


def test_one_digest_with_two_sizes_is_refused(scripted, namespace):
    """A manifest cannot say two things of one layer."""
    image = build_image([layer_tar({"a": b"a"})] * 2, platform=PLATFORM)
    manifest = json.loads(image.manifest)
    manifest["layers"][1]["size"] += 1
    scripted.add(image, "demo/bad")
    scripted.put_manifest("demo/bad", json.dumps(manifest).encode(), tag="1", media_type=str(OCI_MANIFEST))

    with pytest.raises(InvalidDescriptorError):
        namespace.pull(f"{scripted.host}/demo/bad:1")


def test_an_artifact_without_an_image_config_is_pulled(scripted, namespace):
    """A config of another type is an opaque blob: no DiffIDs, no platform."""
    weights = os.urandom(50_000)
    raw = _manifest(
        layers=[{"mediaType": "application/vnd.example.weights", "digest": str(Digest.of(weights)), "size": 50_000}]
    )
    scripted.put_blob("demo/model", b"{}")
    scripted.put_blob("demo/model", weights)
    scripted.put_manifest("demo/model", raw, tag="1", media_type=str(OCI_MANIFEST))

    with namespace.pull(f"{scripted.host}/demo/model:1") as pulled:
        assert pulled.config is None
        with pulled.layers[0].uncompressed() as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == hashlib.sha256(weights).hexdigest()


def test_a_platform_index_with_attestations_gives_the_image(scripted, namespace, image):
    """Entries that are not for any platform are passed over."""
    index = build_index([image])
    scripted.add(index, "demo/index", "1")

    with namespace.pull(f"{scripted.host}/demo/index:1") as pulled:
        assert pulled.digest == index.digest
        assert pulled.report.manifest == image.digest


# -- life


def test_a_closed_cache_says_so(root, served):
    """Use after close is an error, and what is open stays readable."""
    cache = LayerCache(root, platform=PLATFORM)
    namespace = cache.namespace("ns")
    pulled = namespace.pull(served)
    cache.close()
    cache.close()

    with pulled.layers[0].uncompressed() as tar:
        assert tar.read()
    pulled.close()
    with pytest.raises(StoreClosedError):
        cache.namespaces()
    with pytest.raises(StoreClosedError):
        list(namespace.blobs())


def test_a_closed_cache_keeps_no_file_open(root, served):
    """Also while the namespace's handle lives: the filesystem can be unmounted."""
    cache = LayerCache(root, platform=PLATFORM)
    namespace = cache.namespace("ns")
    namespace.pull(served).close()
    cache.close()

    opened = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert [name for name in opened if name.startswith(str(root))] == []
    assert str(root) not in Path("/proc/self/maps").read_text()
    assert namespace is not None


def test_a_forked_child_opens_its_own(root, served, namespace):
    """After a fork the child pulls through connections and locks of its own."""
    with namespace.pull(served) as pulled:
        child = os.fork()
        if child == 0:  # pragma: no cover - the child's side
            status = 1
            try:
                with namespace.pull(served) as own:
                    status = 0 if sources(own) == {"hit"} else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0
        with pulled.layers[0].uncompressed() as tar:
            assert tar.read()


def test_a_registry_that_answers_with_an_error_is_a_registry_error(scripted, served, namespace):
    """A refusal carries host and status, and never becomes a miss."""
    scripted.fault("manifests/*", Status(403), times=None)

    with pytest.raises(RegistryError) as caught:
        namespace.pull(served)
    assert caught.value.status == 403
    assert caught.value.host == scripted.host
