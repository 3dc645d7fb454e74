"""What the policy is told, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Quota", "Source", "Victim"]

_WEIGHT = 0.2
_BULK = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """How dear it is to fetch again from where a blob came: ``rtt`` in seconds, ``bandwidth`` in bytes a second."""

    rtt: float = 0.05
    bandwidth: float = 250e6

    def cost(self, size: int) -> float:
        """Seconds that a miss of ``size`` bytes takes."""
        return self.rtt + size / self.bandwidth

    def measured(self, size: int, *, wait: float, seconds: float) -> Source:
        """The source after one more fetch: ``wait`` until its first byte, ``seconds`` for the ``size`` bytes after it.

        A moving average. Small bodies say nothing about bandwidth and do not change it.
        """
        rtt = self.rtt + _WEIGHT * (max(wait, 0.0) - self.rtt)
        if size < _BULK or seconds <= 0:
            return Source(rtt, self.bandwidth)
        return Source(rtt, self.bandwidth + _WEIGHT * (size / seconds - self.bandwidth))


@dataclass(frozen=True, slots=True)
class Quota:
    """What a namespace may take (``limit``, None for no limit of its own) and what it is left (``floor``), in bytes."""

    limit: int | None = None
    floor: int = 0


@dataclass(frozen=True, slots=True)
class Victim:
    """A blob to evict.

    ``why``: ``quota``, its namespace is over its limit; ``image``, a blob of every image it belongs to has gone;
    ``value``, it is worth least.
    """

    key: str
    size: int
    namespace: str
    why: str
