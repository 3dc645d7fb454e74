"""Worlds by number: each seed is a history of processes, faults and power cuts on a simulated disk, judged by a model.

One command plays one again, with every call to the disk if asked::

    python -m layercache.testing.simulation --seed 17 --trace
    python -m layercache.testing.simulation --seeds 0:10000
"""

from __future__ import annotations

import argparse
import errno
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache

from layercache.store import NamespaceName, Store
from layercache.testing._actor import REFERENCES, Actor
from layercache.testing.disk import Fault, Process, SimulatedDisk
from layercache.testing.model import CONTENTS, NAMESPACES, Content, Model, ViolationError, orphans
from layercache.testing.schedule import ByChance, Event, Schedule, Task

__all__ = ["judge", "main", "play", "started"]

_VERBS = (
    *("create", "open", "read", "write", "reserve", "truncate", "sync", "rename", "remove", "remove_dir", "names"),
    *("dir", "make_dir", "stat", "fstat", "lock", "map"),
)
_CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EROFS)

Operation = Callable[[Actor], None]


def play(seed: int, *, trace: Callable[[str], None] | None = None) -> Counter[str]:
    """Play one world to its end and return what happened in it.

    :raises ViolationError: when a law of the store does not hold in it.
    """
    rng = random.Random(seed)
    world = _World(rng, trace)
    for _ in range(rng.choice((1, 1, 1, 2))):
        world.act()
    judge(world.model, rng)
    return world.seen


class _World:
    def __init__(self, rng: random.Random, trace: Callable[[str], None] | None) -> None:
        self.rng = rng
        self.seen: Counter[str] = Counter()
        self._trace = trace
        start = rng.choices(("namespace", "root", "nothing"), (8, 1, 1))[0]
        self.disk = started(start).clone()
        self.disk.rng = rng
        self.disk.tick = rng.choice((0.00001, 0.0001, 0.001))
        self.model = Model(self.disk)
        self.seen[f"start: {start}"] += 1
        if rng.random() < 0.12:
            self.model.full = True
            self.disk.capacity = (self.disk.used + rng.randint(0, 40)) * 4096
            self.seen["small disk"] += 1

    def act(self) -> None:
        """Run some processes, and let happen to them what can happen."""
        rng, disk = self.rng, self.disk
        count = rng.choices((1, 2, 3, 4, 6), (35, 40, 15, 6, 4))[0]
        actors = [Actor(self.model, disk.process()) for _ in range(count)]
        programs = [self._program(rng.randint(1, 7 if count == 1 else 4)) for _ in actors]
        length = 45 * sum(map(len, programs))
        schedule = Schedule(disk, ByChance(rng, rng.choice((0.02, 0.1, 0.3, 0.6))))
        if self._trace is not None:
            schedule.trace = self._trace
        tasks = [schedule.spawn(actor.process, _run(actor, ops)) for actor, ops in zip(actors, programs, strict=True)]
        events: list[Event] = []
        if rng.random() < 0.55:
            events.append((rng.randint(1, length), schedule.power_off))
        if rng.random() < 0.3:
            events.append((rng.randint(1, length), self._kill(rng.choice(tasks))))
        if rng.random() < 0.08 and count > 1:
            events.extend(self._stop(rng.choice(tasks), rng.randint(1, length), rng.randint(1, 3 * length)))
        if rng.random() < 0.08:
            events.append((rng.randint(1, length), self._rot))
        schedule.events = sorted(events, key=lambda event: -event[0])
        if rng.random() < 0.25:
            for _ in range(rng.randint(1, 3)):
                verb = rng.choice(_VERBS)
                code = rng.choice((*_CODES, 0)) if verb == "read" else rng.choice(_CODES)
                if verb == "sync" or rng.random() < 0.5:
                    code = errno.EIO
                disk.faults.append(Fault(verb, rng.randint(1, 60), code, sticky=rng.random() < 0.2))
        schedule.run()
        fired = sum(fault.fired for fault in disk.faults)
        self.model.harmed |= fired > 0
        self.seen["faults"] += fired
        disk.faults = []
        self.seen["steps"] += disk.steps
        self.seen["processes"] += count
        if schedule.cut:
            self.seen["power cuts"] += 1
            self._say("the power is cut")
            disk.crash(rng)
            self.model.after_crash()
        else:
            for process in disk.processes:
                process.kill()
            disk.processes = []
        self.model.leases = []

    def _program(self, length: int) -> list[Operation]:
        return [self._operation() for _ in range(length)]

    def _operation(self) -> Operation:
        rng = self.rng
        namespace = rng.choices(NAMESPACES, (4, 1))[0]
        content = _content(rng)
        reference = rng.choice(REFERENCES)
        kind = rng.choices(
            ("put", "get", "remove", "purge", "partial", "lie", "ref", "list", "recover", "reopen", "linger"),
            (30, 20, 10, 8, 4, 4, 8, 4, 8, 4, 3),
        )[0]
        self.seen[kind] += 1
        pieces, keep, wait = rng.randint(1, 3), rng.random() < 0.3, rng.choice((0.0, 0.0, 0.05))
        lie, ranges = rng.choice(("short", "long", "wrong")), random.Random(rng.getrandbits(32))
        match kind:
            case "put":
                return lambda actor: actor.put(namespace, content, pieces=pieces, keep=keep)
            case "get":
                whole = rng.random() < 0.6
                return lambda actor: actor.get(namespace, content, keep=keep, ranges=None if whole else ranges)
            case "remove":
                return lambda actor: actor.remove(namespace, content.digest)
            case "purge":
                return lambda actor: actor.purge(namespace, wait=wait)
            case "partial":
                return lambda actor: actor.put(namespace, content, pieces=pieces + 1, stop_after=pieces)
            case "lie":
                stop = rng.choice((None, 1))
                return lambda actor: actor.put(namespace, content, pieces=pieces + 1, lie=lie, stop_after=stop)
            case "ref":
                return rng.choice(
                    (
                        lambda actor: actor.set_ref(namespace, reference, content),
                        lambda actor: actor.get_ref(namespace, reference),
                        lambda actor: actor.remove_ref(namespace, reference),
                    )
                )
            case "list":
                return lambda actor: actor.list(namespace)
            case "recover":
                return lambda actor: _ignore(actor.recover())
            case "linger":
                seconds = rng.choice((0.001, 0.1, 6.0))
                return lambda actor: actor.linger(seconds)
            case _:
                return lambda actor: actor.close()

    def _kill(self, task: Task) -> Callable[[], None]:
        def kill() -> None:
            if not task.done:
                self._say(f"process {task.process.pid} is killed")
                self.seen["kills"] += 1
                task.process.kill()

        return kill

    def _stop(self, task: Task, at: int, length: int) -> list[Event]:
        def stop() -> None:
            self._say(f"process {task.process.pid} is stopped")
            self.model.stopped = task.stopped = True
            self.seen["stops"] += 1

        def go_on() -> None:
            self._say(f"process {task.process.pid} goes on")
            task.stopped = False

        return [(at, stop), (at + length, go_on)]

    def _rot(self) -> None:
        files = [
            (path, node)
            for path, node in self.disk.files("data")
            if path[1:2] in (("blobs",), ("meta",)) and len(path) == 4 and len(path[3]) == 64
        ]
        if files:
            path, node = self.rng.choice(files)
            self._say(f"damage in {'/'.join(path)}")
            self.disk.rot(node, self.rng)
            self.model.harmed = True
            self.seen["damage"] += 1
            slot, _, number = path[0].partition(".")
            for content in CONTENTS:
                if content.digest.encoded == path[3]:
                    self.model.blob((slot, int(number)), content.digest).doubt(False, self.model.now())

    def _say(self, text: str) -> None:
        if self._trace is not None:
            self._trace(f"--- {text}")


def judge(model: Model, rng: random.Random) -> None:
    """Recover, perhaps with power cuts in between, and hold what is then there against every promise.

    :raises ViolationError: for a promise that is broken, or anything left over.
    """
    disk = model.disk
    disk.capacity, disk.faults = (None if rng.random() < 0.5 else disk.capacity), []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        _interrupted(model, rng)
    actor = Actor(model, disk.process())
    actor.recover()
    for left in orphans(disk):
        raise ViolationError(f"left after recovery: {left}")
    thorough = rng.random() < 0.25
    if thorough:
        actor.close()
        if actor.recover() > 0:
            raise ViolationError("a second recovery still finds something")
    for namespace in NAMESPACES:
        home = model.home(namespace)
        if home is None:
            continue
        for content in CONTENTS:
            if content in CONTENTS[:4] or (home, content.digest) in model.blobs:
                actor.get(namespace, content)
        for reference in REFERENCES:
            actor.get_ref(namespace, reference)
    homes = [model.home(namespace) for namespace in NAMESPACES]
    for home, digest in model.promised():
        if home not in homes:
            raise ViolationError(f"lost with its namespace: {digest} of {home}")
    model.check_aside()
    if model.receipts or model.fenced:
        actor.check_receipts()
    if thorough:
        disk.capacity, model.full = None, False
        actor.put(NAMESPACES[0], CONTENTS[0])
        actor.get(NAMESPACES[0], CONTENTS[0])
    actor.close()
    disk.processes = []


def _interrupted(model: Model, rng: random.Random) -> None:
    disk = model.disk
    actor = Actor(model, disk.process())
    schedule = Schedule(disk, ByChance(rng, 0.0))
    schedule.events = [(int(rng.expovariate(0.01)) + 1, schedule.power_off)]
    schedule.spawn(actor.process, lambda: _ignore(actor.recover()))
    schedule.run()
    disk.crash(rng)
    model.after_crash()


def _run(actor: Actor, operations: list[Operation]) -> Callable[[], None]:
    def program() -> None:
        for operation in operations:
            operation(actor)
        actor.close()

    return program


def _content(rng: random.Random) -> Content:
    return CONTENTS[rng.choices(range(6), (400, 200, 100, 60, 20, 20))[0]]


def _ignore(_: object) -> None:
    pass


@cache
def started(kind: str) -> SimulatedDisk:
    """Return a disk to begin with, to be cloned: with ``nothing`` on it, a ``root``, or a ``namespace`` in one."""
    disk = SimulatedDisk()
    if kind != "nothing":
        process: Process = disk.process()
        store = Store("", disk=process)
        if kind == "namespace":
            generation = store.generation(NamespaceName(NAMESPACES[0]), create=True)
            assert generation is not None
            generation.close()
        store.close()
        disk.tree.root.locks = {}
    return disk


def main(arguments: list[str] | None = None) -> int:
    """Play seeds from the command line."""
    parser = argparse.ArgumentParser(prog="python -m layercache.testing.simulation", description=__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--seed", type=int, help="play this one")
    group.add_argument("--seeds", metavar="FROM:TO", help="play a range")
    parser.add_argument("--trace", action="store_true", help="print every call to the disk")
    options = parser.parse_args(arguments)
    logging.getLogger("layercache.store").setLevel(logging.CRITICAL)
    first, last = (options.seed, options.seed + 1) if options.seeds is None else map(int, options.seeds.split(":"))
    seen: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            seen += play(seed, trace=print if options.trace else None)
        except Exception:
            sys.stderr.write(f"seed {seed}: python -m layercache.testing.simulation --seed {seed} --trace\n")
            raise
    sys.stdout.write(f"{last - first} seeds: {dict(sorted(seen.items()))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
