"""One list of victims while it is made: what may go, and why it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from layercache.policy._images import Images
from layercache.policy._table import Table
from layercache.policy._values import Quota, Victim

__all__ = ["Choice"]


class Choice:
    """Victims so far: ``freed`` of ``need`` bytes; ``taken`` are their slots."""

    def __init__(
        self,
        table: Table,
        images: Images,
        *,
        usage: Mapping[str, int],
        need: int,
        kept: Callable[[str], bool],
        quotas: Mapping[str, Quota],
    ) -> None:
        self.need, self.freed = need, 0
        self.taken: set[int] = set()
        self.victims: list[Victim] = []
        self._table, self._images, self._kept = table, images, kept
        # What each floor lets go.
        self._spare = {name: usage.get(name, 0) - quota.floor for name, quota in quotas.items() if quota.floor > 0}

    def consider(self, slot: int, why: str) -> None:
        """Take ``slot`` where it may go; then what its going leaves worth little, while bytes are needed."""
        if not self._take(slot, why) or why == "image":
            return
        for other in self._images.left_by(slot, self._table, self.taken):
            if self.freed >= self.need:
                break
            self._take(other, "image")

    def _take(self, slot: int, why: str) -> bool:
        table = self._table
        key, size, namespace = table.keys[slot], table.size[slot], table.namespaces[slot]
        if slot in self.taken or key is None or self._kept(key):
            return False
        spare = self._spare.get(namespace)
        if spare is not None:
            if size > spare:
                return False
            self._spare[namespace] = spare - size
        self.taken.add(slot)
        self.freed += size
        self.victims.append(Victim(key, size, namespace, why))
        return True
