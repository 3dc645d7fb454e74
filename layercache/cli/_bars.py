"""Progress bars. The only module that imports rich."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from layercache.cli._output import binary, short

if TYPE_CHECKING:
    from layercache.control import Progress as Step
    from layercache.oci import Digest

__all__ = ["Bars"]

_FINAL = ("hit", "miss", "bypass")


class _Amount(ProgressColumn):
    """``1.5/4.0 GiB``, each in its own unit."""

    def render(self, task: Task) -> Text:
        return Text(f"{binary(task.completed)} / {binary(task.total or 0)}", justify="right")


class _Rate(ProgressColumn):
    """Bytes a second, over the last moments."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None or task.fields["stage"] == "hit" else f"{binary(speed)}/s", justify="right")


class Bars:
    """A bar per blob on standard error, gone when the pull is over. Called from the threads that fetch."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            _Amount(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[stage]}"),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # it may be a pipe
            expand=True,
        )
        self._lock = threading.Lock()
        self._tasks: dict[Digest, TaskID] = {}
        self._ended: list[TaskID] = []

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, now: Step) -> None:
        """Move the bar of one blob."""
        with self._lock:
            task = self._tasks.get(now.digest)
            if task is None:
                task = self._progress.add_task(short(now.digest), start=False, total=now.size, stage=now.stage)
                self._tasks[now.digest] = task
            if now.stage == "fetching" or now.stage in _FINAL:
                self._progress.start_task(task)
            done = now.size if now.stage in _FINAL else now.done
            self._progress.update(task, completed=done, stage=now.stage)
            if now.stage in _FINAL:
                self._ended.append(task)
                self._make_room()

    def _make_room(self) -> None:
        """Hide bars of finished blobs where they would push moving ones off the screen."""
        while self._ended and len(self._tasks) - self._hidden() > self._console.height - 2:
            self._progress.update(self._ended.pop(0), visible=False)

    def _hidden(self) -> int:
        return sum(1 for task in self._progress.tasks if not task.visible)
