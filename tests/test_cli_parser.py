"""What can be typed, and what is refused before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest

from layercache.cli import main
from layercache.cli._parser import UsageError, build_parser

GLOBALS = {"root": None, "json": False, "quiet": False, "verbose": False, "no_progress": False}


def parsed(text: str) -> dict[str, Any]:
    """What a command line means."""
    return vars(build_parser().parse_args(text.split()))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pull R -n N", {"command": "pull", "reference": "R", "namespace": "N", "platform": None, "jobs": None}),
        ("pull R -n N", {"plain_http": False, "fresh": False, "timeout": None}),
        ("pull --namespace N R --platform linux/arm64 --jobs 3", {"platform": "linux/arm64", "jobs": 3}),
        ("pull R -n N --plain-http --fresh --timeout 1.5", {"plain_http": True, "fresh": True, "timeout": 1.5}),
        ("ls", {"command": "ls", "namespace": None, "no_trunc": False}),
        ("list -n N --no-trunc", {"command": "ls", "namespace": "N", "no_trunc": True}),
        ("inspect D -n N", {"command": "inspect", "digest": "D", "namespace": "N"}),
        ("cat D -n N --uncompressed", {"command": "cat", "digest": "D", "uncompressed": True}),
        ("cat D -n N", {"uncompressed": False}),
        ("export R -n N DIR", {"command": "export", "target": "R", "directory": "DIR"}),
        ("export -n N R DIR", {"target": "R", "directory": "DIR"}),
        ("put F -n N", {"command": "put", "file": "F", "media_type": None}),
        ("put F -n N --media-type a/b", {"media_type": "a/b"}),
        ("put -n N -- -f", {"file": "-f", "namespace": "N"}),
        ("verify -n N", {"command": "verify", "digest": None}),
        ("verify -n N D", {"digest": "D"}),
        ("verify D -n N", {"digest": "D"}),
        ("rm A B -n N", {"command": "rm", "targets": ["A", "B"], "ignore_missing": False}),
        ("rm A -n N B --ignore-missing C", {"targets": ["A", "B", "C"], "ignore_missing": True}),
        ("purge N", {"command": "purge", "namespace": "N", "wait": 5.0}),
        ("purge N --wait 0", {"wait": 0.0}),
    ],
)
def test_each_form_of_each_command_is_understood(line: str, expected: dict[str, Any]) -> None:
    """The table of the contract, options before, between and after the arguments."""
    found = parsed(line)

    assert {key: found[key] for key in expected} == expected
    assert {key: found[key] for key in GLOBALS} == GLOBALS


@pytest.mark.parametrize("line", ["{} ls", "ls {}"])
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--root DIR", {"root": "DIR"}),
        ("--json", {"json": True}),
        ("-q", {"quiet": True}),
        ("--quiet", {"quiet": True}),
        ("-v", {"verbose": True}),
        ("--verbose", {"verbose": True}),
        ("--no-progress", {"no_progress": True}),
    ],
)
def test_what_every_command_takes_may_stand_before_or_after_it(
    line: str, option: str, expected: dict[str, Any]
) -> None:
    """An option of all commands means the same in both places, and a command does not undo it."""
    found = parsed(line.format(option))

    assert {key: found[key] for key in GLOBALS} == GLOBALS | expected


def test_the_later_of_two_roots_stands() -> None:
    """Given twice, the one after the command counts."""
    assert parsed("--root a ls --root b")["root"] == "b"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "pul R -n N",
        "pull",
        "pull R",
        "pull -n N",
        "pull R -n N extra",
        "pull R -n N --plat linux/amd64",
        "pull R -n N --jobs 0",
        "pull R -n N --jobs -1",
        "pull R -n N --jobs 1.5",
        "pull R -n N --jobs ²",
        "pull R -n N --jobs 99999999",
        "pull R -n N --timeout nan",
        "pull R -n N --timeout inf",
        "pull R -n N --timeout -1",
        "pull R -n N --timeout soon",
        "ls extra",
        "inspect -n N",
        "cat D",
        "export R -n N",
        "put -n N",
        "verify",
        "verify A B -n N",
        "rm -n N",
        "purge",
        "purge -n N",
        "purge N --wait x",
        "ls --unknown",
        "ls --root",
    ],
)
def test_anything_else_is_wrong_usage_in_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, nothing on standard output, and one line that says where to look."""
    with pytest.raises(UsageError):
        parsed(line)

    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("layercache: ")
    assert "--help" in err
