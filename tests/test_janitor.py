"""Housekeeping: what is swept, what is scrubbed, and who does it."""

import io
import json
import os
import threading
import time
from pathlib import Path

import pytest

from layercache import Descriptor, Digest, LayerCache
from layercache.cli import main
from layercache.control import Control
from layercache.errors import CancelledError
from layercache.janitor import SCRUB_PERIOD, Janitor
from layercache.oci import OCTET_STREAM
from layercache.reports import Housekeeping
from layercache.store import Store
from layercache.store import _scrub as scrub_room


@pytest.fixture
def cache(root: Path):
    with LayerCache(root, janitor=False) as opened:
        yield opened


def admit(cache: LayerCache, name: str, data: bytes) -> Digest:
    descriptor = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
    return cache.namespace(name).admit(descriptor, io.BytesIO(data)).digest


def path_of(root: Path, digest: Digest, kind: str = "blobs") -> Path:
    (found,) = root.glob(f"data/*/{kind}/*/{digest.encoded}")
    return found


def age(root: Path, digest: Digest, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path_of(root, digest, "meta"), (then, then))


def scrub(store: Store, older_than: float = 100.0, rate: float = 1e12, control: Control | None = None):
    return list(store.scrub(older_than=older_than, rate=rate, control=control or Control()))


def test_a_scrub_reads_what_was_not_read_for_long(root, cache):
    """Only blobs that are due are compared; afterwards they are not due any more."""
    old, new = admit(cache, "a", b"old"), admit(cache, "b", b"new")
    age(root, old, 1000)
    before = path_of(root, new, "meta").stat().st_mtime

    assert scrub(cache.store()) == []

    assert time.time() - cache.namespace("a").stat(old).verified < 60
    assert path_of(root, new, "meta").stat().st_mtime == before


def test_a_scrub_finds_rot_in_any_namespace_and_goes_on(root, cache):
    """A damaged blob is found and moved aside, its neighbours are compared all the same."""
    digests = [admit(cache, name, name.encode() * 1000) for name in ("a", "b", "c")]
    for digest in digests:
        age(root, digest, 1000)
    path_of(root, digests[1]).write_bytes(b"x" * 1000)

    (finding,) = scrub(cache.store())

    assert (finding.kind, finding.digest) == ("content", digests[1])
    assert not cache.namespace("b").contains(digests[1])
    assert scrub(cache.store()) == []
    assert all(time.time() - cache.namespace(n).stat(d).verified < 60 for n, d in zip("ac", digests[::2], strict=True))


def test_a_scrub_takes_the_longest_unread_first_and_goes_on_where_it_was_cut(root, cache, monkeypatch):
    """A scrub that is stopped has done the oldest, and the next one does the rest: nothing is starved."""
    digests = [admit(cache, "a", os.urandom(100)) for _ in range(4)]
    for position, digest in enumerate(digests):
        age(root, digest, 1000 + position)
    stop = threading.Event()
    compared = []
    real = scrub_room._compare

    def compare(disk, generation, digest, *rest):
        compared.append(digest)
        if len(compared) == 2:
            stop.set()
        return real(disk, generation, digest, *rest)

    monkeypatch.setattr(scrub_room, "_compare", compare)
    with pytest.raises(CancelledError):
        scrub(cache.store(), control=Control(cancel=stop))
    scrub(cache.store())

    assert compared == [digests[3], digests[2], digests[2], digests[1], digests[0]]


def test_a_scrub_keeps_to_its_rate(cache, root, monkeypatch):
    """The waits between pieces add up to size over rate."""
    digest = admit(cache, "a", os.urandom(3 << 20))
    age(root, digest, 1000)
    store = cache.store()
    waits: list[float] = []
    monkeypatch.setattr(type(store._disk), "pause", lambda self, seconds: waits.append(seconds))

    scrub(store, rate=1 << 20)

    assert sum(waits) == pytest.approx(3.0)
    assert max(waits) <= 0.05  # so that a stop takes effect at once


def test_one_process_scrubs_at_a_time(root, cache):
    """Where somebody scrubs, another one does nothing."""
    digest = admit(cache, "a", b"data")
    age(root, digest, 1000)
    store, other = cache.store(), Store(root)
    disk = other._disk
    held = disk.create(disk.root, "scrub.lock", exist_ok=True)
    assert disk.lock(held, exclusive=True)

    assert scrub(store) == []
    assert time.time() - cache.namespace("a").stat(digest).verified > 900
    disk.close(held)
    other.close()
    scrub(store)
    assert time.time() - cache.namespace("a").stat(digest).verified < 60


def test_a_tick_sweeps_and_scrubs(root, cache):
    """What a crash left goes, what is due is compared, and the thread ends when asked."""
    digest = admit(cache, "a", b"data")
    age(root, digest, SCRUB_PERIOD)
    litter = path_of(root, digest).parents[2] / "in" / f"tmp.{'0' * 12}.{'1' * 16}"
    litter.write_bytes(b"left")
    janitor = Janitor(cache.store)
    try:
        janitor.tick()
    finally:
        janitor.stop()

    assert not litter.exists()
    assert time.time() - cache.namespace("a").stat(digest).verified < 60


def test_a_round_can_be_had_without_a_thread(root, cache):
    """What is damaged is found and said; a second round has nothing left to do."""
    digest = admit(cache, "a", b"data")
    age(root, digest, SCRUB_PERIOD)
    path_of(root, digest).write_bytes(b"DATA")
    litter = path_of(root, digest).parents[2] / "in" / f"tmp.{'0' * 12}.{'1' * 16}"
    litter.write_bytes(b"left")

    done = cache.keep_house()
    assert (done.swept, done.complete) == (1, True)
    assert [finding.digest for finding in done.findings] == [digest]
    assert not litter.exists()
    assert cache.keep_house() == Housekeeping(0, 0, (), complete=True)


def test_a_round_whose_time_is_over_goes_on_the_next_time(root, cache):
    """A deadline ends the reading only."""
    digest = admit(cache, "a", b"data")
    age(root, digest, SCRUB_PERIOD)
    assert not cache.keep_house(timeout=0.0).complete
    assert time.time() - cache.namespace("a").stat(digest).verified > SCRUB_PERIOD / 2
    assert cache.keep_house().complete
    assert time.time() - cache.namespace("a").stat(digest).verified < 60


def test_a_round_finishes_the_purge_of_a_process_that_died(root, cache):
    """Its directory is gone, and there is a receipt that says so, once."""
    digest = admit(cache, "a", b"data")
    generation = path_of(root, digest).parents[2]
    slot, _, number = generation.name.partition(".")
    (root / "slots" / slot / f"live.{number}").rename(root / "slots" / slot / f"purging.{number}")
    for _ in range(2):
        cache.keep_house()
        end = time.monotonic() + 10
        while list(root.glob("data/*")) + list(root.glob("trash/*")) and time.monotonic() < end:
            time.sleep(0.01)
    assert not list(root.glob("data/*")) + list(root.glob("trash/*"))
    assert [receipt.level for receipt in cache.receipts()] == ["unlinked"]


def test_the_command_does_a_round(root, cache, capsys):
    """Exit 4 says that something was damaged."""
    digest = admit(cache, "a", b"data")
    age(root, digest, SCRUB_PERIOD)
    path_of(root, digest).write_bytes(b"DATA")
    assert main(["janitor", "--root", str(root), "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert [finding["digest"] for finding in document["findings"]] == [str(digest)]
    assert main(["janitor", "--root", str(root), "--json", "--timeout", "5"]) == 0
    assert json.loads(capsys.readouterr().out) == {"swept": 0, "evicted": 0, "findings": [], "complete": True}


def test_a_cache_keeps_house_unless_told_not_to(root):
    """The thread lives as long as the cache is open."""
    with LayerCache(root):
        assert "layercache-janitor" in {thread.name for thread in threading.enumerate()}
    assert "layercache-janitor" not in {thread.name for thread in threading.enumerate()}
    with LayerCache(root, janitor=False):
        assert "layercache-janitor" not in {thread.name for thread in threading.enumerate()}
