"""Coming back to a host that said no: a gate for everybody, jitter, a budget."""

from __future__ import annotations

import itertools
import threading

import pytest

from layercache.control import Control
from layercache.errors import DeadlineError
from layercache.registry._pace import Pace


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now


class Waits(Control):
    """A control whose waits move the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, seconds: float) -> None:
        self.clock.waits.append(seconds)
        self.clock.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_open_gate_costs_no_wait(clock: Clock) -> None:
    """Nothing was ever refused."""
    Pace(clock=clock).enter("h", Waits(clock))

    assert not clock.waits


def test_a_shut_gate_keeps_everybody_out_for_the_time_asked_for(clock: Clock) -> None:
    """Of that host, and of no other."""
    pace = Pace(clock=clock, jitter=lambda: 0.0)
    pace.shut("h", 7.0, entered=pace.now())

    pace.enter("other", Waits(clock))
    assert clock.now == 100.0
    assert pace.is_shut("h")
    pace.enter("h", Waits(clock))
    assert clock.now == pytest.approx(107.0)
    assert not pace.is_shut("h")


def test_who_waited_does_not_come_back_all_at_once(clock: Clock) -> None:
    """Spread over the time of one backoff."""
    chance = itertools.cycle([0.0, 0.25, 0.5, 0.75])
    pace = Pace(clock=clock, jitter=lambda: next(chance))
    pace.shut("h", 5.0, entered=pace.now())

    starts = []
    for _ in range(4):
        clock.now = 100.0
        pace.enter("h", Waits(clock))
        starts.append(clock.now)

    assert min(starts) >= 105.0
    assert len(set(starts)) == 4
    assert max(starts) - min(starts) >= 0.1


def test_many_refusals_at_once_are_one_strike(clock: Clock) -> None:
    """Requests that were on their way when the gate shut say nothing new; later ones double the wait."""
    pace = Pace(clock=clock, jitter=lambda: 1.0)
    entered = pace.now()
    clock.now += 0.01
    for _ in range(200):
        pace.shut("h", 0.0, entered=entered)
    once = pace._hosts["h"].opens - clock.now
    for _ in range(4):
        clock.now = pace._hosts["h"].opens + 0.001
        pace.shut("h", 0.0, entered=pace.now())
    later = pace._hosts["h"].opens - clock.now

    assert once == pytest.approx(0.2)
    assert later == pytest.approx(3.2)


def test_a_good_answer_forgives(clock: Clock) -> None:
    """The next refusal starts from the smallest wait."""
    pace = Pace(clock=clock, jitter=lambda: 1.0)
    for _ in range(6):
        clock.now += 100
        pace.shut("h", 0.0, entered=pace.now())
    clock.now += 100

    pace.served("h")
    pace.shut("h", 0.0, entered=pace.now())

    assert pace._hosts["h"].opens - clock.now == pytest.approx(0.2)


def test_the_budget_of_repetitions_is_spent_and_comes_back(clock: Clock) -> None:
    """32 at once, then one a second, and half a one for each good answer; per host."""
    pace = Pace(clock=clock)

    assert sum(pace.repeat("h") for _ in range(100)) == 32
    assert pace.repeat("other")
    clock.now += 5
    assert sum(pace.repeat("h") for _ in range(100)) == 5
    for _ in range(8):
        pace.served("h")
    assert sum(pace.repeat("h") for _ in range(100)) == 4


def test_a_wait_at_the_gate_ends_with_the_callers_time() -> None:
    """On the real clock."""
    pace = Pace()
    pace.shut("h", 30.0, entered=pace.now())

    with pytest.raises(DeadlineError):
        pace.enter("h", Control(timeout=0.05))


def test_many_threads_against_a_throttling_host_slow_down() -> None:
    """200 requests at once: the first refusals shut the gate, the others do not follow at once."""
    pace = Pace()
    refused = []
    lock = threading.Lock()

    def work() -> None:
        control = Control(timeout=0.9)
        try:
            while True:
                pace.enter("h", control)
                entered = pace.now()
                with lock:
                    refused.append(entered)
                pace.shut("h", 0.0, entered)
        except DeadlineError:
            pass

    threads = [threading.Thread(target=work) for _ in range(200)]
    start = pace.now()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    late = [when for when in refused if when - start > 0.3]
    assert len(late) < 40
    assert len(refused) < 300


def test_the_hosts_kept_are_bounded(clock: Clock) -> None:
    """Redirects to ever new hosts do not fill the memory."""
    pace = Pace(clock=clock)

    for number in range(1000):
        pace.repeat(str(number))

    assert len(pace._hosts) <= 256
