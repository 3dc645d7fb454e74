"""The fuzz runner: a short run is repeatable, finds nothing in the parsers, and does find what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent.parent / "fuzz" / "run.py"


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the runner to its end."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_short_run_finds_nothing_in_the_parsers() -> None:
    """The seeds and a few thousand mutations of them; the seed is printed, for the same run again."""
    done = run(RUN, "--runs", "3000", "--seed", "1")
    assert (done.returncode, done.stderr) == (0, "")
    found = "fuzz_{}: 3000 inputs, seed 1, nothing found\n"
    assert done.stdout == "".join(found.format(name) for name in ("files", "references", "registry"))


def test_a_finding_is_printed_and_fails(tmp_path: Path) -> None:
    """A target that raises ends the run with the input that did it."""
    shutil.copy(RUN, tmp_path)
    target = "SEEDS, TOKENS = [b'ab'], [b'!']\ndef one(data):\n    assert b'!' not in data\n"
    (tmp_path / "fuzz_wrong.py").write_text(target)
    first, second = (run(tmp_path / "run.py", "--runs", "500", "--seed", "1") for _ in range(2))
    assert first.returncode == 1
    assert "found by b'" in first.stderr
    assert "!" in first.stderr.splitlines()[0]
    assert first.stderr == second.stderr


def test_an_unknown_target_is_wrong_usage() -> None:
    """A misspelt name is not a run that found nothing."""
    done = run(RUN, "fuzz_nothing")
    assert done.returncode == 2
    assert "no such target" in done.stderr
