"""What the library shows: exact lists of public names, and an import that stays light."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layercache

PACKAGE = Path(__file__).parent.parent / "layercache"
LISTED = Path(__file__).parent / "public_names.txt"

# Imported at their first use, never by `import layercache`.
HEAVY = (
    "aiofiles",
    "asyncio",
    "boto3",
    "botocore",
    "hypothesis",
    "matplotlib",
    "rich",
    "urllib3",
    "zlib_ng",
    "zstandard",
)


def public_modules() -> list[str]:
    """Every module of which no part of the name is private."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["layercache", *path.relative_to(PACKAGE).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def offered(name: str) -> list[str]:
    """The ``__all__`` of a module."""
    return list(importlib.import_module(name).__all__)


def defined(name: str) -> set[str]:
    """Classes, functions and constants that a module's own source defines; an alias of a type may stay out."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    found: set[str] = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        match node:
            case ast.ClassDef(name=own) | ast.FunctionDef(name=own) | ast.AsyncFunctionDef(name=own):
                found.add(own)
            case ast.Assign(targets=targets):
                parts = [part for target in targets for part in ast.walk(target)]
                found |= {part.id for part in parts if isinstance(part, ast.Name) and part.id.isupper()}
            case ast.AnnAssign(target=ast.Name(id=own)):
                found.add(own)
    return {own for own in found if not own.startswith("_")}


@pytest.mark.parametrize("name", public_modules())
def test_a_public_module_offers_exactly_its_public_names(name: str) -> None:
    """``__all__`` is sorted, everything in it exists, and nothing public that the module defines is left out."""
    module = importlib.import_module(name)
    names = offered(name)

    assert names == sorted(set(names), key=lambda one: (not one.isupper(), not one[0].isupper(), one))
    assert [one for one in names if not hasattr(module, one)] == []
    assert sorted(defined(name) - set(names)) == []


def test_public_names_are_the_listed_ones() -> None:
    """A name that appears, moves or goes is a decision: it shows as a changed line of ``public_names.txt``."""
    now = [f"{name}.{one}" for name in public_modules() for one in sorted(offered(name))]
    if os.environ.get("UPDATE_DOCS"):
        LISTED.write_text("\n".join(now) + "\n")

    assert now == LISTED.read_text().splitlines(), "if it is meant: UPDATE_DOCS=1 pytest tests/test_public.py"


@pytest.mark.parametrize(
    ("program", "none_of"),
    [
        ("import layercache", {*HEAVY, "dataclasses", "logging", "ssl"}),
        ("import layercache.errors", {*HEAVY, "ssl"}),
        ("from layercache import LayerCache, Namespace, diagnose", {*HEAVY, "ssl"}),
        ("from layercache.cache import LayerCache; LayerCache('/proc/none', janitor=False).close()", {*HEAVY, "ssl"}),
    ],
)
def test_import_is_light(program: str, none_of: set[str]) -> None:
    """Nothing heavy comes with a name, and no part of the registry's client: a host pays for what it uses."""
    program = f"import json, sys; {program}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))

    assert sorted({module.partition(".")[0] for module in loaded} & none_of) == []
    assert "layercache.registry" not in loaded


def test_a_name_of_the_root_is_the_one_of_its_home() -> None:
    """Every name comes, as it is in its module; a submodule comes too; anything else is not there."""
    listed = {name: home for home, names in layercache._HOMES.items() for name in names}
    assert sorted([*listed, "__version__"]) == sorted(layercache.__all__)
    for name, home in listed.items():
        assert getattr(layercache, name) is getattr(importlib.import_module(f"layercache.{home}"), name)
    assert set(layercache.__all__) <= set(dir(layercache))
    program = "import layercache; print(layercache.errors.NotFoundError.__name__, hasattr(layercache, 'nothing'))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["NotFoundError", "False"]
