"""layercache.layout: what an export leaves in a directory, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from layercache import layout
from layercache.errors import (
    IntegrityError,
    InUseError,
    InvalidError,
    InvalidManifestError,
    NoSpaceError,
    NotFoundError,
    StoreError,
)
from layercache.layout import REF_NAME, write_layout
from layercache.oci import (
    DOCKER_CONFIG,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    OCTET_STREAM,
    Descriptor,
    Digest,
    MediaType,
)
from layercache.testing.images import BuiltImage, build_image, layer_tar

OLD = b"old bytes"


def blob(data: bytes, media_type: MediaType = OCTET_STREAM, algorithm: str = "sha256") -> Descriptor:
    """The descriptor of ``data``."""
    return Descriptor(media_type, Digest.of(data, algorithm=algorithm), len(data))


def pieces(data: bytes, step: int = 7) -> Iterator[bytes | memoryview]:
    """``data`` in small pieces of more than one type."""
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        yield piece if start % 2 else memoryview(piece)


def image(text: str) -> tuple[Descriptor, dict[Descriptor, bytes]]:
    """A manifest's descriptor and every blob of the image, as small as they come."""
    config, layer = b"{}", text.encode()
    parts = {blob(config, OCI_CONFIG): config, blob(layer, OCI_LAYER_GZIP): layer}
    first, second = parts
    manifest = json.dumps({"schemaVersion": 2, "config": first.to_json(), "layers": [second.to_json()]}).encode()
    root = blob(manifest, OCI_MANIFEST)
    return root, {**parts, root: manifest}


def export(directory: Path, text: str = "one", name: str | None = "demo:1") -> Descriptor:
    """Export the image of ``text``."""
    root, parts = image(text)
    write_layout(
        directory, descriptor=root, reference_name=name, blobs=((one, pieces(data)) for one, data in parts.items())
    )
    return root


def index(directory: Path) -> dict[str | None, str]:
    """Reference name -> digest of every entry."""
    entries = json.loads((directory / "index.json").read_text())["manifests"]
    return {entry.get("annotations", {}).get(REF_NAME): entry["digest"] for entry in entries}


def path_of(directory: Path, descriptor: Descriptor) -> Path:
    """Where the layout keeps a blob."""
    return directory / "blobs" / descriptor.digest.algorithm / descriptor.digest.encoded


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory and its content; unfinished ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_absent_directory_becomes_a_layout(tmp_path: Path) -> None:
    """Parents are made; marker, index and blobs are those of the image-spec and nothing else is there."""
    directory = tmp_path / "a" / "b"
    root = export(directory)

    parts = image("one")[1]
    assert json.loads((directory / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    entry = root.to_json() | {"annotations": {REF_NAME: "demo:1"}}
    assert json.loads((directory / "index.json").read_text()) == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    }
    expected = {f"blobs/sha256/{one.digest.encoded}" for one in parts} | {"oci-layout", "index.json"}
    assert set(tree(directory)) == expected
    assert all(path_of(directory, one).read_bytes() == data for one, data in parts.items())


def test_an_empty_directory_or_one_with_leftovers_of_a_killed_export_is_taken(tmp_path: Path) -> None:
    """Unfinished files of an earlier export do not make a directory foreign."""
    (tmp_path / ".layercache-0123").write_bytes(b"cut")
    export(tmp_path)

    assert index(tmp_path) == {"demo:1": str(image("one")[0].digest)}


def test_a_reference_of_the_same_name_is_replaced_and_others_stay(tmp_path: Path) -> None:
    """The second export under a name wins; entries under other names are kept as they were."""
    export(tmp_path, "one", "a")
    export(tmp_path, "two", "b")
    export(tmp_path, "three", "a")

    assert index(tmp_path) == {"b": str(image("two")[0].digest), "a": str(image("three")[0].digest)}


def test_an_image_without_a_name_replaces_only_itself(tmp_path: Path) -> None:
    """Exporting a digest twice leaves one unnamed entry, and named ones of the same digest stay."""
    export(tmp_path, "one", "a")
    export(tmp_path, "one", None)
    export(tmp_path, "one", None)
    export(tmp_path, "two", None)

    entries = json.loads((tmp_path / "index.json").read_text())["manifests"]
    one, two = (str(image(text)[0].digest) for text in ("one", "two"))
    assert [(entry["digest"], "annotations" in entry) for entry in entries] == [(one, True), (one, False), (two, False)]


def test_what_others_wrote_into_the_index_is_kept(tmp_path: Path) -> None:
    """Fields and entries this library does not know survive a merge unchanged."""
    export(tmp_path)
    document = json.loads((tmp_path / "index.json").read_text())
    document["annotations"] = {"com.example.made-by": "somebody"}
    document["com.example"] = [1, {"x": None}]
    document["manifests"][0]["com.example"] = "kept"
    del document["mediaType"]
    (tmp_path / "index.json").write_text(json.dumps(document))
    export(tmp_path, "two", "other")

    merged = json.loads((tmp_path / "index.json").read_text())
    assert merged["manifests"][0] == document["manifests"][0]
    assert {**merged, "manifests": []} == {**document, "manifests": []}


def test_annotations_of_the_descriptor_are_kept_and_its_old_name_is_not(tmp_path: Path) -> None:
    """The entry carries the descriptor's own annotations under the name given now."""
    root, parts = image("one")
    named = Descriptor(root.media_type, root.digest, root.size, annotations={REF_NAME: "before", "a": "b"})
    blobs = [(one, pieces(data)) for one, data in parts.items()]
    write_layout(tmp_path, descriptor=named, reference_name="now", blobs=blobs)

    entry = json.loads((tmp_path / "index.json").read_text())["manifests"][0]
    assert entry["annotations"] == {REF_NAME: "now", "a": "b"}


def test_a_blob_already_there_is_not_written_again(tmp_path: Path) -> None:
    """A file of the right size stays the same file, and its source is closed unread."""
    root = export(tmp_path)
    before = path_of(tmp_path, root).stat()
    closed = threading.Event()

    class Source:
        """An iterator that must be closed, not read."""

        def __iter__(self) -> Iterator[bytes]:
            return self

        def __next__(self) -> bytes:
            pytest.fail("read")

        def close(self) -> None:
            closed.set()

    write_layout(tmp_path, descriptor=root, reference_name="again", blobs=[(root, Source())])

    after = path_of(tmp_path, root).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert closed.is_set()
    assert set(index(tmp_path)) == {"demo:1", "again"}


def test_a_cut_blob_is_written_again(tmp_path: Path) -> None:
    """A file of the wrong size under a blob's name is replaced."""
    root = export(tmp_path)
    path_of(tmp_path, root).write_bytes(b"cut")
    export(tmp_path)

    assert path_of(tmp_path, root).read_bytes() == image("one")[1][root]


def test_blobs_of_both_algorithms_and_an_empty_one_are_placed(tmp_path: Path) -> None:
    """sha512 has a directory of its own; a blob of no bytes is a file of no bytes."""
    root, parts = image("one")
    wide = blob(b"wide", algorithm="sha512")
    blobs = [(one, pieces(data)) for one, data in (parts | {wide: b"wide", blob(b""): b""}).items()]
    write_layout(tmp_path, descriptor=root, reference_name=None, blobs=blobs)

    assert path_of(tmp_path, wide).read_bytes() == b"wide"
    assert path_of(tmp_path, blob(b"")).read_bytes() == b""


@pytest.mark.parametrize(
    "data",
    [b"shorter", b"longer than promised", b"other byteS"],
    ids=["short", "long", "wrong"],
)
def test_bytes_that_are_not_what_the_digest_says_leave_the_old_index(tmp_path: Path, data: bytes) -> None:
    """A wrong blob is an integrity error, has no name in the layout and changes nothing that was there."""
    export(tmp_path)
    before = tree(tmp_path)
    promised = blob(b"other bytes")

    with pytest.raises(IntegrityError, match=str(promised.digest)):
        write_layout(tmp_path, descriptor=promised, reference_name="demo:1", blobs=[(promised, pieces(data))])

    assert tree(tmp_path) == before


def test_a_source_that_fails_leaves_a_valid_empty_layout(tmp_path: Path) -> None:
    """The first export into a directory that breaks off can be repeated: the directory is a layout by then."""
    directory = tmp_path / "new"
    promised = blob(b"x" * 100)

    def source() -> Iterator[bytes]:
        yield b"x" * 50
        raise IntegrityError("rot", digest=promised.digest)

    with pytest.raises(IntegrityError, match="rot"):
        write_layout(directory, descriptor=promised, reference_name="a", blobs=[(promised, source())])
    assert set(tree(directory)) == {"oci-layout"}

    export(directory)
    assert set(index(directory)) == {"demo:1"}


def test_an_index_never_names_an_absent_manifest(tmp_path: Path) -> None:
    """Blobs without the manifest itself are an error and the index stays."""
    export(tmp_path)
    before = (tmp_path / "index.json").read_bytes()
    root, parts = image("two")
    del parts[root]

    with pytest.raises(NotFoundError, match=str(root.digest)):
        write_layout(
            tmp_path, descriptor=root, reference_name="b", blobs=[(one, pieces(data)) for one, data in parts.items()]
        )

    assert (tmp_path / "index.json").read_bytes() == before


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"index.json": '{"schemaVersion": 2, "manifests": []}'},
        {"oci-layout": "{}"},
        {"oci-layout": "not json"},
        {"oci-layout": "[" * 100_000},
        {"oci-layout": '{"imageLayoutVersion": "2.0.0"}'},
        {"oci-layout": '{"imageLayoutVersion": "1.0.0"}', "index.json": "not json"},
        {"oci-layout": '{"imageLayoutVersion": "1.0.0"}', "index.json": '{"schemaVersion": 2, "manifests": [1]}'},
        {"oci-layout": '{"imageLayoutVersion": "1.0.0"}', "index.json": '{"schemaVersion": 2, "layers": []}'},
        {"oci-layout": '{"imageLayoutVersion": "1.0.0"}', "index.json": " " * (5 << 20)},
    ],
    ids=[
        "other",
        "no marker",
        "no version",
        "bad marker",
        "deep",
        "version 2",
        "bad index",
        "entry",
        "manifest",
        "big",
    ],
)
def test_anything_else_is_refused_and_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    """A directory that is not empty and not a valid layout is wrong input, before anything is written."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)

    with pytest.raises(InvalidError):
        export(tmp_path)

    assert tree(tmp_path) == before
    assert not (tmp_path / "blobs").exists()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """The name of a file is wrong input, and the file stays."""
    target = tmp_path / "file"
    target.write_bytes(OLD)

    with pytest.raises(InvalidError):
        export(target)

    assert target.read_bytes() == OLD


@pytest.mark.parametrize("name", ["blobs", "blobs/sha256", "blob", "index.json", "oci-layout"])
def test_symlinks_inside_are_never_followed(tmp_path: Path, name: str) -> None:
    """A link planted in a layout, whatever its name, is refused and what it points to does not change."""
    directory, outside = tmp_path / "layout", tmp_path / "outside"
    export(directory)
    root, _ = image("two")
    if name == "blob":
        name = str(path_of(directory, root).relative_to(directory))
    planted = directory / name
    if planted.is_dir():
        outside.mkdir()
        shutil.rmtree(planted)
    else:
        outside.write_bytes(planted.read_bytes() if planted.exists() else OLD)
        planted.unlink(missing_ok=True)
    planted.symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else list(outside.iterdir())

    with pytest.raises(InvalidError):
        export(directory, "two", "b")

    assert (outside.read_bytes() if outside.is_file() else list(outside.iterdir())) == before


def test_a_fifo_in_place_of_the_index_does_not_make_it_wait(tmp_path: Path) -> None:
    """A special file is refused at once."""
    export(tmp_path)
    (tmp_path / "index.json").unlink()
    os.mkfifo(tmp_path / "index.json")

    with pytest.raises(InvalidError, match="plain file"):
        export(tmp_path)


def test_a_hard_linked_blob_of_the_wrong_size_is_replaced_not_written_through(tmp_path: Path) -> None:
    """What shares an inode with a file of the layout keeps its bytes."""
    directory, outside = tmp_path / "layout", tmp_path / "outside"
    root = export(directory)
    outside.write_bytes(OLD)
    path_of(directory, root).unlink()
    os.link(outside, path_of(directory, root))
    export(directory)

    assert outside.read_bytes() == OLD
    assert path_of(directory, root).stat().st_nlink == 1


def test_exports_into_one_layout_at_a_time_lose_no_entry(tmp_path: Path) -> None:
    """Twelve threads export different images into one directory; all twelve are in the index."""
    threads = [threading.Thread(target=export, args=(tmp_path, f"image {n}", f"n{n}")) for n in range(12)]
    export(tmp_path, "first", "first")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert set(index(tmp_path)) == {"first", *(f"n{n}" for n in range(12))}
    assert not [name for name in tree(tmp_path) if ".layercache-" in name]


def test_a_lock_that_is_not_released_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait without an end: the index stays and the caller is told that somebody holds it."""
    export(tmp_path)
    monkeypatch.setattr(layout, "_LOCK_WAIT", 0.05)
    holder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(InUseError):
            export(tmp_path, "two", "b")
    finally:
        os.close(holder)

    assert set(index(tmp_path)) == {"demo:1"}


def test_files_are_synced_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of one export: each file fsync then rename, directories before the index, the index last."""
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        kind = "dir" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        calls.append(f"sync {kind}")
        real_sync(handle)

    def replace(source: str, target: str, **where: int) -> None:
        calls.append("name " + (target if len(target) < 64 else "blob"))
        real_replace(source, target, **where)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    export(tmp_path)

    publish = ["sync file", "name blob"]
    assert calls == [
        *["sync file", "name oci-layout"],
        *(publish * 3),
        *["sync dir", "sync dir"],
        *["sync file", "name index.json", "sync dir"],
    ]


def test_a_full_disk_is_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC becomes NoSpaceError, the unfinished file goes and the index stays."""
    export(tmp_path)
    before = tree(tmp_path)

    def full(_handle: int, _data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(NoSpaceError, match="free some space"):
        export(tmp_path, "two", "b")

    assert tree(tmp_path) == before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take less than it was given; nothing is lost."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    root = export(tmp_path)

    assert path_of(tmp_path, root).read_bytes() == image("one")[1][root]


def test_an_unusable_parent_is_a_store_error(tmp_path: Path) -> None:
    """What the operating system refuses arrives as this library's error, chained."""
    with pytest.raises(StoreError) as caught:
        export(Path("/proc/layercache-no"))

    assert isinstance(caught.value.__cause__, OSError)


def test_a_broken_index_is_found_before_the_blobs_are_read(tmp_path: Path) -> None:
    """Gigabytes are not copied only to find that the index cannot be merged."""
    export(tmp_path)
    (tmp_path / "index.json").write_text("{")

    class Source:
        """Blobs nobody may ask for."""

        def __iter__(self) -> Iterator[tuple[Descriptor, Iterator[bytes]]]:
            pytest.fail("read")

    with pytest.raises(InvalidManifestError):
        write_layout(tmp_path, descriptor=blob(b"x"), reference_name="a", blobs=Source())


def test_a_docker_manifest_gets_an_oci_form_beside_it(tmp_path: Path) -> None:
    """Only media types change; the original stays among the blobs, and a repeated export changes nothing."""
    root, parts = docker_image()
    export_again = [
        write_layout(
            tmp_path, descriptor=root, reference_name="a", blobs=[(one, pieces(data)) for one, data in parts.items()]
        )
        for _ in range(2)
    ]

    named = export_again[0]
    assert export_again[1] == named
    assert index(tmp_path) == {"a": str(named.digest)}
    assert named.media_type == OCI_MANIFEST
    assert path_of(tmp_path, root).read_bytes() == parts[root]
    expected = parts[root].decode()
    for docker, oci in (
        (DOCKER_MANIFEST, OCI_MANIFEST),
        (DOCKER_CONFIG, OCI_CONFIG),
        (DOCKER_LAYER_GZIP, OCI_LAYER_GZIP),
    ):
        expected = expected.replace(f'"{docker}"', f'"{oci}"')
    assert json.loads(path_of(tmp_path, named).read_text()) == json.loads(expected)


def test_a_docker_manifest_that_lay_there_damaged_is_not_given_an_oci_form(tmp_path: Path) -> None:
    """A file of the right size is taken as the blob, but not parsed unverified."""
    root, parts = docker_image()
    blobs = [(one, pieces(data)) for one, data in parts.items()]
    write_layout(tmp_path, descriptor=root, reference_name="a", blobs=blobs)
    path_of(tmp_path, root).write_bytes(parts[root].replace(b"kept", b"rots"))

    with pytest.raises(IntegrityError, match=str(root.digest)):
        write_layout(tmp_path, descriptor=root, reference_name="a", blobs=[])


def docker_image() -> tuple[Descriptor, dict[Descriptor, bytes]]:
    """A schema 2 manifest with a member nobody knows, and its blobs."""
    config, layer = blob(b"{}", DOCKER_CONFIG), blob(b"layer", DOCKER_LAYER_GZIP)
    manifest = {
        "schemaVersion": 2,
        "mediaType": str(DOCKER_MANIFEST),
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "com.example": "kept",
    }
    raw = json.dumps(manifest).encode()
    root = blob(raw, DOCKER_MANIFEST)
    return root, {config: b"{}", layer: b"layer", root: raw}


def all_of(built: BuiltImage) -> Iterator[tuple[Descriptor, Iterator[bytes]]]:
    """Every blob of a built image, the manifest last."""
    config = Descriptor(OCI_CONFIG, Digest.of(built.config), len(built.config))
    for descriptor in (config, *built.layers):
        content = built.blobs[descriptor.digest]
        yield descriptor, iter([content if isinstance(content, bytes) else Path(content).read_bytes()])
    yield built.descriptor, iter([built.manifest])


@pytest.mark.parametrize("style", ["oci", "docker"])
def test_skopeo_opens_and_copies_an_exported_layout(
    tmp_path: Path, skopeo: Callable[..., bytes], style: Literal["oci", "docker"]
) -> None:
    """A foreign tool finds each image by its reference name, reads it and copies every blob of it."""
    tar = layer_tar([Path(json.__file__).parent], under="usr/lib/python3")
    directory = tmp_path / "layout"
    names = ["127.0.0.1:5000/demo/serving:1.0", "plain"]
    images = [build_image([tar], style=style, platform="linux/amd64")]
    images.append(build_image([tar], style=style, platform="linux/amd64", compression="none"))
    for name, built in zip(names, images, strict=True):
        named = write_layout(directory, descriptor=built.descriptor, reference_name=name, blobs=all_of(built))
        assert (named.digest == built.digest) is (style == "oci")
        assert json.loads(skopeo("inspect", f"oci:{directory}:{name}"))["Digest"] == str(named.digest)
        target = tmp_path / f"copy-{built.digest.encoded[:8]}"
        skopeo("copy", "--quiet", "--preserve-digests", f"oci:{directory}:{name}", f"dir:{target}")
        assert Digest.of((target / "manifest.json").read_bytes()) == named.digest
        assert {path.name for path in target.iterdir()} >= {digest.encoded for digest in built.blobs}
