"""The store on a real filesystem: what it keeps, what it refuses, what it gives out."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layercache.errors import (
    FormatError,
    IntegrityError,
    InUseError,
    InvalidNamespaceError,
    NamespacePurgedError,
    NoSpaceError,
    NotFoundError,
    StoreClosedError,
    StoreError,
    UnsafeRootError,
)
from layercache.integrity import CHUNK, FIRST
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Platform, Reference
from layercache.store import Blob, Generation, NamespaceName, Ref, Store, _slots, _store, arrived
from layercache.store import _generation as generation_room
from layercache.store._disk import PosixDisk

NAME = NamespaceName("acme/endpoint-7")


def described(data: bytes) -> Descriptor:
    return Descriptor(OCTET_STREAM, Digest.of(data), len(data))


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def put(generation: Generation, data: bytes) -> Descriptor:
    descriptor = described(data)
    ingest = generation.begin(descriptor)
    assert ingest is not None
    ingest.feed(data)
    ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="test").close()
    return descriptor


def living(store: Store, name: NamespaceName = NAME, *, create: bool = True) -> Generation:
    generation = store.generation(name, create=create)
    assert generation is not None
    return generation


def bad_range(error: IntegrityError) -> range:
    assert error.offset is not None
    assert error.length is not None
    return range(error.offset, error.offset + error.length)


def read(blob: Blob) -> bytes:
    return b"".join(bytes(piece) for piece in blob.chunks())


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def blob_file(root: Path, descriptor: Descriptor) -> Path:
    (found,) = root.glob(f"data/*/blobs/*/{descriptor.digest.encoded}")
    return found


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    opened = Store(root)
    yield opened
    opened.close()


@pytest.fixture
def generation(store: Store) -> Iterator[Generation]:
    made = living(store)
    yield made
    made.close()


# -- what goes in comes out


@pytest.mark.parametrize("size", [0, 1, FIRST, FIRST + 1, CHUNK, CHUNK + 1, 9 * CHUNK + 5])
def test_a_blob_comes_out_as_it_went_in(generation, size):
    """Sequential and random reads give the bytes that were fed, for every shape of chunk table."""
    data = content(size)
    descriptor = put(generation, data)

    with generation.open(descriptor.digest) as blob:
        assert read(blob) == data
        for offset, length in [(0, size), (size // 2, 100), (FIRST - 1, 2), (CHUNK - 1, 2), (size, 5), (0, 0)]:
            assert blob.pread(offset, length) == data[offset : offset + length]
        blob.verify()


def test_a_blob_survives_closing_the_store(root):
    """What was committed is there for the next process."""
    first = Store(root)
    made = living(first)
    descriptor = put(made, b"hello")
    made.close()
    first.close()

    second = Store(root)
    again = living(second, create=False)
    with again.open(descriptor.digest) as blob:
        assert read(blob) == b"hello"
        assert blob.meta.origin == "test"
    again.close()
    second.close()


def test_an_absent_blob_is_not_found(generation):
    """Only absence is a miss."""
    with pytest.raises(NotFoundError):
        generation.open(Digest.of(b"never"))


def test_wrong_content_leaves_nothing_behind(root, generation):
    """A digest that does not match is an error, and no file of it stays."""
    before = files(root)
    ingest = generation.begin(described(b"right"))
    ingest.feed(b"wrong")

    with pytest.raises(IntegrityError):
        ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="test")
    assert files(root) == before
    assert list(generation.digests()) == []


def test_too_many_bytes_are_refused_at_once(root, generation):
    """The byte after the size ends the ingest before it is written."""
    before = files(root)
    ingest = generation.begin(described(b"right"))

    with pytest.raises(IntegrityError):
        ingest.feed(b"right!")
    assert files(root) == before


def test_an_unfinished_blob_is_invisible(generation):
    """Nothing is readable before commit."""
    data = content(CHUNK)
    ingest = generation.begin(described(data))
    ingest.feed(data)

    with pytest.raises(NotFoundError):
        generation.open(Digest.of(data))
    assert list(generation.digests()) == []
    ingest.abort()


def test_files_are_private(root, generation):
    """Directories are 0700 and files 0600, whatever the umask."""
    put(generation, content(5 * CHUNK))

    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {0o600}


# -- one writer


def test_one_digest_has_one_writer(generation):
    """While one writes, nobody else gets the right; afterwards the blob is there."""
    data = content(100)
    first = generation.begin(described(data))

    assert generation.begin(described(data)) is None
    first.feed(data)
    first.commit(media_type=OCTET_STREAM, diff_id=None, origin="test").close()
    assert generation.begin(described(data)) is None
    assert generation.has(Digest.of(data))


def test_an_interrupted_blob_goes_on_where_it_stopped(root, generation):
    """What was written is kept by whole chunks, and only what is missing is fed again."""
    data = content(7 * CHUNK + 11)
    first = generation.begin(described(data))
    first.feed(data[: 5 * CHUNK + 1000])
    assert arrived(generation, described(data)) == 5 * CHUNK + 1000
    first.suspend()

    second = generation.begin(described(data))
    assert second.offset == 5 * CHUNK
    second.feed(data[second.offset :])
    with second.commit(media_type=OCTET_STREAM, diff_id=None, origin="test") as blob:
        assert read(blob) == data
    assert not list(root.glob("data/*/in/*"))


def test_a_damaged_partial_is_taken_up_to_the_damage(root, generation):
    """A chunk that does not match its sum, and all after it, is fetched again."""
    data = content(6 * CHUNK)
    first = generation.begin(described(data))
    first.feed(data[: 5 * CHUNK])
    first.suspend()
    (partial,) = root.glob("data/*/in/*.part")
    with partial.open("r+b") as file:
        file.seek(2 * CHUNK + 17)
        file.write(b"\xff\x00\xff")

    second = generation.begin(described(data))

    assert second.offset == 2 * CHUNK
    second.abort()
    assert not list(root.glob("data/*/in/*"))


def test_a_partial_of_another_size_is_not_taken_up(generation):
    """A partial is bound to the size it will have: two descriptors of one digest never share bytes."""
    data = content(6 * CHUNK)
    first = generation.begin(described(data))
    first.feed(data[: 5 * CHUNK])
    first.suspend()

    other = generation.begin(Descriptor(OCTET_STREAM, Digest.of(data), len(data) + 1))

    assert other.offset == 0
    other.abort()


def test_a_full_disk_is_found_out_before_the_first_byte(generation, monkeypatch, root):
    """Space for all of a blob is taken when it begins."""

    def full(self, file, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PosixDisk, "reserve", full)
    before = files(root)

    with pytest.raises(NoSpaceError):
        generation.begin(described(content(CHUNK)))
    assert files(root) == before


@pytest.mark.parametrize("verb", ["write", "sync", "rename"])
def test_a_failing_disk_makes_nothing_visible(generation, monkeypatch, root, verb):
    """An error while writing, syncing or publishing drops the file and is typed."""
    data = content(CHUNK)
    before = files(root)
    ingest = generation.begin(described(data))

    def fail(self, *args, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(PosixDisk, verb, fail)
        with pytest.raises(StoreError):  # noqa: PT012 - one of the two fails, by the verb
            ingest.feed(data)
            ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="test")

    assert [name for name in files(root) if "/blobs/" in name or "/in/" in name] == []
    assert set(before) <= set(files(root))
    assert put(generation, data).digest == Digest.of(data)


def test_what_others_may_have_is_not_taken_back(generation, monkeypatch):
    """A lease that fails after the publication is an error for who asked; what is published stays, whole."""
    data = content(5000)
    lock, shared = PosixDisk.lock, []

    def failing(self, at, *, exclusive):
        held = lock(self, at, exclusive=exclusive)
        if not exclusive and Path(f"/proc/self/fd/{at.fd}").readlink().name == described(data).digest.encoded:
            shared.append(at)
            if len(shared) == 2:  # the writer's first, then the reader's
                raise OSError(errno.EIO, "lock")
        return held

    with monkeypatch.context() as patch:
        patch.setattr(PosixDisk, "lock", failing)
        with pytest.raises(StoreError, match="publish"):
            put(generation, data)
    with generation.open(described(data).digest) as blob:
        assert read(blob) == data


def test_a_disk_that_keeps_failing_is_left_alone_for_a_while(store, generation, monkeypatch):
    """After three failures in a row writes are refused untouched, reads go on, and a success ends it."""
    kept = put(generation, b"kept")
    clock = [1000.0]
    monkeypatch.setattr(store._health, "_now", lambda: clock[0])
    touched = []

    def fail(self, *args, **options):
        touched.append(args)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(PosixDisk, "sync", fail)
        for seed in range(3):
            assert not store.failing
            with pytest.raises(StoreError):
                put(generation, content(100, seed))
        assert store.failing
        patch.setattr(PosixDisk, "create", fail)
        touched.clear()
        with pytest.raises(StoreError, match="left alone"):
            put(generation, b"new")
        assert touched == []
        with generation.open(kept.digest) as blob:
            assert read(blob) == b"kept"
        clock[0] += 6
        with pytest.raises(StoreError):
            put(generation, b"new")
        assert touched
        clock[0] += 6
        assert store.failing  # twice as long as before

    clock[0] += 6
    put(generation, b"new")
    assert not store.failing
    with monkeypatch.context() as patch:
        patch.setattr(PosixDisk, "sync", fail)
        with pytest.raises(StoreError):
            put(generation, b"newer")
    assert not store.failing  # counted from the beginning again


def test_a_full_disk_is_not_a_failing_disk(store, generation, monkeypatch):
    """Running out of space is not the device's failure."""

    def full(self, file, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PosixDisk, "reserve", full)
    for _ in range(5):
        with pytest.raises(NoSpaceError):
            generation.begin(described(content(CHUNK)))
    assert not store.failing


# -- damage


@pytest.mark.parametrize("offset", [0, FIRST, CHUNK - 1, CHUNK, 5 * CHUNK + 3])
def test_a_flipped_bit_is_an_error_on_its_chunk(root, generation, offset):
    """Chunks before the damage are given out, the damaged one never, and its place is named."""
    data = content(6 * CHUNK)
    descriptor = put(generation, data)
    blob = generation.open(descriptor.digest)
    with blob_file(root, descriptor).open("r+b") as file:
        file.seek(offset)
        file.write(bytes([data[offset] ^ 1]))

    got = b""
    with pytest.raises(IntegrityError) as caught:  # noqa: PT012 - what came before it counts too
        for piece in blob.chunks():
            got += bytes(piece)
    assert data.startswith(got)
    assert offset in bad_range(caught.value)
    with pytest.raises(IntegrityError):
        blob.pread(offset, 1)
    blob.close()


def test_damage_makes_a_miss_and_can_be_put_again(root, generation):
    """A damaged blob is moved aside: not there, and never taken for present; its neighbours stay."""
    data, neighbour = content(CHUNK), put(generation, b"neighbour")
    descriptor = put(generation, data)
    with blob_file(root, descriptor).open("r+b") as file:
        file.write(b"XX")
    with generation.open(descriptor.digest) as blob, pytest.raises(IntegrityError):
        read(blob)

    with pytest.raises(NotFoundError):
        generation.open(descriptor.digest)
    assert len(list(root.glob("data/*/bad/*"))) == 1
    put(generation, data)
    with generation.open(descriptor.digest) as blob, generation.open(neighbour.digest) as other:
        assert read(blob) == data
        assert read(other) == b"neighbour"


@pytest.mark.parametrize("damage", ["truncate", "grow", "no meta", "meta of another", "meta garbage", "other blob"])
def test_a_blob_whose_record_does_not_fit_is_a_miss(root, generation, damage):
    """Data without a record of its own digest and size is never served."""
    descriptor, other = put(generation, content(CHUNK, 1)), put(generation, content(CHUNK, 2))
    path = blob_file(root, descriptor)
    meta = Path(str(path).replace("/blobs/", "/meta/"))
    match damage:
        case "truncate":
            os.truncate(path, 100)
        case "grow":
            os.truncate(path, CHUNK + 1)
        case "no meta":
            meta.unlink()
        case "meta of another":
            shutil.copy(str(blob_file(root, other)).replace("/blobs/", "/meta/"), meta)
        case "meta garbage":
            meta.write_bytes(b"LCmeta1\n" + bytes(100))
        case "other blob":
            shutil.copy(blob_file(root, other), path)
            with generation.open(descriptor.digest) as blob, pytest.raises(IntegrityError):
                read(blob)

    with pytest.raises(NotFoundError):
        generation.open(descriptor.digest)
    put(generation, content(CHUNK, 1))


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "directory"])
def test_what_is_planted_under_a_name_is_never_followed(root, generation, tmp_path, kind):
    """A link, fifo or directory under a blob's name is a miss, and what it leads to is not touched."""
    data = content(1000)
    descriptor = put(generation, data)
    path = blob_file(root, descriptor)
    path.unlink()
    secret = tmp_path / "secret"
    secret.write_bytes(data)
    match kind:
        case "symlink":
            path.symlink_to(secret)
        case "hard link":
            path.hardlink_to(secret)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()

    with pytest.raises(NotFoundError):
        generation.open(descriptor.digest)
    put(generation, data)
    assert secret.read_bytes() == data


# -- leases


def test_an_open_blob_is_not_removed(generation):
    """The lease is the open handle; the error names who holds it."""
    descriptor = put(generation, b"data")
    with generation.open(descriptor.digest), pytest.raises(InUseError) as caught:
        generation.remove(descriptor.digest)
    assert caught.value.holders == (os.getpid(),)

    assert generation.remove(descriptor.digest) == 4
    with pytest.raises(NotFoundError):
        generation.remove(descriptor.digest)


def test_removing_leaves_no_record(root, generation):
    """The blob goes first, then what is known of it."""
    before = files(root)
    generation.remove(put(generation, b"data").digest)

    assert files(root) == before


_HOLD = """
import sys
from layercache.oci import Digest
from layercache.store import NamespaceName, Store
generation = Store(sys.argv[1]).generation(NamespaceName("acme/endpoint-7"), create=False)
with generation.open(Digest.parse(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lease_ends_with_its_process(root, generation):
    """A killed reader holds nothing."""
    descriptor = put(generation, b"data")
    command = [sys.executable, "-c", _HOLD, str(root), str(descriptor.digest)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"held\n"
            with pytest.raises(InUseError) as caught:
                generation.remove(descriptor.digest)
            assert caught.value.holders == (reader.pid,)
        finally:
            reader.kill()

    assert generation.remove(descriptor.digest) == 4


def test_a_forked_child_neither_keeps_nor_ends_a_lease(generation):
    """The child drops its copies without unlocking; using them there is a typed error."""
    descriptor = put(generation, b"data")
    blob = generation.open(descriptor.digest)
    reading, writing = os.pipe()
    waiting, going = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's side
        os.close(going)
        try:
            blob.pread(0, 1)
        except StoreClosedError:
            os.write(writing, b"1")
            os.read(waiting, 1)
        os._exit(0)
    os.close(writing)
    try:
        with pytest.raises(InUseError):
            generation.remove(descriptor.digest)
        assert os.read(reading, 1) == b"1", "by now it has dropped its copies, and lives"
        blob.close()
        assert generation.remove(descriptor.digest) == 4
    finally:
        os.close(going)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(waiting)


# -- namespaces


@pytest.mark.parametrize("name", ["a", "acme/endpoint-7", "../../etc/passwd", "\0", "é" * 127, " ", "a" * 255])
def test_any_text_is_a_namespace(store, root, name):
    """A namespace's name never becomes a path, whatever is in it."""
    made = living(store, NamespaceName(name))
    put(made, b"data")
    made.close()

    assert [one.name.text for one in store.namespaces()] == [name]
    assert {path.parts[0] for path in (Path(name) for name in files(root))} <= {
        "data",
        "slots",
        "receipts",
        "FORMAT",
        "root.key",
        "root.lock",
        "janitor.lock",
        "scrub.lock",
        "evict.lock",
        "space",
        "ballast",
    }


@pytest.mark.parametrize("name", ["", "a" * 256, "é" * 128, "\ud800"])
def test_other_texts_are_refused(name):
    """Empty, too long and not encodable names are errors that do not repeat the name."""
    with pytest.raises(InvalidNamespaceError) as caught:
        NamespaceName(name)
    assert not name or name not in str(caught.value)


def test_a_namespace_is_not_in_its_repr():
    """A tenant's name does not get into logs by accident."""
    assert "acme" not in repr(NAME)


def test_namespaces_share_nothing(store, generation):
    """What one namespace holds, another does not, though it knows the digest."""
    descriptor = put(generation, b"private")
    other = living(store, NamespaceName("other"))

    with pytest.raises(NotFoundError):
        other.open(descriptor.digest)
    assert list(other.digests()) == []
    put(other, b"private")
    store.purge(NamespaceName("other"))
    with generation.open(descriptor.digest) as blob:
        assert read(blob) == b"private"
    other.close()


def test_asking_for_a_namespace_makes_nothing(store, root):
    """Only storing something makes a namespace."""
    before = files(root)

    assert store.generation(NAME, create=False) is None
    assert files(root) == before


# -- references


def test_a_reference_is_remembered_and_forgotten(generation):
    """What a reference resolved to is there until it is forgotten."""
    reference = Reference.parse("127.0.0.1:5000/demo/serving:1.0")
    ref = Ref(reference, described(b"index"), Digest.of(b"manifest"), Platform.parse("linux/arm64/v8"), 12.5)
    generation.set_ref(ref)

    assert generation.get_ref(reference) == ref
    assert list(generation.refs()) == [ref]
    generation.remove_ref(reference)
    generation.remove_ref(reference)
    assert generation.get_ref(reference) is None


def test_a_damaged_reference_is_no_reference(root, generation):
    """A record that does not check is as if it were not there, and blocks no other."""
    references = [Reference.parse(f"h.example/a:{tag}") for tag in ("1", "2")]
    for one in references:
        generation.set_ref(Ref(one, described(b"x"), Digest.of(b"x"), Platform.parse("linux/amd64"), 1.0))
    (path,) = root.glob(f"data/*/refs/{hashlib.sha256(str(references[0]).encode()).hexdigest()}")
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    assert generation.get_ref(references[0]) is None
    assert [ref.reference for ref in generation.refs()] == references[1:]


# -- purge


def test_a_purge_leaves_nothing(store, generation, root):
    """Every file of the generation is gone, and the receipt says how much that was."""
    put(generation, content(CHUNK))
    put(generation, b"data")
    ingest = generation.begin(described(content(5 * CHUNK, 9)))
    ingest.feed(content(5 * CHUNK, 9)[: 2 * CHUNK])
    ingest.suspend()

    receipt = store.purge(NAME)

    assert (receipt.level, receipt.generation, receipt.blobs, receipt.pending) == ("unlinked", 1, 2, ())
    assert receipt.bytes > 3 * CHUNK
    assert not list(root.glob("data/*"))
    assert not list(root.glob("trash/*"))
    assert [path.name for path in root.glob("slots/*/*") if path.name != "lock"] == ["dead.1"]
    assert "acme" not in json.dumps(receipt.to_json())


def test_nothing_passes_the_fence(store, generation):
    """Readers and writers from before the purge fail at their next call, and publish nothing."""
    descriptor = put(generation, content(20 * CHUNK))
    blob = generation.open(descriptor.digest)
    pieces = blob.chunks()
    next(pieces)
    ingest = generation.begin(described(b"late"))

    receipt = store.purge(NAME)

    assert receipt.level == "fenced"
    assert receipt.pending == (os.getpid(),)
    for call in (
        lambda: next(pieces),
        lambda: blob.pread(0, 1),
        lambda: generation.open(descriptor.digest),
        lambda: generation.begin(described(b"new")),
        lambda: list(generation.digests()),
        lambda: ingest.feed(b"late"),
    ):
        with pytest.raises(NamespacePurgedError):
            call()
    blob.close()
    assert store.purge(NAME).level == "unlinked"


def test_a_commit_after_the_fence_fails(store, generation, root):
    """A writer that fed everything before the purge cannot publish after it."""
    ingest = generation.begin(described(b"late"))
    ingest.feed(b"late")
    store.purge(NAME)

    with pytest.raises(NamespacePurgedError):
        ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="test")
    assert store.purge(NAME).level == "unlinked"
    assert not [name for name in files(root) if name.startswith(("data", "trash"))]


def test_a_purged_namespace_begins_anew(store, generation):
    """The next use starts empty, in the next generation."""
    descriptor = put(generation, b"data")
    store.purge(NAME)

    anew = living(store)
    assert anew.generation == 2
    with pytest.raises(NotFoundError):
        anew.open(descriptor.digest)
    put(anew, b"data")
    anew.close()


def test_a_namespace_begins_anew_while_an_old_reader_lives(store, generation):
    """One stubborn reader delays its own file, not the tenant."""
    blob = generation.open(put(generation, b"data").digest)
    store.purge(NAME)

    anew = living(store)
    put(anew, b"data")
    blob.close()
    anew.close()
    levels = [receipt.level for receipt in store.receipts()]
    assert set(levels) == {"fenced"}
    assert store.purge(NAME).generation == 2
    assert list(dict.fromkeys((one.generation, one.level) for one in store.receipts())) == [
        (1, "fenced"),
        (1, "unlinked"),
        (2, "unlinked"),
    ]


def test_purging_nothing_says_so(store):
    """A namespace never used, or purged already, is not an error."""
    assert store.purge(NAME).generation == 0
    assert list(store.receipts()) == []


def test_the_next_opening_finishes_a_purge(root, store, generation):
    """What a reader held up goes when the root is opened next."""
    blob = generation.open(put(generation, b"data").digest)
    store.purge(NAME, wait=0)
    assert list(root.glob("trash/*"))
    store.close()
    blob.close()

    with_next = Store(root)

    assert not list(root.glob("trash/*"))
    assert [one.level for one in with_next.receipts()] == ["fenced", "unlinked"]
    with_next.close()


@pytest.mark.parametrize("step", ["word", "fence", "hide", "empty"])
def test_a_purge_is_finished_from_any_step(root, store, generation, step, monkeypatch):
    """Wherever a purge stopped, the next opening or use of the namespace brings it to its end."""
    for module in (_slots, _store):
        monkeypatch.setattr(module, "_BUDGET", 60.0)  # others have the disk, too
    put(generation, b"data")
    slot = next(root.glob("slots/*"))
    if step == "word":
        next(root.glob("data/*/fence")).write_bytes(b"\1" + bytes(7))
    else:
        (slot / "live.1").rename(slot / "purging.1")
    if step in {"hide", "empty"}:
        shutil.move(root / "data" / f"{slot.name}.1", root / "trash")
    if step == "empty":
        next(root.glob("trash/*/blobs/*/*")).unlink()

    with_next = Store(root)
    anew = living(with_next)
    assert anew.generation == 2
    assert list(anew.digests()) == []
    anew.close()
    with_next.close()
    levels = [one.level for one in store.receipts()]
    if step == "word" and levels[0] == "fenced":
        levels.pop(0)  # who finds the word waits for nobody: on a busy disk that is said first
    assert levels == ["unlinked"]
    assert not list(root.glob("trash/*"))


def test_receipts_are_a_chain(root, store, generation):
    """Changing one record breaks the chain, and reading says so."""
    for _ in range(3):
        made = living(store)
        put(made, b"data")
        made.close()
        store.purge(NAME)
    receipts = list(store.receipts())
    assert [one.generation for one in receipts] == [1, 2, 3]
    assert receipts[0].previous == ""

    segment = next(root.glob("receipts/segment.*"))
    segment.write_bytes(segment.read_bytes().replace(b'"blobs":1', b'"blobs":7', 1))
    with pytest.raises(StoreError, match="chain"):
        list(store.receipts())


# -- the root


def test_a_directory_with_other_things_is_refused(tmp_path):
    """A root is never made over something else."""
    (tmp_path / "letters").mkdir()

    with pytest.raises(FormatError):
        Store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters"]


def test_a_root_that_others_can_write_is_refused(root):
    """Group- and world-writable roots are unsafe."""
    for mode in (0o770, 0o702):
        root.chmod(mode)
        with pytest.raises(UnsafeRootError):
            Store(root)


def test_a_file_is_no_root(tmp_path):
    """A root must be a directory."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsafeRootError):
        Store(tmp_path / "file")


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b'{"layercache": 2, "features": []}', b'{"layercache": 1, "features": ["zoned"]}']
)
def test_an_unknown_format_is_refused(root, raw):
    """Another version, an unknown feature and a damaged FORMAT are not opened."""
    Store(root).close()
    (root / "FORMAT").write_bytes(raw)

    with pytest.raises(FormatError):
        Store(root)


@pytest.mark.parametrize("size", [0, 16, 33])
def test_a_key_that_is_not_whole_is_refused(root, size):
    """Namespaces are never looked for, or made, under slots of another key."""
    Store(root).close()
    (root / "root.key").write_bytes(bytes(size))

    with pytest.raises(FormatError, match=r"root\.key"):
        Store(root)


def test_a_filesystem_without_exclusion_is_refused(root, monkeypatch):
    """Where flock lets everybody in, the root is refused."""
    monkeypatch.setattr(PosixDisk, "lock", lambda self, file, *, exclusive: True)

    with pytest.raises(UnsafeRootError):
        Store(root)


def test_a_stray_root_lock_does_not_make_a_directory_ours(tmp_path):
    """A file named like our lock beside other things is not an unfinished root."""
    (tmp_path / "root.lock").touch()
    (tmp_path / "letters").mkdir()

    with pytest.raises(FormatError):
        Store(tmp_path)


def test_making_a_root_can_be_taken_up_again(root):
    """A root whose making was interrupted is finished by the next opening."""
    Store(root).close()
    (root / "FORMAT").unlink()
    (root / "root.key").unlink()

    store = Store(root)
    made = living(store)
    put(made, b"data")
    made.close()
    store.close()


def test_a_closed_store_says_so(root):
    """Use after close is a typed error."""
    store = Store(root)
    store.close()
    store.close()

    with pytest.raises(StoreClosedError):
        living(store)


def test_many_threads_open_one_namespace_at_once(root):
    """Opening a new root and namespace from many threads gives one generation."""
    found: list[int] = []

    def work():
        store = Store(root)
        made = living(store)
        found.append(made.generation)
        made.close()
        store.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


def test_a_torn_receipt_does_not_follow_the_next(root, store, generation):
    """What a power cut left of a longer record is gone once another one is in its place."""
    put(generation, b"data")
    store.purge(NAME)
    segment = next(root.glob("receipts/segment.*"))
    raw = segment.read_bytes()
    end = raw.index(b"\0")
    torn = b'{"torn": "' + b"x" * 3000
    segment.write_bytes(raw[:end] + torn + raw[end + len(torn) :])

    again = living(store)
    put(again, b"data")
    again.close()
    store.purge(NAME)

    assert [receipt.generation for receipt in store.receipts()] == [1, 2]
    assert b"xxx" not in segment.read_bytes()


def test_a_sweep_leaves_the_record_of_a_blob_that_is_being_published(root, store, generation, monkeypatch):
    """A record without its blob is judged under the digest's lock: its blob may be a moment behind it."""
    monkeypatch.setattr(generation_room, "_LOCK_PATIENCE", 0.05)
    sweeper = Store(root)
    rename, swept = PosixDisk.rename, []

    def interrupted(self, at, name, to, new, *, replace):
        if name.endswith(".part"):  # the record is in its place, the blob is not
            swept.append(sweeper.recover())
        rename(self, at, name, to, new, replace=replace)

    with monkeypatch.context() as patch:
        patch.setattr(PosixDisk, "rename", interrupted)
        descriptor = put(generation, content(1000))
    sweeper.close()

    assert len(swept) == 1
    with generation.open(descriptor.digest) as blob:
        assert read(blob) == content(1000)


def test_recovery_ends_a_purge_that_had_only_begun(root, store, generation):
    """A set word on a state that still says live is a purge whose process died at once: recovery ends it."""
    put(generation, b"data")
    next(root.glob("data/*/fence")).write_bytes(b"\1" + bytes(7))

    assert [leftover.kind for leftover in store.recover()] == ["generation"]
    assert store.recover() == ()
    assert not list(root.glob("data/*"))
    assert [receipt.level for receipt in store.receipts()] == ["unlinked"]


def test_the_name_of_a_new_root_is_durable(tmp_path, monkeypatch):
    """The directories above it that were made for it are flushed, and one that was left empty is flushed again."""
    flushed = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    Store(tmp_path / "a" / "b" / "root").close()
    assert [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")] == flushed[:3]

    (tmp_path / "left").mkdir(mode=0o700)
    flushed.clear()
    Store(tmp_path / "left").close()
    assert flushed[0] == str(tmp_path)
