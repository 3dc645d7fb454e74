"""Every place instead of some: power cuts after each call of a scenario, and each order in which two processes can run.

States are met again in many orders; each is gone on from once (:func:`interleavings`).
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from layercache.store._disk import Handle, Stat, Word
from layercache.testing._actor import Actor
from layercache.testing._inodes import Node
from layercache.testing.disk import Fault, Process, SimulatedDisk, _Word
from layercache.testing.model import Model
from layercache.testing.schedule import Schedule, Task
from layercache.testing.simulation import judge

__all__ = ["Program", "faults", "interleavings", "power_cuts"]

Program = Callable[[Actor], None]


def power_cuts(
    start: SimulatedDisk,
    programs: Sequence[Program],
    *,
    fates: int = 4,
    seed: int = 0,
    kill: bool = False,
    every: int = 1,
    offset: int = 0,
) -> Counter[str]:
    """Cut the power after each call that changes the disk; return what was done.

    :param programs: run one after another, each by a process of its own.
    :param fates: how many of the states that a cut may leave are judged for each place.
    :param kill: only one process dies at that place, the next ones run, and the power is cut at the end.
    :param every: look at every such place only, from ``offset`` on (a shard).
    :raises ViolationError: when a promise is broken.
    """
    seen: Counter[str] = Counter()
    for step in _changes(start, programs)[offset::every]:
        seen["places"] += 1
        for fate in range(fates):
            rng = random.Random(f"{seed} {step} {fate}")
            disk = start.clone()
            disk.rng = rng
            model = Model(disk)
            _play(model, programs, step, kill=kill)
            seen["cuts"] += 1
            disk.crash(rng)
            model.after_crash()
            judge(model, rng)
    return seen


def faults(
    start: SimulatedDisk,
    programs: Sequence[Program],
    code: int,
    *,
    sticky: bool = False,
    seed: int = 0,
    every: int = 1,
    offset: int = 0,
) -> Counter[str]:
    """Let each call fail with ``code`` (and all after it, if ``sticky``), one a run, then cut the power.

    :raises ViolationError: when a promise is broken.
    """
    seen: Counter[str] = Counter()
    number = 1 + offset
    while True:
        rng = random.Random(f"{seed} {number}")
        disk = start.clone()
        disk.rng = rng
        model = Model(disk)
        fault = Fault("*", number, code, sticky=sticky)
        disk.faults = [fault]
        _play(model, programs, 0, kill=False)
        seen["runs"] += 1
        if not fault.fired:
            return seen
        model.harmed = True
        disk.crash(rng)
        model.after_crash()
        judge(model, rng)
        number += every


_CHANGING = frozenset(("create", "make_dir", "write", "truncate", "sync", "rename", "remove", "remove_dir", "word"))


def _changes(start: SimulatedDisk, programs: Sequence[Program]) -> list[int]:
    """Return the steps that follow a change of the disk, and the one after the last."""
    verbs: list[str] = []
    model = Model(start.clone())
    _play(model, programs, 0, kill=False, trace=lambda line: verbs.append(line.split()[2]))
    return [*(step for step, verb in enumerate(verbs, 2) if verb in _CHANGING), len(verbs) + 2]


def _play(
    model: Model, programs: Sequence[Program], step: int, *, kill: bool, trace: Callable[[str], None] | None = None
) -> None:
    """Run the programs; at ``step``, counted over all of them, one dies, or all with the power (0: never)."""
    for program in programs:
        actor = Actor(model, model.disk.process())
        schedule = Schedule(model.disk, _Straight())
        schedule.trace = trace
        schedule.spawn(actor.process, _whole(program, actor))
        if step > 0:
            schedule.events = [(step, schedule.power_off)]
        before = model.disk.steps
        schedule.run()
        if schedule.cut and not kill:
            return
        step = 0 if schedule.cut else max(0, step - (model.disk.steps - before))


def _whole(program: Program, actor: Actor) -> Callable[[], None]:
    def run() -> None:
        program(actor)
        actor.close()

    return run


class _Straight:
    def stay(self, task: Task, verb: str) -> bool:  # noqa: ARG002 - it always does
        return True

    def pick(self, ready: list[Task]) -> Task:
        return ready[0]


def interleavings(
    start: SimulatedDisk,
    programs: Sequence[Program],
    *,
    opened: Sequence[str] = (),
    before: Program | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Counter[str]:
    """Run two or more programs in every order that matters, and judge each end; return how many states there were.

    :param opened: namespaces that every process has open already.
    :param before: run first, by a process of its own that then stays alive.
    :param most: stop after so many runs, in an order that ``seed`` decides.
    :raises ViolationError: when a promise is broken; its text holds the choices that lead there.
    """
    seen: Counter[str] = Counter()
    rng = random.Random(seed)
    states: set[int] = set()
    pending: list[list[int]] = [[]]
    ends: set[int] = set()
    while pending and (most is None or seen["runs"] < most):
        forced = pending.pop(rng.randrange(len(pending)))
        seen["runs"] += 1
        disk = start.clone()
        disk.tick = 0.0
        model = Model(disk)
        if before is not None:
            before(Actor(model, _process(disk)))
        actors = [Actor(model, _process(disk)) for _ in programs]
        for actor in actors:
            for namespace in opened:
                actor.generation(namespace)
        explorer = _Explorer(disk, forced, states)
        schedule = explorer.schedule
        for actor, program in zip(actors, programs, strict=True):
            schedule.spawn(actor.process, _whole(program, actor))
        try:
            schedule.run()
            pending.extend(explorer.others)
            if schedule.cut:
                continue
            end = _state(disk)
            if end not in ends:
                ends.add(end)
                for process in disk.processes:
                    process.kill()
                disk.processes = []
                model.leases = []
                judge(model, random.Random(0))
        except AssertionError as error:
            raise type(error)(f"{error} (choices {explorer.made})") from error
    seen["states"], seen["ends"], seen["left"] = len(states), len(ends), len(pending)
    return seen


class _Explorer:
    """Takes the forced choices, then the first way at each state, noting the others; stops at a state already seen."""

    def __init__(self, disk: SimulatedDisk, forced: list[int], states: set[int]) -> None:
        self.schedule = Schedule(disk, self)
        self.others: list[list[int]] = []
        self.made: list[int] = []
        self._forced = forced
        self._states = states

    def stay(self, task: Task, verb: str) -> bool:  # noqa: ARG002 - the protocol
        return verb in _ALONE or sum(self._can(other) for other in self.schedule.tasks) < 2

    def pick(self, ready: list[Task]) -> Task:
        if len(ready) == 1 or self.schedule.cut:
            return ready[0]
        tasks = self.schedule.tasks
        depth = len(self.made)
        if depth < len(self._forced):
            chosen = self._forced[depth]
        else:
            trails = ((task.started, task.done, getattr(task.process, "trail", 0)) for task in tasks)
            state = hash((_state(self.schedule.disk), *trails))
            if state in self._states:
                self.schedule.power_off()
                return ready[0]
            self._states.add(state)
            chosen, *others = (tasks.index(task) for task in ready)
            self.others.extend([*self.made, other] for other in others)
        self.made.append(chosen)
        return tasks[chosen]

    def _can(self, task: Task) -> bool:
        return not task.done and not task.stopped and task.process.wake <= self.schedule.disk.clock


_ALONE = frozenset(
    ("close", "fstat", "start_flush", "free", "map", "read", "reserve", "sync", "touch", "truncate", "write")
)
"""Calls that may as well come together with the one before: they touch what only this process is at, or nobody sees
them but by a call that is not among them."""


def _state(disk: SimulatedDisk) -> int:
    return _state_of(disk.tree.root)


def _state_of(node: Node) -> int:
    locks = frozenset((getattr(file, "about", ""), strong) for file, strong in node.locks.items())
    if node.kind == "dir":
        return hash((locks, frozenset((name, child.ino, _state_of(child)) for name, child in node.entries.items())))
    return hash((node.size, frozenset(node.pages.items()), locks, node.opened, node.leased is not None))


def _process(disk: SimulatedDisk) -> Process:
    process = _Recorded(disk, disk.next_id())
    disk.processes.append(process)
    return process


class _Recorded(Process):
    """A process that keeps a sum of everything its disk ever told it: with the same sum it goes on the same way."""

    trail = 0

    def _record(self, verb: str, result: object) -> None:
        self.trail = hash((self.trail, verb, result))


class _RecordedWord:
    def __init__(self, process: _Recorded, word: Word) -> None:
        self._process = process
        self._word = word

    def get(self) -> int:
        value = self._word.get()
        self._process._record("get", value)  # noqa: SLF001
        return value


def _seen(result: object) -> object:
    if isinstance(result, Handle):
        return result.node.ino  # type: ignore[attr-defined]
    if isinstance(result, _Word):
        return None
    if isinstance(result, Stat):
        return (result.kind, result.size, result.inode)
    if isinstance(result, dict):
        return tuple(sorted((key, tuple(sorted(value))) for key, value in result.items()))
    return tuple(sorted(result)) if isinstance(result, list) else result


def _recorded(verb: str) -> Callable[..., Any]:
    original: Callable[..., Any] = getattr(Process, verb)

    def call(self: _Recorded, *arguments: Any, **named: Any) -> Any:
        try:
            result = original(self, *arguments, **named)
        except OSError as error:
            self._record(verb, error.errno or errno.EIO)
            raise
        told = bytes(memoryview(arguments[1])[:result]) if verb == "read" else _seen(result)
        self._record(verb, (self.about, told))
        return _RecordedWord(self, result) if verb == "word" else result

    return call


for _verb in (
    *("pause", "dir", "make_dir", "create", "open", "read", "write", "truncate", "sync", "rename", "remove"),
    *("remove_dir", "names", "stat", "fstat", "lock", "word", "close"),
    *("lease", "openers", "elapsed", "trim"),
):
    setattr(_Recorded, _verb, _recorded(_verb))
