"""Terminals, pipes and signals: what a person and a shell see of a running command."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layercache.testing.images import BuiltImage, build_image, layer_tar
from layercache.testing.registry import Drip, ScriptedRegistry, Stall

NS = "acme/endpoint-7"
BAR = "\u2501"


@pytest.fixture
def environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a person's shell has set."""
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    return {**os.environ, "LAYERCACHE_ROOT": str(root), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}


@pytest.fixture
def image(scripted: ScriptedRegistry) -> BuiltImage:
    """An image of two layers, on the registry as ``demo:1``."""
    layers = [layer_tar({"a": os.urandom(3 << 20)}), layer_tar({"b": os.urandom(4 << 20)})]
    built = build_image(layers, platform="linux/amd64", compression="none")
    scripted.add(built, "demo", "1")
    return built


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a command; whatever still runs at the end of the test is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*args: object, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "layercache", *map(str, args)]
        started.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


class Terminal:
    """A pseudo terminal, read while the command writes."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self.master, 65536)
            except OSError:  # the last writer closed its side
                return
            if not piece:
                return
            self._shown += piece

    def close(self) -> str:
        """Everything shown, once nobody writes any more."""
        os.close(self.slave)
        self._reader.join(10)
        os.close(self.master)
        return self._shown.decode()


def test_a_terminal_shows_a_bar_per_blob_and_the_pipe_beside_it_only_data(
    start: Callable[..., subprocess.Popen[bytes]], scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """Bars go to standard error; standard output has the document and not one byte more."""
    scripted.fault("blobs/*", Drip(rate=6_000_000, size=65536), times=None)
    terminal = Terminal()
    process = start("pull", f"{scripted.host}/demo:1", "-n", NS, "--json", stderr=terminal.slave)
    out, _ = process.communicate(timeout=30)
    shown = terminal.close()

    assert process.returncode == 0
    assert json.loads(out)["digest"] == str(image.digest)
    assert BAR in shown
    for layer in image.layers:
        assert f"sha256:{layer.digest.encoded[:12]}" in shown
    assert "/s" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is there again


@pytest.mark.parametrize("option", ["--no-progress", "-q"])
def test_a_terminal_stays_quiet_when_asked(
    start: Callable[..., subprocess.Popen[bytes]], scripted: ScriptedRegistry, image: BuiltImage, option: str
) -> None:
    """No bars, no escape sequences."""
    terminal = Terminal()
    process = start("pull", f"{scripted.host}/demo:1", "-n", NS, option, stderr=terminal.slave)
    process.communicate(timeout=30)
    shown = terminal.close()

    assert process.returncode == 0
    assert BAR not in shown
    assert "\x1b" not in shown


def test_a_pipe_shows_no_bars(
    start: Callable[..., subprocess.Popen[bytes]], scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """Standard error in a pipe has plain lines only."""
    process = start("pull", f"{scripted.host}/demo:1", "-n", NS)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 0
    assert b"\x1b" not in err
    assert BAR.encode() not in err


def test_ls_shortens_digests_on_a_terminal_only(
    start: Callable[..., subprocess.Popen[bytes]], scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """Whole with --no-trunc."""
    start("pull", f"{scripted.host}/demo:1", "-n", NS).communicate(timeout=30)
    for option, whole in (("-v", False), ("--no-trunc", True)):
        terminal = Terminal()
        start("ls", "-n", NS, option, stdout=terminal.slave).communicate(timeout=30)
        shown = terminal.close()

        assert f"sha256:{image.digest.encoded[:12]}" in shown
        assert (image.digest.encoded in shown) is whole


def stalled_pull(
    start: Callable[..., subprocess.Popen[bytes]], scripted: ScriptedRegistry, stderr: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """A pull whose layers have begun and do not go on."""
    scripted.fault("blobs/*", Stall(at=65536), times=None)
    process = start("pull", f"{scripted.host}/demo:1", "-n", NS, "--json", stderr=stderr)
    end = time.monotonic() + 20
    while sum(request.sent >= 65536 for request in scripted.requests) < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stalled_pull_with_nothing_half_visible(
    start: Callable[..., subprocess.Popen[bytes]],
    scripted: ScriptedRegistry,
    image: BuiltImage,
    number: signal.Signals,
    code: int,
) -> None:
    """Exit 130 for Ctrl-C soon after, one line and no traceback; no layer is listed; the next pull is whole."""
    process = stalled_pull(start, scripted)
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)

    assert process.returncode == code
    assert time.monotonic() - began < 10
    assert out == b""
    assert err.decode().startswith("layercache: interrupted")
    assert err.count(b"\n") == 1
    held = start("ls", "-q", "-n", NS).communicate(timeout=30)[0].decode().split()
    assert not {str(layer.digest) for layer in image.layers} & set(held)
    scripted.clear_faults()
    again = start("pull", f"{scripted.host}/demo:1", "-n", NS)
    again.communicate(timeout=30)
    assert again.returncode == 0


def test_ctrl_c_on_a_terminal_leaves_the_cursor_visible(
    start: Callable[..., subprocess.Popen[bytes]], scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """Bars hide it; whatever way the command ends, it comes back."""
    terminal = Terminal()
    process = stalled_pull(start, scripted, stderr=terminal.slave)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    shown = terminal.close()

    assert process.returncode == 130
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "Traceback" not in shown


HANGS = """
import sys, threading, time
from layercache.cli import _interrupt
from layercache.cli._interrupt import Interrupt

_interrupt._GRACE = {}

def hang():
    print("hanging", flush=True)
    time.sleep({})

threading.Thread(target=hang).start()
with Interrupt() as interrupt:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        assert interrupt.cancel.is_set()
        assert interrupt.code == 130
sys.exit(interrupt.code)
"""


@pytest.mark.parametrize(("seconds", "signals", "grace"), [(0.1, 1, 60), (60, 1, 0.2), (60, 2, 60)])
def test_no_thread_that_hangs_outlives_ctrl_c(seconds: float, signals: int, grace: float) -> None:
    """The process ends by itself, else after a moment of grace, else at once at the second Ctrl-C; 130 each time."""
    with subprocess.Popen([sys.executable, "-c", HANGS.format(grace, seconds)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hanging\n"
        time.sleep(0.1)
        began = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        try:
            assert process.wait(40) == 130
        finally:
            process.kill()
        assert time.monotonic() - began < 30


def test_cat_into_a_closed_pipe_is_quiet(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Exit 141, as a shell reports a program that SIGPIPE ended; nothing on standard error."""
    (tmp_path / "file").write_bytes(os.urandom(1 << 20) * 8)
    digest = start("put", tmp_path / "file", "-n", NS).communicate(timeout=30)[0].decode().strip()
    for option in ("-q", "--json"):
        process = start("cat", digest, "-n", NS, option)
        assert process.stdout is not None
        assert process.stdout.read(100)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_before_the_first_line_is_quiet(
    start: Callable[..., subprocess.Popen[bytes]], environment: dict[str, str], unbuffered: str
) -> None:
    """What nobody reads is no error of ours, for help as for data, whenever Python writes it."""
    environment["PYTHONUNBUFFERED"] = unbuffered
    for args in (("--help",), ("ls", "--json")):
        reader, writer = os.pipe()
        os.close(reader)
        process = start(*args, stdout=writer)
        os.close(writer)
        assert process.communicate(timeout=30)[1] == b""
        assert process.returncode == 141


def test_a_full_disk_behind_standard_output_is_a_failure(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Data that could not be written is not exit 0."""
    (tmp_path / "file").write_bytes(bytes(100_000))
    digest = start("put", tmp_path / "file", "-n", NS).communicate(timeout=30)[0].decode().strip()
    for args in (("cat", digest, "-n", NS), ("ls",)):
        full = os.open("/dev/full", os.O_WRONLY)
        process = start(*args, stdout=full)
        os.close(full)
        err = process.communicate(timeout=30)[1]
        assert process.returncode == 1
        assert b"No space left" in err
        assert err.count(b"\n") == 1


def test_closed_standard_streams_do_no_harm(environment: dict[str, str], root: Path, tmp_path: Path) -> None:
    """With 1 and 2 closed by the caller nothing is printed into files of the store."""
    (tmp_path / "file").write_bytes(b"content")
    command = f'exec "{sys.executable}" -m layercache put "{tmp_path / "file"}" -n {NS} -v <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env=environment, timeout=30, check=False)
    assert done.returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "layercache", "verify", "-n", NS], env=environment, timeout=30, check=False
    )
    assert done.returncode == 0


def test_what_is_not_needed_is_not_imported(environment: dict[str, str]) -> None:
    """--version and ls import neither rich nor boto3 nor asyncio."""
    for args in (["--version"], ["ls"]):
        code = (
            "import sys; from layercache.cli import main; main(sys.argv[1:]);"
            "sys.exit(','.join({'rich', 'boto3', 'botocore', 'asyncio', 'zstandard'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.stderr in ("\n", "layercache: no namespaces in " + environment["LAYERCACHE_ROOT"] + "\n\n")
