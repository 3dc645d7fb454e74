"""What the documentation says, done: its Python and its commands run, its links lead somewhere, its tables are true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from layercache.testing.images import build_image, build_layer, layer_tar
from layercache.testing.registry import ScriptedRegistry

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)(?P<target>[^)#]+)")
TASK = re.compile(r"(?:`|\$ )make ([a-z]+)")

# What stands in the documentation for what a reader has: their cache and their registry.
CACHE, REGISTRY = "/var/lib/layercache", "127.0.0.1:5000"


def blocks(language: str) -> list[ParameterSet]:
    """Every fenced block of a language, named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match["text"], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def tasks() -> set[str]:
    """The tasks of the Makefile."""
    return set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """A registry that holds the image of the documentation."""
    tar = layer_tar([Path(json.__file__).parent], under="usr/lib/python3")
    image = build_image([tar, build_layer(layer_tar({"etc/serving.json": b"{}"}), "zstd")])
    with ScriptedRegistry() as registry:
        registry.add(image, "demo/serving", "1.0")
        yield registry.host


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_documentation_runs(
    text: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python block runs as it stands, but for the reader's cache and registry."""
    monkeypatch.chdir(tmp_path)
    text = text.replace(CACHE, str(tmp_path / "cache")).replace(REGISTRY, host)

    exec(compile(text, "documentation", "exec"), {"__name__": "documentation"})

    capsys.readouterr()


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_in_the_documentation_run(text: str, host: str, tmp_path: Path) -> None:
    """Every ``$ layercache`` line of a block succeeds, in order; not those with a shortened digest or a pipe."""
    environment = os.environ | {"LAYERCACHE_ROOT": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for line in text.splitlines():
        if not line.startswith("$ layercache ") or "..." in line or " | " in line:
            continue
        words = shlex.split(line.removeprefix("$ layercache").replace(REGISTRY, host), comments=True)
        done = subprocess.run(
            [sys.executable, "-m", "layercache", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_documentation_has_something_to_run() -> None:
    """The search for blocks finds the README's: a change of its form must not switch these tests off."""
    assert any("README.md" in str(block.id) for block in blocks("python"))
    assert any("README.md" in str(block.id) for block in blocks("console"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page: Path) -> None:
    """Relative links lead to files of the repository, and every task a page names is in the menu."""
    text = page.read_text()

    assert [target for target in LINK.findall(text) if not (page.parent / target).exists()] == []
    assert sorted(set(TASK.findall(text)) - tasks()) == []


def test_ci_runs_the_task_a_contributor_runs() -> None:
    """``.ci/run`` is ``make test`` and nothing else."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()

    assert [line for line in lines if "make" in line] == ["exec make test </dev/null"]


def test_architecture_names_every_module_and_what_it_touches() -> None:
    """The table of modules has every top module, and its last column is what pyproject.toml marks."""
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["layercache"]["touches"]
    top = {path.stem for path in (ROOT / "layercache").iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)}
    said = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            for name in re.findall(r"`([\w.]+)`", cells[0]):
                said[name] = sorted(filter(None, cells[2].replace("-", "").split(", ")))

    assert said == {name: sorted(marks.get(name, [])) for name in said}
    assert sorted(top - set(said)) == []


def test_architecture_shows_the_import_layers() -> None:
    """The layers on the page are the ones that import-linter holds."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]

    assert "\n".join(["```", *contract["layers"], "```"]) in (ROOT / "docs" / "architecture.md").read_text()


def test_demo_shows_the_main_job(tmp_path: Path) -> None:
    """The demo ends well, shows every step in order with its source and requests, and leaves nothing behind."""
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "docs" / "examples" / "demo.py"],
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if not line.startswith(" ")}

    assert (done.returncode, done.stderr) == (0, "")
    assert list(lines) == ["build", "serve", "pull", "again", "offline", "read", "purge"]
    assert "5 hit; 0 requests" in lines["again"]
    assert "stale" in lines["offline"]
    assert "unlinked" in lines["purge"]
    assert list(tmp_path.iterdir()) == []


def test_registry_rules_are_all_there_and_name_tests_that_exist() -> None:
    """Ninety-three rules and twenty-five bugs, each once; a test that was renamed shows here."""
    text = (ROOT / "docs" / "registry.md").read_text()
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }

    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert numbers == [*range(1, 94), *range(1, 26)]
    assert sorted(set(re.findall(r"`(test_\w+)`", text)) - known) == []
