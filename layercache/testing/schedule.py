"""Virtual processes that run one at a time, switched where a seed or an explorer says.

A process runs until a call to its disk. There another may go on instead, or the process is stopped, killed or loses the
power. Waiting costs virtual time only: whoever pauses is asleep until the others have used up that much of it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import ClassVar, Protocol

from layercache.testing.disk import KilledError, Process, SimulatedDisk
from layercache.testing.model import ViolationError

__all__ = ["ByChance", "Choice", "Event", "Schedule", "Task"]

_MOST_STEPS = 300_000

Event = tuple[int, Callable[[], None]]


class Task:
    """A virtual process on the schedule."""

    __slots__ = ("baton", "done", "error", "process", "program", "started", "stopped")

    def __init__(self, process: Process, program: Callable[[], None]) -> None:
        self.process = process
        self.program = program
        self.baton = threading.Lock()
        self.baton.acquire()
        self.started = self.done = self.stopped = False
        self.error: BaseException | None = None


class Choice(Protocol):
    """Who goes on."""

    def stay(self, task: Task, verb: str) -> bool:
        """Tell whether the task that is about to call ``verb`` simply goes on."""
        ...

    def pick(self, ready: list[Task]) -> Task:
        """Return one of the tasks that can go on."""
        ...


class ByChance:
    """Switches at each call with the probability ``switch``."""

    def __init__(self, rng: random.Random, switch: float) -> None:
        self._rng = rng
        self._switch = switch

    def stay(self, task: Task, verb: str) -> bool:  # noqa: ARG002 - chance does not look
        """Tell whether the task simply goes on."""
        return self._rng.random() >= self._switch

    def pick(self, ready: list[Task]) -> Task:
        """Return any of them."""
        return ready[0] if len(ready) == 1 else self._rng.choice(ready)


class Schedule:
    """Runs the programs of virtual processes to their end.

    Each program has a thread of its own, but only the one with the baton runs, so that the same choices give the same
    run.

    :ivar events: what happens from outside, each at its step (kill, stop, go on, cut the power), the last one first.
    :ivar trace: told of every call.
    """

    def __init__(self, disk: SimulatedDisk, choice: Choice) -> None:
        self.disk = disk
        self.tasks: list[Task] = []
        self.events: list[Event] = []
        self.cut = False
        self.trace: Callable[[str], None] | None = None
        self._choice = choice
        self._first = disk.steps
        self._finished = threading.Lock()
        self._finished.acquire()
        self._current: Task | None = None

    def spawn(self, process: Process, program: Callable[[], None]) -> Task:
        """Add a process."""
        task = Task(process, program)
        self.tasks.append(task)
        return task

    def power_off(self) -> None:
        """End every process where it stands."""
        self.cut = True
        for task in self.tasks:
            task.process.kill()

    def run(self) -> None:
        """Run all to the end, or until the power is off.

        :raises ViolationError: what a program raised, or when they do not come to an end.
        """
        self.disk.hook = self._step
        following = self._following()
        if following is not None:
            self._resume(following)
            self._finished.acquire()
        self.disk.hook = None
        for task in self.tasks:
            if task.error is not None:
                raise task.error

    # -- inside; all of it runs in the thread that has the baton

    def _step(self, process: Process, verb: str) -> None:
        task = self._current
        if task is None or task.process is not process:
            return
        steps = self.disk.steps - self._first
        while self.events and steps >= self.events[-1][0]:
            self.events.pop()[1]()
        if process.dead:
            return
        if self.trace is not None:
            self.trace(f"{steps:5} {process.pid} {verb} {process.about}")
        if steps > _MOST_STEPS:
            raise ViolationError("no end: some process waits for ever")
        if verb != "pause" and not task.stopped and self._choice.stay(task, verb):
            return
        following = self._following()
        if following is not None and following is not task:
            self._resume(following)
            task.baton.acquire()

    def _following(self) -> Task | None:
        """Return who goes on; time passes until somebody can."""
        while True:
            clock = self.disk.clock
            waiting = [task for task in self.tasks if not task.done]
            ready = [task for task in waiting if task.process.dead or (not task.stopped and task.process.wake <= clock)]
            if ready:
                task = self._choice.pick(ready)
                if task.started or not task.process.dead:
                    return task
                task.done = True
            elif not waiting:
                return None
            else:
                if all(task.stopped for task in waiting):
                    for task in waiting:
                        task.stopped = False
                self.disk.clock = max(clock, min(task.process.wake for task in waiting if not task.stopped))

    def _resume(self, task: Task) -> None:
        self._current = task
        if task.started:
            task.baton.release()
        else:
            task.started = True
            _start(lambda: self._run(task))

    def _run(self, task: Task) -> None:
        try:
            task.program()
        except KilledError:
            pass
        except BaseException as error:  # noqa: BLE001 - told by run()
            task.error = error
            self.power_off()
        task.done = True
        following = self._following()
        if following is not None:
            self._resume(following)
        else:
            self._finished.release()


class _Worker(threading.Thread):
    """A thread that is used again: starting one costs more than many a program."""

    idle: ClassVar[list[_Worker]] = []

    def __init__(self) -> None:
        super().__init__(daemon=True, name="simulated process")
        self.ready = threading.Lock()
        self.ready.acquire()
        self.job: Callable[[], None] = _nothing
        self.start()

    def run(self) -> None:
        while True:
            self.ready.acquire()
            self.job()
            _Worker.idle.append(self)


def _nothing() -> None:
    pass


def _start(job: Callable[[], None]) -> None:
    worker = _Worker.idle.pop() if _Worker.idle else _Worker()
    worker.job = job
    worker.ready.release()
