"""The simulated disk: what it forgets, what it refuses, and that it is like a real one where nothing is lost."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.store._disk import Dir, Disk, File, Handle, PosixDisk
from layercache.testing.disk import Fault, KilledError, Process, SimulatedDisk
from tests.crash import sweeps

SEEDS = range(60)


@pytest.fixture
def disk() -> SimulatedDisk:
    """Return an empty disk."""
    return SimulatedDisk()


def write(process: Process, name: str, data: bytes, *, sync: bool) -> None:
    """Write a file in the root."""
    file = process.create(process.root, name, exist_ok=True)
    process.write(file, data, 0)
    if sync:
        process.sync(file)
    process.close(file)


def outcomes(make: Callable[[Process], None]) -> Iterator[SimulatedDisk]:
    """Yield what is left of the same calls after power cuts of many kinds."""
    for seed in SEEDS:
        disk = SimulatedDisk()
        make(disk.process())
        disk.crash(random.Random(seed))
        yield disk


def content(disk: SimulatedDisk, *path: str) -> bytes | None:
    """Return what a file holds, ``None`` where it is not."""
    node = disk.at(*path)
    return None if node is None else node.content()


def test_an_unflushed_file_under_a_new_name_may_come_back_empty():
    """M1 of the measurements: renamed and its directory flushed, but not its data: the name is there, with length 0."""

    def make(process: Process) -> None:
        write(process, "tmp", b"x" * 5000, sync=False)
        process.rename(process.root, "tmp", process.root, "blob", replace=False)
        process.sync(process.root)

    found = {content(disk, "blob") for disk in outcomes(make)}

    assert b"" in found
    assert b"x" * 5000 in found
    assert None not in found
    assert any(len(data or b"") == 5000 and b"\0" in (data or b"") for data in found), "a hole in the middle"


def test_an_unflushed_rename_may_come_back_as_the_old_name_full_of_bytes():
    """M2 of the measurements: data flushed, directory not: the temporary name is back, with all of it."""

    def make(process: Process) -> None:
        process.make_dir(process.root, "in")
        process.make_dir(process.root, "blobs")
        process.sync(process.root)
        incoming, blobs = process.dir(process.root, "in"), process.dir(process.root, "blobs")
        file = process.create(incoming, "tmp")
        process.write(file, b"x" * 5000, 0)
        process.sync(file)
        process.rename(incoming, "tmp", blobs, "blob", replace=False)

    found = {(content(disk, "in", "tmp"), content(disk, "blobs", "blob")) for disk in outcomes(make)}

    assert found == {(b"x" * 5000, None), (None, b"x" * 5000), (None, None)}, "never both names, never half a file"


def test_flushed_data_and_names_stay():
    """What fsync has promised no power cut takes away, whatever was changed after."""

    def make(process: Process) -> None:
        write(process, "a", b"1" * 9000, sync=True)
        process.sync(process.root)
        write(process, "b", b"2", sync=False)
        process.remove(process.root, "b")

    assert {content(disk, "a") for disk in outcomes(make)} == {b"1" * 9000}


def test_an_unflushed_removal_may_come_back():
    """A name that was unlinked without a flush of its directory may be there again, with its bytes."""

    def make(process: Process) -> None:
        write(process, "a", b"tenant", sync=True)
        process.sync(process.root)
        process.remove(process.root, "a")

    assert {content(disk, "a") for disk in outcomes(make)} == {b"tenant", None}


def test_an_overwritten_page_comes_back_old_new_or_torn():
    """A page is torn between sectors, never inside one."""

    def make(process: Process) -> None:
        write(process, "a", b"1" * 4096, sync=True)
        process.sync(process.root)
        write(process, "a", b"2" * 4096, sync=False)

    found = {content(disk, "a") or b"" for disk in outcomes(make)}

    assert {b"1" * 4096, b"2" * 4096} < found
    for data in found:
        assert all(len(set(data[start : start + 512])) == 1 for start in range(0, 4096, 512))


def test_a_failed_flush_calls_pages_clean_that_are_lost():
    """The second fsync succeeds and brings nothing back: whoever retries is fooled."""
    lost = 0
    for seed in SEEDS:
        disk = SimulatedDisk()
        disk.rng = random.Random(seed)
        process = disk.process()
        file = process.create(process.root, "a")
        process.write(file, b"x" * 20_000, 0)
        disk.faults = [Fault("sync", 1, errno.EIO)]
        with pytest.raises(OSError, match="Input/output"):
            process.sync(file)
        process.sync(file)
        process.sync(process.root)
        disk.crash(random.Random(seed))
        lost += content(disk, "a") != b"x" * 20_000
    assert lost == len(SEEDS)


def test_locks_exclude_between_handles_and_end_with_the_process(disk):
    """A lock belongs to the open file; a dead process has none."""
    one, two = disk.process(), disk.process()
    mine, other = one.create(one.root, "l", exist_ok=True), two.create(two.root, "l", exist_ok=True)

    assert one.lock(mine, exclusive=True)
    assert not two.lock(other, exclusive=False)
    assert one.lock(mine, exclusive=False), "an exclusive lock becomes a shared one"
    assert two.lock(other, exclusive=False)
    assert not two.lock(other, exclusive=True)
    assert one.lock(mine, exclusive=False)
    one.kill()
    assert two.lock(other, exclusive=True)
    with pytest.raises(KilledError):
        one.names(one.root)


def test_a_lock_that_cannot_be_made_exclusive_is_lost(disk):
    """As flock does it: the old lock is dropped before the new one is tried for."""
    process = disk.process()
    handles = [process.create(process.root, "l", exist_ok=True) for _ in range(3)]
    assert process.lock(handles[0], exclusive=False)
    assert process.lock(handles[1], exclusive=False)
    assert not process.lock(handles[0], exclusive=True)
    process.close(handles[1])
    assert process.lock(handles[2], exclusive=True)


def test_a_full_disk_is_full_until_something_goes(disk):
    """A write that does not fit writes what fits; rename and unlink work; space of an open file stays taken."""
    disk.capacity = 3 * 4096
    process = disk.process()
    file = process.create(process.root, "a")
    with pytest.raises(OSError, match="No space") as raised:
        process.write(file, bytes(range(1, 251)) * 80, 0)
    assert raised.value.errno == errno.ENOSPC
    assert process.fstat(file).size == 3 * 4096
    with pytest.raises(OSError, match="No space"):
        process.make_dir(process.root, "d")
    process.rename(process.root, "a", process.root, "b", replace=False)
    process.remove(process.root, "b")
    assert process.room().free == 0
    process.close(file)
    assert process.room().free == 3 * 4096


def test_the_word_is_seen_by_every_process_at_once(disk):
    """Two mappings of one file share it; a power cut may lose it."""
    one, two = disk.process(), disk.process()
    write(one, "w", bytes(8), sync=True)
    words = [process.word(process.create(process.root, "w", exist_ok=True)) for process in (one, two)]
    write(one, "w", (7).to_bytes(8, "little"), sync=False)
    assert [word.get() for word in words] == [7, 7]


def test_a_lease_is_had_by_who_has_the_file_alone(disk, tmp_path: Path):
    """Refused beside another handle or a mapping; while it is held nobody else opens the file. As on a real disk."""
    for any_disk in (disk.process(), PosixDisk(os.fspath(tmp_path))):
        made = any_disk.create(any_disk.root, "f")
        any_disk.write(made, bytes(8), 0)
        mine = any_disk.open(any_disk.root, "f")
        assert not any_disk.lease(mine), "our own other handle is somebody else"
        any_disk.close(made)
        assert any_disk.lease(mine)
        with pytest.raises(BlockingIOError):
            any_disk.open(any_disk.root, "f")
        any_disk.remove(any_disk.root, "f")
        any_disk.close(mine)
        mapped = any_disk.create(any_disk.root, "m")
        any_disk.write(mapped, bytes(8), 0)
        word = any_disk.word(mapped)
        any_disk.close(mapped)
        again = any_disk.open(any_disk.root, "m")
        assert not any_disk.lease(again), "a mapping outlives its handle"
        assert word.get() == 0
        for handle in (again, any_disk.root):
            any_disk.close(handle)


def test_a_clone_lives_its_own_life(disk):
    """A copy shares nothing that changes, and forgets the same."""
    process = disk.process()
    write(process, "a", b"1", sync=True)
    process.sync(process.root)
    write(process, "a", b"2", sync=False)
    twin = disk.clone()
    write(twin.process(), "b", b"3", sync=False)
    write(process, "a", b"4", sync=True)

    assert content(twin, "a") == b"2"
    assert content(disk, "b") is None
    twin.crash(random.Random(1))
    assert content(twin, "a") in (b"1", b"2", b"")
    assert content(disk, "a") == b"4"


def test_damage_is_seen_and_marked(disk):
    """What is damaged on purpose differs, and says so to the judge."""
    write(disk.process(), "a", b"x" * 5000, sync=True)
    node = disk.at("a")
    assert node is not None
    for seed in range(30):
        node.write(memoryview(b"x" * 5000), 0)
        node.truncate(5000)
        disk.rot(node, random.Random(seed))
        assert node.spoiled
        assert node.content() != b"x" * 5000


# -- like a real one

_names = st.sampled_from(["a", "b"])
_calls = st.lists(
    st.one_of(
        st.tuples(st.just("make_dir"), _names, _names),
        st.tuples(st.just("create"), _names, _names, st.booleans()),
        st.tuples(st.just("open"), _names, _names),
        st.tuples(st.just("remove"), _names, _names),
        st.tuples(st.just("remove_dir"), _names, _names),
        st.tuples(st.just("rename"), _names, _names, _names, _names, st.booleans()),
        st.tuples(st.just("write"), st.integers(0, 3), st.integers(0, 9000), st.integers(1, 9000)),
        st.tuples(st.just("truncate"), st.integers(0, 3), st.integers(0, 9000)),
        st.tuples(st.just("read"), st.integers(0, 3), st.integers(0, 9000), st.integers(1, 9000)),
        st.tuples(st.just("lock"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("close"), st.integers(0, 3)),
        st.tuples(st.just("stat"), _names, _names),
        st.tuples(st.just("names"), _names),
        st.tuples(st.just("dir"), _names, _names),
    ),
    min_size=5,
    max_size=40,
)


class _Player:
    """Makes calls on a disk and notes what it is told."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.files: list[File] = []
        self.folders: dict[str, Dir] = {}
        for name in ("a", "b"):
            disk.make_dir(disk.root, name)
            self.folders[name] = disk.dir(disk.root, name)

    def play(self, call: tuple[object, ...]) -> object:
        """Make one call; return what is comparable of the answer."""
        try:
            return self._play(*call)  # type: ignore[arg-type]
        except OSError as error:
            return error.errno

    def _play(self, verb: str, *args: object) -> object:
        disk = self.disk
        values = list(args)
        if verb in ("write", "truncate", "read", "lock", "close"):
            if not self.files:
                return None
            file = self.files[int(values[0]) % len(self.files)]  # type: ignore[call-overload]
            if verb == "write":
                disk.write(file, bytes([int(values[1]) % 251 + 1]) * int(values[2]), int(values[1]))  # type: ignore[call-overload]
                return None
            if verb == "truncate":
                disk.truncate(file, int(values[1]))  # type: ignore[call-overload]
                return None
            if verb == "read":
                into = bytearray(int(values[2]))  # type: ignore[call-overload]
                count = disk.read(file, into, int(values[1]))  # type: ignore[call-overload]
                return bytes(into[:count])
            if verb == "lock":
                return disk.lock(file, exclusive=bool(values[1]))
            disk.close(file)
            return None
        at = self.folders[str(values[0])]
        if verb == "rename":
            replace = bool(values[4])
            disk.rename(at, str(values[1]), self.folders[str(values[2])], str(values[3]), replace=replace)
            return None
        if verb == "create":
            self.files.append(disk.create(at, str(values[1]), exist_ok=bool(values[2])))
            return "file"
        if verb == "open":
            self.files.append(disk.open(at, str(values[1])))
            return "file"
        if verb == "dir":
            disk.close(disk.dir(at, str(values[1])))
            return "dir"
        if verb == "stat":
            status = disk.stat(at, str(values[1]))
            return status and (status.kind, status.size if status.kind == "file" else 0)
        result = getattr(disk, verb)(at, *map(str, values[1:]))
        return sorted(result) if isinstance(result, list) else result

    def end(self) -> None:
        """Close everything."""
        handles: list[Handle] = [*self.files, *self.folders.values(), self.disk.root]
        for handle in handles:
            self.disk.close(handle)


@given(calls=_calls)
@settings(max_examples=6000 if sweeps.SOAK else 150, deadline=None, derandomize=not sweeps.SOAK)
def test_it_answers_as_a_real_filesystem_does(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[object, ...]]
):
    """The same calls get the same answers, the same errors included."""
    path = tmp_path_factory.mktemp("real")
    simulated, real = _Player(SimulatedDisk().process()), _Player(PosixDisk(os.fspath(path)))
    try:
        for call in calls:
            assert simulated.play(call) == real.play(call), call
    finally:
        simulated.end()
        real.end()


def test_a_removed_directory_takes_nothing_more(disk, tmp_path: Path):
    """M9 of the measurements: after rmdir, whoever has the directory open can make nothing in it; as on a real disk."""
    for any_disk in (disk.process(), PosixDisk(os.fspath(tmp_path))):
        any_disk.make_dir(any_disk.root, "d")
        folder = any_disk.dir(any_disk.root, "d")
        file = any_disk.create(any_disk.root, "f")
        any_disk.remove_dir(any_disk.root, "d")
        for attempt in (
            lambda folder=folder, any_disk=any_disk: any_disk.create(folder, "x"),
            lambda folder=folder, any_disk=any_disk: any_disk.make_dir(folder, "x"),
            lambda folder=folder, any_disk=any_disk: any_disk.rename(any_disk.root, "f", folder, "x", replace=False),
        ):
            with pytest.raises(FileNotFoundError):
                attempt()
        assert any_disk.names(folder) == []
        for handle in (folder, file, any_disk.root):
            any_disk.close(handle)
