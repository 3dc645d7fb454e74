"""Archives that attack whoever extracts them: nobody does here, so they are bytes like any other."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from layercache import LayerCache
from layercache.registry import Anonymous
from layercache.testing.images import build_image, build_layer
from layercache.testing.registry import ScriptedRegistry

CANARY = b"as it was"


def attack(target: Path) -> bytes:
    """A tar that reaches for ``target`` and its directory in each of the ways that have worked against somebody."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.mode = kind, len(data), 0o777
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(data))

        where, owned = str(target.parent), b"owned"
        add("../" * 20 + str(target).lstrip("/"), data=owned)
        add(str(target), data=owned)  # absolute
        add("link", tarfile.SYMTYPE, linkname=where)
        add(f"link/{target.name}", data=owned)  # through a link
        add("chain", tarfile.SYMTYPE, linkname="link/..")
        add("chain/escaped", data=owned)
        add(".", tarfile.SYMTYPE, linkname=where)  # the root itself (umoci CVE-2021-29136)
        add("/", tarfile.SYMTYPE, linkname=where)
        add(target.name, data=owned)
        add("hard", tarfile.LNKTYPE, linkname=str(target))  # to outside, then changed (oras-go, containerd)
        add("hard", data=owned)
        add(f"../../{target.name}", tarfile.LNKTYPE, linkname="hard")
        add("link/.", tarfile.DIRTYPE, mode=0o000)  # chmod through a link
        add("device", tarfile.CHRTYPE, devmajor=1, devminor=8)
        add("pipe", tarfile.FIFOTYPE)
        add("x" * 300 + "/../../../" + target.name, data=owned)  # in a PAX header
        add("wh/.wh..wh..opq")
        add(f"wh/.wh.../{target.name}")
    return out.getvalue()


def tree(place: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of everything below a directory."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            data = b"" if name in folders else path.read_bytes()
            found[str(path.relative_to(place))] = (path.lstat().st_mode, data)
    return found


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_an_archive_that_leaves_its_directory_is_bytes_like_any_other(
    scripted: ScriptedRegistry, root: Path, tmp_path: Path, compression: Any
) -> None:
    """Pulled, read, checked and exported, it comes out as it went in, and no file of it is anywhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_bytes(CANARY)
    tar = attack(outside / "canary")
    title = {"org.opencontainers.image.title": f"../../../{outside}/canary"}
    image = build_image([build_layer(tar, compression)], platform="linux/amd64", annotations=title)
    scripted.add(image, "demo/x", "1")
    before = tree(outside)

    with LayerCache(root, janitor=False, credentials=Anonymous(), platform="linux/amd64") as cache:
        namespace = cache.namespace("a")
        with namespace.pull(f"{scripted.host}/demo/x:1") as pulled, pulled.layers[0].uncompressed() as stream:
            assert stream.read() == tar
        assert not list(namespace.verify())
        namespace.export(f"{scripted.host}/demo/x:1", tmp_path / "export")

    assert tree(outside) == before
    files = tree(root) | tree(tmp_path / "export")
    assert not [name for name in files if "canary" in name or "escaped" in name or "hard" in name]
    assert {mode & 0o170000 for mode, _ in files.values()} <= {0o100000, 0o040000}  # files and directories alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "outside", "root"]
