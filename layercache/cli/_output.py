"""How results look: tables, sizes and ages for people, one JSON document for programs."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = ["Output", "age", "binary", "note", "pairs", "printable", "rfc3339", "short", "table"]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_TIMES = frozenset({"created", "finished", "resolved", "started", "used", "verified"})
_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def printable(text: object) -> str:
    """Text that moves no cursor and stays on its line: what a registry or a tenant named may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def binary(size: float) -> str:
    """``size`` bytes for people: ``512 B``, ``1.5 MiB``."""
    unit = "B"
    for larger in _UNITS:
        if size < 1023.95:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def age(seconds: float) -> str:
    """A span for people, its largest unit only: ``4d``, ``12m``, ``0s``."""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return "0s"


def rfc3339(moment: float) -> str:
    """A time in seconds since 1970 as RFC 3339, in UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def short(digest: object) -> str:
    """The first 12 characters of a digest, for a person to recognise."""
    algorithm, _, encoded = str(digest).partition(":")
    return f"{algorithm}:{encoded[:12]}"


def table(rows: Iterable[Sequence[object]], *, header: Sequence[str] = (), right: Iterable[int] = ()) -> Iterable[str]:
    """Lines of ``rows`` in aligned columns; the columns ``right`` end at their right edge."""
    lines = [[printable(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def pairs(document: Mapping[str, object]) -> Iterable[str]:
    """A document for people: a line per member."""
    rows = []
    for key, value in _dated(document).items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        if key in ("size", "bytes") and isinstance(value, int):
            text = f"{value} ({binary(value)})"
        rows.append((f"{key.replace('_', ' ')}:", "-" if text in (None, "") else text))
    return table(rows)


def note(text: str) -> None:
    """One line on standard error."""
    print(f"layercache: {printable(text)}", file=sys.stderr, flush=True)


class Output:
    """Standard output of one command: lines, or with ``as_json`` exactly one document."""

    def __init__(self, *, as_json: bool, quiet: bool = False, no_trunc: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._whole = no_trunc or not sys.stdout.isatty()

    def document(self, document: Mapping[str, object]) -> None:
        """Print the one JSON document, unless people are reading."""
        if self.as_json:
            print(json.dumps(_dated(document), indent=2))

    def lines(self, lines: Iterable[str]) -> None:
        """Print lines, unless a program is reading."""
        if not self.as_json:
            for line in lines:
                print(line)

    @staticmethod
    def data(data: bytes | bytearray | memoryview) -> None:
        """Write bytes as they are."""
        view = memoryview(data)
        while view:
            # Unbuffered (PYTHONUNBUFFERED) this is the file itself, which may take less than it is given.
            written = sys.stdout.buffer.write(view)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, "standard output is not ready (it does not block)")
            view = view[written:]

    def digest(self, digest: object) -> str:
        """A digest for a table: whole in a pipe or with ``--no-trunc``, recognisable on a terminal."""
        return str(digest) if self._whole else short(digest)


def _dated(value: Any) -> Any:
    """The document with its times as text; 0 is a time that never was."""
    if isinstance(value, Mapping):
        return {
            key: (rfc3339(item) if item else None) if key in _TIMES and isinstance(item, int | float) else _dated(item)
            for key, item in value.items()
        }
    return [_dated(item) for item in value] if isinstance(value, list | tuple) else value
