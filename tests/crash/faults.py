"""A fault or a kill at every system call that a scenario makes on the root, injected by strace.

    python -m tests.crash.faults                                    a sweep; prints what it covered
    python -m tests.crash.faults --only put --point fsync:3:EIO     one point: the scenario's third fsync fails once
    python -m tests.crash.faults --only put --point fsync:3+:EIO    ... and every one after it
    python -m tests.crash.faults --only purge --finish cli          what is left of a purge is finished by the command

The scenario runs in a process forked from this one, so that no interpreter starts; strace attaches when it is ready and
sees nothing but its calls. A fresh process then recovers the root and compares it with what was promised.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from layercache.errors import LayerCacheError
from layercache.store._disk import PosixDisk
from tests.crash.examine import examine, finish_purges, report
from tests.crash.loopfs import enter_private_mounts
from tests.crash.scenarios import SCENARIOS, Actor, Event, Promises, read_events, untyped, warm, write_event

__all__ = ["Call", "Point", "main", "points", "run", "trace", "unavailable"]

_CALLS = (
    "openat,mkdirat,pwrite64,preadv,preadv2,pread64,fsync,fdatasync,fallocate,ftruncate,sync_file_range,renameat,renameat2,"
    "unlinkat,getdents64,newfstatat,fstat,fstatfs,flock,fcntl,close,utimensat,fchown,fchownat,linkat"
)
_CHANGING = {"openat", "mkdirat", "pwrite64", "fsync", "fdatasync", "fallocate", "ftruncate", "renameat", "renameat2"}
_INTERRUPTIBLE = {"openat", "pwrite64", "preadv", "preadv2", "fsync", "fallocate", "ftruncate", "close", "flock"}
_READS = ("preadv", "preadv2", "pread64")
_LINE = re.compile(r"^(?:\d+\s+)?(\w+)\((.*)\)\s+= (\S+)")
_FINISHES = ("open", "same", "cli")
_SHORT = 16  # as many zero bytes begin each piece
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Call:
    """The ``number``-th ``name`` of a scenario, with its arguments as strace shows them."""

    name: str
    number: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Point:
    """What is injected where. ``sticky``: also into every later call of that name."""

    scenario: str
    call: str
    number: int
    fault: str
    sticky: bool = False

    def __str__(self) -> str:
        return f"{self.call}:{self.number}{'+' if self.sticky else ''}:{self.fault}"

    @staticmethod
    def parse(scenario: str, text: str) -> Point:
        call, number, fault = text.split(":")
        return Point(scenario, call, int(number.rstrip("+")), fault, number.endswith("+"))

    def command(self) -> str:
        return f"python -m tests.crash.faults --only {self.scenario} --point {self}"

    def injection(self) -> str:
        if self.fault == "KILL":
            what = "signal=KILL"
        elif self.fault.startswith("short"):
            what = f"retval={self.fault[5:]}"
        else:
            what = f"error={self.fault}"
        return f"inject={self.call}:{what}:when={self.number}{'+' if self.sticky else ''}"

    @property
    def harmless(self) -> bool:
        """True for what every caller of the kernel must live with: the scenario goes on as if nothing had been."""
        return self.fault == "EINTR" or self.fault.startswith("short")


@dataclass(slots=True)
class Outcome:
    """What one point showed."""

    injected: int = 0
    log: str = ""
    events: list[Event] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def unavailable() -> str:
    """Say why strace cannot be used here; empty when it can."""
    if shutil.which("strace") is None:
        return "needs strace"
    child = subprocess.Popen(["sleep", "60"])
    try:
        attached = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", "trace=none", "-p", str(child.pid)],
            check=False,
            capture_output=True,
            timeout=0.3,
        )
        return f"strace may not attach here: {attached.stderr.decode(errors='replace').strip()}"
    except subprocess.TimeoutExpired:
        return ""
    finally:
        child.kill()
        child.wait()


class _Life:
    """A forked process that plays a part and waits for us between its steps."""

    def __init__(self, part: Callable[[Callable[[Event], None], Callable[[], None]], None]) -> None:
        out, into = os.pipe()
        self._gate, self._open_gate = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(out)
                os.close(self._open_gate)
                part(lambda event: write_event(into, event), lambda: _through(self._gate))
            except BaseException as error:  # noqa: BLE001 - the process ends here
                write_event(into, untyped(error))
            finally:
                os._exit(0)
        os.close(into)
        os.close(self._gate)
        self._out = out
        self._raw = b""
        self.gone = self.hung = False

    def until(self, op: str) -> None:
        """Wait until it says ``op``, or ends, or hangs."""
        mark = f'{{"op": "{op}"'.encode()
        end = time.monotonic() + _PATIENCE
        while mark not in self._raw and not self.gone:
            if not select.select([self._out], [], [], max(0.0, end - time.monotonic()))[0]:
                self.hung = True
                return
            data = os.read(self._out, 1 << 16)
            self._raw += data
            self.gone = not data

    def go(self, word: bytes = b"!") -> None:
        """Let it go on; with ``?`` make it do a call that changes nothing."""
        try:
            os.write(self._open_gate, word)
        except BrokenPipeError:
            self.gone = True

    @property
    def events(self) -> list[Event]:
        return read_events(self._raw)

    def end(self) -> None:
        """Let it end, and make sure of it."""
        os.close(self._open_gate)
        os.close(self._out)
        end = time.monotonic() + 2
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.0005)


def _through(gate: int) -> None:
    """Wait for the word to go on; until then, show that a tracer sees our calls."""
    while os.read(gate, 1) == b"?":
        os.getppid()


def _one_thread(root: Path) -> PosixDisk:
    """Return the disk of a process whose every call is traced: strace does not see threads that begin later."""
    disk = PosixDisk.open_root(root)
    disk.background = lambda job: None  # type: ignore[method-assign]
    return disk


def _part(root: Path, scenario: str, *, again: bool) -> Callable[[Callable[[Event], None], Callable[[], None]], None]:
    def part(say: Callable[[Event], None], wait: Callable[[], None]) -> None:
        _keep_keys(root)
        setup = Actor(root, say)
        SCENARIOS[scenario].setup(setup)
        setup.close()
        actor = Actor(root, say, lambda: _one_thread(root))
        SCENARIOS[scenario].enter(actor)
        say({"op": "ready", "is": "done"})
        wait()
        try:
            SCENARIOS[scenario].act(actor)
        except Exception as error:
            if not hasattr(error, "what"):  # a typed error was said by its step
                raise
            if again:
                with suppress(LayerCacheError):  # said by its step
                    actor.purge("a")
        finally:
            actor.close()
        gc.collect()  # an error and its frames, in a cycle, keep handles that nobody has any more
        say({"op": "acted", "is": "done"})
        wait()

    return part


def _strace(life: _Life, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Attach strace and return when it sees every call: being attached is not enough, it must have stopped it once."""
    traced = ["-e", f"trace=getppid,{_CALLS}"]
    process = subprocess.Popen(
        ["strace", "-qq", "-y", "-s", "0", "-o", str(log), *traced, *options, "-p", str(life.pid)],
        stderr=subprocess.PIPE,
    )
    status = Path(f"/proc/{life.pid}/status")
    end = time.monotonic() + _PATIENCE
    while not (log.exists() and b"getppid" in log.read_bytes()):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"strace did not attach: {process.stderr.read() if process.stderr else b''!r}")
        if "TracerPid:\t0\n" not in status.read_text():
            life.go(b"?")
        time.sleep(0.0005)
    return process


def _play(home: Path, scenario: str, *options: str, again: bool = False) -> tuple[_Life, str, list[str]]:
    """Play a scenario under strace; return the life, strace's log and the files of the root that stayed open."""
    root, log = home / "root", home / "strace.log"
    life = _Life(_part(root, scenario, again=again))
    tracer: subprocess.Popen[bytes] | None = None
    try:
        life.until("ready")
        if life.gone or life.hung:
            raise AssertionError(f"the setup of {scenario} failed: {life.events[-1:]}")
        tracer = _strace(life, log, *options)
        life.go()
        life.until("acted")
        left = [] if life.gone else _open_below(life.pid, root)
        life.go()
    finally:
        life.end()
        if tracer is not None:
            try:
                tracer.wait(5)
            except subprocess.TimeoutExpired:
                tracer.kill()
                tracer.wait()
            if tracer.stderr is not None:
                tracer.stderr.close()
    return life, log.read_text(), left


def _open_below(pid: int, root: Path) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # closed since
            continue
        if target.startswith(str(root)):
            found.append(target.removeprefix(str(root)))
    return found


_place: list[Path] = []


def _home() -> tempfile.TemporaryDirectory[str]:
    """Return a directory for one point: in memory, and for root where it ends with this process however that ends."""
    if not _place:
        memory = Path("/dev/shm")
        _place.append(enter_private_mounts() if os.geteuid() == 0 else memory)
    return tempfile.TemporaryDirectory(prefix="layercache-t1.", dir=_place[0] if _place[0].is_dir() else None)


def trace(scenario: str) -> list[Call]:
    """Return the calls a scenario makes on its root, in order."""
    with _home() as home:
        life, log, left = _play(Path(home), scenario)
        if life.gone or left:
            raise AssertionError(f"{scenario} does not come to its end by itself: {life.events[-1:]} {left}")
        calls: list[Call] = []
        counts: dict[str, int] = {}
        for line in log.splitlines():
            match = _LINE.match(line)
            if match is not None:
                name = match[1]
                counts[name] = counts.get(name, 0) + 1
                if home in match[2]:
                    calls.append(Call(name, counts[name], match[2].replace(home, "")))
        return calls


def _distinct(calls: list[Call]) -> list[Call]:
    """Leave out the middle of what repeats, such as the making of sixteen locks: the first two and the last stay."""
    alike: dict[str, list[Call]] = {}
    for call in calls:
        alike.setdefault(f"{call.name} {re.sub(r'[0-9a-f]+', '#', call.arguments)}", []).append(call)
    kept = {call for group in alike.values() for call in (*group[:2], group[-1])}
    return [call for call in calls if call in kept]


def points(scenario: str, calls: list[Call], *, everything: bool) -> Iterator[Point]:
    """Yield every fault at every call, and for each call one kill after the last, which must not be reached."""
    for call in calls if everything else _distinct(calls):
        yield Point(scenario, call.name, call.number, "KILL")
        if call.name == "close" and ("lock" in call.arguments or "/space>" in call.arguments):
            continue  # a close that is injected does not close: only the kill is true to a lock
        if call.name == "flock":
            yield Point(scenario, call.name, call.number, "ENOLCK")
        elif call.name == "fcntl":
            if "F_SETLEASE" in call.arguments:  # somebody has it open; the kernel gives none here
                yield from (Point(scenario, call.name, call.number, fault) for fault in ("EAGAIN", "EACCES", "EIO"))
        else:
            yield Point(scenario, call.name, call.number, "EIO")
            if call.name != "close":
                yield Point(scenario, call.name, call.number, "EIO", sticky=True)
        if call.name in _CHANGING and (call.name != "openat" or "O_CREAT" in call.arguments):
            yield Point(scenario, call.name, call.number, "ENOSPC")
            yield Point(scenario, call.name, call.number, "ENOSPC", sticky=True)
            yield Point(scenario, call.name, call.number, "EROFS")
        if call.name == "openat":
            yield Point(scenario, call.name, call.number, "EMFILE")
        if call.name in _INTERRUPTIBLE:
            yield Point(scenario, call.name, call.number, "EINTR")
        if call.name == "pwrite64":
            yield Point(scenario, call.name, call.number, "short0")
            # (What is sealed does not begin with zeros.)
            if ".part>" in call.arguments and not SCENARIOS[scenario].sealed:
                yield Point(scenario, call.name, call.number, f"short{_SHORT}")
    last = {call.name: call.number for call in calls}
    for name, number in last.items():
        yield Point(scenario, name, number + 1000, "KILL")


def run(point: Point, *, finish: str = "open") -> Outcome:
    """Play a scenario with one injection and say what is wrong afterwards.

    What is left of a purge is finished by whoever opens the root next (``open``), or before that by the ``same``
    process, which tries again, or by the command (``cli``).
    """
    outcome = Outcome()
    with _home() as home:
        root = Path(home) / "root"
        life, outcome.log, left = _play(Path(home), point.scenario, "-e", point.injection(), again=finish == "same")
        outcome.events = life.events
        outcome.injected = outcome.log.count("(INJECTED)") + outcome.log.count("+++ killed by SIGKILL")
        killed = "+++ killed by SIGKILL" in outcome.log
        # A close that was injected did not close, whatever the error: what follows from that is the injection's doing.
        faulty = not killed and not (point.harmless and point.call != "close")
        # The last lock of a put, and in a sealed namespace the last read, come when others may have the blob already.
        promises = Promises(faulty=faulty, unlocked=point.call in ("flock", *_READS))
        promises.hear(outcome.events)
        if point.call in _READS and point.fault == "EIO":
            promises.unreadable()
        outcome.findings += promises.findings
        if life.hung:
            outcome.findings.append(f"the scenario hangs: {outcome.events[-1:]}")
        if life.gone and not killed and not promises.findings:
            outcome.findings.append(f"the scenario ended in the middle: {outcome.events[-1:]}")
        if left and point.call != "close":
            outcome.findings.append(f"files stay open: {', '.join(sorted(left))}")
        if point.harmless and promises.errors and point.call != "close":
            outcome.findings.append(f"{point.fault} is no reason to fail: {'; '.join(promises.errors)}")
        last = [event["is"] for event in outcome.events if event["op"] == "purge"][-1:]
        if finish == "same" and not (killed or point.sticky) and last not in ([], ["done"]):
            outcome.findings.append("the same process could not purge when it tried again")
        if point.fault == "EIO" and _refuses_the_last_close(outcome.log) and not promises.errors:
            outcome.findings.append("a file whose close failed was taken for durable")
        looker = _Life(lambda say, _: _look(root, promises, say, command=finish == "cli"))
        try:
            looker.until("looked")
            if looker.gone or looker.hung:
                outcome.findings.append("the last look did not come to its end")
            outcome.findings += [event["text"] for event in looker.events if event["op"] in ("wrong", "untyped")]
        finally:
            looker.end()
    return outcome


def _refuses_the_last_close(log: str) -> bool:
    """Tell whether the close was injected by which a file that was just flushed is asked for its last errors."""
    lines = log.splitlines()
    for before, line in itertools.pairwise(lines):
        flushed, closed = (
            re.search(rf"{name}\((\d+)<(.*)>\)", text) for name, text in (("fsync", before), ("close", line))
        )
        # Through another descriptor: with the same one it is a directory, or the end.
        if flushed and closed and flushed[2] == closed[2] and flushed[1] != closed[1] and "(INJECTED)" in line:
            return True
    return False


def _keep_keys(root: Path) -> None:
    """Have the keys of sealed namespaces beside the root, where calls on them are seen."""
    os.environ["LAYERCACHE_KEYS"] = str(root.parent / "keys")


def _lost_keys(root: Path) -> Iterator[str]:
    """Yield the keys that no generation's record names."""
    known = {json.loads(path.read_bytes())["id"] for path in root.glob("data/*/key")}
    yield from (f"the key {path.name} is left" for path in (root.parent / "keys").glob("*") if path.name not in known)


def _look(root: Path, promises: Promises, say: Callable[[Event], None], *, command: bool) -> None:
    _keep_keys(root)
    if command:
        for finding in finish_purges(root):
            say({"op": "wrong", "is": "done", "text": finding})
    disk = PosixDisk.open_root(root)
    for finding in (*examine(root, promises, disk=disk, boot=disk.boot), *_lost_keys(root)):
        say({"op": "wrong", "is": "done", "text": finding})
    say({"op": "looked", "is": "done"})


def main(arguments: list[str] | None = None) -> int:
    """Sweep, or replay one point; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=sorted(SCENARIOS), help="one scenario")
    parser.add_argument("--point", help="replay CALL:NUMBER:FAULT")
    parser.add_argument("--finish", choices=_FINISHES, default="open", help="who finishes what is left of a purge")
    parser.add_argument("--all", action="store_true", help="also the middle of what repeats")
    parser.add_argument("--shard", default="0/1", help="K/N: each N-th point, beginning with the K-th")
    options = parser.parse_args(arguments)
    if why := unavailable():
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    warm()
    logging.disable()  # damage is what is looked for here
    if options.point:
        return _replay(Point.parse(options.only or "put", options.point), options.finish)
    part, of = map(int, options.shard.split("/"))
    started = time.monotonic()
    visited = total = untouched = 0
    failed: list[tuple[str, list[str]]] = []
    names = [options.only] if options.only else list(SCENARIOS)
    for name in names:
        before = time.monotonic(), visited
        calls = trace(name)
        for point in points(name, calls, everything=options.all):
            total += 1
            if total % of != part:
                continue
            visited += 1
            outcome = run(point, finish=options.finish)
            untouched += not outcome.injected
            if outcome.injected == 0 and point.number < 1000:
                outcome.findings.append("nothing was injected: the scenario took another way")
            if outcome.injected and point.number > 1000:
                outcome.findings.append("there was a call after the last")
            if outcome.findings:
                failed.append((f"{point.command()} --finish {options.finish}", outcome.findings))
        print(
            f"{name}: {len(calls)} calls, {visited - before[1]} points, {time.monotonic() - before[0]:.1f} s",
            file=sys.stderr,
        )
    report(failed)
    summary = (
        f"strace: {visited} of {total} points over {len(names)} scenarios, shard {options.shard},"
        f" {untouched} ran untouched, {len(failed)} failed, {time.monotonic() - started:.1f} s"
    )
    print(summary)
    return 1 if failed else 0


def _replay(point: Point, finish: str) -> int:
    outcome = run(point, finish=finish)
    print(outcome.log)
    for event in outcome.events:
        print(json.dumps(event))
    print("\n".join(outcome.findings) or "nothing wrong")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
