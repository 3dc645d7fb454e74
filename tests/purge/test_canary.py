"""The canary scan finds a canary wherever one is, so that finding none means something; and purges of a real root."""

from __future__ import annotations

import json
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layercache import LayerCache
from layercache.errors import NamespacePurgedError
from layercache.testing.registry import ScriptedRegistry
from tests.purge.canary import COMPRESSIONS, Canary

_BLOCK = 4096


@pytest.fixture
def canary() -> Canary:
    return Canary()


def _blocks(raw: bytes) -> list[bytes]:
    """Whole aligned blocks of a file."""
    return [raw[start : start + _BLOCK] for start in range(0, len(raw) - _BLOCK + 1, _BLOCK)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_block_of_a_layer_has_a_canary(canary, compression):
    """As it is stored, and as the tar inside: no 4 KiB can stay behind unseen."""
    layer = canary.layer(200_000, compression)
    assert isinstance(layer.content, bytes)
    needle = canary.inner if compression == "none" else canary.outer
    assert len(_blocks(layer.content)) > 20
    assert all(needle in block for block in _blocks(layer.content)[:-1])
    if compression != "none":
        assert canary.inner not in layer.content


def test_two_canaries_have_nothing_in_common(canary):
    """Of one tenant's bytes nothing is found by the other's canary."""
    other = Canary()
    raw = b"".join(bytes(content) for content in other.image().blobs.values() if isinstance(content, bytes))
    assert other.in_bytes(raw)
    assert not canary.in_bytes(raw)


def test_a_canary_across_the_pieces_of_a_scan_is_found_once(canary, tmp_path, monkeypatch):
    """Wherever it lies, at an edge of the pieces too, and after a hole."""
    monkeypatch.setattr("tests.purge.canary._WINDOW", 1000)
    path = tmp_path / "file"
    for offset in (0, 936, 937, 970, 999, 1000, 1 << 20):
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(canary.inner + canary.word.encode())
            file.flush()
            assert [(hit.what, hit.count) for hit in canary.in_file(file.fileno())] == [("inner", 1), ("word", 1)]


def _name(canary: Canary, root: Path) -> None:
    (root / f"of-{canary.word}").mkdir()


def _bytes(canary: Canary, root: Path) -> None:
    (root / "file").write_bytes(b"before" + canary.outer)


def _link(canary: Canary, root: Path) -> None:
    (root / "link").symlink_to(f"nowhere/{canary.word}")


@pytest.mark.parametrize("plant", [_name, _bytes, _link])
def test_a_canary_in_a_tree_is_found(canary, tmp_path, plant: Callable[[Canary, Path], None]):
    """In a name, in a file, in where a link leads."""
    assert not canary.in_tree(tmp_path)
    plant(canary, tmp_path)
    assert len(canary.in_tree(tmp_path)) == 1


_HOLDERS = {
    "open": "file = open({path!r}, 'rb')",
    "mapped": "import mmap; file = open({path!r}, 'rb'); m = mmap.mmap(file.fileno(), 0, prot=1); m[:1]; file.close()",
}


@pytest.mark.parametrize("how", _HOLDERS)
@pytest.mark.parametrize("named", [True, False])
def test_a_canary_that_another_process_holds_is_found(canary, tmp_path, how, named):
    """Open, or only mapped; with a name, or without one."""
    path = tmp_path / "root" / "file"
    path.parent.mkdir()
    path.write_bytes(canary.file(10_000))
    code = f"{_HOLDERS[how].format(path=str(path))}; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if not named:
            path.unlink()
        hits = canary.in_processes(path.parent)
        assert any(str(process.pid) in hit.where for hit in hits), hits
        process.communicate(b"\n")
    assert not canary.in_processes(path.parent)


def test_a_canary_of_our_own_is_found(canary, tmp_path):
    """In a file of no name that lies somewhere else, and in one in memory."""
    for fd in (os.open(tmp_path, os.O_RDWR | os.O_TMPFILE), os.memfd_create("elsewhere")):
        os.write(fd, canary.inner)
        assert canary.in_processes()
        os.close(fd)
    assert not canary.in_processes()


def test_a_purge_leaves_no_canary(  # noqa: PLR0917 - fixtures
    canary, root, tmp_path, scripted: ScriptedRegistry, monkeypatch, caplog
):
    """Blobs, records, references, damaged blobs, half-written ones: in the tree, in open files, in what was told."""
    caplog.set_level(logging.DEBUG)
    elsewhere = [tmp_path / "tmp", tmp_path / "home"]
    for variable, place in zip(("TMPDIR", "HOME"), elsewhere, strict=True):
        place.mkdir()
        monkeypatch.setenv(variable, str(place))
    image, neighbour = canary.image(), Canary()
    scripted.add(image, canary.repository, "1.0")
    scripted.add(neighbour.image(), neighbour.repository, "1.0")
    reference = f"{scripted.host}/{canary.repository}:1.0"
    told: list[str] = []
    with LayerCache(root) as cache:
        cache.namespace(neighbour.namespace).pull(f"{scripted.host}/{neighbour.repository}:1.0").close()
        namespace = cache.namespace(canary.namespace)
        with namespace.pull(reference) as pulled:
            tars = [stream.read() for layer in pulled.layers for stream in [layer.uncompressed()]]
            assert all(all(canary.inner in block for block in _blocks(tar)[1:-3]) for tar in tars)
        _damage(root, image.layers[0].digest.encoded)
        assert len(list(namespace.verify())) == 1
        before = canary.in_tree(root)
        assert {hit.what for hit in before} == {"inner", "outer", "word"}
        assert any("/bad/" in hit.where for hit in before)
        theirs = neighbour.in_tree(root)
        held = namespace.open(image.layers[1].digest)
        receipt = namespace.purge(wait=0.0)
        assert receipt.level == "fenced"
        with pytest.raises(NamespacePurgedError):
            held.compressed().read()
        assert canary.in_processes(root)
        held.close()
        receipt = namespace.purge(wait=5.0)
        assert receipt.level == "unlinked"
        told += [repr(receipt), json.dumps(receipt.to_json()), repr(namespace), repr(cache)]
        told += [json.dumps(one.to_json()) for one in cache.receipts()]
        assert not canary.in_tree(root)
        assert not canary.in_processes(root, *elsewhere)
        assert neighbour.in_tree(root) == theirs
    for place in elsewhere:
        assert not list(place.iterdir())
    assert not canary.in_bytes("\n".join(told).encode())
    # At DEBUG urllib3 tells each URL, which names the repository; what is ours tells nothing.
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("layercache")]
    assert ours
    assert not canary.in_bytes("\n".join(ours).encode())


def _damage(root: Path, encoded: str) -> None:
    (path,) = root.glob(f"data/*/blobs/*/{encoded}")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[100] ^= 1
