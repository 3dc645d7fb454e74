"""Sealed namespaces on a disk that forgets, beside a tmpfs that a power cut empties: cut and killed at every call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from layercache.errors import LayerCacheError, NotFoundError
from layercache.oci import OCTET_STREAM
from layercache.store import NamespaceName, Store
from layercache.testing._failing import KilledError
from layercache.testing._inodes import Node
from layercache.testing.disk import Process, SimulatedDisk
from layercache.testing.model import CONTENTS
from layercache.testing.simulation import started
from layercache.testing.tmpfs import Tmpfs
from tests.crash import sweeps

NAME = NamespaceName("acme/sealed")
BLOB, PROBE = CONTENTS[2], CONTENTS[2].data[1000:1064]


class Machine:
    """One disk and one tmpfs, and what a process of it does."""

    def __init__(self) -> None:
        self.disk: SimulatedDisk = started("root").clone()
        self.tmpfs = Tmpfs()
        self.put = False
        self.levels: list[str] = []

    def store(self) -> Store:
        process = self.disk.process()
        return Store("", disk=process, memory=self.tmpfs.of(process))

    def live(self) -> None:
        """Begin a sealed namespace, fill it, read it, end it."""
        store = self.store()
        generation = store.generation(NAME, create=True, seal="ephemeral")
        assert generation is not None
        ingest = generation.begin(BLOB.descriptor)
        assert ingest is not None
        ingest.feed(BLOB.data)
        blob = ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="simulation")
        self.put = True
        assert b"".join(map(bytes, blob.chunks())) == BLOB.data
        blob.close()
        generation.close()
        self.put = False  # from here on it may be gone
        self.levels.append(store.purge(NAME).level)
        store.close()

    def judge(self, *, cut: bool) -> None:
        """Whoever comes next: nothing hinders him, and nothing is left or claimed that is not so."""
        for node in self.nodes():
            assert PROBE not in node.content()
            assert NAME.text.encode() not in node.content()
        store = self.store()
        store.recover()
        generation = store.generation(NAME, create=False)
        if self.put and not cut:
            assert generation is not None
        if generation is not None:
            assert not cut, "a generation lives whose key a power cut has taken"
            with suppress(NotFoundError):
                blob = generation.open(BLOB.digest)
                assert b"".join(map(bytes, blob.chunks())) == BLOB.data
                blob.close()
            generation.close()
        assert len(self.tmpfs.names()) == (generation is not None)
        before = self.tmpfs.content()[-32:]
        receipt = store.purge(NAME)
        if generation is not None:
            assert receipt.level == "crypto-erased"
            assert before not in self.tmpfs.content()
        assert not self.tmpfs.names()
        found = list(store.receipts())
        assert not store.verify_receipts().problems
        assert [one.level for one in found].count("crypto-erased") >= ("crypto-erased" in self.levels)
        if cut:
            # What no process saw is not claimed: only a purge that was at its end before the cut may say so.
            assert "crypto-erased" not in [one.level for one in found if one.resumed]
        store.close()

    def nodes(self) -> Iterator[Node]:
        return (node for node in self.disk.tree.walk(self.disk.tree.root) if node.kind == "file")


def calls() -> int:
    """How many calls it makes, on the disk and on the tmpfs."""
    machine = Machine()
    seen: list[str] = []
    machine.disk.hook = lambda _, verb: seen.append(verb)
    machine.live()
    assert machine.levels == ["crypto-erased"]
    assert sum(verb.startswith("memory") for verb in seen) > 10
    return len(seen)


def kill_at(number: int) -> Callable[[Process, str], None]:
    left = number

    def hook(process: Process, _verb: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            process.kill()

    return hook


@pytest.mark.parametrize("cut", [False, True], ids=["killed", "power cut"])
def test_no_death_leaves_a_key_a_byte_in_clear_or_a_claim_that_is_not_so(cut):
    step = 1 if sweeps.SOAK else 2
    for number in range(1, calls() + 1, step):
        machine = Machine()
        machine.disk.hook = kill_at(number)
        with suppress(KilledError, LayerCacheError):
            machine.live()
        machine.disk.hook = None
        machine.tmpfs.reap()
        if cut:
            machine.disk.crash(random.Random(number))
            machine.tmpfs.empty()
        machine.judge(cut=cut)
