"""Purges: their deadline, who is named as a holder, what resists, and what receipts say, forged ones too."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import jsonschema
import pytest

from layercache import LayerCache
from layercache.errors import NamespacePurgedError, StoreError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Generation, NamespaceName, Receipt, Store, _errand, _kernel, _purge
from layercache.store._chain import Chain
from layercache.store._disk import PosixDisk
from layercache.store._erase import erase
from layercache.store._files import lock_within
from layercache.store._layout import slot_name

NAME = NamespaceName("acme/endpoint-7")
T = TypeVar("T")
SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "receipt.schema.json").read_text())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root):
    store = Store(root)
    yield store
    store.close()


@pytest.fixture
def unhurried(monkeypatch):
    """Let the caller stay until what is reached is recorded: here others have the disk, too."""
    monkeypatch.setattr(_errand, "_GRACE", 60.0)
    monkeypatch.setattr(_errand, "_TOLD", 61.0)


def put(store: Store, data: bytes, name: NamespaceName = NAME) -> Descriptor:
    """Store a blob in a namespace, made if it is not there."""
    generation = living(store, name)
    descriptor = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
    ingest = generation.begin(descriptor)
    assert ingest is not None
    with ingest:
        ingest.feed(data)
        ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="test").close()
    generation.close()
    return descriptor


def living(store: Store, name: NamespaceName = NAME) -> Generation:
    generation = store.generation(name, create=True)
    assert generation is not None
    return generation


def blob_file(root: Path, descriptor: Descriptor) -> Path:
    return next(root.glob(f"data/*/blobs/*/{descriptor.digest.encoded}"))


def until_gone(root: Path) -> None:
    """Wait until the trash is empty."""
    until(lambda: list(root.glob("trash/*")), lambda left: not left)


def until(look: Callable[[], T], wanted: Callable[[T], bool], seconds: float = 30.0) -> T:
    """Look until what is seen is wanted; return it."""
    end = time.monotonic() + seconds
    while not wanted(seen := look()):
        assert time.monotonic() < end, f"it stays at {seen}"
        time.sleep(0.01)
    return seen


def test_a_beginning_that_failed_goes_with_its_namespace(store, root):
    put(store, b"bytes")
    generation = next(root.glob("data/*")).name
    neighbour = root / "trash" / f"{'0' * 40}.1.1f"
    for place in (root / "trash" / f"{generation}.1f", root / "trash" / f"{generation}1.1f", neighbour):
        place.mkdir()
        (place / "name").write_text(str(NAME))
    receipt = store.purge(NAME, wait=5)
    assert receipt.level == "unlinked"
    assert {path.name for path in root.glob("trash/*")} == {f"{generation}1.1f", neighbour.name}


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_a_purge_returns_by_its_deadline_whatever_readers_do(store, root, wait):
    """With a reader that does not let go the call is over soon after the wait, and the reader is cut off.

    It is a tenth of a second after the fence, where nobody else has the machine: ``python -m bench.purge`` measures
    that. Here other tests have it too; the reader would stay for ever.
    """
    descriptor = put(store, b"data")
    generation = living(store)
    blob = generation.open(descriptor.digest)

    began = time.monotonic()
    receipt = store.purge(NAME, wait=wait)

    assert time.monotonic() - began < wait + 5.0
    assert (receipt.level, receipt.complete) == ("fenced", False)
    with pytest.raises(NamespacePurgedError):
        blob.pread(0, 1)
    blob.close()
    until_gone(root)


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_readers_of_this_library_are_named_without_a_look_at_every_process(store, monkeypatch, wait):
    """Where that look takes longer than the caller waits, whoever holds a lock is named all the same."""
    let_go = threading.Event()
    descriptor = put(store, b"data")

    def slow(device, but=-1):
        assert let_go.wait(30)
        return {}

    monkeypatch.setattr("layercache.store._proc.openers", slow)
    monkeypatch.setattr(_errand, "_GRACE", 1.0)  # a busy disk takes its time to get as far as a look
    monkeypatch.setattr(_errand, "_TOLD", 2.0)
    generation = living(store)
    with generation.open(descriptor.digest):
        receipt = store.purge(NAME, wait=wait)
        assert (receipt.level, receipt.pending, receipt.unseen) == ("fenced", (os.getpid(),), 0)
    let_go.set()
    generation.close()


def test_the_rest_of_a_purge_goes_on_beside_the_caller(store, root, unhurried):
    """Nobody has to ask again: when the last reader lets go the files go, with a further receipt of the same purge."""
    descriptor = put(store, b"data")
    blob = living(store).open(descriptor.digest)
    store.purge(NAME, wait=0.0)

    blob.close()
    until_gone(root)
    store.close()  # waits for what goes on

    with_next = Store(root)
    found = [(one.generation, one.level, one.pending) for one in with_next.receipts()]
    assert found == [(1, "fenced", (os.getpid(),)), (1, "unlinked", ())]
    assert with_next.verify_receipts().problems == ()
    with_next.close()


def test_a_long_system_call_does_not_hold_the_caller(store, root, monkeypatch):
    """An unlink that does not come back: the caller goes, with a receipt that is not in the chain yet."""
    put(store, b"data")
    remove, begun, come_back = type(store._disk).remove, threading.Event(), threading.Event()

    def slow(self, at, name):
        begun.set()
        assert come_back.wait(30)
        remove(self, at, name)

    # The clock of the purge stands until the unlink has begun: who comes to it later, on a busy machine, does not begin
    # it at all but records what is reached.
    began, elapsed = time.monotonic(), type(store._disk).elapsed
    monkeypatch.setattr(type(store._disk), "elapsed", lambda self: elapsed(self) if begun.is_set() else began)
    monkeypatch.setattr(type(store._disk), "remove", slow)
    receipt = store.purge(NAME, wait=0.1)

    assert (receipt.level, receipt.number) == ("fenced", 0)
    come_back.set()
    until_gone(root)


def _impatient(lock, disk, file, **_):
    lock(disk, file, patience=0.1)


def test_a_slot_that_somebody_keeps_locked_hinders_no_other_purge(store, root, monkeypatch):
    """That is said when the others are gone; the one it is of lives on."""
    other = NamespaceName("acme/other")
    put(store, b"data")
    put(store, b"data", other)
    with store._slots.locked(slot_name(store._key, NAME), create=False):
        monkeypatch.setattr("layercache.store._slots.lock_within", partial(_impatient, lock_within))
        with pytest.raises(StoreError, match="lock"):
            store.purge_all([NAME, other], wait=30.0)
    assert store.generation(other, create=False) is None
    assert living(store).has(Digest.of(b"data"))


HOLDER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "mapped":
    held = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_holder_that_knows_nothing_of_locks_is_named(store, root, how, unhurried):
    """A process that just opened or mapped the file, past the library, keeps the purge pending; then it ends."""
    path = blob_file(root, put(store, b"data"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "ready\n"
        receipt = store.purge(NAME, wait=0.0)
        assert (receipt.level, receipt.pending, receipt.unseen) == ("fenced", (holder.pid,), 0)
        holder.communicate()
    assert store.purge(NAME).complete


def test_a_holder_nobody_can_see_is_counted(store, root, monkeypatch, unhurried):
    """In another pid namespace /proc shows nothing, but the kernel refuses the lease."""
    path = blob_file(root, put(store, b"data"))
    monkeypatch.setattr("layercache.store._proc.openers", lambda device, but=-1: {})
    with path.open("rb"):
        receipt = store.purge(NAME, wait=0.0)
        assert (receipt.level, receipt.pending, receipt.unseen) == ("fenced", (), 1)
    until_gone(root)


def test_without_leases_locks_and_a_look_decide(store, root, monkeypatch, unhurried):
    """Where the kernel gives this process no lease the receipt says what vouches instead; holders still count."""

    def refused(fd):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(_kernel, "write_lease", refused)
    path = blob_file(root, put(store, b"data"))
    with path.open("rb"):
        assert store.purge(NAME, wait=0.0).pending == (os.getpid(),)
    receipt = store.purge(NAME)
    assert (receipt.level, receipt.proof) == ("unlinked", "scan")


def test_who_opens_a_leased_file_does_not_kill_the_purger(tmp_path):
    """The kernel tells the holder of a lease with a signal that is ignored by whoever does not expect it."""
    path = tmp_path / "f"
    path.write_bytes(b"x")
    program = f"""
import os
from layercache.store import _kernel
fd = os.open({str(path)!r}, os.O_RDONLY)
assert _kernel.write_lease(fd)
try:
    os.open({str(path)!r}, os.O_RDONLY | os.O_NONBLOCK)
except BlockingIOError:
    print("lived")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "lived\n")
    assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL


def test_two_purgers_empty_one_after_the_other(store, root, monkeypatch):
    """Who comes second waits: every blob is counted in one receipt, and neither takes the other for a holder."""
    for number in range(3):
        put(store, f"data {number}".encode())
    entered, go_on = threading.Event(), threading.Event()

    def slow(*args, **options):
        monkeypatch.undo()
        entered.set()
        assert go_on.wait(30)
        return erase(*args, **options)

    monkeypatch.setattr(_purge, "erase", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.purge, NAME, wait=30.0)
        assert entered.wait(30)
        other = Store(root)
        second = other.purge(NAME, wait=0.1)
        go_on.set()
        assert (first.result().level, first.result().blobs, first.result().resumed) == ("unlinked", 3, False)
    other.close()
    assert (second.level, second.blobs, second.pending, second.unseen) == ("fenced", 0, (), 0)
    assert sum(receipt.blobs for receipt in store.receipts()) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file immutable")
def test_one_stubborn_file_delays_only_itself(store, root, unhurried):
    """An immutable file stays and is counted by its error, everything else goes; later it goes too."""
    stubborn = blob_file(root, put(store, b"stubborn"))
    for number in range(20):
        put(store, f"other {number}".encode())
    if subprocess.run(["chattr", "+i", stubborn], capture_output=True).returncode:
        pytest.skip("no immutable files here")
    moved = root / "trash" / stubborn.relative_to(root / "data")
    try:
        receipt = store.purge(NAME, wait=0.0)
        assert (receipt.level, receipt.failed, receipt.blobs) == ("fenced", {"EPERM": 1}, 20)
        assert [path.name for path in root.glob("trash/*/blobs/*/*")] == [stubborn.name]
    finally:
        subprocess.run(["chattr", "-i", moved if moved.exists() else stubborn], check=True)
    until_gone(root)


def test_a_second_name_from_outside_is_told(store, root, tmp_path):
    """Our name goes; that another one leads to the bytes is in the receipt."""
    path = blob_file(root, put(store, b"data"))
    os.link(path, tmp_path / "copy")
    receipt = store.purge(NAME)
    assert (receipt.level, receipt.elsewhere) == ("unlinked", 1)


def test_an_idle_handle_holds_nothing_up(store):
    """A process that has the namespace open, its word mapped, and reads nothing is no holder."""
    put(store, b"data")
    generation = living(store)
    assert store.purge(NAME).complete
    with pytest.raises(NamespacePurgedError):
        generation.check()
    generation.close()


def test_a_new_generation_begins_while_the_old_one_is_emptied(store, root):
    """A tenant is not held up by his own old readers."""
    blob = living(store).open(put(store, b"data").digest)
    store.purge(NAME, wait=0.0)
    anew = living(store)
    assert anew.generation == 2
    assert list(anew.digests()) == []
    anew.close()
    blob.close()
    until_gone(root)


def test_purges_of_many_are_fenced_before_any_is_waited_for(root, unhurried):
    """One receipt each, in one wait; other tenants stay."""
    with LayerCache(root, janitor=False) as cache:
        for name in ("acme/1", "acme/2", "other/1"):
            put(cache.store(), name.encode(), NamespaceName(name))
        held = living(cache.store(), NamespaceName("acme/1"))
        blob = held.open(Digest.of(b"acme/1"))
        receipts = cache.purge_matching("acme/*", wait=0.0)
        assert {name: receipt.level for name, receipt in receipts.items()} == {"acme/1": "fenced", "acme/2": "unlinked"}
        assert [info.name for info in cache.namespaces() if info.blobs] == ["other/1"]
        blob.close()
        held.close()
        cache.resume_purges()
        assert not list(root.glob("trash/*"))
        assert cache.verify_receipts().problems == ()


def test_a_trim_waits_for_nobody(store, root, monkeypatch, unhurried):
    """Once for all that have ended, at the latest after the deadline, whoever keeps others from ending."""
    trims: list[int] = []

    def trim(self):
        trims.append(1)
        return 4096

    monkeypatch.setattr(type(store._disk), "trim", trim)
    names = [NamespaceName(name) for name in ("acme/1", "acme/2", "acme/3")]
    for name in names:
        descriptor = put(store, name.text.encode(), name)
    held = living(store, names[2])
    blob = held.open(descriptor.digest)

    receipts = store.purge_all(names, wait=0.2, trim=True)
    assert receipts[2].level == "fenced"
    levels = until(lambda: [one.level for one in store.receipts()], lambda levels: levels.count("discarded") == 2)
    assert sorted(levels) == ["discarded", "discarded", "fenced", "unlinked", "unlinked"]
    assert len(trims) == 1
    blob.close()
    held.close()
    levels = until(lambda: [one.level for one in store.receipts()], lambda levels: levels.count("discarded") == 3)
    assert (len(levels), len(trims)) == (7, 2)
    assert store.verify_receipts().problems == ()


def test_a_second_trim_of_the_same_purge_is_no_second_receipt(store):
    """Two calls wait for one purge, and both trim when it has ended: ext4 then has nothing left to hand over."""
    receipt = Receipt("0" * 64, 1, "discarded", trimmed=4096)
    first = store._chain.append(receipt)

    assert store._chain.append(replace(receipt, trimmed=0)) == first
    assert store._chain.append(replace(receipt, trimmed=512)) == first
    assert [one.level for one in store.receipts()] == ["discarded"]


def test_a_trim_that_follows_the_end_of_a_key_is_a_receipt_of_its_own(store):
    receipt = Receipt("0" * 64, 1, "crypto-erased")
    store._chain.append(receipt)

    assert store._chain.append(replace(receipt, trimmed=4096)).number == 2
    assert store._chain.append(receipt).ends
    assert len(list(store.receipts())) == 2


@pytest.mark.parametrize(
    ("kind", "options", "granularity"),
    [("btrfs", "rw", 4096), ("ext4", "rw,data=journal", 4096), ("ext4", "rw", 0), ("xfs", "rw", 1 << 20)],
)
def test_what_a_trim_cannot_vouch_for_stays_unlinked(store, monkeypatch, kind, options, granularity):
    """Old extents, a journal with data, a device that discards nothing or in pieces: nothing more is claimed."""
    monkeypatch.setattr(_kernel, "filesystem_of", lambda fd: (kind, frozenset(options.split(","))))
    monkeypatch.setattr(_kernel, "_discard_granularity", lambda fd: granularity)
    put(store, b"data")
    receipt = store.purge(NAME, trim=True)
    assert (receipt.level, receipt.trimmed, receipt.complete) == ("unlinked", 0, True)
    assert [one.level for one in store.receipts()] == ["unlinked"]


def test_resuming_with_nothing_left_is_nothing(store):
    """No purge, no receipt."""
    assert store.resume_purges() == []


def test_the_word_is_written_not_stored(store, root):
    """The mapping cannot be written through: on a full disk that would kill the process."""
    generation = living(store)
    with pytest.raises(TypeError):
        generation._word._view[0] = 1  # type: ignore[attr-defined]
    generation.close()


# -- receipts


@pytest.fixture
def chain(store, root) -> Path:
    """Return the segment of a chain of four receipts."""
    for _ in range(4):
        put(store, b"data")
        assert store.purge(NAME).complete
    return Path(next(root.glob("receipts/segment.*")))


def lines_of(segment: Path) -> list[bytes]:
    return segment.read_bytes().split(b"\0", 1)[0].splitlines(keepends=True)


def replace_lines(segment: Path, lines: list[bytes]) -> None:
    raw = segment.read_bytes()
    old = b"".join(lines_of(segment))
    new = b"".join(lines)
    with segment.open("r+b") as file:
        file.write(new.ljust(len(old), b"\0") if len(new) < len(old) else new)
    assert len(raw) == segment.stat().st_size


def test_receipts_fit_the_schema(store, root, chain):
    """What is stored and what is given out are as docs/receipt.schema.json says, and name no tenant."""
    assert store.purge(NAME).generation == 0
    for receipt in [*store.receipts(), store.purge(NAME)]:
        jsonschema.validate(receipt.to_json(), SCHEMA)
    for line in lines_of(chain):
        jsonschema.validate(json.loads(line), SCHEMA)
    assert b"acme" not in chain.read_bytes()
    assert [one.number for one in store.receipts()] == [1, 2, 3, 4]
    assert store.verify_receipts().problems == ()


def test_threads_that_list_one_directory_see_each_name_once(tmp_path):
    """The receipts of a root are listed by whoever records and whoever reads, through one handle."""
    disk = PosixDisk.open_root(tmp_path)
    names = {f"name {number}" for number in range(500)}
    for name in names:
        (tmp_path / name).touch()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: disk.names(disk.root), range(200)):
            assert len(found) == len(names)
            assert set(found) == names
    disk.close(disk.root)


def test_a_record_on_its_way_is_no_problem(store, root, monkeypatch):
    """Who examines the chain between the last rmdir of a purge and its record is told nothing wrong."""
    descriptor = put(store, b"data")
    generation = living(store)
    blob = generation.open(descriptor.digest)
    assert store.purge(NAME, wait=0.0).level == "fenced"
    until(lambda: [one.level for one in store.receipts()], bool)
    append, entered, go_on = Chain.append, threading.Event(), threading.Event()

    def slow(self, receipt):
        entered.set()
        assert go_on.wait(30)
        return append(self, receipt)

    monkeypatch.setattr(Chain, "append", slow)
    blob.close()
    assert entered.wait(30)
    assert not list(root.glob("trash/*"))
    assert store.verify_receipts().problems == ()
    go_on.set()
    generation.close()


@pytest.mark.parametrize("at", range(4))
def test_an_edited_receipt_is_found(store, chain, at):
    """Any one, the last included."""
    lines = lines_of(chain)
    lines[at] = lines[at].replace(b'"blobs":1', b'"blobs":7')
    replace_lines(chain, lines)
    assert store.verify_receipts().problems


@pytest.mark.parametrize("at", range(4))
def test_a_dropped_receipt_is_found(store, chain, at):
    """Any one, the last included."""
    lines = lines_of(chain)
    del lines[at]
    replace_lines(chain, lines)
    assert store.verify_receipts().problems


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 3), (2, 3)])
def test_receipts_that_changed_places_are_found(store, chain, one, other):
    """Their order is part of what they say."""
    lines = lines_of(chain)
    lines[one], lines[other] = lines[other], lines[one]
    replace_lines(chain, lines)
    assert store.verify_receipts().problems


def test_a_chain_that_was_emptied_is_found_by_the_slots(store, root, chain):
    """Ended generations need receipts, whatever the chain says of itself."""
    chain.write_bytes(bytes(1 << 20))
    problems = store.verify_receipts().problems
    assert [problem.split(" of ")[0] for problem in problems] == [f"generation {number}" for number in range(1, 5)]


def test_a_chain_written_anew_is_found_by_a_hash_kept_elsewhere(store, root, chain):
    """Who can write the root can make it whole again, but not to contain that hash."""
    kept = store.verify_receipts().last
    assert store.verify_receipts(after=kept).problems == ()
    lines, previous = [], ""
    from layercache.store._receipts import line_hash, parse_line, to_line

    for number, line in enumerate(lines_of(chain), 1):
        forged = to_line(Receipt(**{**parse_line(line.rstrip(), number).to_json(), "blobs": 9, "previous": previous}))
        previous = line_hash(forged.rstrip())
        lines.append(forged)
    raw = b"".join(lines).ljust((1 << 20) - 4096, b"\0") + json.dumps({"count": 4, "last": previous}).encode()
    chain.write_bytes(raw.ljust(1 << 20, b"\0"))
    assert store.verify_receipts().problems == ()
    assert store.verify_receipts(after=kept).problems == ("the receipt of the given hash is not there",)


def test_a_full_segment_rolls_over_into_one_made_beforehand(store, root, monkeypatch):
    """The chain goes on in the next file; the next is there before it is needed."""
    from layercache.store import _chain

    monkeypatch.setattr(_chain, "_SEGMENT", 8192)
    monkeypatch.setattr(_chain, "_ROOM", 4096)
    receipt = Receipt(slot="0" * 40, generation=1, level="fenced")
    for _ in range(10):
        store._chain.append(receipt)
        names = sorted(path.name for path in root.glob("receipts/segment.*"))
    assert names[:2] == ["segment.000001", "segment.000002"]
    assert [one.number for one in store.receipts()] == list(range(1, 11))


def test_a_stopped_process_at_the_receipts_delays_the_record_only(store, root):
    """The caller is not held; what was not recorded is, later."""
    put(store, b"data")
    fd = os.open(root / "receipts" / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    receipt = store.purge(NAME, wait=0.1)
    assert (receipt.level, receipt.number) == ("fenced", 0)
    os.close(fd)
    until(lambda: list(store.receipts()), bool)


def test_a_mapping_of_the_caller_himself_is_pending(store, root, unhurried):
    """fileno() handles that were mapped hold as well, after they were closed."""
    path = blob_file(root, put(store, b"data"))
    fd = os.open(path, os.O_RDONLY)
    view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    assert store.purge(NAME, wait=0.0).pending == (os.getpid(),)
    view.close()
    until_gone(root)
