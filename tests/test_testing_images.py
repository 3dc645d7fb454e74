"""Images are built from real files, the same bytes every time, and other programs read them."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zstandard

from layercache.oci import Compression, Digest, Index, Manifest, Platform, parse_document, select
from layercache.testing import _content
from layercache.testing.images import (
    BuiltImage,
    BuiltIndex,
    Style,
    build_image,
    build_index,
    build_layer,
    compress,
    layer_tar,
    synthetic_layer,
    write_layout,
)

TAR = layer_tar({"etc/motd": b"hello\n" * 5000, "bin/empty": b""})
STYLES: tuple[Style, ...] = ("oci", "docker")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def names(tar: bytes) -> dict[str, tarfile.TarInfo]:
    """Entries of a tar by name."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return {info.name: info for info in opened}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a directory with a file, a program, a link, an empty directory and an interpreter's leftovers."""
    top = tmp_path / "tree"
    (top / "inner" / "__pycache__").mkdir(parents=True)
    (top / "inner" / "__pycache__" / "a.pyc").write_bytes(b"x")
    (top / "inner" / "a.py").write_text("a = 1\n")
    (top / "empty").mkdir()
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o700)
    (top / "link").symlink_to("inner/a.py")
    return top


def test_a_tar_of_a_tree_holds_the_tree(tree: Path) -> None:
    """Files, links and empty directories are there under their place, with their parents, and no leftovers."""
    entries = names(layer_tar([tree], under="/opt/app"))

    assert list(entries) == [
        "opt",
        "opt/app",
        "opt/app/tree",
        "opt/app/tree/empty",
        "opt/app/tree/inner",
        "opt/app/tree/inner/a.py",
        "opt/app/tree/link",
        "opt/app/tree/run",
    ]
    assert entries["opt/app/tree/link"].linkname == "inner/a.py"
    assert entries["opt/app/tree/empty"].isdir()
    assert (entries["opt/app/tree/run"].mode, entries["opt/app/tree/inner/a.py"].mode) == (0o755, 0o644)


def test_a_tar_does_not_depend_on_times_and_owners(tree: Path) -> None:
    """The same files at another time, with another mask, are the same bytes."""
    before = layer_tar([tree])
    os.utime(tree / "inner" / "a.py", (1, 1))
    (tree / "inner" / "a.py").chmod(0o600)

    assert layer_tar([tree]) == before


def test_a_mapping_names_what_goes_where(tree: Path) -> None:
    """Bytes, files and trees can be put anywhere; ``keep`` chooses inside trees; the root itself is no entry."""
    named: dict[str, bytes | Path] = {"etc/x": b"1", "srv/a.py": tree / "inner" / "a.py", "": tree}
    tar = layer_tar(named, keep=lambda path: path.name == "run")

    assert list(names(tar)) == ["etc", "etc/x", "run", "srv", "srv/a.py"]


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    """A typing error in a path does not become an empty layer."""
    with pytest.raises(FileNotFoundError):
        layer_tar([tmp_path / "nothing"])


def test_members_are_independent_gzip_streams() -> None:
    """So many members, without a time in their headers, that decode to the tar."""
    data = compress(TAR, "gzip", members=4)
    rest, members = data, 0
    while rest:
        decoder = zlib.decompressobj(31)
        decoder.decompress(rest)
        rest, members = decoder.unused_data, members + 1

    assert members == 4
    assert gzip.decompress(data) == TAR
    assert data[4:8] == bytes(4)


def test_frames_are_independent_zstd_streams() -> None:
    """So many frames that decode to the tar."""
    data = compress(TAR, "zstd", frames=5)
    rest, frames, out = data, 0, b""
    while rest:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        out += decoder.decompress(rest)
        rest, frames = decoder.unused_data, frames + 1

    assert frames == 5
    assert out == TAR


def test_skippable_frames_stand_before_between_and_after() -> None:
    """Every real frame has a skippable one on both sides, and a reader that skips them finds the tar."""
    data = compress(TAR, "zstd", frames=3, skippable=True)
    plain = compress(TAR, "zstd", frames=3)
    kinds, rest, out = "", data, b""
    while rest:
        if rest[:4] == ZSTD_MAGIC:
            decoder = zstandard.ZstdDecompressor().decompressobj()
            out += decoder.decompress(rest)
            kinds, rest = kinds + "f", decoder.unused_data
        else:
            assert 0x184D2A50 <= int.from_bytes(rest[:4], "little") <= 0x184D2A5F
            kinds, rest = kinds + "s", rest[8 + int.from_bytes(rest[4:8], "little") :]

    assert kinds == "sfsfsfs"
    assert out == TAR
    assert len(data) > len(plain)


def test_more_parts_than_bytes_gives_empty_parts() -> None:
    """A stream of parts without content is valid and can be built."""
    assert gzip.decompress(compress(b"ab", "gzip", members=4)) == b"ab"


@pytest.mark.parametrize(
    ("compression", "options"),
    [("gzip", {"frames": 2}), ("zstd", {"members": 2}), ("none", {"skippable": True}), ("zstd", {"frames": 0})],
)
def test_parts_a_format_does_not_have_are_refused(compression: Compression, options: dict[str, Any]) -> None:
    """Asking for them is a mistake in the test, not a request to guess."""
    with pytest.raises(ValueError, match=r"exist in|less than one"):
        compress(TAR, compression, **options)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_an_image_is_valid_and_complete(style: Style, compression: Compression) -> None:
    """The manifest parses, says what its layers are, and every blob it names is there with that size and digest."""
    odd = build_layer(TAR, "zstd", frames=3, algorithm="sha512")
    image = build_image(
        [TAR, odd, TAR],
        style=style,
        compression=compression,
        platform="linux/arm64/v8",
        annotations={"a": "b"},
    )
    manifest = parse_document(image.manifest, content_type=str(image.media_type))
    assert isinstance(manifest, Manifest)

    assert ("docker" in str(image.media_type)) == (style == "docker")
    assert manifest.layers == image.layers
    assert [layer.media_type.compression for layer in manifest.layers] == [compression, "zstd", compression]
    for descriptor in (manifest.config, *manifest.layers):
        content = image.blobs[descriptor.digest]
        assert isinstance(content, bytes)
        assert Digest.of(content, algorithm=descriptor.digest.algorithm) == descriptor.digest
        assert len(content) == descriptor.size
    assert len(image.blobs) == 3
    config = json.loads(image.config)
    assert config["rootfs"]["diff_ids"] == [f"sha256:{sha256(TAR).hexdigest()}"] * 3
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm64", "v8")
    assert image.descriptor.platform == Platform.parse("linux/arm64/v8")
    assert image.digest == Digest.of(image.manifest)


def test_an_image_is_for_this_host_unless_said_otherwise() -> None:
    """The platform of the descriptor is the host's."""
    assert build_image([TAR]).descriptor.platform == Platform.host()


def test_the_same_files_give_the_same_image() -> None:
    """Nothing of an image depends on when it was built."""
    assert build_image([TAR], config={"author": "x"}) == build_image([TAR], config={"author": "x"})


@pytest.mark.parametrize("style", STYLES)
def test_an_index_leads_to_its_images(style: Style) -> None:
    """Selecting a platform in an index gives the image that was built for it."""
    amd64 = build_image([TAR], platform="linux/amd64", style=style)
    arm64 = build_image([TAR], platform="linux/arm64", style=style)
    built = build_index([amd64, arm64], style=style, annotations={"a": "b"})
    index = parse_document(built.manifest, content_type=str(built.media_type))
    assert isinstance(index, Index)

    assert select(index, Platform.parse("linux/arm64")).digest == arm64.digest
    assert [descriptor.digest for descriptor in index.manifests] == [amd64.digest, arm64.digest]
    assert built.digest == Digest.of(built.manifest)


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_synthetic_layer_is_a_layer(tmp_path: Path, compression: Compression) -> None:
    """The file has the digest, size and DiffID that are claimed, and unpacks to one file of the asked size."""
    size = (2 << 20) + 77
    layer = synthetic_layer(tmp_path / "layer", size, seed=3, compression=compression, name="weights.bin")
    content = (tmp_path / "layer").read_bytes()
    unpack: dict[str, Callable[[bytes], bytes]] = {
        "none": bytes,
        "gzip": gzip.decompress,
        "zstd": zstandard.ZstdDecompressor().decompressobj().decompress,
    }
    tar = unpack[compression](content)

    assert layer.content == tmp_path / "layer"
    assert (Digest.of(content), len(content)) == (layer.digest, layer.size)
    assert Digest.of(tar) == layer.diff_id
    assert names(tar)["weights.bin"].size == size
    assert len(content) > size * 0.99


def test_a_seed_decides_a_synthetic_layer(tmp_path: Path) -> None:
    """The same seed gives the same layer, another seed another one."""
    digests = [synthetic_layer(tmp_path / "x", 5000, seed=seed).digest for seed in (1, 1, 2)]

    assert digests[0] == digests[1] != digests[2]


def test_a_synthetic_layer_is_never_held_in_memory(tmp_path: Path) -> None:
    """Writing and reading one takes a few pieces' worth of memory, not the layer's."""
    tracemalloc.start()
    try:
        layer = synthetic_layer(tmp_path / "x", 24 << 20)
        taken = sum(len(piece) for piece in _content.pieces(layer.content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert taken == layer.size > 24 << 20
    assert peak < 8 << 20


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(("start", "end"), [(0, None), (0, 10), (5, 9), (9, 100), (10, 12), (3, 3)])
def test_pieces_are_slices(tmp_path: Path, *, as_file: bool, start: int, end: int | None) -> None:
    """A range of a content is the same range of its bytes, whether they are in memory or in a file."""
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")

    found = b"".join(_content.pieces(path if as_file else b"0123456789", start, end))

    assert found == b"0123456789"[start:end]


def test_pieces_are_bounded(tmp_path: Path) -> None:
    """No piece is larger than the promised size."""
    data = bytes(_content.PIECE * 2 + 1)
    (tmp_path / "x").write_bytes(data)

    for content in (data, tmp_path / "x"):
        assert [len(piece) for piece in _content.pieces(content)] == [_content.PIECE, _content.PIECE, 1]


@pytest.mark.parametrize("kind", ["oci-gzip", "oci-zstd", "oci-plain", "odd", "index"])
def test_skopeo_opens_a_layout(
    real_images: dict[str, BuiltImage | BuiltIndex], skopeo: Callable[..., bytes], tmp_path: Path, kind: str
) -> None:
    """Skopeo finds the image in the layout and copies every blob of it, which checks their digests."""
    image = real_images[kind]
    write_layout(image, tmp_path / "layout", "1.0")

    raw = skopeo("inspect", "--raw", f"oci:{tmp_path}/layout:1.0")
    skopeo("copy", "--all", "--preserve-digests", f"oci:{tmp_path}/layout:1.0", f"dir:{tmp_path}/copy")

    assert raw == image.manifest
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == image.manifest


def test_a_layout_takes_several_tags_and_a_tag_moves(tmp_path: Path) -> None:
    """Writing beside what is there keeps it; writing a tag again points it elsewhere."""
    first, second = build_image([TAR]), build_image([TAR, TAR])
    for image, tag in ((first, "a"), (first, "b"), (second, "b")):
        write_layout(image, tmp_path, tag)

    entries = json.loads((tmp_path / "index.json").read_bytes())["manifests"]

    tags = {entry["annotations"]["org.opencontainers.image.ref.name"]: entry["digest"] for entry in entries}
    assert tags == {"a": str(first.digest), "b": str(second.digest)}
    assert len(entries) == 2


def test_a_layout_takes_layers_from_files(tmp_path: Path) -> None:
    """A layer that lives in a file is copied, not moved."""
    layer = synthetic_layer(tmp_path / "layer", 4000)
    write_layout(build_image([layer]), tmp_path / "layout", "1.0")

    assert (tmp_path / "layout/blobs/sha256" / layer.digest.encoded).read_bytes() == (tmp_path / "layer").read_bytes()
