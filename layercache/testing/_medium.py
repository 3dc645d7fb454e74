"""The simulated filesystem as it lies on its medium, beside all processes: its tree, its blocks, and who judges it."""

from __future__ import annotations

import random
from collections.abc import Iterator

from layercache.store._disk import Kind
from layercache.testing._inodes import PAGE, Node, Tree

__all__ = ["Medium"]


class Medium:
    """One filesystem of ``capacity`` bytes, or without an end. Looking and damaging here is no call of a process."""

    def __init__(self, *, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.tree = Tree()
        self.used = 0
        self.ids = 0

    def next_id(self) -> int:
        """Return the next number of a process, or of what was planted."""
        self.ids += 1
        return self.ids

    def at(self, *path: str) -> Node | None:
        """Return the inode of a path as the running system sees it, for whoever judges from outside."""
        node = self.tree.root
        for name in path:
            found = node.entries.get(name)
            if found is None:
                return None
            node = found
        return node

    def files(self, *path: str) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Yield every file below a path, by its path from there."""
        node = self.at(*path)
        for name, child in (node.entries if node else {}).items():
            if child.kind == "dir":
                yield from (((name, *rest), found) for rest, found in self.files(*path, name))
            else:
                yield (name,), child

    def plant(self, *path: str, kind: Kind = "other") -> None:
        """Put an entry where it does not belong, durably: ``file``, ``dir`` or ``other`` (a link, fifo or device)."""
        at = self.at(*path[:-1])
        assert at is not None, path
        node = Node(self.next_id() << 24, kind, home=at.home)
        node.spoiled = True
        self.tree.change(at, (at, path[-1], node))
        self.tree.flush(at)

    def rot(self, node: Node, rng: random.Random) -> None:
        """Damage a file where it lies: a bit, a sector, its end."""
        node.spoiled = True
        what = rng.randrange(3) if node.size else 2
        if what < 2:
            offset = rng.randrange(node.size)
            index, within = divmod(offset, PAGE)
            page = bytearray(node.pages.get(index, bytes(PAGE)))
            if what == 0:
                page[within] ^= 1 << rng.randrange(8)
            else:
                page[within : within + 64] = bytes(len(page[within : within + 64]))
                page[within] ^= 0xFF
            node.write(memoryview(page)[: min(PAGE, node.size - index * PAGE)], index * PAGE)
        else:
            node.truncate(rng.randrange(node.size) if node.size and rng.random() < 0.7 else node.size + 1)
        node.flush()

    def left(self) -> int:
        """Return the bytes that can still be written."""
        return max(0, (1 << 50 if self.capacity is None else self.capacity) - self.used * PAGE)

    def take(self, node: Node, size: int) -> bool:
        """Give an inode the blocks for ``size`` bytes, if there are enough."""
        more = -(-size // PAGE) - node.blocks
        if more <= 0:
            return True
        if self.capacity is not None and (self.used + more) * PAGE > self.capacity:
            return False
        self.used += more
        node.blocks += more
        return True

    def give_back(self, node: Node, size: int = 0) -> None:
        """Take the blocks behind ``size`` bytes from an inode."""
        less = node.blocks - -(-size // PAGE)
        if less > 0:
            self.used -= less
            node.blocks -= less
