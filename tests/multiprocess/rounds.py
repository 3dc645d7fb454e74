"""Sixteen processes pull one image at once, again and again, and whoever fetches is killed in the middle of a write.

    python -m tests.multiprocess.rounds --rounds 200            rounds against a docker-registry of its own
    python -m tests.multiprocess.rounds --seed 7 --only 31      one round of that seed

Each round has a namespace of its own, so one digest in one namespace. The leader dies at a random byte of the layer (it
writes up to that byte and is killed by SIGKILL), right after it has forked, as a host runtime may: the fork lives on
and must not keep the right to write. What was transferred is counted in the registry's own access log.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import mmap
import os
import random
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layercache import LayerCache
from layercache.store._disk import Buffer, File, PosixDisk
from layercache.testing.images import build_image
from tests import peers
from tests.crash.loopfs import enter_private_mounts

__all__ = ["Round", "main", "unavailable"]

WORKERS = 16
SIZE = (4 << 20) + (512 << 10) + 77
"""Bytes of the layer: large enough that what is in is gone on with."""

TAKEOVER = 2.0
"""Seconds in which a waiter must have begun to write after the leader's death."""

_PATIENCE = 20.0
_STOPPED = 0.3
_FORK_LIVES = 0.4
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None, use_errno=True)

Mode = Literal["none", "kill", "stop"]


@dataclass(frozen=True, slots=True)
class Round:
    """What happens to the leader of one round, at which byte of the layer."""

    number: int
    mode: Mode
    at: int

    @staticmethod
    def of(seed: int, number: int) -> Round:
        rng = random.Random(f"{seed} {number}")
        mode: Mode = "stop" if number % 40 == 20 else "none" if number % 40 == 30 else "kill"
        return Round(number, mode, rng.choice((0, SIZE - 1)) if number % 20 == 10 else rng.randrange(SIZE))


def unavailable() -> str:
    """Say why this cannot run here; empty when it can."""
    missing = peers.missing_programs()
    return f"needs {' and '.join(missing)}" if missing else ""


class _Fate:
    """Memory that all processes share: what is to happen to whoever writes, and when it did."""

    _PLAN, _STATE = struct.Struct("=BQ"), struct.Struct("=Idd")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    def arm(self, plan: Round) -> None:
        self._STATE.pack_into(self._memory, 64, 0, 0.0, 0.0)
        self._PLAN.pack_into(self._memory, 0, {"none": 0, "kill": 1, "stop": 2}[plan.mode], plan.at)

    @property
    def plan(self) -> tuple[int, int]:
        mode, at = self._PLAN.unpack_from(self._memory, 0)
        return mode, at

    @property
    def state(self) -> tuple[int, float, float]:
        """Return the victim's pid, when it was hit, and when another process wrote first after that; 0 for not yet."""
        victim, hit, taken = self._STATE.unpack_from(self._memory, 64)
        return victim, hit, taken

    def hit(self) -> None:
        self._STATE.pack_into(self._memory, 64, os.getpid(), time.monotonic(), 0.0)

    def taken(self) -> None:
        victim, hit, _ = self.state
        self._STATE.pack_into(self._memory, 64, victim, hit, time.monotonic())


def _hook(fate: _Fate, part: str, quiet: tuple[int, ...]) -> None:
    """Let fate strike in the middle of a write of the layer."""
    write = PosixDisk.write

    def fateful(disk: PosixDisk, file: File, data: Buffer, offset: int) -> None:
        mode, at = fate.plan
        if mode and part in Path(f"/proc/self/fd/{file.fd}").readlink().name:
            victim, _, taken = fate.state
            if not victim and offset <= at < offset + len(data):
                cut = memoryview(data)
                write(disk, file, cut[: at - offset], offset)
                fate.hit()
                if mode == 1:
                    _fork_that_lives_on(quiet)
                    os.kill(os.getpid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGSTOP)
                write(disk, file, cut[at - offset :], at)
                return
            if victim and victim != os.getpid() and not taken:
                fate.taken()
        write(disk, file, data, offset)

    PosixDisk.write = fateful  # type: ignore[method-assign,assignment]


def _fork_that_lives_on(quiet: tuple[int, ...]) -> None:
    if os.fork() == 0:
        for fd in quiet:
            os.close(fd)
        time.sleep(_FORK_LIVES)
        os._exit(0)


@dataclass(slots=True)
class _Worker:
    pid: int
    commands: int


def _work(root: Path, reference: str, *, commands: int, results: int, fate: _Fate, layer: str) -> None:
    """Pull when told, say how it went; end when nobody can tell any more."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    logging.disable()
    _hook(fate, f"{layer}.{SIZE}", (commands, results))
    with LayerCache(root) as cache, os.fdopen(commands) as orders:
        for line in orders:
            order = json.loads(line)
            told: dict[str, Any] = {"pid": os.getpid(), "round": order["round"]}
            try:
                with cache.namespace(order["ns"]).pull(reference, timeout=_PATIENCE) as image:
                    blob = next(blob for blob in image.report.blobs if blob.digest.encoded == layer)
                    told |= {"source": blob.source, "reason": blob.reason}
                    if order["read"] == os.getpid():
                        with image.layers[0].uncompressed() as stream:  # DiffID and chunk sums are compared on the way
                            told["read"] = sum(map(len, iter(lambda: stream.read(1 << 20), b"")))
            except BaseException as error:  # noqa: BLE001 - told, and judged there
                told |= {
                    "source": "error",
                    "reason": f"{type(error).__name__}: {error}",
                    "trace": traceback.format_exc(limit=-4),
                }
            os.write(results, json.dumps(told)[:4000].encode() + b"\n")


class _Crowd:
    """The processes, of which one may be missing after a round."""

    def __init__(self, root: Path, registry: peers.PeerRegistry, reference: str, layer: str) -> None:
        self.root = root
        self.fate = _Fate()
        self.layer = layer
        self._reference = reference
        self._log = (registry.home / "docker-registry.log").open("rb")
        self._get = f'"GET /v2/{peers.REPOSITORY}/blobs/sha256:{layer} HTTP'.encode()
        self._results, self._say = os.pipe()
        self._raw = b""
        self.workers: dict[int, _Worker] = {}
        self.transfers()

    def fill_up(self) -> None:
        """Fork processes until there are enough."""
        while len(self.workers) < WORKERS:
            out, into = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(into)
                    os.close(self._results)
                    for worker in self.workers.values():  # else an order's pipe would never end
                        os.close(worker.commands)
                    _work(
                        self.root,
                        self._reference,
                        commands=out,
                        results=self._say,
                        fate=self.fate,
                        layer=self.layer,
                    )
                finally:
                    os._exit(0)
            os.close(out)
            self.workers[pid] = _Worker(pid, into)

    def order(self, plan: Round) -> None:
        """Tell everybody to begin."""
        self.fate.arm(plan)
        pids = list(self.workers)
        text = json.dumps({"round": plan.number, "ns": f"round-{plan.number}", "read": pids[plan.number % len(pids)]})
        for worker in self.workers.values():
            os.write(worker.commands, text.encode() + b"\n")

    def results(self, wait: float) -> list[dict[str, Any]]:
        """Return what was told within ``wait`` seconds; ends early on news."""
        if select.select([self._results], [], [], wait)[0]:
            self._raw += os.read(self._results, 1 << 16)
        *lines, self._raw = self._raw.split(b"\n")
        return [json.loads(line) for line in lines]

    def bury(self) -> None:
        """Take note of who died, and reap what their forks left us."""
        with suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                worker = self.workers.pop(pid, None)
                if worker is not None:
                    os.close(worker.commands)

    def transfers(self) -> int:
        """Return how many requests for the layer the registry logged since the last call."""
        return self._log.read().count(self._get)

    def disperse(self) -> None:
        """End everybody and wait for them."""
        for worker in self.workers.values():
            os.kill(worker.pid, signal.SIGCONT)
            os.close(worker.commands)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.002)
            except ChildProcessError:
                break
        for pid in list(self.workers):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self._log.close()
        os.close(self._results)
        os.close(self._say)


@dataclass(slots=True)
class _Tally:
    rounds: int = 0
    struck: int = 0
    stopped: int = 0
    transfers: int = 0
    takeovers: list[float] = field(default_factory=list)
    failed: list[tuple[Round, list[str]]] = field(default_factory=list)


def _play(crowd: _Crowd, cache: LayerCache, plan: Round, tally: _Tally) -> list[str]:
    """Play a round; return what was wrong."""
    findings: list[str] = []
    crowd.fill_up()
    crowd.order(plan)
    told: list[dict[str, Any]] = []
    end = time.monotonic() + _PATIENCE
    gone_on = False
    while time.monotonic() < end:
        told += crowd.results(0.05)
        victim, hit, _ = crowd.fate.state
        if plan.mode == "stop" and victim and not gone_on:
            findings += _stopped(crowd, victim, told)
            gone_on = True
        if len(told) >= WORKERS - (plan.mode == "kill" and victim > 0):
            break
    victim, hit, taken = crowd.fate.state
    crowd.bury()
    expected = 1 + (plan.mode == "kill" and victim > 0)
    sources = [one["source"] for one in told]
    if len(told) != WORKERS - (expected - 1):
        findings.append(f"{len(told)} of {WORKERS} processes came back within {_PATIENCE:.0f} s")
    if sources.count("miss") != 1 or sources.count("hit") != len(told) - 1:
        reasons = {one["reason"] for one in told if one["source"] in ("bypass", "error")}
        findings.append(f"one miss and otherwise hits were due, not {sorted(sources)} {reasons or ''}")
    if any(one.get("read", SIZE) < SIZE for one in told):
        findings.append("a reader got too few bytes")
    if plan.mode == "kill" and victim:
        tally.struck += 1
        if taken:
            tally.takeovers.append(taken - hit)
        if not taken or taken - hit >= TAKEOVER:
            findings.append(
                f"nobody took over within {TAKEOVER} s" if not taken else f"takeover took {taken - hit:.2f} s"
            )
    tally.stopped += plan.mode == "stop" and victim > 0
    transfers = _settled(crowd, expected)
    tally.transfers += transfers
    if transfers != expected:
        findings.append(f"{transfers} transfers of the layer instead of {expected}")
    findings += [f"left in in/: {path.name}" for path in crowd.root.glob("data/*/in/*")]
    receipt = cache.namespace(f"round-{plan.number}").purge()
    if receipt.level != "unlinked":
        findings.append(f"everybody closed it, and still the purge is only {receipt.level}, held by {receipt.pending}")
    return findings


def _stopped(crowd: _Crowd, victim: int, told: list[dict[str, Any]]) -> list[str]:
    """Give the others time to rob a stopped leader, then let it go on."""
    time.sleep(_STOPPED)
    told += crowd.results(0.0)
    _, _, taken = crowd.fate.state
    robbed = [f"the stopped leader was robbed ({len(told)} done)"] if told or taken else []
    os.kill(victim, signal.SIGCONT)
    return robbed


def _settled(crowd: _Crowd, expected: int) -> int:
    """Count this round's transfers: the registry writes a line when a transfer has ended."""
    count = crowd.transfers()
    end = time.monotonic() + 2
    while count < expected and time.monotonic() < end:
        time.sleep(0.002)
        count += crowd.transfers()
    return count


@contextmanager
def _registry(home: Path) -> Iterator[tuple[peers.PeerRegistry, str]]:
    """Run a docker-registry that holds one image of one layer; yield it and the layer's encoded digest."""
    (home / "registry").mkdir()
    registry = peers.PeerRegistry(home / "registry", home / "registry" / "store")
    registry.start()
    try:
        image = build_image([random.Random(1).randbytes(SIZE)], compression="none")
        registry.push("rounds", image)
        yield registry, image.layers[0].digest.encoded
    finally:
        registry.stop()


def main(arguments: list[str] | None = None) -> int:
    """Play rounds; the exit code tells whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.multiprocess.rounds", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time() // 86400))
    parser.add_argument("--only", type=int, help="play this round alone")
    options = parser.parse_args(arguments)
    if why := unavailable():
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    logging.disable()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed process forked becomes ours to wait for
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # For root, files that end with this process however it ends.
    home = Path(tempfile.mkdtemp(prefix="layercache-t4.", dir=enter_private_mounts() if os.geteuid() == 0 else None))
    tally = _Tally()
    numbers = range(options.rounds) if options.only is None else [options.only]
    try:
        with _registry(home) as (registry, layer):
            started = time.monotonic()
            crowd = _Crowd(home / "root", registry, registry.reference("rounds"), layer)
            try:
                with LayerCache(home / "root") as cache:
                    for number in numbers:
                        plan = Round.of(options.seed, number)
                        findings = _play(crowd, cache, plan, tally)
                        tally.rounds += 1
                        if findings:
                            tally.failed.append((plan, findings))
            finally:
                crowd.disperse()
            late = crowd_late(registry, layer)
            seconds = time.monotonic() - started
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if late != tally.transfers:
        print(f"FAILED: {late} transfers in the registry's log at the end, {tally.transfers} counted round by round")
    for plan, findings in tally.failed[:10]:
        print(f"FAILED python -m tests.multiprocess.rounds --seed {options.seed} --only {plan.number}   # {plan}")
        print("\n".join(f"    {finding}" for finding in findings))
    worst = max(tally.takeovers, default=0.0)
    p99 = sorted(tally.takeovers)[int(len(tally.takeovers) * 0.99)] if tally.takeovers else 0.0
    print(
        f"rounds: {tally.rounds} of {WORKERS} processes, seed {options.seed}: {tally.struck} leaders killed,"
        f" {tally.stopped} stopped, {tally.transfers} transfers, takeover p99 {p99 * 1e3:.0f} ms,"
        f" worst {worst * 1e3:.0f} ms, {len(tally.failed)} failed, {seconds:.1f} s"
    )
    return 1 if tally.failed or late != tally.transfers else 0


def crowd_late(registry: peers.PeerRegistry, layer: str) -> int:
    """Return how often the layer was asked for in all, when the registry has written its last line."""
    pattern = re.compile(rf"/blobs/sha256:{layer}$")
    return sum(method == "GET" and pattern.search(path) is not None for method, path, _ in registry.requests())


if __name__ == "__main__":
    sys.exit(main())
