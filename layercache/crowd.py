"""What keeps this thread from running: a thread of the host that holds the GIL, or a core that others have."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Crowd", "CrowdedError", "queued"]

_NAP = 0.0005
_LATE = 0.002
"""Seconds over its time after which a nap has waited for somebody: a busy thread gives the GIL up after 5 ms."""

_LOOKS, _DENSE = 8, 3


class CrowdedError(Exception):
    """Other threads of this process hold the GIL so much that what is being done belongs elsewhere."""


class Crowd:
    """Whether other threads of this process hold the GIL: how long a nap takes, but for the wait for a core."""

    def __init__(self) -> None:
        self._late: deque[bool] = deque(maxlen=_LOOKS)

    def dense(self) -> bool:
        """Tell whether it is crowded now. Takes 4 ms where it is not, some tens where it is."""
        return sum(self._nap() for _ in range(_LOOKS)) >= _DENSE

    def over(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the pieces as they come, as long as it is not crowded.

        :raises CrowdedError: once it is.
        """
        try:
            for piece in pieces:
                yield piece
                self._late.append(self._nap())
                if sum(self._late) >= _DENSE and self.dense():
                    raise CrowdedError
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    @staticmethod
    def _nap() -> bool:
        """Sleep a moment; tell whether the GIL was to be waited for afterwards."""
        start = time.perf_counter()
        time.sleep(_NAP)
        if time.perf_counter() - start - _NAP < _LATE:
            return False
        # Once more, and how much of it was the wait for a core: asking that costs a file's reading.
        waited, start = queued(), time.perf_counter()
        time.sleep(_NAP)
        return time.perf_counter() - start - _NAP - (queued() - waited) >= _LATE


def queued() -> float:
    """Seconds for which this thread has waited for a core, so far; 0 where the kernel does not say."""
    try:
        with Path("/proc/thread-self/schedstat").open("rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
