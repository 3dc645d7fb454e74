"""Files and directories that remember what a power cut would leave of them.

Every inode has two states: what the running system sees, and what has reached the medium. A file differs page by page,
a directory name by name. :class:`Tree` keeps the changes of names that were not flushed in the order they were made and
picks at a crash any subset of them that a journaling filesystem could come back with: a change is kept only with those
before it that touched the same names, and a rename happens whole or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from layercache.store._disk import Dir, File, Handle, Kind

__all__ = ["PAGE", "SECTOR", "Change", "Node", "SimulatedDir", "SimulatedFile", "Tree"]

PAGE = 4096
SECTOR = 512
_ZEROS = bytes(PAGE)

Key = tuple[int, str]


class Node:
    """One inode. ``pages`` lacks pages of zeros; ``dirty`` are the pages a flush would write."""

    __slots__ = (
        "blocks",
        "dirty",
        "entries",
        "home",
        "ino",
        "kind",
        "leased",
        "locks",
        "mapped",
        "mtime",
        "named",
        "opened",
        "pages",
        "resized",
        "settled",
        "settled_size",
        "size",
        "spoiled",
        "written",
    )

    def __init__(self, ino: int, kind: Kind, *, home: str = "") -> None:
        self.ino = ino
        self.kind = kind
        self.home = home
        """The entry of ``data/`` this was made below."""
        self.mtime = 0.0
        self.named = True
        self.opened = self.mapped = 0
        self.leased: Handle | None = None
        self.blocks = 0
        self.size = 0
        self.pages: dict[int, bytes] = {}
        self.dirty: set[int] = set()
        self.resized = False
        self.settled: dict[int, bytes] = {}
        self.settled_size = 0
        self.spoiled = False
        """Damaged on purpose: its content is nobody's promise any more."""
        self.locks: dict[Handle, bool] = {}
        self.entries: dict[str, Node] = {}
        self.written: dict[str, Node] = {}
        """The names that a power cut cannot take away."""

    def read(self, into: memoryview, offset: int) -> int:
        """Fill ``into`` from ``offset`` and return the count."""
        count = min(len(into), self.size - offset)
        if count <= 0:
            return 0
        first, within = divmod(offset, PAGE)
        last = (offset + count - 1) // PAGE
        get = self.pages.get
        if first == last:
            into[:count] = get(first, _ZEROS)[within : within + count]
        else:
            pages = b"".join([get(index, _ZEROS) for index in range(first, last + 1)])
            into[:count] = memoryview(pages)[within : within + count]
        return count

    def write(self, data: memoryview, offset: int) -> None:
        """Change the running system's content."""
        done, count = 0, len(data)
        while done < count:
            index, within = divmod(offset + done, PAGE)
            part = min(PAGE - within, count - done)
            if part == PAGE:
                page = bytes(data[done : done + part])
            else:
                old = self.pages.get(index, _ZEROS)
                page = old[:within] + bytes(data[done : done + part]) + old[within + part :]
            self._set(index, page)
            done += part
        if offset + count > self.size:
            self.size = offset + count
            self.resized = True

    def truncate(self, size: int) -> None:
        """Set the size; what is cut off reads as zeros when the file grows again."""
        for index in [index for index in self.pages if (index + 1) * PAGE > size]:
            within = max(0, size - index * PAGE)
            self._set(index, self.pages[index][:within] + bytes(PAGE - within))
        self.resized |= size != self.size
        self.size = size

    def content(self) -> bytes:
        """The running system's content."""
        raw = bytearray(self.size)
        self.read(memoryview(raw), 0)
        return bytes(raw)

    def flush(self) -> None:
        """Make the content survive a power cut."""
        for index in self.dirty:
            page = self.pages.get(index)
            if page is None:
                self.settled.pop(index, None)
            else:
                self.settled[index] = page
        self.settled_size = self.size
        self.dirty.clear()
        self.resized = False

    def fail_flush(self, rng: random.Random) -> None:
        """Fail as Linux does: some pages got through, all are called clean, so that a second try succeeds."""
        for index in sorted(self.dirty):
            page = self.pages.get(index)
            if page is not None and rng.random() < 0.3:
                self.settled[index] = page
        self.dirty.clear()
        self.resized = False

    def cut(self, rng: random.Random) -> None:
        """Lose what a power cut may lose of the content."""
        mood = rng.random()
        size = self.settled_size
        if self.resized:
            ends = [self.size, self.settled_size, rng.randint(0, max(self.size, self.settled_size) // SECTOR) * SECTOR]
            size = ends[0] if mood < 0.3 else ends[1] if mood < 0.6 else rng.choice(ends)
        pages = dict(self.settled)
        for index in sorted(self.dirty):
            new, old = self.pages.get(index, _ZEROS), self.settled.get(index, _ZEROS)
            if new == old:
                continue
            fate = 0 if mood < 0.3 else 1 if mood < 0.5 else rng.randrange(3)
            if fate == 0:
                pages[index] = new
            elif fate == 2:
                pages[index] = _torn(old, new, rng)
        self.pages = {index: page for index, page in pages.items() if page != _ZEROS and index * PAGE < size}
        self.size = size
        last, within = divmod(size, PAGE)
        if within and last in self.pages:
            self.pages[last] = self.pages[last][:within] + bytes(PAGE - within)
        self.settled, self.settled_size = dict(self.pages), size
        self.dirty, self.resized = set(), False
        self.blocks = -(-size // PAGE)

    def _set(self, index: int, page: bytes) -> None:
        if page == _ZEROS:
            self.pages.pop(index, None)
        else:
            self.pages[index] = page
        self.dirty.add(index)


def _torn(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """Return a page of which some sectors were written."""
    sectors = [start for start in range(0, PAGE, SECTOR) if old[start : start + SECTOR] != new[start : start + SECTOR]]
    edge = rng.choice(sectors[1:] or sectors)
    return old[:edge] + new[edge:] if rng.random() < 0.5 else new[:edge] + old[edge:]


class SimulatedDir(Dir):
    """An open directory of the simulation."""

    __slots__ = ("about", "node")
    about: str

    def __init__(self, fd: int, node: Node) -> None:
        super().__init__(fd)
        self.node = node


class SimulatedFile(File):
    """An open file of the simulation."""

    __slots__ = ("about", "node", "writable")
    about: str

    def __init__(self, fd: int, node: Node, *, writable: bool) -> None:
        super().__init__(fd, node.ino, node.size)
        self.node = node
        self.writable = writable


class Change:
    """One change of names that no power cut can split: each name with the inode it leads to from now on."""

    __slots__ = ("names", "target")

    def __init__(self, target: Node, *names: tuple[Node, str, Node | None]) -> None:
        self.target = target
        """The directory whose flush makes it survive."""
        self.names = names

    def keys(self) -> list[Key]:
        """The names it is about."""
        return [(folder.ino, name) for folder, name, _ in self.names]

    def settle(self) -> None:
        """Make it survive."""
        for folder, name, node in self.names:
            if node is None:
                folder.written.pop(name, None)
            else:
                folder.written[name] = node


class Tree:
    """All inodes below one root, with the changes of names that were not flushed yet."""

    __slots__ = ("pending", "root")

    def __init__(self) -> None:
        self.root = Node(1, "dir")
        self.pending: list[Change] = []

    def change(self, target: Node, *names: tuple[Node, str, Node | None]) -> None:
        """Change names now; whether that survives is decided by a flush of ``target``, or by a crash."""
        for folder, name, node in names:
            if node is None:
                del folder.entries[name]
            else:
                folder.entries[name] = node
        self.pending.append(Change(target, *names))

    def flush(self, folder: Node) -> None:
        """Make the names in ``folder`` survive, with the changes they rest on."""
        needed: set[Key] = set()
        taken, left = [], []
        for change in reversed(self.pending):
            keys = change.keys()
            if change.target is folder or not needed.isdisjoint(keys):
                needed.update(keys)
                taken.append(change)
            else:
                left.append(change)
        for change in reversed(taken):
            change.settle()
        left.reverse()
        self.pending = left

    def cut(self, rng: random.Random) -> None:
        """Lose what a power cut may lose of names and content."""
        mood = rng.randrange(4)
        upto = rng.randint(0, len(self.pending)) if mood == 0 else len(self.pending)
        chance = (1.0, 0.0, 1.0, rng.random())[mood]
        lost: set[Key] = set()
        for change in self.pending[:upto]:
            keys = change.keys()
            if rng.random() < chance and lost.isdisjoint(keys):
                change.settle()
            else:
                lost.update(keys)
        self.pending = []
        for node in list(self.walk(self.root, written=True)):
            if node.kind == "dir":
                node.entries = dict(node.written)
            else:
                node.cut(rng)
            node.named, node.locks, node.leased, node.opened, node.mapped = True, {}, None, 0, 0

    def walk(self, node: Node, *, written: bool = False) -> Iterator[Node]:
        """Yield what is below ``node``, itself first; with ``written``, what a power cut cannot take away."""
        yield node
        for child in (node.written if written else node.entries).values():
            yield from self.walk(child, written=written)

    def clone(self) -> Tree:
        """Return the same state again, independent of this one. What is open but has no name is left out."""
        copies: dict[int, Node] = {}

        def copy(node: Node) -> Node:
            known = copies.get(node.ino)
            if known is not None:
                return known
            twin = copies[node.ino] = Node(node.ino, node.kind, home=node.home)
            twin.mtime, twin.named, twin.blocks, twin.size = node.mtime, node.named, node.blocks, node.size
            twin.resized, twin.settled_size, twin.spoiled = node.resized, node.settled_size, node.spoiled
            if node.kind == "dir":
                twin.entries = {name: copy(child) for name, child in node.entries.items()}
                twin.written = {name: copy(child) for name, child in node.written.items()}
            else:
                twin.pages, twin.settled, twin.dirty = dict(node.pages), dict(node.settled), set(node.dirty)
            return twin

        tree = Tree()
        tree.root = copy(self.root)
        tree.pending = [
            Change(
                copy(change.target),
                *((copy(folder), name, None if node is None else copy(node)) for folder, name, node in change.names),
            )
            for change in self.pending
        ]
        return tree
