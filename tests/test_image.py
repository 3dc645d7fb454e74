"""Layers in the hand of a caller: random reads that are verified, and the descriptor that is not."""

from __future__ import annotations

import mmap
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layercache import Layer, LayerCache, Namespace
from layercache.errors import IntegrityError, NamespacePurgedError, NoSpaceError, UnsupportedError
from layercache.registry import Anonymous
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import ScriptedRegistry

MIB = 1 << 20
DATA = random.Random(7).randbytes(3 * MIB + 12_345)


@pytest.fixture
def cache(root: Path) -> Iterator[LayerCache]:
    with LayerCache(root, janitor=False, credentials=Anonymous(), platform="linux/amd64") as cache:
        yield cache


@pytest.fixture
def layer(cache: LayerCache, tmp_path: Path) -> Iterator[Layer]:
    """Return a stored blob of a little over three chunks."""
    namespace = cache.namespace("a")
    with kept(namespace, tmp_path) as layer:
        yield layer


def kept(namespace: Namespace, place: Path) -> Layer:
    """Return the content, stored and open."""
    (place / "content").write_bytes(DATA)
    return namespace.open(namespace.put(place / "content").digest)


def damage(root: Path, at: int) -> None:
    """Flip a byte of the one large blob below a root."""
    (file,) = [path for path in root.rglob("blobs/*/*") if path.stat().st_size == len(DATA)]
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 1]))


def test_pread_gives_any_range_verified(layer: Layer, root: Path) -> None:
    for offset, length in [(0, 1), (65_535, 2), (MIB - 1, MIB + 2), (len(DATA) - 5, 100), (len(DATA), 1), (7, 0)]:
        assert layer.pread(offset, length) == DATA[offset : offset + length]
    damage(root, 2 * MIB + 5)
    assert layer.pread(MIB, 1000) == DATA[MIB : MIB + 1000]
    with pytest.raises(IntegrityError):
        layer.pread(2 * MIB + 100, 1)


def test_the_descriptor_is_of_the_compressed_bytes(layer: Layer) -> None:
    """It can be read at any place and mapped, and cannot be written through."""
    fd = layer.fileno()
    assert layer.fileno() == fd
    assert os.pread(fd, 100, MIB) == DATA[MIB : MIB + 100]
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == DATA
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    assert not os.get_inheritable(fd)
    assert layer.compressed().read() == DATA  # no matter where somebody left its position


def test_sendfile_fills_a_socket_that_is_slower(layer: Layer) -> None:
    """All of it, and any part of it, through a pair of sockets that take little at once, blocking or not."""
    for blocking in (True, False):
        for offset, length in [(0, None), (MIB - 3, MIB), (len(DATA) - 1, 10), (len(DATA) + 5, 3)]:
            near, far = socket.socketpair()
            with near, far:
                near.setblocking(blocking)
                got = bytearray()

                def drain(far: socket.socket = far, got: bytearray = got) -> None:
                    while piece := far.recv(50_000):
                        got += piece

                thread = threading.Thread(target=drain)
                thread.start()
                expected = DATA[offset:] if length is None else DATA[offset : offset + length]
                assert layer.sendfile_to(near.fileno(), offset=offset, length=length) == len(expected)
                near.shutdown(socket.SHUT_WR)
                thread.join()
                assert got == expected


def test_sendfile_to_a_file_and_to_nobody(layer: Layer, tmp_path: Path) -> None:
    with (tmp_path / "copy").open("wb") as out:
        assert layer.sendfile_to(out.fileno()) == len(DATA)
    assert (tmp_path / "copy").read_bytes() == DATA
    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises(BrokenPipeError):
        layer.sendfile_to(near.fileno())
    with pytest.raises(ValueError, match="negative"):
        layer.sendfile_to(1, offset=-1)


def test_a_file_that_was_cut_is_an_error_not_an_end(layer: Layer, root: Path, tmp_path: Path) -> None:
    (file,) = [path for path in root.rglob("blobs/*/*") if path.stat().st_size == len(DATA)]
    os.truncate(file, MIB)
    with (tmp_path / "copy").open("wb") as out, pytest.raises(IntegrityError, match="too short"):
        layer.sendfile_to(out.fileno())


def test_a_purge_ends_both(cache: LayerCache, layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is given out after it; one that was is what the receipt waits for."""
    # A busy disk takes its time to get as far as a look at who holds it.
    monkeypatch.setattr("layercache.store._errand._GRACE", 60.0)
    monkeypatch.setattr("layercache.store._errand._TOLD", 61.0)
    fd = layer.fileno()
    receipt = cache.namespace("a").purge(wait=0.0)
    assert receipt.level == "fenced"
    assert os.getpid() in receipt.pending
    assert os.pread(fd, 10, 0) == DATA[:10]  # as documented
    with (tmp_path / "copy").open("wb") as out:
        for call in (layer.fileno, lambda: layer.sendfile_to(out.fileno()), lambda: layer.pread(0, 1)):
            with pytest.raises(NamespacePurgedError):
                call()
    assert not (tmp_path / "copy").read_bytes()


def test_a_purge_in_the_middle_of_a_transfer_is_told(
    cache: LayerCache, layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes in the last piece: who has sent purged bytes is told so."""
    send = os.sendfile

    def purging(*args: int) -> int:
        count = send(*args)
        cache.namespace("a").purge(wait=0.0)
        return count

    monkeypatch.setattr(os, "sendfile", purging)
    with (tmp_path / "copy").open("wb") as out, pytest.raises(NamespacePurgedError):
        layer.sendfile_to(out.fileno())


def test_a_closed_layer_has_no_descriptor(cache: LayerCache, tmp_path: Path) -> None:
    namespace = cache.namespace("a")
    layer = kept(namespace, tmp_path)
    layer.close()
    with pytest.raises(ValueError, match="closed"):
        layer.fileno()
    with pytest.raises(ValueError, match="closed"):
        layer.sendfile_to(1)


def test_a_sealed_layer_has_no_descriptor(cache: LayerCache, tmp_path: Path) -> None:
    """Its file holds other bytes; verified reads work."""
    pytest.importorskip("cryptography")
    namespace = cache.namespace("s", seal="ephemeral")
    with kept(namespace, tmp_path) as layer:
        assert layer.pread(MIB, 100) == DATA[MIB : MIB + 100]
        for call in (layer.fileno, lambda: layer.sendfile_to(1)):
            with pytest.raises(UnsupportedError, match="sealed"):
                call()


def test_a_layer_that_is_not_held_has_neither(
    cache: LayerCache, scripted: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bypass the digest is known to be right at the end alone, so that there is no random read."""
    image = build_image([layer_tar({"a": DATA})], platform="linux/amd64")
    scripted.add(image, "demo/x", "1")

    def full(*_: object, **__: object) -> None:
        raise NoSpaceError("full")

    monkeypatch.setattr("layercache.store.Generation.begin", full)
    with cache.namespace("b").pull(f"{scripted.host}/demo/x:1") as pulled:
        layer = pulled.layers[0]
        assert layer.bypass
        for call in (layer.fileno, lambda: layer.sendfile_to(1), lambda: layer.pread(0, 1)):
            with pytest.raises(UnsupportedError, match="not held"):
                call()
