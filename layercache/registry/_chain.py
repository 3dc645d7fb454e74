"""Which source comes next: what an error of one means for the others, and which of them are well. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layercache.errors import (
    LayerCacheError,
    NotFoundError,
    RateLimitedError,
    RegistryError,
    UnauthorizedError,
    UnreachableError,
)

__all__ = ["Health", "falls_through", "in_order", "is_outage"]

_STRIKES = 3
_REST = 30.0  # seconds a source that keeps failing is asked last
_SLOW = 1.0  # seconds to a first byte that are worth going elsewhere for,
_SLOWER = 4.0  # where that is so many times faster


@dataclass(slots=True)
class Health:
    """What is remembered of a source: failures in a row, until when it rests, seconds to its first byte."""

    strikes: int = 0
    rests_until: float = 0.0
    latency: float | None = None

    def failed(self, now: float) -> None:
        """Count a failure; from the third in a row on the source rests, and each further one prolongs that."""
        self.strikes += 1
        if self.strikes >= _STRIKES:
            self.rests_until = now + _REST

    def served(self, seconds: float) -> None:
        """Forget the failures; take the time to the first byte into the memory."""
        self.strikes, self.rests_until = 0, 0.0
        self.latency = seconds if self.latency is None else 0.7 * self.latency + 0.3 * seconds


def falls_through(error: LayerCacheError, *, credentials: bool) -> bool:
    """Whether the next source may be asked after ``error`` of this one.

    Absent, unreachable, too many requests and what a server got wrong go on. Wrong bytes stop it: somebody lies, and
    who it is must be looked at. So does a refusal (401, 403) of ``credentials`` that were configured for this source.
    """
    if isinstance(error, NotFoundError):
        return True
    if not isinstance(error, RegistryError):
        return False
    return not (credentials and error.status in (401, 403))


def is_outage(error: LayerCacheError) -> bool:
    """Whether ``error`` says that the source is not well, rather than something about what was asked."""
    if isinstance(error, UnreachableError | RateLimitedError):
        return True
    return isinstance(error, RegistryError) and not isinstance(error, UnauthorizedError) and error.retryable


def in_order(healths: Sequence[Health], now: float) -> list[int]:
    """Positions of the sources in the order in which to ask them: as given, but the resting and the slow ones later."""

    def late(number: int) -> tuple[bool, bool]:
        health = healths[number]
        slow = health.latency is not None and health.latency > _SLOW
        quick = [other.latency for other in healths if other.latency is not None and other.rests_until <= now]
        slow = slow and health.latency is not None and health.latency > _SLOWER * min(quick, default=health.latency)
        return health.rests_until > now, slow

    return sorted(range(len(healths)), key=late)
