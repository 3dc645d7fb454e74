"""Pins and grants on a disk that forgets: what a call has told holds after a power cut, kept or taken back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from layercache.oci import OCTET_STREAM, Reference
from layercache.store import Generation, Grant, NamespaceName, Pin, Store, grant, granted, pin, pins, revoke, unpin
from layercache.testing.disk import SimulatedDisk
from layercache.testing.model import CONTENTS
from layercache.testing.simulation import started

BLOB = CONTENTS[1]
NAME = NamespaceName("acme/endpoint-7")
GRANT = Grant(BLOB.digest, len(BLOB.data), OCTET_STREAM, None, "registry.example.com/base", 1.0)
SEEDS = 40
"""Power cuts after each step: what is not flushed is lost in one of two of them."""


def after_a_cut(disk: SimulatedDisk, seed: int) -> Generation:
    """Cut the power and return what the next process finds."""
    disk.crash(random.Random(seed))
    store = Store("", disk=disk.process())
    store.recover()
    generation = store.generation(NAME, create=False)
    assert generation is not None
    return generation


def lent(generation: Generation) -> bool:
    """Whether the tenant may read the blob."""
    return granted(generation, BLOB.digest) is not None


def pinned(generation: Generation) -> bool:
    """Whether the tenant has its pin."""
    return [found.name for found in pins(generation)] == ["release"]


def lend_it(generation: Generation) -> None:
    """Grant the blob."""
    grant(generation, [GRANT])


def take_it(generation: Generation) -> None:
    """Take the grant back."""
    assert revoke(generation, BLOB.digest) is not None


def pin_it(generation: Generation) -> None:
    """Pin an image of one blob."""
    made = Pin("release", Reference.parse("registry.example.com/base:1"), BLOB.digest, (BLOB.digest,), 1.0)
    pin(generation, made, hold=generation.open)


def unpin_it(generation: Generation) -> None:
    """Let go of it."""
    unpin(generation, "release")


@pytest.mark.parametrize(
    ("keep", "let_go", "holds"), [(lend_it, take_it, lent), (pin_it, unpin_it, pinned)], ids=["grant", "pin"]
)
def test_what_was_told_of_it_survives_a_power_cut(
    keep: Callable[[Generation], None], let_go: Callable[[Generation], None], holds: Callable[[Generation], bool]
) -> None:
    """It is there once the call that makes it is back, and gone once the one that takes it back is."""
    for seed in range(SEEDS):
        disk = started("root").clone()
        generation = Store("", disk=disk.process()).generation(NAME, create=True)
        assert generation is not None
        ingest = generation.begin(BLOB.descriptor)
        assert ingest is not None
        with ingest:
            ingest.feed(BLOB.data)
            ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="simulation").close()
        keep(generation)
        generation = after_a_cut(disk, seed)
        assert holds(generation)
        let_go(generation)
        assert not holds(after_a_cut(disk, seed + SEEDS))
