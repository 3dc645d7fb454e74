"""Room: what a root may take, what it takes, and that the first is never less than the second."""

import errno
import io
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from layercache import Descriptor, Digest, LayerCache, Namespace
from layercache.errors import InvalidError, NoSpaceError, NotFoundError
from layercache.oci import OCTET_STREAM
from layercache.store import Amount, Budget, Generation, NamespaceName, Store
from layercache.store import _space as space_room
from layercache.store._disk import PosixDisk, Room

MIB = 1 << 20
NAME = NamespaceName("acme/endpoint-7")


def described(data: bytes) -> Descriptor:
    return Descriptor(OCTET_STREAM, Digest.of(data), len(data))


def content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def taken(root: Path) -> int:
    """What ``du`` says of a root, with files that go meanwhile passed over."""
    total = 0
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            try:
                total += (Path(folder) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def opened(root: Path, budget: int | str, **options) -> LayerCache:
    return LayerCache(root, budget=budget, keep_free=options.pop("keep_free", 0), janitor=False, **options)


def tidy(cache: LayerCache) -> int:
    evictor = cache.store().evictor
    assert evictor is not None
    return evictor.tidy()


def admit(namespace: Namespace, data: bytes) -> Digest:
    return namespace.admit(described(data), io.BytesIO(data)).digest


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (12, 12),
        ("12", 12),
        ("1k", 1024),
        ("1.5 GiB", 3 << 29),
        ("200GiB", 200 << 30),
        ("2 GB", 2 * 10**9),
        ("80%", 800),
        ("0%", 0),
        ("100%", 1000),
        ("3T", 3 << 40),
    ],
)
def test_an_amount_is_said_in_units_or_as_a_share(text, size):
    """Binary units by default and with an i, decimal ones with a b, and a share of the filesystem."""
    assert Amount.parse(text).of(1000) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", -1, "101%", "1 furlong", "1e9", 1.5, None, True, "1 GiB 2", "0x10"])
def test_what_is_no_amount_is_refused(text):
    """Nothing is guessed."""
    with pytest.raises(InvalidError):
        Amount.parse(text)


def test_a_wrong_budget_is_an_error_before_anything_is_made(tmp_path):
    """The arguments of the cache are checked first."""
    for wrong in ({"budget": "lots"}, {"watermarks": (0.5, 0.9)}, {"policy": "best"}, {"keep_free": "some"}):
        with pytest.raises(InvalidError):
            LayerCache(tmp_path / "root", **wrong)
    assert not (tmp_path / "root").exists()


def test_without_a_budget_most_of_the_filesystem_may_be_used():
    """80 %, and 5 % left free, of which 10 GiB are enough on a large disk."""
    small = Budget().limits(Room(1000, 500, 200, 100))
    assert (small.most, small.floor, small.floor_inodes) == (800, 50, 2)
    assert Budget().limits(Room(1 << 50, 0, 0, 0)).floor == 10 << 30


def test_a_budget_is_remembered_for_those_who_give_none(root):
    """A command of the operator evicts by what the runtime was told."""
    opened(root, "64MiB", policy="lru").close()

    with LayerCache(root, janitor=False) as cache:
        limits = cache.store().limits

    assert limits is not None
    assert (limits.most, limits.policy, limits.floor) == (64 * MIB, "lru", 0)
    with opened(root, "32MiB") as cache:
        limits = cache.store().limits
        assert limits is not None
        assert limits.most == 32 * MIB


def test_a_disk_that_cannot_remember_the_budget_is_used_all_the_same(root, monkeypatch):
    """Neither a new budget nor a quota that cannot be written keeps anybody out."""
    with opened(root, 64 * MIB) as cache:
        digest = admit(cache.namespace("a"), content(MIB, 1))
    real = PosixDisk.rename

    def rename(self, at, name, to, new, *, replace):
        if new in ("budget", "quota"):
            raise OSError(errno.ENOSPC, "no space")
        real(self, at, name, to, new, replace=replace)

    monkeypatch.setattr(PosixDisk, "rename", rename)
    with opened(root, 32 * MIB) as cache:
        assert cache.namespace("a", quota="1MiB").contains(digest)
        limits = cache.store().limits
        assert limits is not None
        assert limits.most == 32 * MIB


def test_what_does_not_fit_pushes_out_what_was_not_used_for_longest(root):
    """A full root takes new blobs; the ones in use lately stay."""
    with opened(root, 24 * MIB, policy="lru") as cache:
        namespace = cache.namespace("a")
        digests = [admit(namespace, content(2 * MIB, seed)) for seed in range(6)]
        namespace.open(digests[0]).close()
        for seed in range(6, 10):
            digests.append(admit(namespace, content(2 * MIB, seed)))
            assert taken(root) <= 24 * MIB

        here = [namespace.contains(digest) for digest in digests]

    assert here[0]
    assert here[-1]
    assert not all(here)
    assert not here[1]


def test_a_blob_that_cannot_fit_is_refused_and_pushes_nothing_out(root):
    """One larger than the budget costs nobody anything."""
    with opened(root, 16 * MIB) as cache:
        namespace = cache.namespace("a")
        small = admit(namespace, content(MIB, 1))

        with pytest.raises(NoSpaceError):
            admit(namespace, content(20 * MIB, 2))

        assert namespace.contains(small)
        assert taken(root) <= 16 * MIB


def test_an_open_blob_is_never_evicted(root):
    """What is leased stays, all else goes; where only leased blobs are left, the new one is refused."""
    with opened(root, 16 * MIB) as cache:
        namespace = cache.namespace("a")
        held = [namespace.open(admit(namespace, content(3 * MIB, seed))) for seed in range(2)]
        for seed in range(2, 6):
            admit(namespace, content(2 * MIB, seed))
        with pytest.raises(NoSpaceError):
            admit(namespace, content(6 * MIB, 7))
        for layer in held:
            assert b"".join(bytes(piece) for piece in layer.compressed().chunks())[:0] == b""
            assert namespace.contains(layer.digest)
            layer.close()
        time.sleep(1.1)
        assert namespace.contains(admit(namespace, content(6 * MIB, 7)))
        assert taken(root) <= 16 * MIB


def test_what_was_moved_aside_goes_first(root):
    """Damaged content takes room that sound content needs."""
    with opened(root, 20 * MIB) as cache:
        namespace = cache.namespace("a")
        digest = admit(namespace, content(6 * MIB, 1))
        (path,) = root.glob(f"data/*/blobs/*/{digest.encoded}")
        with path.open("r+b") as file:
            file.write(b"rot")
        assert list(namespace.verify())
        other = admit(namespace, content(5 * MIB, 2))

        new = admit(namespace, content(5 * MIB, 3))

        assert not list(root.glob("data/*/bad/*"))
        assert namespace.contains(other)
        assert namespace.contains(new)


def test_room_comes_back_when_blobs_and_namespaces_go(root):
    """Removing and purging make room at once; nothing is lost over many rounds."""
    with opened(root, 20 * MIB) as cache:
        for round_ in range(4):
            namespace = cache.namespace("a")
            digest = admit(namespace, content(8 * MIB, round_))
            namespace.remove(digest)
            admit(namespace, content(9 * MIB, round_ + 10))
            assert namespace.purge(wait=5.0).level == "unlinked"
            assert taken(root) <= 20 * MIB


def test_the_count_is_what_a_walk_finds(root):
    """After everything has settled the count and ``du`` differ by what is kept back alone."""
    with opened(root, 64 * MIB) as cache:
        namespace = cache.namespace("a")
        for seed in range(8):
            admit(namespace, content(random.Random(seed).randrange(3 * MIB), seed))
        namespace.remove(next(iter(namespace.blobs())).digest)
        counted = cache.store().space.counted()
        cache.store().recover()
        walked = cache.store().space.counted()

    # The next segment of receipts and the ballast are counted whether they are there or not.
    assert 0 <= walked - taken(root) <= (2 << 20) + (4 << 20)
    assert walked <= counted <= walked + 9 * 128 * 1024


def test_a_partial_keeps_its_room_when_its_writer_goes(root):
    """What a dead writer reserved is counted until it is swept, by the old count and by a new one."""
    data = content(6 * MIB, 1)
    with opened(root, 32 * MIB) as cache:
        generation = cache.store().generation(NAME, create=True)
        assert generation is not None
        before = cache.store().space.count()
        ingest = generation.begin(described(data))
        assert ingest is not None
        ingest.feed(data[: 2 * MIB])
        ingest.suspend()
        counted = cache.store().space.counted()
        again = generation.begin(described(data))
        assert again is not None
        assert cache.store().space.counted() == counted
        assert cache.store().space.count() >= before + 6 * MIB - space_room.GENERATION
        again.abort()
        assert cache.store().space.count() < before + MIB
        generation.close()


def test_a_walk_during_a_removal_is_not_subtracted_from(root, monkeypatch):
    """What a walk has not found any more is given back by the walk alone."""
    with opened(root, 32 * MIB) as cache:
        digest = admit(cache.namespace("a"), content(6 * MIB, 1))
        admit(cache.namespace("a"), content(4 * MIB, 2))
        space, real = cache.store().space, Generation.forget

        def forget(self, name):
            space.count()
            return real(self, name)

        monkeypatch.setattr(Generation, "forget", forget)
        cache.namespace("a").remove(digest)
        monkeypatch.undo()
        assert space.counted() >= space.count()


def test_a_partial_that_goes_while_it_is_taken_over_is_not_made_anew_without_room(root, monkeypatch):
    """Whoever drops it gives its room back; the next attempt takes room of its own."""
    data = content(6 * MIB, 1)
    with opened(root, 32 * MIB) as cache:
        generation = cache.store().generation(NAME, create=True)
        assert generation is not None
        ingest = generation.begin(described(data))
        assert ingest is not None
        ingest.feed(data[: 2 * MIB])
        ingest.suspend()
        (partial,) = root.glob("data/*/in/*.part")
        real = PosixDisk.create

        def create(self, at, name, **options):
            if name == partial.name:
                partial.unlink(missing_ok=True)
            return real(self, at, name, **options)

        monkeypatch.setattr(PosixDisk, "create", create)
        assert generation.begin(described(data)) is None
        monkeypatch.undo()
        before = cache.store().space.count()
        again = generation.begin(described(data))
        assert again is not None
        assert cache.store().space.counted() >= before + 6 * MIB
        again.abort()
        generation.close()


def test_what_is_reserved_counts_where_blocks_cannot_be_taken_beforehand(root, monkeypatch):
    """On a filesystem without ``fallocate`` a walk counts what a partial will take, not what it takes."""
    monkeypatch.setattr(PosixDisk, "reserve", lambda *_: None)
    data = content(6 * MIB, 1)
    with opened(root, 20 * MIB) as cache:
        generation = cache.store().generation(NAME, create=True)
        assert generation is not None
        before = cache.store().space.count()
        ingest = generation.begin(described(data))
        assert ingest is not None
        assert cache.store().space.count() >= before + 6 * MIB - space_room.GENERATION
        with pytest.raises(NoSpaceError):
            generation.begin(described(content(8 * MIB, 2)))
        ingest.abort()
        generation.close()


def test_the_rest_of_the_machine_keeps_its_share(root, monkeypatch):
    """Where others fill the disk, the cache gives way: it evicts for what it takes, and stops where nothing is left."""
    free = [100 * MIB]
    monkeypatch.setattr(PosixDisk, "room", lambda _: Room(1 << 40, free[0] - taken(root), 1000, 1000))
    with opened(root, "1GiB", keep_free=50 * MIB) as cache:
        namespace = cache.namespace("a")
        old = admit(namespace, content(4 * MIB, 1))
        free[0] = 51 * MIB + taken(root)
        new = admit(namespace, content(3 * MIB, 2))

        assert not namespace.contains(old)
        assert namespace.contains(new)
        free[0] = 40 * MIB + taken(root)
        with pytest.raises(NoSpaceError):
            admit(namespace, content(3 * MIB, 3))


def test_inodes_are_left_to_others_too(root, monkeypatch):
    """Where hardly any inode is left, nothing new is begun before something went."""
    inodes = [1000]
    monkeypatch.setattr(PosixDisk, "room", lambda _: Room(1 << 40, 1 << 40, 10_000, inodes[0]))
    with opened(root, "1GiB", keep_free="1%") as cache:
        namespace = cache.namespace("a")
        admit(namespace, content(MIB, 1))
        inodes[0] = 101
        with pytest.raises(NoSpaceError):
            admit(namespace, content(MIB, 2))


def test_who_waited_for_another_to_evict_does_not_evict_again(root):
    """What was wanted is asked for again once it is this one's turn."""
    with opened(root, 64 * MIB) as cache:
        digest = admit(cache.namespace("a"), content(MIB, 1))
        evictor = cache.store().evictor
        assert evictor is not None
        assert evictor.evict(lambda: 0)
        assert cache.namespace("a").contains(digest)
        assert not evictor.evict(lambda: 40 * MIB)
        assert cache.namespace("a").contains(digest)
        assert evictor.evict(lambda: 1)
        assert not cache.namespace("a").contains(digest)


def test_housekeeping_goes_from_the_high_to_the_low_watermark(root):
    """A budget that was lowered is kept to at the next housekeeping."""
    with opened(root, 64 * MIB) as cache:
        for seed in range(10):
            admit(cache.namespace("a"), content(2 * MIB, seed))
    with opened(root, 20 * MIB, watermarks=(0.9, 0.7)) as cache:
        assert tidy(cache) > 0
        assert taken(root) <= 14 * MIB
        assert tidy(cache) == 0


def test_a_namespace_over_its_quota_pays_first_and_one_at_its_floor_does_not_pay(root):
    """Room is made where the quota was passed, and never below a floor."""
    with opened(root, 40 * MIB, policy="lru") as cache:
        modest = cache.namespace("modest", floor=12 * MIB)
        greedy = cache.namespace("greedy", quota=4 * MIB)
        kept = [admit(modest, content(4 * MIB, seed)) for seed in range(2)]
        grabbed = [admit(greedy, content(4 * MIB, seed)) for seed in range(10, 14)]
        other = [admit(cache.namespace("other"), content(4 * MIB, seed)) for seed in range(20, 23)]

        assert all(modest.contains(digest) for digest in kept)
        assert not greedy.contains(grabbed[0])
        assert all(cache.namespace("other").contains(digest) for digest in other)


def test_uses_and_state_survive_a_restart_and_may_be_lost(root):
    """What was used is known to the next process; damaged notes only make the choice worse."""
    with opened(root, 24 * MIB, policy="lru") as cache:
        digests = [admit(cache.namespace("a"), content(2 * MIB, seed)) for seed in range(6)]
    with opened(root, 24 * MIB, policy="lru") as cache:
        cache.namespace("a").open(digests[0]).close()
    assert list(root.glob("data/*/hints"))
    with opened(root, 24 * MIB, policy="lru") as cache:
        for seed in range(6, 10):
            admit(cache.namespace("a"), content(2 * MIB, seed))
        assert cache.namespace("a").contains(digests[0])
        assert not cache.namespace("a").contains(digests[1])
    for path in [*root.glob("data/*/hints"), *root.glob("data/*/policy"), root / "policy", root / "space"]:
        path.write_bytes(os.urandom(200))
    with opened(root, 24 * MIB, policy="lru") as cache:
        for seed in range(20, 26):
            admit(cache.namespace("a"), content(2 * MIB, seed))
            assert taken(root) <= 24 * MIB


def test_what_is_remembered_of_a_namespace_goes_with_it(root):
    """No name of a blob is anywhere in the root after the purge."""
    with opened(root, 24 * MIB) as cache:
        namespace = cache.namespace("a")
        digests = [admit(namespace, content(2 * MIB, seed)) for seed in range(14)]
        assert namespace.purge(wait=5.0).complete
        admit(cache.namespace("b"), content(8 * MIB, 50))
        admit(cache.namespace("b"), content(8 * MIB, 51))
        admit(cache.namespace("b"), content(8 * MIB, 52))
    left = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file() and path.stat().st_size < MIB)
    assert not [digest for digest in digests if digest.encoded.encode() in left]


def test_a_count_of_another_boot_is_not_believed(root, monkeypatch):
    """After a power cut the last words may be lost, so the root is walked over before anything is taken."""
    with opened(root, 24 * MIB) as cache:
        admit(cache.namespace("a"), content(6 * MIB, 1))
    monkeypatch.setattr("layercache.store._proc.boot_id", lambda: "feedfacefeed")
    walked = []
    real = space_room.Space._walk

    def walk(self, lock):
        walked.append(self)
        return real(self, lock)

    monkeypatch.setattr(space_room.Space, "_walk", walk)
    with opened(root, 24 * MIB) as cache:
        admit(cache.namespace("a"), content(MIB, 2))
        assert walked
        assert cache.store().space.counted() >= taken(root)


WRITER = """
import io, random, sys
from layercache import Descriptor, Digest, LayerCache, Namespace
from layercache.errors import InUseError, NotFoundError, StoreError
from layercache.oci import OCTET_STREAM
root, seed, rounds, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
kept = refused = lost = 0
with LayerCache(root, budget=budget, keep_free=0, janitor=False) as cache:
    held = []
    for _ in range(rounds):
        namespace = cache.namespace(rng.choice("abc"))
        number = rng.randrange(60)
        data = random.Random(number).randbytes(random.Random(number).randrange(1, 1 << 20))
        try:
            namespace.admit(Descriptor(OCTET_STREAM, Digest.of(data), len(data)), io.BytesIO(data))
            kept += 1
            if rng.random() < 0.3:
                held.append((namespace, namespace.open(Digest.of(data))))
        except (StoreError, InUseError):
            refused += 1
        except NotFoundError:
            pass  # evicted between the two
        for at, layer in held:
            if not at.contains(layer.digest):
                lost += 1
        while len(held) > 2:
            held.pop(0)[1].close()
        if rng.random() < 0.05:
            try:
                namespace.remove(Digest.of(data))
            except (NotFoundError, InUseError):
                pass
print(kept, refused, lost)
"""


def run_writers(root: Path, *, processes: int, rounds: int, budget: int, kill: bool = False) -> list[tuple[int, ...]]:
    """Let processes fill one budget and watch the disk all the while."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root), str(seed), str(rounds), str(budget)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    most = 0
    rng = random.Random(0)
    while any(writer.poll() is None for writer in writers):
        most = max(most, taken(root))
        if kill and most and rng.random() < 0.02:
            rng.choice(writers).kill()
        time.sleep(0.02)
    outcomes = []
    for writer in writers:
        out = writer.communicate()[0]
        assert kill or writer.returncode == 0
        if writer.returncode == 0:
            outcomes.append(tuple(map(int, out.split())))
    assert most <= budget
    return outcomes


def test_processes_at_the_limit_never_pass_it_and_lose_nothing_that_is_open(root):
    """Four processes put, open and remove at the limit: the disk never holds more, no open blob goes."""
    budget = 20 * MIB
    outcomes = run_writers(root, processes=4, rounds=60, budget=budget)
    assert len(outcomes) == 4
    assert all(lost == 0 and kept > 0 for kept, _, lost in outcomes)
    with opened(root, budget) as cache:
        assert taken(root) <= cache.store().space.counted() <= budget


def test_processes_that_are_killed_leave_a_count_that_is_not_too_low(root):
    """Whoever dies when, what is on disk stays within the budget."""
    budget = 20 * MIB
    run_writers(root, processes=3, rounds=60, budget=budget, kill=True)
    with opened(root, budget) as cache:
        assert cache.store().space.counted() >= taken(root)
        admit(cache.namespace("d"), content(4 * MIB, 99))
        assert taken(root) <= budget


def test_threads_of_one_process_share_one_count(root):
    """The lock excludes threads as it does processes."""
    with opened(root, 20 * MIB) as cache:

        def work(seed: int) -> None:
            for number in range(12):
                try:
                    admit(cache.namespace(str(seed)), content(MIB, seed * 100 + number))
                except NoSpaceError:
                    continue
                assert taken(root) <= 20 * MIB

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert taken(root) <= cache.store().space.counted() <= 20 * MIB


def test_a_store_without_a_budget_counts_nothing(root):
    """No budget, no file to keep."""
    store = Store(root)
    generation = store.generation(NAME, create=True)
    assert generation is not None
    generation.close()
    assert (root / "space").stat().st_size == 0
    assert store.limits is None
    with pytest.raises(NotFoundError):
        generation_of(store).open(Digest.of(b""))
    store.close()


def generation_of(store: Store):
    generation = store.generation(NAME, create=False)
    assert generation is not None
    return generation
