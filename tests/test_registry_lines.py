"""The budget of connections: bounds, turns, fairness, an end to every wait."""

from __future__ import annotations

import threading
import time

import pytest

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError
from layercache.registry._lines import Lines

FOR = 10.0


def waiting(lines: Lines, count: int) -> None:
    end = time.monotonic() + FOR
    while len(lines._waiting) != count:
        assert time.monotonic() < end
        time.sleep(0.001)


def queue(lines: Lines, order: list[str], *wants: str, host: str = "a") -> list[threading.Thread]:
    """Start waiters one after the other; each notes its name when it has its turn."""
    threads = []
    for number, who in enumerate(wants):

        def want(who: str = who) -> None:
            lines.take(host, who, Control(timeout=FOR))
            order.append(who)

        threads.append(threading.Thread(target=want))
        threads[-1].start()
        waiting(lines, number + 1)
    return threads


def test_there_are_so_many_to_a_host_and_so_many_in_all() -> None:
    """A full host keeps nobody from another one, until all are used up."""
    lines = Lines(in_all=3, per_host=2)
    assert [lines.take_now("a", who) for who in "xyz"] == [True, True, False]
    assert [lines.take_now("b", who) for who in "xy"] == [True, False]
    lines.give("a", "x")
    assert lines.take_now("b", "y")
    assert lines.in_use == 3


def test_one_client_gets_half_of_a_host() -> None:
    """Whatever it transfers, and however slowly: others find a connection."""
    lines = Lines(per_host=4)
    assert [lines.take_now("a", "big") for _ in range(3)] == [True, True, False]
    assert [lines.take_now("a", "small") for _ in range(3)] == [True, True, False]
    assert lines.take_now("b", "big")


def test_the_next_one_goes_to_who_has_the_fewest() -> None:
    """One who holds many and waits for more comes after one who holds none, though first to ask."""
    lines = Lines(in_all=9, per_host=4)
    for who in ("big", "big", "x", "y"):
        lines.take("a", who, Control())
    order: list[str] = []
    threads = queue(lines, order, "big", "small", "other")
    for done, who in enumerate(["x", "y", "big"]):
        lines.give("a", who)
        end = time.monotonic() + FOR
        while len(order) <= done:
            assert time.monotonic() < end
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == ["small", "other", "big"]
    assert lines.in_use == 4


def test_nobody_overtakes_who_waits() -> None:
    """What is given back is the waiter's, not that of a thread which comes at that moment."""
    lines = Lines(in_all=9, per_host=1)
    assert lines.take_now("a", "x")
    order: list[str] = []
    (thread,) = queue(lines, order, "y")
    lines.give("a", "x")
    assert not lines.take_now("a", "x")
    thread.join()
    assert (order, lines.in_use) == (["y"], 1)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_wait_that_is_given_up_takes_nothing(how: str) -> None:
    """And who comes after has the turn."""
    lines = Lines(in_all=9, per_host=1)
    assert lines.take_now("a", "x")
    cancel = threading.Event()
    if how == "cancel":
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(CancelledError):
            lines.take("a", "y", Control(cancel=cancel))
    else:
        with pytest.raises(DeadlineError):
            lines.take("a", "y", Control(timeout=0.1))
    lines.give("a", "x")
    assert lines.in_use == 0
    assert lines.take_now("a", "z")


def test_readers_that_do_nothing_keep_nobody_out_for_ever() -> None:
    """go-containerregistry#2276, #2309, #2373: readers that were opened and not read held all there were."""
    lines = Lines(in_all=1, per_host=1, patience=0.2)
    assert lines.take_now("a", "idle")
    start = time.monotonic()
    lines.take("a", "x", Control(timeout=FOR))
    assert time.monotonic() - start < FOR
    assert lines.in_use == 2
    lines.give("a", "x")
    lines.give("a", "idle")
    assert lines.in_use == 0
