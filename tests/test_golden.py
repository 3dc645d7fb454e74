"""A root that the first version of format 1 wrote stays readable for ever."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from layercache.oci import DiffID, Digest, Platform, Reference
from layercache.store import NamespaceName, Store
from tests.golden.make_format_1 import NAME, REFERENCE, SIZES, content

GOLDEN = Path(__file__).parent / "golden" / "format-1.tar.gz"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="tar")
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    opened = Store(root)
    yield opened
    opened.close()


def test_every_blob_and_reference_of_the_golden_root_is_there(store):
    """Names, records, chunk tables and references are read as they were written."""
    (tenancy,) = store.namespaces()
    assert (tenancy.name, tenancy.state, tenancy.generation) == (NamespaceName(NAME), "live", 2)
    generation = store.generation(NamespaceName(NAME), create=False)
    assert generation is not None
    assert {*generation.digests()} == {Digest.of(content(size)) for size in SIZES}
    for size in SIZES:
        with generation.open(Digest.of(content(size))) as blob:
            assert b"".join(bytes(piece) for piece in blob.chunks()) == content(size)
            blob.verify()
            assert blob.meta.origin == "registry.example:5000/demo"
            assert blob.meta.diff_id == DiffID(Digest.of(b"tar", algorithm="sha512"))
    ref = generation.get_ref(Reference.parse(REFERENCE))
    assert ref is not None
    assert (ref.platform, ref.resolved) == (Platform.parse("linux/arm64/v8"), 12.5)
    assert ref.manifest == ref.descriptor.digest == Digest.of(content(SIZES[-1]))
    generation.close()


def test_the_receipts_of_the_golden_root_are_a_chain(store):
    """The purge of the first generation is on record, and the next one follows from it."""
    (first,) = store.receipts()
    assert (first.generation, first.level, first.blobs, first.previous) == (1, "unlinked", len(SIZES), "")

    store.purge(NamespaceName(NAME))
    assert [receipt.generation for receipt in store.receipts()] == [1, 2]


def test_the_golden_root_can_be_recovered_and_written(store, root):
    """What another boot left unfinished is swept, and nothing else is found."""
    assert {leftover.kind for leftover in store.recover()} == {"partial"}
    assert store.recover() == ()
    assert not list(root.glob("data/*/in/*"))
    generation = store.generation(NamespaceName(NAME), create=True)
    assert generation is not None
    assert generation.generation == 2
    generation.close()
