"""Power cuts of a real filesystem after any change the store makes, again and again while it recovers.

    python -m tests.crash.power ext4                                     a sweep; prints what it covered
    python -m tests.crash.power xfs --only put --mode log --cut 12 3     one point: cut after the 12th change of the
                                                                         scenario, then after the recovery's 3rd
    python -m tests.crash.power xfs --only purge --finish cli            the command finishes what is left of a purge
    python -m tests.crash.power xfs --only purge --finish same           ... or its process, when the disk is back

Every life (the scenario, each recovery that is cut, the last look) is a process of its own that the cut ends, so that
no clean-up of ours runs in it. Cut 0 means: let it come to its end, then cut.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercache.errors import LayerCacheError
from layercache.store import Store
from layercache.store._disk import Dir, Disk, File, Handle, PosixDisk
from tests.crash import loopfs
from tests.crash.examine import examine, finish_purges, report
from tests.crash.scenarios import SCENARIOS, Actor, Event, Promises, Scenario, read_events, untyped, warm, write_event

__all__ = ["CutDisk", "Point", "deeper", "main", "points", "run"]

_CUT_STATUS = 77
_FLUSHES: dict[str, type[Handle]] = {"files": File, "directories": Dir}
_CHANGES = (
    "make_dir create write reserve truncate start_flush sync touch rename remove remove_dir".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Point:
    """One chain of cuts.

    ``mode`` says what reached the disk of what was not flushed: nothing (``cut``), the journal (``log``), or the
    journal as it was after the K-th change, because somebody else flushed a file then (``neighbour:K``).
    """

    filesystem: str
    scenario: str
    mode: str
    cuts: tuple[int, ...]

    def command(self) -> str:
        cuts = " ".join(map(str, self.cuts))
        return f"python -m tests.crash.power {self.filesystem} --only {self.scenario} --mode {self.mode} --cut {cuts}"


@dataclass(slots=True)
class Outcome:
    """What one chain showed: how many changes each life made, and what was wrong at the end."""

    changes: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


class CutDisk:
    """The disk below ``path`` whose power fails after so many changes."""

    def __init__(self, path: Path, boot: int) -> None:
        self._inner = PosixDisk.open_root(path)
        self._inner.boot = f"{boot:012x}"
        self.changes = 0
        self.sync: Callable[..., Any]
        self._cut_at = self._neighbour_at = 0
        self._mode = loopfs.CUT
        self.survives = self.was_cut = False
        self._aside = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        for name in _CHANGES:
            setattr(self, name, self._counting(getattr(self._inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def arm(self, mode: str, cut_at: int) -> None:
        """Count from here; cut after ``cut_at`` changes."""
        word, _, at = mode.partition(":")
        self._mode = loopfs.FLUSH_LOG if word == "log" else loopfs.CUT
        self._neighbour_at = int(at or 0)
        self._cut_at = cut_at
        self.changes = 0

    def forget(self, kind: type[Handle]) -> None:
        """Answer flushes of files, or of directories, without doing them."""
        flush = self.sync
        self.sync = lambda handle: None if isinstance(handle, kind) else flush(handle)

    def cut(self) -> None:
        """End the power, and this process with it, unless it ``survives`` on a disk that answers no more."""
        loopfs.cut_power(self._aside, self._mode)
        if not self.survives:
            os._exit(_CUT_STATUS)
        self.was_cut = True
        os.close(self._aside)

    def background(self, job: Callable[[], None]) -> None:
        """Run nothing beside: each life is one line of changes."""

    def _counting(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            result = verb(*args, **options)
            self.changes += 1
            if self.changes == self._neighbour_at and not self.was_cut:
                self._be_a_neighbour()
            if self.changes == self._cut_at:
                self.cut()
            return result

        return counted

    def _be_a_neighbour(self) -> None:
        fd = os.open("neighbour", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=self._aside)
        os.write(fd, b"its own")
        os.fsync(fd)
        os.close(fd)


def _disk(path: Path, boot: int) -> tuple[CutDisk, Disk]:
    disk = CutDisk(path, boot)
    return disk, disk


def _live(life: Callable[[Callable[[Event], None]], None]) -> tuple[int, list[Event]]:
    """Run ``life`` in a process of its own; return its exit status and what it said."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(out)
            life(lambda event: write_event(into, event))
            status = 0
        except BaseException as error:  # noqa: BLE001 - the process ends here
            write_event(into, untyped(error))
        finally:
            os._exit(status)
    os.close(into)
    raw = b""
    while data := os.read(out, 1 << 16):
        raw += data
    os.close(out)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), read_events(raw)


def prepare(image: loopfs.Image, scenario: Scenario) -> tuple[list[tuple[int, bytes]], list[Event]]:
    """Make the filesystem a scenario starts from; return it and what was promised on the way."""

    def life(say: Callable[[Event], None]) -> None:
        actor = Actor(image.place / "root", say, lambda: _disk(image.place / "root", 1)[1])
        scenario.setup(actor)

    image.mount()
    status, events = _live(life)
    image.unmount()
    if status != 0:
        raise AssertionError(f"the setup of {scenario.name} failed: {events[-1]}")
    return image.save(), events


def run(
    image: loopfs.Image,
    base: list[tuple[int, bytes]],
    said: list[Event],
    point: Point,
    *,
    without: str = "",
    finish: str = "open",
) -> Outcome:
    """Play one chain of cuts from a prepared filesystem and say what is wrong at its end.

    What is left of a purge is finished by whoever opens the root next (``open``), or before that by the command
    (``cli``), or by the ``same`` process, which outlives the disk's failure and tries again when it is mounted anew.
    ``without`` the flushes of ``files`` or ``directories`` the scenario is a wrong one, which must show.
    """
    scenario, root = SCENARIOS[point.scenario], image.place / "root"
    outcome = Outcome()

    def act(say: Callable[[Event], None]) -> None:
        disks: list[CutDisk] = []

        def make() -> Disk:
            cutting, disk = _disk(root, 1)
            disks.append(cutting)
            cutting.survives = finish == "same"
            if point.scenario == "first-open":  # everything it does counts, from the first entry on
                cutting.arm(point.mode, point.cuts[0])
            return disk

        actor = Actor(root, say, make)
        scenario.enter(actor)
        if disks:
            disks[0].arm(point.mode, point.cuts[0])
        if without:
            disks[0].forget(_FLUSHES[without])
        try:
            scenario.act(actor)
        except LayerCacheError:  # said by its step
            if not disks[0].was_cut:
                raise
        say({"op": "changes", "is": "done", "count": disks[0].changes})
        if not disks[0].was_cut:
            disks[0].cut()
        actor.close()
        image.unmount()
        image.mount()
        again = Actor(root, say, lambda: _disk(root, 1)[1])
        again.open()
        again.purge("a")
        again.close()
        os._exit(_CUT_STATUS)

    def recover(say: Callable[[Event], None], boot: int, cut_at: int) -> None:
        if finish == "cli" and cut_at == 0:
            for finding in finish_purges(root):
                say({"op": "wrong", "is": "done", "text": finding})
        cutting, disk = _disk(root, boot)
        cutting.arm(point.mode.partition(":")[0], cut_at)
        store = Store(root, disk=disk)
        store.recover()
        say({"op": "changes", "is": "done", "count": cutting.changes})
        if cut_at == 0:
            store.close()
            promises = Promises(faulty=finish == "same")
            promises.hear(said + outcome.events)
            for finding in promises.findings + examine(
                root, promises, disk=_disk(root, boot)[1], boot=f"{boot:012x}", recovered=True
            ):
                say({"op": "wrong", "is": "done", "text": finding})
        else:
            cutting.cut()

    image.restore(base)
    image.mount()
    status, outcome.events = _live(act)
    _conclude(outcome, status, outcome.events, _CUT_STATUS)
    if finish == "same" and [event["op"] for event in outcome.events[-2:]] != ["purge", "purge"]:
        outcome.findings.append("the same process could not purge to the end when it tried again")
    for boot, cut_at in enumerate((*point.cuts[1:], 0), 2):
        image.unmount()
        try:
            image.mount()
        except OSError as error:
            outcome.findings.append(f"the filesystem does not mount again: {error}")
            return outcome
        status, events = _live(lambda say, boot=boot, cut_at=cut_at: recover(say, boot, cut_at))  # type: ignore[misc]
        _conclude(outcome, status, events, 0 if cut_at == 0 else _CUT_STATUS)
    image.unmount()
    return outcome


def _conclude(outcome: Outcome, status: int, events: list[Event], wanted: int) -> None:
    counts = [event["count"] for event in events if event["op"] == "changes"]
    outcome.changes.append(counts[0] if counts else -1)
    outcome.findings += [event["text"] for event in events if event["op"] in ("wrong", "untyped")]
    if status != wanted and not outcome.findings:
        outcome.findings.append(f"a life ended with {status} instead of {wanted}: {events[-1:]}")


def points(filesystem: str, scenario: str, total: int, *, rng: random.Random) -> Iterator[Point]:
    """Yield every cut of a scenario of ``total`` changes, in every mode."""
    for cut in (*range(1, total + 1), 0):
        for mode in ("cut", "log"):
            yield Point(filesystem, scenario, mode, (cut,))
        if total > 1 and cut != 1:
            yield Point(filesystem, scenario, f"neighbour:{rng.randint(1, (cut or total + 1) - 1)}", (cut,))


def deeper(point: Point, changes: int, *, rng: random.Random) -> Iterator[Point]:
    """Yield chains that go on from a cut whose recovery makes so many ``changes``: cut that, and the one after it."""
    if changes > 0:
        second = rng.randint(1, changes)
        yield Point(point.filesystem, point.scenario, point.mode, (*point.cuts, second))
        yield Point(point.filesystem, point.scenario, point.mode, (*point.cuts, second, rng.randint(1, changes)))


@dataclass(slots=True)
class Coverage:
    """What a sweep did."""

    cuts: int = 0
    chains: int = 0
    by_depth: dict[int, int] = field(default_factory=dict)
    failed: list[tuple[Point, list[str]]] = field(default_factory=list)

    def count(self, point: Point, outcome: Outcome) -> None:
        self.chains += 1
        self.cuts += len(point.cuts)
        self.by_depth[len(point.cuts)] = self.by_depth.get(len(point.cuts), 0) + 1
        if outcome.findings:
            self.failed.append((point, outcome.findings))


def sweep(
    image: loopfs.Image,
    names: list[str],
    *,
    seed: int,
    nested: int,
    shard: tuple[int, int],
    without: str = "",
    finish: str = "open",
) -> Coverage:
    """Cut every scenario everywhere, and go deeper from each ``nested``-th cut.

    ``shard`` (k, n) visits only each n-th cut, beginning with the k-th.
    """
    coverage = Coverage()
    number = 0
    empty = image.save()
    for name in names:
        rng = random.Random(f"{seed} {name}")
        before = time.monotonic(), coverage.chains
        image.restore(empty)
        base, said = prepare(image, SCENARIOS[name])
        whole = run(image, base, said, Point(image.filesystem, name, "cut", (0,))).changes[0]
        for point in points(image.filesystem, name, whole, rng=rng):
            number += 1
            if number % shard[1] != shard[0]:
                continue
            outcome = run(image, base, said, point, without=without, finish=finish)
            coverage.count(point, outcome)
            if nested and number // shard[1] % nested == 0:
                for chain in deeper(point, outcome.changes[-1], rng=rng):
                    coverage.count(chain, run(image, base, said, chain, without=without, finish=finish))
        print(
            f"{image.filesystem} {name}: {whole} changes, {coverage.chains - before[1]} chains of cuts,"
            f" {time.monotonic() - before[0]:.1f} s",
            file=sys.stderr,
        )
    return coverage


def main(arguments: list[str] | None = None) -> int:
    """Sweep, or replay one point; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.power", description=__doc__.partition("\n")[0])
    parser.add_argument("filesystem", choices=sorted(loopfs.FILESYSTEMS))
    parser.add_argument("--only", choices=sorted(SCENARIOS), help="one scenario")
    parser.add_argument("--mode", default="cut")
    parser.add_argument("--cut", type=int, nargs="+", help="replay this chain")
    parser.add_argument("--seed", type=int, default=int(time.time() // 86400))
    parser.add_argument("--nested", type=int, default=1, help="go deeper from each so many-th cut; 0 from none")
    parser.add_argument("--shard", default="0/1", help="K/N: each N-th cut, beginning with the K-th")
    parser.add_argument(
        "--finish", choices=("open", "same", "cli"), default="open", help="who finishes what is left of a purge"
    )
    parser.add_argument("--without", choices=sorted(_FLUSHES), default="", help="drop these flushes: it must show")
    options = parser.parse_args(arguments)
    if why := loopfs.unavailable(options.filesystem):
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    warm()
    logging.disable()  # damage is what is looked for here
    place = loopfs.enter_private_mounts() / options.filesystem
    started = time.monotonic()
    with loopfs.Image(options.filesystem, place) as image:
        if options.cut:
            point = Point(options.filesystem, options.only or "put", options.mode, tuple(options.cut))
            return _replay(image, point, options.finish)
        part, of = map(int, options.shard.split("/"))
        names = (
            [options.only]
            if options.only
            else [name for name, one in SCENARIOS.items() if name != "get" and not one.sealed]
        )
        coverage = sweep(
            image,
            names,
            seed=options.seed,
            nested=options.nested,
            shard=(part, of),
            without=options.without,
            finish=options.finish,
        )
    seconds = time.monotonic() - started
    report([(point.command(), findings) for point, findings in coverage.failed])
    depths = ", ".join(f"{count} of depth {depth}" for depth, count in sorted(coverage.by_depth.items()))
    summary = (
        f"{options.filesystem}: {coverage.cuts} power cuts in {coverage.chains} chains ({depths}) over {len(names)}"
        f" scenarios, seed {options.seed}, shard {options.shard}, {len(coverage.failed)} failed, {seconds:.1f} s"
    )
    print(summary)
    return 1 if coverage.failed else 0


def _replay(image: loopfs.Image, point: Point, finish: str) -> int:
    base, said = prepare(image, SCENARIOS[point.scenario])
    outcome = run(image, base, said, point, finish=finish)
    for event in said + outcome.events:
        print(json.dumps(event))
    print(f"changes of each life that came to its end: {outcome.changes}")
    print("\n".join(outcome.findings) or "nothing wrong")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
