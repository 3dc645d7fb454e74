"""The scheduler: the same seed is the same run; processes are switched, stopped and killed between two calls."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial

import pytest

from layercache.testing.disk import Process, SimulatedDisk
from layercache.testing.model import ViolationError
from layercache.testing.schedule import ByChance, Schedule
from layercache.testing.simulation import play


def trace_of(seed: int) -> list[str]:
    """Return every call of a world."""
    lines: list[str] = []
    play(seed, trace=lines.append)
    return lines


@pytest.mark.parametrize("seed", range(12))
def test_a_seed_is_one_run(seed):
    """Playing it again makes the same calls in the same order."""
    assert trace_of(seed) == trace_of(seed)


def test_a_seed_is_the_same_run_in_another_process():
    """Nothing hangs on the order of a hash, on a clock or on chance: the command replays it."""
    command = [sys.executable, "-m", "layercache.testing.simulation", "--seed", "3", "--trace"]
    outs = {
        subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }

    assert len(outs) == 1
    assert len(outs.pop().splitlines()) > 50


def append(process: Process, text: str, times: int, log: list[str]) -> None:
    """Call the disk some times and note whose turn it was."""
    for _ in range(times):
        process.names(process.root)
        log.append(text)


def test_processes_take_turns_at_calls_only():
    """With every call a switch may come; all programs come to their end."""
    log: list[str] = []
    disk = SimulatedDisk()
    schedule = Schedule(disk, ByChance(random.Random(1), 0.5))
    for name in "abc":
        process = disk.process()
        schedule.spawn(process, partial(append, process, name, 20, log))
    schedule.run()

    assert sorted(log) == sorted("abc" * 20)
    assert log != sorted(log)


def test_a_pause_lets_the_others_go_first_and_costs_no_time():
    """Waiting is virtual: who pauses goes on when the others have used up so much of the clock."""
    disk, log = SimulatedDisk(), []
    schedule = Schedule(disk, ByChance(random.Random(1), 0.0))
    one, two = disk.process(), disk.process()
    before = disk.clock

    def sleeper() -> None:
        one.pause(3600.0)
        log.append("sleeper")

    schedule.spawn(one, sleeper)
    schedule.spawn(two, lambda: append(two, "other", 3, log))
    schedule.run()

    assert log == ["other"] * 3 + ["sleeper"]
    assert disk.clock >= before + 3600.0


def test_a_killed_process_makes_no_call_more_not_even_to_clean_up():
    """What a program does on its way out after a kill changes nothing."""
    disk = SimulatedDisk()
    process = disk.process()
    schedule = Schedule(disk, ByChance(random.Random(1), 0.0))

    def program() -> None:
        try:
            process.create(process.root, "a")
            process.create(process.root, "b")
        finally:
            process.remove(process.root, "a")

    schedule.spawn(process, program)
    schedule.events = [(2, process.kill)]
    schedule.run()

    assert list(disk.tree.root.entries) == ["a"]


def test_what_a_program_raises_ends_the_run_and_is_told():
    """A broken promise in one process stops all of them."""
    disk = SimulatedDisk()
    one, two = disk.process(), disk.process()
    schedule = Schedule(disk, ByChance(random.Random(1), 0.5))

    def broken() -> None:
        one.names(one.root)
        raise ViolationError("broken")

    schedule.spawn(one, broken)
    schedule.spawn(two, lambda: append(two, "x", 10_000, []))
    with pytest.raises(ViolationError, match="broken"):
        schedule.run()
    assert two.dead


def test_a_process_that_waits_for_ever_is_a_violation():
    """No wait is without an end."""
    disk = SimulatedDisk()
    process = disk.process()
    schedule = Schedule(disk, ByChance(random.Random(1), 0.0))

    def program() -> None:
        while True:
            process.names(process.root)

    schedule.spawn(process, program)
    with pytest.raises(ViolationError, match="for ever"):
        schedule.run()
