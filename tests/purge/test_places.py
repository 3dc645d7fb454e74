"""Every place that the library, or anything it uses, writes to is a known one: a purge cannot forget what is not there.

strace shows each call that makes, changes or renames a name, in this process and all it starts; a target that
``PLACES`` does not list fails the test. A new place gets its row here, and a purge that empties it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from layercache.testing.registry import ScriptedRegistry
from tests.crash import faults
from tests.purge import scenes
from tests.purge.canary import Canary

WHY_NOT = faults.unavailable()

_GEN = r"[0-9a-f]{40}\.\d+"
_HEX = r"[0-9a-f]{2}"
_NAME = r"[0-9a-f]{64}"
_TENANT = rf"(data|trash)/{_GEN}"

PLACES = {
    # As docs/format.md has it: below the root, and whose bytes it can hold.
    "FORMAT": r"FORMAT(\.new)?",
    "tmp.*": r"tmp\.[0-9a-f]+\.[0-9a-f]+",
    "root.key": r"root\.key(\.new)?",
    "root.lock": r"root\.lock",
    "janitor.lock": r"janitor\.lock",
    "scrub.lock": r"scrub\.lock",
    "evict.lock": r"evict\.lock",
    "space": r"space",
    "budget": r"budget|tmp\.[0-9a-f]+\.[0-9a-f]+",
    "policy": rf"policy|{_TENANT}/policy",
    "ballast": r"ballast",
    "slots/<slot>/": r"slots(/[0-9a-f]{40}(/lock)?)?",
    "live.<gen> | purging.<gen> | dead.<gen>": r"slots/[0-9a-f]{40}/(live|purging|dead)\.\d+",
    "data/<slot>.<gen>/": rf"data(/{_GEN})?",
    "trash/<slot>.<gen>/": rf"trash(/{_GEN})?",
    "fence": rf"{_TENANT}/fence(\.new)?",
    "name": rf"{_TENANT}/name(\.new)?",
    "pins/<64 hex>": rf"{_TENANT}/pins(/{_NAME})?",
    "grants/<name>": rf"{_TENANT}/grants(/{_NAME})?",
    "hints": rf"{_TENANT}/hints",
    "quota": rf"{_TENANT}/quota",
    "key": rf"{_TENANT}/key(\.new)?",
    "in/": rf"{_TENANT}/in(/{_NAME}(\.\d+)?\.[0-9a-f]+\.(part|sums)|/tmp\.[0-9a-f]+\.[0-9a-f]+)?",
    "blobs/<2 hex>/<name>": rf"{_TENANT}/blobs(/{_HEX}(/{_NAME})?)?",
    "meta/<2 hex>/<name>": rf"{_TENANT}/meta(/{_HEX}(/{_NAME})?)?",
    "refs/<64 hex>": rf"{_TENANT}/refs(/{_NAME})?",
    "locks/<0..f>": rf"{_TENANT}/locks(/[0-9a-f])?",
    "bad/": rf"{_TENANT}/bad(/{_NAME}\.[0-9a-f]+|/unknown\.[0-9a-f]+)?",
    "aside/": r"aside(/unknown\.[0-9a-f]+)?",
    "receipts/": r"receipts(/lock|/segment\.\d{6})?",
}
PLANTED = r"slots/unknown|data/[0-9a-f]{40}\.\d+/blobs/unknown"
"""What the scenes themselves put in the way of recovery."""

_CALLS = (
    "open,openat,openat2,creat,mkdir,mkdirat,mknod,mknodat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,"
    "unlink,unlinkat,rmdir,truncate,chmod,fchmodat,chown,lchown,fchownat,utime,utimes,utimensat,futimesat,"
    "setxattr,lsetxattr,memfd_create,bind,mount,name_to_handle_at"
)
_LINE = re.compile(r"^\d+ +(\w+)\((.*?)(?:\) += .*|<unfinished \.\.\.>)$")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<((?:[^<>]|<[^<>]*>)*)>, )?"((?:[^"\\]|\\.)*)"')
_WRITES = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)")


@dataclass(frozen=True, slots=True)
class Change:
    """A call that makes or changes what a name leads to."""

    call: str
    path: str


def changes(log: str) -> Iterator[Change]:
    """Yield every change in a log of strace, wherever it led and however it ended."""
    for line in log.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        call, arguments = match[1], match[2]
        if call in ("open", "openat", "openat2") and not _WRITES.search(arguments):
            continue
        if call == "bind" and "AF_UNIX" not in arguments:
            continue
        if call == "memfd_create":
            yield Change(call, f"/memfd:{arguments}")
            continue
        for folder, name in _PATH.findall(arguments):
            at = folder.removesuffix(" (deleted)")
            yield Change(call, os.path.normpath(os.path.join(at, name)))  # noqa: PTH118 - may be relative to nothing


def traced(home: Path, *command: str | Path, **environment: str) -> str:
    """Run a command to its good end under strace, with all it starts; return the log."""
    log = home / "strace.log"
    done = subprocess.run(
        [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-y",
            "-s",
            "4096",
            "-e",
            "signal=none",
            "-e",
            f"trace={_CALLS}",
            "-o",
            str(log),
        ]
        + [str(part) for part in command],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return log.read_text(errors="replace")


def undeclared(found: list[Change], root: Path, *others: Path) -> set[str]:
    """Return what led to no declared place; ``others`` are directories that the caller named."""
    known = re.compile(f"({'|'.join(PLACES.values())}|{PLANTED})")
    wrong = set()
    for change in found:
        if change.path in (str(root), "/dev/null") or any(Path(change.path).is_relative_to(other) for other in others):
            continue
        inside = change.path.removeprefix(f"{root}/")
        if inside == change.path or not known.fullmatch(inside):
            wrong.add(f"{change.call} {change.path}")
    return wrong


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_nothing_is_written_outside_the_declared_places(root, tmp_path, scripted: ScriptedRegistry):
    """Whatever is done, and by the command, too; TMPDIR and HOME are traps."""
    canary = Canary()
    scripted.add(canary.image(), canary.repository, "1.0")
    traps = {variable: tmp_path / variable.lower() for variable in ("TMPDIR", "HOME", "XDG_CACHE_HOME")}
    for trap in traps.values():
        trap.mkdir()
    target = tmp_path / "exported"
    script = (sys.executable, "-m", "tests.purge.scenes", root, target, scripted.host, canary.seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as keys:
        environment = {"LAYERCACHE_KEYS": keys} | {variable: str(trap) for variable, trap in traps.items()}
        found = list(changes(traced(tmp_path, *script, **environment)))
        assert not list(Path(keys).iterdir())
        wrong = sorted(undeclared(found, root, target, Path(keys)))
    assert not wrong, "\n".join(wrong)
    for trap in traps.values():
        assert not list(trap.iterdir())
    written = {change.path.removeprefix(f"{root}/") for change in found}
    unused = {place for place, pattern in PLACES.items() if not any(map(re.compile(pattern).fullmatch, written))}
    assert not unused, "declared, and nothing writes there"
    assert not canary.in_tree(root), "the scenes purge every namespace they make"
    assert canary.in_tree(target)


def test_every_scene_is_played():
    """A scene is a method, so that none is forgotten."""
    assert len(scenes.NAMES) >= 9


def test_every_declared_place_is_in_the_description_of_the_format():
    """docs/format.md lists what this test allows."""
    tree = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert not [place for place in PLACES if place not in tree]


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize(
    "code",
    [
        "import tempfile; tempfile.NamedTemporaryFile()",
        "import tempfile; tempfile.TemporaryFile()",
        "import os; os.memfd_create('x')",
        "import os; os.mkdir('{root}/data/other')",
        "import os; os.symlink('x', '{root}/link')",
        "import os; os.rename('{root}/none', '{root}/data/none')",
        "import subprocess; subprocess.run(['sh', '-c', 'echo > {root}/../outside'])",
        "import threading as t; x = t.Thread(target=lambda: open('{root}/slots/file', 'w')); x.start(); x.join()",
        "import socket; socket.socket(socket.AF_UNIX).bind('{root}/socket')",
    ],
)
def test_a_write_elsewhere_is_seen(root, tmp_path, code):
    """In a temporary directory, without a name, in memory, in the root under a name of no meaning, by a child."""
    (root / "slots").mkdir()
    (root / "data").mkdir()
    code = f"import contextlib\nwith contextlib.suppress(OSError):\n  {code.format(root=root)}"
    assert undeclared(list(changes(traced(tmp_path, sys.executable, "-c", code))), root)
