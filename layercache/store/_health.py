"""Whether the device under the root can be written: after some failures in a row it is left alone for a while."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable

from layercache.errors import StoreError

__all__ = ["Health"]

_log = logging.getLogger("layercache.store")

_FAILURES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0
_DEVICE = frozenset(
    (errno.EIO, errno.ENXIO, errno.EREMOTEIO, errno.EUCLEAN, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV)
)


class Health:
    """Counts failures of one device, for one process.

    After three without a success in between, writes are refused without touching the device; one is tried again after
    5 seconds, then after twice as long, up to a minute. A success ends that. Reads go on: they are verified.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._failures = 0
        self._pause = _FIRST_PAUSE
        self._until = 0.0

    @property
    def failing(self) -> bool:
        """True while writes are refused."""
        return self._now() < self._until

    def check(self) -> None:
        """Refuse a write while the device is left alone.

        :raises StoreError: then; nothing was touched.
        """
        left = self._until - self._now()
        if left > 0:
            raise StoreError(
                f"the disk under the root failed {self._failures} times and is left alone for {left:.0f} s",
                hint="check the disk",
            )

    def failed(self, error: OSError) -> None:
        """Count a failure, if it is the device's."""
        if error.errno not in _DEVICE:
            return
        with self._lock:
            self._failures += 1
            if self._failures >= _FAILURES:
                self._until = self._now() + self._pause
                _log.warning("the disk under the root failed; the cache goes past it for %.0f s", self._pause)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def succeeded(self) -> None:
        """Note that something was written and made durable."""
        if self._failures:
            with self._lock:
                if self._failures >= _FAILURES:
                    _log.warning("the disk under the root works again")
                self._failures, self._pause, self._until = 0, _FIRST_PAUSE, 0.0
