"""What every test may ask for, and what no test may leave behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from layercache.testing.images import BuiltImage, BuiltIndex
from layercache.testing.registry import ScriptedRegistry
from tests import peers

_REAL = {"docker_registry", "stoppable_registry", "skopeo"}
_FOREIGN = ("AWS_", "DOCKER_", "LAYERCACHE_", "XDG_")
_GRACE = 2.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs real programs, and skip it where they are missing, saying which."""
    missing = peers.missing_programs()
    why = f"needs {' and '.join(missing)}: apt-get install {' '.join(missing)}"
    for item in items:
        if _REAL.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("real")
        if missing and item.get_closest_marker("real") is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the registries of a failed test saw."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, peers.PeerRegistry):
                report.sections.append((f"log of {name}", value.log_tail()))
            elif isinstance(value, ScriptedRegistry):
                lines = (f"{r.method} {r.path} {r.status} {r.sent} ({r.listener})" for r in value.requests[-40:])
                report.sections.append((f"requests to {name}", "\n".join(lines)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the sweeps covered: how many faults, cuts, rounds and seeds, and of which share."""
    reports = (report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind))
    lines = [str(value) for report in reports for name, value in report.user_properties if name == "coverage"]
    if lines:
        terminalreporter.section("what the sweeps covered")
        for line in sorted(lines):
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread or a child process."""
    threads, children = set(threading.enumerate()), _children()
    yield
    end = time.monotonic() + _GRACE
    while True:
        left_threads = [thread for thread in threading.enumerate() if thread not in threads and not _pooled(thread)]
        left_children = _children() - children
        if not left_threads and not left_children:
            return
        if time.monotonic() >= end:
            break
        time.sleep(0.01)
    names = [f"{pid} {_command(pid)}" for pid in left_children]
    for pid in left_children:  # ours, by pid: nobody else would end them
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    pytest.fail(f"left behind: threads {[thread.name for thread in left_threads]}, processes {names}")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    """Keep the settings and credentials of whoever runs the tests out of them."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name.upper().endswith("_PROXY") or name == "REGISTRY_AUTH_FILE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(empty_home))


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home directory with nothing in it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return an empty directory of mode 0700: the root of a cache."""
    path = tmp_path / "root"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    """Return a running scripted registry that holds nothing."""
    with ScriptedRegistry() as registry:
        yield registry


@pytest.fixture(scope="session")
def real_images() -> dict[str, BuiltImage | BuiltIndex]:
    """Return images of real trees by kind; see :func:`peers.real_images`."""
    return peers.real_images()


@pytest.fixture(scope="session")
def docker_registry(
    tmp_path_factory: pytest.TempPathFactory, real_images: dict[str, BuiltImage | BuiltIndex]
) -> Iterator[peers.PeerRegistry]:
    """Return Debian's docker-registry, running and filled with the real images through skopeo.

    It is shared: read from it, and stop another one (``stoppable_registry``).
    """
    home = tmp_path_factory.mktemp("docker-registry")
    registry = peers.PeerRegistry(home, home / "store")
    registry.start()
    try:
        peers.fill(registry, real_images)
        yield registry
    finally:
        registry.stop()


@pytest.fixture
def stoppable_registry(docker_registry: peers.PeerRegistry, tmp_path: Path) -> Iterator[peers.PeerRegistry]:
    """Return a docker-registry of the test's own over the same images, which it may stop and start again."""
    home = tmp_path / "docker-registry"
    home.mkdir()
    registry = peers.PeerRegistry(home, docker_registry.store, docker_registry.pushed)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


@pytest.fixture
def peer(docker_registry: peers.PeerRegistry, tmp_path: Path) -> Iterator[Callable[..., peers.PeerRegistry]]:
    """Return a starter of further registries over the same images."""
    started: list[peers.PeerRegistry] = []

    def start(*, store: Path = docker_registry.store, **sections: Any) -> peers.PeerRegistry:
        home = tmp_path / f"registry-{len(started)}"
        home.mkdir()
        started.append(peers.PeerRegistry(home, store, docker_registry.pushed, **sections))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., peers.Nginx]]:
    """Return a starter of nginx."""
    started: list[peers.Nginx] = []

    def start(*servers: str, **options: Any) -> peers.Nginx:
        started.append(peers.Nginx(tmp_path / f"nginx-{len(started)}", *servers, **options))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def skopeo(tmp_path: Path) -> Callable[..., bytes]:
    """Return a function that runs skopeo with its arguments and returns what it prints."""
    home = tmp_path / "skopeo"
    home.mkdir()

    def run(*args: str | Path) -> bytes:
        return peers.skopeo(*args, home=home)

    return run


def _pooled(thread: threading.Thread) -> bool:
    """Tell whether a thread of the simulation waits for its next program: starting one costs more than a program."""
    return thread.name == "simulated process"


def _children() -> set[int]:
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # the thread ended, or a kernel without this file
            found.update(map(int, (thread / "children").read_text().split()))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") or "(ended)"
    except OSError:
        return "(ended)"
