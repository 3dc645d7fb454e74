"""How results look to people and to programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache.cli._output import Output, age, binary, pairs, printable, rfc3339, short, table
from layercache.cli._progress import progress
from layercache.control import Progress
from layercache.oci import Digest

DIGEST = Digest.parse("sha256:" + "0123456789abcdef" * 4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 63, "8.0 EiB"),
        (1 << 80, "1048576.0 EiB"),
    ],
)
def test_sizes_are_binary_and_never_read_1024(size: int, expected: str) -> None:
    """Sizes for people use the largest unit that fits."""
    assert binary(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(-5, "0s"), (0.4, "0s"), (59, "59s"), (60, "1m"), (3600, "1h"), (86400 * 400, "400d")]
)
def test_ages_use_their_largest_unit(seconds: float, expected: str) -> None:
    """A clock that went back is an age of nothing."""
    assert age(seconds) == expected


def test_times_are_rfc_3339_in_utc() -> None:
    """Milliseconds and a Z, whatever the host's time zone."""
    assert rfc3339(1_700_000_000.25) == "2023-11-14T22:13:20.250Z"


def test_a_short_digest_keeps_its_algorithm() -> None:
    """Twelve characters, as the field has it."""
    assert short(DIGEST) == "sha256:0123456789ab"


@given(st.text())
def test_printable_text_stays_on_its_line_and_moves_no_cursor(text: str) -> None:
    """Whatever a name holds, it comes out as printable characters; a harmless one unchanged."""
    shown = printable(text)

    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_names_that_are_not_text_are_printable_too() -> None:
    """A file name of bytes that are no UTF-8 arrives as surrogates."""
    assert printable("a\udcffb\x1b[2J\n") == "a\\udcffb\\x1b[2J\\n"


def test_columns_are_aligned() -> None:
    """Left or right, with no blanks at the end of a line."""
    rows = [("a", 1, ""), ("bbb", 20, "x")]
    assert list(table(rows, header=("NAME", "N", "M"), right=[1])) == ["NAME   N  M", "a      1", "bbb   20  x"]
    assert list(table([])) == []


def test_a_document_has_its_times_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Times at any depth are RFC 3339, one that never was is null, and nothing else changes."""
    document = {"created": 0.5, "verified": 0, "size": 5, "blobs": [{"resolved": 1.0, "seconds": 1.0}], "pending": ()}
    Output(as_json=True).document(document)

    assert json.loads(capsys.readouterr().out) == {
        "created": "1970-01-01T00:00:00.500Z",
        "verified": None,
        "size": 5,
        "blobs": [{"resolved": "1970-01-01T00:00:01.000Z", "seconds": 1.0}],
        "pending": [],
    }


def test_people_get_lines_and_programs_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Never both."""
    for as_json in (False, True):
        out = Output(as_json=as_json)
        out.document({"a": 1})
        out.lines(["line"])
    assert capsys.readouterr().out == 'line\n{\n  "a": 1\n}\n'


def test_pairs_name_each_member(capsys: pytest.CaptureFixture[str]) -> None:
    """For people: blanks for underscores, sizes in both forms, a dash for nothing."""
    lines = list(pairs({"media_type": "a/b", "size": 2048, "diff_id": None, "pending": [], "created": 1.0}))
    assert lines == [
        "media type:  a/b",
        "size:        2048 (2.0 KiB)",
        "diff id:     -",
        "pending:     -",
        "created:     1970-01-01T00:00:01.000Z",
    ]


@pytest.mark.parametrize(
    ("terminal", "no_trunc", "expected"),
    [(True, False, short(DIGEST)), (True, True, str(DIGEST)), (False, False, str(DIGEST))],
)
def test_digests_are_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, no_trunc: bool, expected: str
) -> None:
    """Shortened for a terminal only, and not where the user said otherwise."""
    monkeypatch.setattr(sys, "stdout", Screen(terminal=terminal))
    assert Output(as_json=False, no_trunc=no_trunc).digest(DIGEST) == expected


class Screen(io.StringIO):
    """A stream that says it is a terminal, or that it is not."""

    def __init__(self, *, terminal: bool = True) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


STEPS = (
    Progress(DIGEST, 2048, 0, "queued"),
    Progress(DIGEST, 2048, 0, "fetching"),
    Progress(DIGEST, 2048, 1024, "fetching"),
    Progress(DIGEST, 2048, 2048, "miss"),
)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run STEPS through what a pull would report to and return what standard error got."""

    def run(*, terminal: bool = True, quiet: bool = False, verbose: bool = False, no_progress: bool = False) -> str:
        screen = Screen(terminal=terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        with progress(quiet=quiet, verbose=verbose, no_progress=no_progress) as show:
            if show is not None:
                for step in STEPS:
                    show(step)
        return screen.getvalue()

    for name in ("CI", "NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return run


def test_a_terminal_shows_a_bar_with_amount_and_rate(watch: Callable[..., str]) -> None:
    """The bar names the blob, and is gone in the end (the cursor goes back up and clears)."""
    shown = watch()

    assert short(DIGEST) in shown
    assert "2.0 KiB / 2.0 KiB" in shown
    assert "\u2501" in shown
    assert "\x1b[38;5;" in shown
    assert shown.endswith("\x1b[2K")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_no_color_leaves_bars_without_colours(watch: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR is about colours only."""
    monkeypatch.setenv("NO_COLOR", "1")
    shown = watch()

    assert "\u2501" in shown
    assert "\x1b[38" not in shown


LINE = "layercache: fetching sha256:0123456789ab (2.0 KiB)\n"


def test_a_dumb_terminal_gets_a_line_a_blob(watch: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No escape sequences where nothing understands them."""
    monkeypatch.setenv("TERM", "dumb")
    assert watch() == LINE
    monkeypatch.delenv("TERM")
    assert watch() == LINE


def test_without_rich_a_terminal_gets_a_line_a_blob(watch: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra ``cli`` is not needed for anything but looks."""
    monkeypatch.setitem(sys.modules, "layercache.cli._bars", None)
    assert watch() == LINE


def test_a_pipe_gets_nothing_or_with_verbose_a_line_a_blob(watch: Callable[..., str]) -> None:
    """Scripts see no progress unless they ask for it."""
    assert watch(terminal=False) == ""
    assert watch(terminal=False, verbose=True) == LINE
    assert watch(terminal=False, verbose=True, quiet=True) == ""


@pytest.mark.parametrize("name", ["CI", "LAYERCACHE_NO_PROGRESS"])
def test_a_variable_can_turn_progress_off(
    watch: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Set to something that means yes, as build servers do."""
    monkeypatch.setenv(name, "true")
    assert watch() == ""
    monkeypatch.setenv(name, "0")
    assert watch() != ""


def test_options_turn_progress_off(watch: Callable[..., str]) -> None:
    """On a terminal, too."""
    assert watch(no_progress=True) == ""
    assert watch(quiet=True) == ""


def test_bars_of_finished_blobs_make_room_for_moving_ones(
    monkeypatch: pytest.MonkeyPatch, watch: Callable[..., str]
) -> None:
    """With more blobs than lines, what still moves stays on the screen."""
    del watch  # for its environment
    from layercache.cli._bars import Bars

    monkeypatch.setenv("LINES", "10")
    monkeypatch.setattr(sys, "stderr", Screen())
    digests = [Digest.of(bytes([n])) for n in range(30)]
    with Bars() as bars:
        for digest in digests:
            bars(Progress(digest, 10, 10, "hit"))
        for digest in digests[:3]:
            bars(Progress(Digest.of(str(digest).encode()), 10, 5, "fetching"))
        tasks = bars._progress.tasks

    assert sum(task.visible for task in tasks) <= 11
    assert all(task.visible for task in tasks if task.fields["stage"] == "fetching")


def test_what_is_printed_beside_bars_stays_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], watch: Callable[..., str]
) -> None:
    """Bars take over standard error only."""
    del watch
    from layercache.cli._bars import Bars

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with Bars() as bars:
        bars(STEPS[1])
        print("data")

    assert capsys.readouterr().out == "data\n"
    assert "data" not in screen.getvalue()


def test_data_is_written_whole_where_the_stream_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unbuffered standard output may take a part; one that is not ready is an error, not a gap."""
    taken = bytearray()

    class Slow:
        def write(self, data: memoryview) -> int | None:
            taken.extend(data[:3])
            return len(data[:3]) or None

    class Screen:
        buffer = Slow()

    monkeypatch.setattr(sys, "stdout", Screen())
    Output.data(b"0123456789")
    assert taken == b"0123456789"

    monkeypatch.setattr(Slow, "write", lambda *_: None)
    with pytest.raises(BlockingIOError):
        Output.data(b"x")
