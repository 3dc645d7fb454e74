"""A namespace that is made, filled, purged and made again, with writers that come too late each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from layercache.errors import NamespacePurgedError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Generation, NamespaceName, Store
from tests.crash import sweeps

ROUNDS = 1000 if sweeps.SOAK else 25
NAME = NamespaceName("acme/endpoint")


def begin(generation: Generation, data: bytes):
    ingest = generation.begin(Descriptor(OCTET_STREAM, Digest.of(data), len(data)))
    assert ingest is not None
    return ingest


def commit(ingest, data: bytes) -> None:
    ingest.feed(data[ingest.offset :])
    ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="loop").close()


def entries(root: Path) -> list[str]:
    """Return everything below the root by its name, whatever generation it is of; the receipts grow."""
    slots = {path.name: f"slot {number}" for number, path in enumerate(sorted(root.glob("slots/*")))}
    found = []
    for path in root.rglob("*"):
        text = str(path.relative_to(root))
        for slot, word in slots.items():
            text = text.replace(slot, word)
        if not text.startswith("receipts/segment."):
            found.append(text.rpartition(".")[0] if text.startswith("slots/") and "." in text else text)
    return sorted(found)


@pytest.mark.timeout(3600 if sweeps.SOAK else 120)
def test_late_writers_of_many_generations_leave_nothing(tmp_path, record_property):
    """Each generation begins empty, no late byte is published in it, and only the receipts have grown at the end."""
    root = tmp_path / "root"
    store = Store(root)
    first: list[str] = []
    for number in range(1, ROUNDS + 1):
        generation = store.generation(NAME, create=True)
        assert generation is not None
        assert generation.generation == number
        assert list(generation.digests()) == []
        for blob in range(3):
            commit(begin(generation, f"blob {blob}".encode() * 500), f"blob {blob}".encode() * 500)
        # One has begun, one has come to its last step, when the namespace is purged under them.
        late, later = b"late" * 1000, b"later" * 1000
        with begin(generation, late) as one, begin(generation, later) as other:
            one.feed(late[:1000])
            other.feed(later)
            receipt = store.purge(NAME, wait=0.0)
            while not receipt.ends:  # their partial files are open
                assert receipt.level == "fenced"
                with pytest.raises(NamespacePurgedError):
                    commit(one, late)
                with pytest.raises(NamespacePurgedError):
                    commit(other, later)
                one.abort()
                other.abort()
                receipt = store.purge(NAME, wait=30.0)
        with pytest.raises(NamespacePurgedError):
            generation.check()
        generation.close()
        assert list(root.glob("data/*")) == list(root.glob("trash/*")) == []
        first = first or entries(root)
    assert entries(root) == first
    report = store.verify_receipts()
    assert report.problems == ()
    assert sum(one.ends for one in store.receipts()) == ROUNDS
    store.close()
    size = sum(path.stat().st_size for path in root.glob("receipts/segment.*"))
    record_property("coverage", f"loops: {ROUNDS} generations, {report.count} receipts in {size >> 20} MiB of segments")
