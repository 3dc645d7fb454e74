"""What keeps this thread from running: a thread of the host that holds the GIL, or a core that others have."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator

__all__ = ["Crowd", "CrowdedError", "queued"]

_NAP = 0.0005
_LATE = 0.002
"""Seconds over its time after which a nap has waited for somebody: a busy thread gives the GIL up after 5 ms."""

_LOOKS, _DENSE = 8, 3

_EVERY = 0.1
"""Seconds between two looks while pieces come: a nap for each piece would cost a fast wire a tenth of its time."""


class CrowdedError(Exception):
    """Other threads of this process hold the GIL so much that what is being done belongs elsewhere."""


class Crowd:
    """Whether other threads of this process hold the GIL: how long a nap takes, but for the wait for a core."""

    def __init__(self) -> None:
        self._late: deque[bool] = deque(maxlen=_LOOKS)

    def dense(self) -> bool:
        """Tell whether it is crowded now. Takes 5 ms where it is not, a tenth of a second where it is."""
        late = 0
        for _ in range(_LOOKS):
            late += _nap() >= _LATE
            if late == _DENSE:
                break
        else:
            return False
        # How much of such naps is the wait for a core is asked once: each system call of the question waits, too.
        waited = queued()
        over = sum(_nap() for _ in range(_DENSE))
        return over - (queued() - waited) >= _DENSE * _LATE

    def over(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the pieces as they come, as long as it is not crowded.

        :raises CrowdedError: once it is.
        """
        looked = time.perf_counter()
        try:
            for piece in pieces:
                yield piece
                now = time.perf_counter()
                if now - looked < _EVERY:
                    continue
                looked = now
                self._late.append(_nap() >= _LATE)
                if sum(self._late) >= _DENSE and self.dense():
                    raise CrowdedError
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()


def _nap() -> float:
    """Sleep a moment, and return the seconds that it took too long."""
    start = time.perf_counter()
    time.sleep(_NAP)
    return time.perf_counter() - start - _NAP


def queued() -> float:
    """Seconds for which this thread has waited for a core, so far; 0 where the kernel does not say."""
    try:
        fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(fd, 100).split()[1]) / 1e9
        finally:
            os.close(fd)
    except (OSError, IndexError, ValueError):
        return 0.0
