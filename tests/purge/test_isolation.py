"""What a namespace holds cannot be found out from another one: not by the calls a lookup makes, not by its time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from layercache import LayerCache
from layercache.oci import Digest
from layercache.testing.registry import ScriptedRegistry
from tests.crash import faults, sweeps
from tests.purge import isolation
from tests.purge.canary import Canary

WHY_NOT = faults.unavailable()

_ADDRESS = re.compile(r"0x[0-9a-f]+|\b\d{5,}\b|st_[acm]time=\S+ /\* \S+ \*/|tmp\.[0-9a-f.]+")
# What the root takes in all, which the question before has changed: it is the same whichever digest is asked for.
_COUNT = re.compile(r'(/root/space>, .*?)"LCspace1(?:[^"\\]|\\.)*"')


def _questions(home: Path, root: Path, seed: str) -> dict[str, list[str]]:
    """Return the calls that each question makes, without what differs between any two runs."""
    log = home / f"{seed}.log"
    done = subprocess.run(
        [
            *("strace", "-y", "-v", "-s", "256", "-e", "signal=none", "-o", str(log)),
            *(sys.executable, "-B", "-m", "tests.purge.isolation", "calls", str(root), seed),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    digest = Digest.of(isolation.contents(seed)).encoded
    text = log.read_text(errors="replace").replace(digest, "DIGEST").replace(f'"{digest[:2]}"', '"DI"')
    # As a whole name: a slot, which is made of chance, may begin with the same two digits.
    text = re.sub(rf'/{digest[:2]}(?=[/>"])', "/DI", text.replace(f'"{digest[0]}"', '"D"'))
    text = text.replace(f"locks/{digest[0]}", "locks/D")
    _, *parts, _ = text.split("getppid()")
    calls = [[_COUNT.sub(r"\1COUNT", _ADDRESS.sub("N", line)) for line in part.splitlines()[1:]] for part in parts]
    assert len(calls) == len(isolation.QUESTIONS)
    return {
        name: [line for line in lines if not re.match("brk|mmap|munmap|madvise|clock_|futex|rt_sig", line)]
        for name, lines in zip(isolation.QUESTIONS, calls, strict=True)
    }


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_asking_for_what_another_namespace_holds_makes_the_same_calls(root, tmp_path):
    """Every call, its arguments and result are those of a digest that no tenant has and that is not public either."""
    isolation.furnish(root, ["held"])
    absent, held = _questions(tmp_path, root, "absent"), _questions(tmp_path, root, "held")
    for name in isolation.QUESTIONS:
        assert absent[name] == held[name], name
        assert absent[name], f"{name} asks the disk"
    for seed in ("own 0", "granted"):
        here = _questions(tmp_path, root, seed)
        differ = [name for name in isolation.QUESTIONS if here[name] != absent[name]]
        assert "contains" in differ, "of what is here other calls are seen, so this comparison can fail"


def test_a_pull_of_what_another_namespace_holds_makes_the_same_requests(root, scripted: ScriptedRegistry):
    """Nothing is taken from the neighbour: each namespace fetches all of it under its own permission."""
    image = Canary().image()
    scripted.add(image, "shared/base", "1.0")
    seen = []
    with LayerCache(root, jobs=1) as cache:
        for name in ("first", "second"):
            begun = len(scripted.requests)
            with cache.namespace(name).pull(f"{scripted.host}/shared/base:1.0") as pulled:
                assert {blob.source for blob in pulled.report.blobs} == {"miss"}
            seen.append([(one.method, one.path, one.status, one.sent) for one in scripted.requests[begun:]])
    assert seen[0] == seen[1]


@pytest.mark.timeout(600 if sweeps.SOAK else 120)
def test_the_time_of_a_lookup_does_not_tell_what_another_namespace_holds(root, record_property):
    """Two samples of digests, drawn by chance, in random order: ranks at 1e-4, and once more; a leak is noticed."""
    lookups = "256000" if sweeps.SOAK else "25600"
    sweep = sweeps.start("tests.purge.isolation", "times", str(root), sweeps.seed(), "--lookups", lookups)
    sweeps.finish([sweep], record_property)
