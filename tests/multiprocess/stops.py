"""Purges while a reader, a writer or another purger is stopped between any two of its calls, and goes on or is killed.

    python -m tests.multiprocess.stops --rounds 500
    python -m tests.multiprocess.stops --seed 7 --only 31      one round of that seed

One process stops itself (SIGSTOP) before a call drawn by chance. The namespace is purged meanwhile: that call must come
back by its deadline. Then the process goes on (SIGCONT), or is killed, and must not get a byte any more; at the end
everything is gone and the receipts are whole. In other rounds somebody holds a file past the library: open, mapped, or
through a fork.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layercache.errors import LayerCacheError, NamespacePurgedError, NotFoundError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Generation, NamespaceName, Store
from layercache.store._disk import PosixDisk
from tests.crash.loopfs import enter_private_mounts

__all__ = ["Round", "main"]

Role = Literal["reader", "writer", "purger", "open", "mapped", "fork"]

LATE = 3.0
"""Seconds after its deadline by which a purge must be back. It is a tenth where nobody else has the machine."""

_NAME = NamespaceName("acme/endpoint")
_DATA = random.Random(4).randbytes(300_000)
_MORE = random.Random(5).randbytes(300_000)
_STEPS = {"reader": 60, "writer": 90, "purger": 220}
_VERBS = (
    *("dir", "make_dir", "create", "open", "read", "write", "reserve", "truncate", "sync", "rename", "remove"),
    *("remove_dir", "names", "stat", "fstat", "lock", "lease", "word", "close"),
)


@dataclass(frozen=True, slots=True)
class Round:
    """Who is stopped before which of his calls, whether he goes on, and how long the purge waits.

    A reader's calls below zero count from where he has the blob open.
    """

    number: int
    role: Role
    at: int
    killed: bool
    wait: float

    @staticmethod
    def of(seed: int, number: int) -> Round:
        rng = random.Random(f"{seed} {number}")
        roles: tuple[Role, ...] = ("reader", "writer", "purger", "reader", "purger", "open", "mapped", "fork")
        role = roles[number % len(roles)]
        at = rng.randint(1, _STEPS.get(role, 1))
        if role == "reader" and rng.random() < 0.6:
            at = -rng.randint(1, 8)  # while it reads, not on the way there
        return Round(number, role, at, rng.random() < 0.3, rng.choice((0.0, 0.1, 0.3)))


@dataclass(slots=True)
class Outcome:
    """What one round showed."""

    stopped: bool = False
    late: float = 0.0
    back: float = 0.0
    said: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


class _Other:
    """A forked process that plays a role and says what it got."""

    def __init__(self, program: Callable[[Callable[..., None]], None]) -> None:
        self._out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._out)
                program(lambda **what: _say(into, what))
            except BaseException as error:  # noqa: BLE001 - the process ends here
                os.write(into, json.dumps({"wrong": f"{type(error).__name__}: {error}"}).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(into)
        self.ended = False

    def until_stopped(self) -> bool:
        """Wait until it has stopped itself; false where it came to its end instead."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self.ended = not os.WIFSTOPPED(status)
        return not self.ended

    def until_said(self) -> dict[str, Any]:
        """Return the next thing that it says."""
        raw = b""
        while not raw.endswith(b"\n"):
            raw += os.read(self._out, 1) or b"{}\n"
        said: dict[str, Any] = json.loads(raw)
        return said

    def end(self, how: signal.Signals) -> list[dict[str, Any]]:
        """Let it go on, or kill it; return everything else it says until its end."""
        if not self.ended:
            os.kill(self.pid, how)
            os.waitpid(self.pid, 0)
            self.ended = True
        raw = b""
        while data := os.read(self._out, 1 << 16):
            raw += data
        os.close(self._out)
        return [json.loads(line) for line in raw.splitlines()]


def _say(into: int, what: dict[str, Any]) -> None:
    os.write(into, json.dumps(what).encode() + b"\n")


def _stopping(root: Path, left: list[int]) -> PosixDisk:
    """Return a disk whose process stops when so many calls are left that there is none."""
    disk = PosixDisk.open_root(root)

    def counted(verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            return verb(*args, **options)

        return call

    for name in _VERBS:
        setattr(disk, name, counted(getattr(disk, name)))
    return disk


def _generation(store: Store) -> Generation:
    found = store.generation(_NAME, create=True)
    if found is None:
        raise AssertionError("there is no namespace")
    return found


def _put(store: Store, data: bytes) -> Digest:
    generation = _generation(store)
    descriptor = Descriptor(OCTET_STREAM, Digest.of(data), len(data))
    try:
        ingest = generation.begin(descriptor)
        if ingest is not None:
            with ingest:
                ingest.feed(data[ingest.offset :])
                ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="stops").close()
    finally:
        generation.close()
    return descriptor.digest


def _read(root: Path, at: int, say: Callable[..., None]) -> None:
    left = [at]
    store = Store(root, disk=_stopping(root, left))
    generation = _generation(store)
    try:
        with generation.open(Digest.of(_DATA)) as blob:
            left[0] = -at if at < 0 else left[0]
            for _ in range(8):
                began = generation.generation
                if blob.pread(100_000, 1000) != _DATA[100_000:101_000]:
                    say(wrong="other bytes")
                say(read=began, when=time.monotonic())
    except (NamespacePurgedError, NotFoundError):  # not there: it came after the purge, to the next generation
        say(purged=True)
    except LayerCacheError as error:
        say(error=f"{type(error).__name__}: {error}")
    finally:
        generation.close()
        store.close()


def _write(root: Path, at: int, say: Callable[..., None]) -> None:
    store = Store(root, disk=_stopping(root, [at]))
    try:
        _put(store, _MORE)
        say(put=True)
    except LayerCacheError as error:
        say(error=f"{type(error).__name__}: {error}")
    finally:
        store.close()


def _purge(root: Path, at: int, say: Callable[..., None]) -> None:
    store = Store(root, disk=_stopping(root, [at]))
    try:
        say(receipt=store.purge(_NAME, wait=20.0).level)
    except LayerCacheError as error:
        say(error=f"{type(error).__name__}: {error}")
    finally:
        store.close()


def _hold(root: Path, role: Role, say: Callable[..., None]) -> None:
    (path,) = root.glob(f"data/*/blobs/*/{Digest.of(_DATA).encoded}")
    store = Store(root)
    generation = _generation(store)
    fd = os.open(path, os.O_RDONLY)
    if role == "mapped":
        held = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        os.close(fd)
        say(holds=held[0] == _DATA[0])
    elif role == "fork":
        # The fork of a reader that ends holds nothing: what it got of our handles is closed in it.
        os.close(fd)
        blob = generation.open(Digest.of(_DATA))
        child = os.fork()
        if child == 0:
            signal.pause()
        blob.close()
        say(child=child)
    else:
        say(holds=True)
    signal.pause()


def play(root: Path, plan: Round) -> Outcome:
    """Play one round on a root of its own; say what is wrong."""
    outcome = Outcome()
    store = Store(root)
    _put(store, _DATA)
    programs: dict[str, Callable[[Callable[..., None]], None]] = {
        "reader": lambda say: _read(root, plan.at, say),
        "writer": lambda say: _write(root, plan.at, say),
        "purger": lambda say: _purge(root, plan.at, say),
    }
    other = _Other(programs.get(plan.role, lambda say: _hold(root, plan.role, say)))
    try:
        outcome.findings += (
            _held(store, other, plan, outcome) if plan.role not in programs else (_stopped(store, other, plan, outcome))
        )
        outcome.findings += [said["wrong"] for said in outcome.said if "wrong" in said]
        outcome.findings += _finished(root, store)
    finally:
        if not other.ended:
            other.end(signal.SIGKILL)
        store.close()
    return outcome


def _stopped(store: Store, other: _Other, plan: Round, outcome: Outcome) -> Iterator[str]:
    outcome.stopped = other.until_stopped()
    try:
        level = _timed(store, plan, outcome)
    except LayerCacheError as error:
        # It may have been stopped with the lock in hand under which a purge begins: then that is said.
        if "stopped process" not in error.hint or not outcome.stopped:
            yield f"the purge failed: {error!r}"
        level = ""
    if outcome.late > LATE:
        yield f"the purge was back {outcome.late:.2f} s after its deadline"
    outcome.said = other.end(signal.SIGKILL if plan.killed else signal.SIGCONT)
    if level and outcome.stopped and plan.role == "reader":
        # What it said before it was stopped, it said before the fence; whatever it says later is later than the purge.
        late = [said for said in outcome.said if said.get("when", 0.0) > outcome.back]
        yield from (f"a byte was given out after the fence: {said}" for said in late)
    for said in outcome.said:
        if "error" in said and "stopped process" not in said["error"] and plan.role != "writer":
            yield f"the {plan.role} failed: {said['error']}"


def _held(store: Store, other: _Other, plan: Round, outcome: Outcome) -> Iterator[str]:
    said = other.until_said()
    level = _timed(store, plan, outcome)
    if outcome.late > LATE:
        yield f"the purge was back {outcome.late:.2f} s after its deadline"
    if plan.role == "fork":
        receipt = store.purge(_NAME, wait=20.0)
        if receipt.level != "unlinked":
            yield f"a fork keeps the purge from its end: {receipt}"
        os.kill(said["child"], signal.SIGKILL)
    else:
        if level != "fenced":
            yield f"somebody has a file {plan.role}, and the receipt says {level}"
        receipt = store.purge(_NAME, wait=5.0)
        if other.pid not in receipt.pending:
            yield f"the holder {other.pid} is not named: {receipt}"
    other.end(signal.SIGKILL)


def _timed(store: Store, plan: Round, outcome: Outcome) -> str:
    began = time.monotonic()
    level = store.purge(_NAME, wait=plan.wait).level
    outcome.back = time.monotonic()
    outcome.late = outcome.back - began - plan.wait
    return level


def _finished(root: Path, store: Store) -> Iterator[str]:
    """Everybody is gone: what is left must go, be recorded, and let the namespace begin anew with nothing in it."""
    end = time.monotonic() + 20.0
    store.resume_purges(wait=20.0)
    while list(root.glob("trash/*")) and time.monotonic() < end:
        time.sleep(0.01)
    yield from (f"left in trash: {path.name}" for path in root.glob("trash/*"))
    generation = _generation(store)
    lived = generation.generation
    generation.close()
    receipt = store.purge(_NAME, wait=20.0)
    if (receipt.generation, receipt.level) != (lived, "unlinked"):
        yield f"generation {lived} cannot be purged: {receipt}"
    yield from (f"left in data: {path.name}" for path in root.glob("data/*"))
    ends = Counter(one.generation for one in store.receipts() if one.ends)
    yield from (f"{count} records say that generation {number} is gone" for number, count in ends.items() if count > 1)
    yield from store.verify_receipts().problems


def main(arguments: list[str] | None = None) -> int:
    """Play rounds; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.multiprocess.stops", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=int(time.time() // 86400))
    parser.add_argument("--only", type=int, help="one round")
    options = parser.parse_args(arguments)
    logging.disable()
    place = str(enter_private_mounts()) if os.geteuid() == 0 else None
    started = time.monotonic()
    failed = 0
    seen: Counter[str] = Counter()
    worst = 0.0
    for number in range(options.rounds) if options.only is None else [options.only]:
        plan = Round.of(options.seed, number)
        with tempfile.TemporaryDirectory(prefix="layercache-stops.", dir=place) as home:
            outcome = play(Path(home) / "root", plan)
        seen[plan.role] += 1
        seen["stopped"] += outcome.stopped
        worst = max(worst, outcome.late)
        for finding in outcome.findings:
            again = f"python -m tests.multiprocess.stops --seed {options.seed} --only {number}"
            print(f"FAILED {finding}\n    {again}  {plan}")
        failed += bool(outcome.findings)
    figures = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
    print(
        f"stops: {figures}, seed {options.seed}, a purge was back {worst:.2f} s after its deadline at the latest,"
        f" {failed} failed, {time.monotonic() - started:.1f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
