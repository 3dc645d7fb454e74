"""Whom to follow: the order whose misses cost least lately, and not at every whim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Regret"]

_FADE = 0.5 ** (1 / 1000)
_MARGIN = 0.04


class Regret:
    """What each order's misses have cost, of uses on which they disagreed.

    What every order misses, or has, says nothing about them: a cache full of first uses would drown the difference. Of
    the rest half fades in 1000 disagreements. Another takes the lead once it is better by 4 % of what was at stake;
    changing over costs misses, as the cache turns into what the new leader would hold.
    """

    def __init__(self, orders: int) -> None:
        self.leader = 0
        self._costs = [0.0] * orders
        self._stake = 0.0

    def judge(self, missed: Sequence[int], cost: float) -> bool:
        """Note a use that the orders ``missed`` missed and the others had; True if the lead changed."""
        costs = [one * _FADE for one in self._costs]
        for number in missed:
            costs[number] += cost
        self._costs = costs
        self._stake = self._stake * _FADE + cost
        best = min(costs)
        if costs[self.leader] - best <= _MARGIN * self._stake:
            return False
        self.leader = costs.index(best)
        return True

    def copy(self) -> Regret:
        """Return an independent one."""
        other = Regret(0)
        other.leader, other._costs, other._stake = self.leader, list(self._costs), self._stake
        return other

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"leader": self.leader, "costs": list(self._costs), "stake": self._stake}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave; ValueError where it is not that."""
        costs, leader = [float(cost) for cost in state["costs"]], int(state["leader"])
        if len(costs) != len(self._costs) or not 0 <= leader < len(costs):
            raise ValueError("orders")
        self.leader, self._costs, self._stake = leader, costs, float(state["stake"])
