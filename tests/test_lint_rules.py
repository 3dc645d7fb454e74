"""Who may touch what: files, memory maps, clock, network, processes, threads, chance, host and terminal.

``[tool.layercache.touches]`` in pyproject.toml marks the modules that touch the world, and what each touches. A module
without a mark is pure. The marks are held both ways: a mark no longer needed fails too, so the table stays true.
``make check`` runs this file.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layercache"
MARKS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["layercache"]["touches"]

# Qualified name -> what using it touches; the longest prefix decides, "" is harmless.
TOUCH = {
    "open": "files",
    "io.open": "files",
    "io.FileIO": "files",
    "os": "files",
    "pathlib": "files",
    "shutil": "files",
    "tempfile": "files",
    "fcntl": "files",
    "mmap": "memory",
    "ctypes": "files",
    "glob": "files",
    "tarfile.open": "files",
    "zipfile": "files",
    "gzip.open": "files",
    "sqlite3": "files",
    "aiofiles": "files",
    "importlib.resources": "files",
    "time": "clock",
    "sched": "clock",
    "datetime.datetime.now": "clock",
    "datetime.datetime.today": "clock",
    "datetime.datetime.utcnow": "clock",
    "datetime.date.today": "clock",
    "socket": "network",
    "socketserver": "network",
    "select": "network",
    "selectors": "network",
    "ssl": "network",
    "http": "network",
    "http.HTTPStatus": "",
    "urllib.request": "network",
    "urllib3": "network",
    "boto3": "network",
    "botocore": "network",
    "subprocess": "processes",
    "multiprocessing": "processes",
    "signal": "processes",
    "os.fork": "processes",
    "os.kill": "processes",
    "os.killpg": "processes",
    "os._exit": "processes",
    "os.execv": "processes",
    "os.system": "processes",
    "os.posix_spawn": "processes",
    "os.register_at_fork": "processes",
    "threading": "threads",
    "concurrent.futures": "threads",
    "queue": "threads",
    "asyncio": "threads",
    "random": "chance",
    "secrets": "chance",
    "uuid": "chance",
    "os.urandom": "chance",
    "os.environ": "host",
    "os.getenv": "host",
    "os.uname": "host",
    "os.cpu_count": "host",
    "os.getpid": "host",
    "os.getuid": "host",
    "os.geteuid": "host",
    "platform": "host",
    "pwd": "host",
    "print": "terminal",
    "input": "terminal",
    "sys.stdin": "terminal",
    "sys.stdout": "terminal",
    "sys.stderr": "terminal",
    "rich": "terminal",
    "eval": "code",
    "exec": "code",
    "compile": "code",
    "__import__": "code",
    "os.PathLike": "",
    "os.fspath": "",
    "os.fsencode": "",
    "os.fsdecode": "",
    "os.strerror": "",
    "os.path.join": "",
    "os.path.basename": "",
    "os.path.dirname": "",
    "os.path.normpath": "",
    "pathlib.PurePath": "",
    "pathlib.PurePosixPath": "",
}
BUILTINS = {"open", "print", "input", "eval", "exec", "compile", "__import__"}
# Methods of a path that was handed in: no import gives them away.
PATH_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "rglob"}


def touch_of(name: str) -> str:
    """What using the qualified name touches; empty when harmless."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        found = TOUCH.get(".".join(parts[:length]))
        if found is not None:
            return found
    return ""


def imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> qualified name of everything imported from outside the package, in any scope."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


class Uses(ast.NodeVisitor):
    """Collects ``(line, qualified name)`` of what a module uses when it runs; annotations do not run."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[int, str]] = []
        self._names = imported(tree)
        self._own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        self.visit(tree)

    def visit_Name(self, node: ast.Name) -> None:
        """A bare name: imported, or a builtin; anything else is a variable."""
        if node.id in self._names or (node.id in BUILTINS and node.id not in self._own):
            self.found.append((node.lineno, self._names.get(node.id, node.id)))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A dotted name, as long as it goes."""
        parts: list[str] = []
        head: ast.expr = node
        while isinstance(head, ast.Attribute):
            parts.insert(0, head.attr)
            head = head.value
        if isinstance(head, ast.Name) and head.id in self._names:
            self.found.append((node.lineno, ".".join([self._names[head.id], *parts])))
            return
        if node.attr in PATH_METHODS:
            self.found.append((node.lineno, f"pathlib.Path.{node.attr}"))
        self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        """Skip the annotation of a parameter."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Skip the annotation of a variable."""
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Skip the annotation of the result."""
        for part in [*node.decorator_list, node.args, *node.body]:
            self.visit(part)

    def visit_If(self, node: ast.If) -> None:
        """Skip imports that only the type checker sees."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.generic_visit(node)


def touches(source: str) -> dict[str, list[str]]:
    """What a module's source touches, each with the places (``line name``) that do."""
    found: dict[str, list[str]] = {}
    for line, name in Uses(ast.parse(source)).found:
        touch = touch_of(name)
        if touch:
            found.setdefault(touch, []).append(f"{line} {name}")
    return found


def modules() -> Iterator[str]:
    """Every module of the package, as its dotted name below ``layercache`` (``.`` for the package itself)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "."


def source_of(module: str) -> str:
    """The text of a module named as :func:`modules` names it."""
    path = PACKAGE if module == "." else PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


@pytest.mark.parametrize("module", list(modules()))
def test_a_module_touches_exactly_what_its_mark_says(module: str) -> None:
    """A module without a mark is pure, a marked one uses each thing of its mark and nothing else."""
    found = touches(source_of(module))

    assert sorted(found) == sorted(MARKS.get(module, [])), f"{module} touches {found}; see [tool.layercache.touches]"


def test_every_mark_names_a_module() -> None:
    """A mark of a module that was renamed or removed is an error."""
    assert set(MARKS) <= set(modules())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos.open('x', 0)", ["files"]),
        ("from os import rename as move\nmove('a', 'b')", ["files"]),
        ("import os.path\nos.path.exists('x')", ["files"]),
        ("with open('x') as f: pass", ["files"]),
        ("def f(path): return path.read_text()", ["files"]),
        ("def f():\n    import pathlib as p\n    return p.Path('x')", ["files"]),
        ("import time\nx = time.monotonic", ["clock"]),
        ("from time import time as now\nnow()", ["clock"]),
        ("import datetime\ndatetime.datetime.now()", ["clock"]),
        ("import socket\nsocket.create_connection(('a', 1))", ["network"]),
        ("import urllib3\nurllib3.PoolManager()", ["network"]),
        ("import subprocess as s\ns.run([])", ["processes"]),
        ("import threading\nclass A:\n    lock = threading.Lock()", ["threads"]),
        ("import os\nos.environ['A']", ["host"]),
        ("import os\nmodule = os", ["files"]),
        ("print('x')", ["terminal"]),
        ("async def f():\n    open('x')", ["files"]),
        ("import os\ndef f(p: os.DirEntry) -> os.DirEntry: return p", []),
        ("import os\nos.fspath('x')", []),
        ("def f(platform): return platform.os", []),
        ("import datetime\ndatetime.datetime(2000, 1, 1)", []),
        ("class A:\n    def open(self): ...\nA().open()", []),
        ("def open(): ...\nopen()", []),
        ("from layercache.oci import time\ntime()", []),
    ],
)
def test_the_rule_sees_through_aliases_and_ignores_annotations(source: str, expected: list[str]) -> None:
    """The checker itself: each way to reach a banned call is seen, what does not run is not."""
    assert sorted(touches(source)) == expected
