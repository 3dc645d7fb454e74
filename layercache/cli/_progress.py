"""What a person sees while a pull runs: a bar per blob on a terminal, a line per blob where bars cannot be drawn."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from layercache.cli._output import binary, note, short

if TYPE_CHECKING:
    from layercache.control import Progress
    from layercache.oci import Digest

__all__ = ["progress"]

_FINAL = ("hit", "miss", "bypass")


@contextmanager
def progress(*, quiet: bool, verbose: bool, no_progress: bool) -> Iterator[Callable[[Progress], None] | None]:
    """The callback for a pull, or None where nobody wants to see.

    Bars are drawn on a terminal only. A dumb terminal, or one without ``rich`` (the extra ``cli``), gets a line when a
    blob begins to move; so does anything else with ``verbose``. ``CI`` and ``LAYERCACHE_NO_PROGRESS`` are honoured
    here, ``NO_COLOR`` by rich.
    """
    terminal = sys.stderr.isatty()
    if quiet or no_progress or _set("LAYERCACHE_NO_PROGRESS") or _set("CI"):
        terminal = False
    if terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        try:
            from layercache.cli._bars import Bars  # noqa: PLC0415 - rich is an extra, and costs 60 ms
        except ImportError:
            pass
        else:
            with Bars() as bars:
                yield bars
            return
    yield _Lines() if terminal or (verbose and not quiet) else None


class _Lines:
    """One line a blob, when it begins to move or is found here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[Digest] = set()

    def __call__(self, now: Progress) -> None:
        if now.stage != "fetching" and now.stage not in _FINAL:
            return
        with self._lock:
            if now.digest in self._seen:
                return
            self._seen.add(now.digest)
            note(f"{now.stage} {short(now.digest)} ({binary(now.size)})")


def _set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")
