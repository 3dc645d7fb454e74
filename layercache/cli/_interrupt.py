"""Ctrl-C, and a polite kill: end the command, undo what is half done, leave with 128 + the signal's number."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Interrupt"]

_GRACE = 2.0
_SHOW_CURSOR = "\x1b[?25h"


class Interrupt:
    """Turns the first SIGINT or SIGTERM into ``cancel`` and :class:`KeyboardInterrupt`, a second one into the end.

    ``cancel`` ends worker threads at their next checkpoint. If the process is still there after two seconds (a thread
    hangs in a call that nothing ends) it is ended hard: nothing half done is visible even then, it only leaves a
    partial download for the next pull to resume. ``signal`` is the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.signal = 0
        self._settled = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.signal:
            return  # the process is about to end: a second Ctrl-C must not bring a traceback
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    @property
    def code(self) -> int:
        """The exit code after the signal."""
        return 128 + self.signal

    def settle(self) -> None:
        """From now on a signal ends the process at once: there is nothing left to undo, and no one to catch."""
        self._settled = True

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's shape
        self.signal = self.signal or number
        if self._settled or self.cancel.is_set():
            self._leave()
        self.cancel.set()
        watch = threading.Timer(_GRACE, self._leave)
        watch.daemon = True
        watch.start()
        raise KeyboardInterrupt

    def _leave(self) -> None:
        if sys.stderr.isatty():  # bars may have hidden it
            os.write(2, _SHOW_CURSOR.encode())
        os._exit(self.code)
