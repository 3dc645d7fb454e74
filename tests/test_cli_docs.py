"""docs/cli.md repeats the help of every command. Rewrite it with: UPDATE_DOCS=1 pytest tests/test_cli_docs.py."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest

from layercache.cli._parser import build_parser

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
BLOCK = re.compile(r"<!-- help: (\S+) -->\n(?:\n?```text\n.*?```\n\n?)?", re.DOTALL)


def helps() -> dict[str, str]:
    """Command -> its help; ``layercache`` is the help of all."""
    parser = build_parser()
    found = {"layercache": parser.format_help()}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: verb.format_help() for name, verb in action.choices.items() if verb.prog.endswith(name)}
    return found


def test_the_page_shows_the_help_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has its block, in order, and each block is the help of today."""
    monkeypatch.setenv("COLUMNS", "100")
    expected = helps()
    text = PAGE.read_text()
    rewritten = BLOCK.sub(lambda match: f"<!-- help: {match[1]} -->\n\n```text\n{expected[match[1]]}```\n\n", text)
    rewritten = rewritten.rstrip() + "\n"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(rewritten)

    assert [match[1] for match in BLOCK.finditer(text)] == list(expected)
    assert PAGE.read_text() == rewritten


def test_the_page_names_every_exit_code_and_variable() -> None:
    """Nothing that a script relies on is in the help only."""
    page = PAGE.read_text().partition("## The commands")[0]
    epilog = build_parser().epilog or ""

    codes = {code for line in epilog.splitlines()[1:5] for code in re.findall(r"(?:^|  )(\d+)  ", line)}
    assert codes == {"0", "1", "2", "3", "4", "5", "130", "141"}
    assert codes == set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    for variable in re.findall(r"^  ([A-Z_]+) ", epilog, re.MULTILINE):
        assert f"`{variable}`" in page
