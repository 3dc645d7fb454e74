"""A disk that forgets: the store's seam to the filesystem in memory, with power cuts, faults, a size and processes.

:class:`SimulatedDisk` is one filesystem of one machine. Each virtual process works through its own :class:`Process`,
which is a ``Disk``: it owns handles and locks, and loses them when it dies. :meth:`SimulatedDisk.crash` keeps any legal
part of what was not flushed. Nothing here depends on the clock, on chance or on the order of a hash: the same calls and
the same ``random.Random`` give the same state.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from typing import TypeVar

from layercache.store._disk import Buffer, Dir, File, Handle, Room, Stat, Word
from layercache.store._layout import FENCE
from layercache.testing._failing import Fault, KilledError
from layercache.testing._inodes import PAGE, Node, SimulatedDir, SimulatedFile
from layercache.testing._medium import Medium

__all__ = ["Fault", "KilledError", "Process", "SimulatedDisk"]


class SimulatedDisk(Medium):
    """One filesystem below one directory, empty at first. ``capacity`` is in bytes.

    :ivar hook: called before every verb of every process with its name; may let others run, raise, or kill.
    :ivar watch: called after an unlink, a rename or a written word, with what it was, the inode and its name.
    """

    def __init__(self, *, capacity: int | None = None) -> None:
        super().__init__(capacity=capacity)
        self.clock = 1_700_000_000.0
        self.tick = 0.0001
        """Seconds that every verb takes."""
        self.steps = 0
        self.boots = 1
        self.rng = random.Random(0)
        self.faults: list[Fault] = []
        self.processes: list[Process] = []
        self.hook: Callable[[Process, str], None] | None = None
        self.watch: Callable[[Process, str, Node, str], None] | None = None

    def process(self) -> Process:
        """Start a virtual process: the ``Disk`` that its store works on."""
        process = Process(self, self.next_id())
        self.processes.append(process)
        return process

    def crash(self, rng: random.Random) -> None:
        """Cut the power and boot again: every process dies, and a legal part of what was not flushed is lost."""
        for process in self.processes:
            process.kill()
        self.processes = []
        self.tree.cut(rng)
        self.boots += 1
        self.faults = []
        self.used = sum(node.blocks for node in self.tree.walk(self.tree.root))

    def clone(self) -> SimulatedDisk:
        """Return the same disk again, independent of this one, with nobody on it. What only a handle held is gone."""
        twin = SimulatedDisk(capacity=self.capacity)
        twin.tree = self.tree.clone()
        twin.clock, twin.tick, twin.boots, twin.ids = self.clock, self.tick, self.boots, self.ids
        twin.used = sum(node.blocks for node in twin.tree.walk(twin.tree.root))
        return twin


_H = TypeVar("_H", SimulatedDir, SimulatedFile)


class _Word:
    __slots__ = ("_node", "_process")

    def __init__(self, process: Process, node: Node) -> None:
        self._process = process
        self._node = node

    def get(self) -> int:
        process = self._process
        process.checked, process.by_name = process.disk.steps, False
        page = self._node.pages.get(0)
        return 0 if page is None else int.from_bytes(page[:8], "little")


class Process:
    """One virtual process's view of a :class:`SimulatedDisk`: a ``Disk``.

    :ivar checked: step of the last look at a generation's word, or at its state (``by_name``); ``read_at`` and
        ``moved_at`` are of the last read of a file and the last rename: a judge needs to know in which order they came.
        ``faulted`` counts the faults it met.
    """

    def __init__(self, disk: SimulatedDisk, pid: int) -> None:
        self.disk = disk
        self.pid = pid
        self.dead = False
        self.boot = f"{disk.boots:012x}"
        self.opened: dict[int, SimulatedDir | SimulatedFile] = {}
        self.mapped: list[Node] = []
        self.checked = self.read_at = self.moved_at = self.faulted = 0
        self.by_name = False
        self.wake = 0.0
        """When its pause ends."""
        self.about = ""
        """What the last verb was about."""
        self.reached: dict[str, Node] = {}
        """What it last opened for writing, by name."""
        self._made = 0
        self.root: Dir = self._track(SimulatedDir(self._next(), disk.tree.root))

    def kill(self) -> None:
        """End the process as SIGKILL does: at once, and the kernel drops its locks and descriptors."""
        self.dead = True
        for handle in list(self.opened.values()):
            self._release(handle)
        for node in self.mapped:
            node.mapped -= 1
        self.mapped = []

    def begin(self, verb: str, about: str = "") -> Fault | None:
        """Account for a verb: others may run first, this process may die; return the fault that it must show."""
        disk = self.disk
        self.about = about
        disk.steps += 1
        disk.clock += disk.tick
        if self.dead:
            raise KilledError
        if disk.hook is not None:
            disk.hook(self, verb)
            if self.dead:
                raise KilledError
        if disk.faults:
            for fault in disk.faults:
                if fault.hits(verb, about):
                    self.faulted += 1
                    return fault
        return None

    def reopen(self) -> None:
        """Open the root directory again after a store has closed it."""
        self.root = self._track(SimulatedDir(self._next(), self.disk.tree.root))

    def tell(self, what: str, node: Node, name: str = "") -> None:
        """Let the judge see what was just done."""
        if self.disk.watch is not None:
            self.disk.watch(self, what, node, name)

    # -- time and chance

    def now(self) -> float:
        return self.disk.clock

    def elapsed(self) -> float:
        return self.disk.clock

    def pause(self, seconds: float) -> None:
        self.wake = self.disk.clock + seconds
        self.begin("pause")
        self.disk.clock = max(self.disk.clock, self.wake)

    def token(self) -> str:
        return f"{self.pid:08x}{self._next():08x}"

    # -- opening

    def dir(self, at: Dir, name: str) -> Dir:
        self._begin("dir", name)
        node = self._lookup(at, name)
        if node.kind != "dir":
            raise _error(errno.ENOTDIR if node.kind == "file" else errno.ELOOP, name)
        return self._track(SimulatedDir(self._next(), node))

    def make_dir(self, at: Dir, name: str) -> None:
        self._begin("make_dir", name)
        folder = self._folder(at)
        if name in folder.entries:
            raise _error(errno.EEXIST, name)
        if not folder.named:
            raise _error(errno.ENOENT, name)
        tree = self.disk.tree
        node = Node(self._ino(), "dir", home=folder.home or (name if folder is tree.root.entries.get("data") else ""))
        if not self.disk.take(node, PAGE):
            raise _error(errno.ENOSPC, name)
        node.mtime = self.disk.clock
        tree.change(folder, (folder, name, node))

    def create(self, at: Dir, name: str, *, exist_ok: bool = False) -> File:
        self._begin("create", name)
        folder = self._folder(at)
        node = folder.entries.get(name)
        if node is not None:
            if not exist_ok:
                raise _error(errno.EEXIST, name)
            return self._open(node, name, writable=True)
        if not folder.named:
            raise _error(errno.ENOENT, name)
        node = Node(self._ino(), "file", home=folder.home)
        node.mtime = self.disk.clock
        self.disk.tree.change(folder, (folder, name, node))
        return self._open(node, name, writable=True)

    def open(self, at: Dir, name: str) -> File:
        self._begin("open", name)
        return self._open(self._lookup(at, name), name, writable=False)

    # -- content

    def read(self, file: File, into: Buffer, offset: int) -> int:
        fault = self.begin("read")
        node = self._node(file)
        self.read_at = self.disk.steps
        view = memoryview(into)
        if fault is None:
            return node.read(view, offset)
        if fault.code:
            raise _error(fault.code)
        return node.read(view[: len(view) // 2], offset)

    def write(self, file: File, data: Buffer, offset: int) -> None:
        # A word of its own: everybody who has the file mapped sees it.
        word = getattr(file, "about", "") == FENCE
        fault = self.begin("word" if word else "write")
        node = self._node(file, writable=True)
        view = memoryview(data).cast("B")
        if fault is not None:
            view = view[: len(view) // 2]
        fits = self.disk.take(node, max(node.size, offset + len(view)))
        if not fits:
            self.disk.take(node, node.blocks * PAGE + self.disk.left())
            view = view[: max(0, node.blocks * PAGE - offset)]
        node.write(view, offset)
        node.mtime = self.disk.clock
        if word:
            self.tell("word", node)
        if fault is not None or not fits:
            raise _error(errno.ENOSPC if fault is None else fault.code or errno.EIO)

    def reserve(self, file: File, size: int) -> None:
        self._begin("reserve")
        if not self.disk.take(self._node(file, writable=True), size):
            raise _error(errno.ENOSPC)

    def truncate(self, file: File, size: int) -> None:
        self._begin("truncate")
        node = self._node(file)
        if not getattr(file, "writable", False):
            raise _error(errno.EINVAL)
        node.truncate(size)
        self.disk.give_back(node, size)

    def start_flush(self, file: File, offset: int, length: int) -> None:
        self._begin("start_flush")

    def sync(self, handle: Handle) -> None:
        fault = self.begin("sync")
        node = self._node(handle)
        if node.kind == "dir":
            if fault is not None:
                raise _error(fault.code or errno.EIO)
            self.disk.tree.flush(node)
            return
        if fault is not None:
            node.fail_flush(self.disk.rng)
            raise _error(fault.code or errno.EIO)
        node.flush()

    def touch(self, file: File, when: float | None = None) -> None:
        self._begin("touch")
        self._node(file).mtime = self.disk.clock if when is None else when

    # -- names

    def rename(self, at: Dir, name: str, to: Dir, new: str, *, replace: bool) -> None:
        self._begin("rename", f"{name} -> {new}")
        self.moved_at = self.disk.steps
        old, target = self._folder(at), self._folder(to)
        node, there = old.entries.get(name), target.entries.get(new)
        if node is None or not target.named:
            raise _error(errno.ENOENT, name)
        if there is not None and not replace:
            raise _error(errno.EEXIST, new)
        if there is node:
            return
        if there is not None and there.kind == "dir":
            if node.kind != "dir":
                raise _error(errno.EISDIR, new)
            if there.entries:
                raise _error(errno.ENOTEMPTY, new)
        elif there is not None and node.kind == "dir":
            raise _error(errno.ENOTDIR, new)
        self.disk.tree.change(target, (old, name, None), (target, new, node))
        self.tell("rename", node, new)
        if there is not None:
            self._unname(there)

    def remove(self, at: Dir, name: str) -> None:
        self._begin("remove", name)
        folder, node = self._folder(at), self._lookup(at, name)
        if node.kind == "dir":
            raise _error(errno.EISDIR, name)
        self.disk.tree.change(folder, (folder, name, None))
        self.tell("remove", node, name)
        self._unname(node)

    def remove_dir(self, at: Dir, name: str) -> None:
        self._begin("remove_dir", name)
        folder, node = self._folder(at), self._lookup(at, name)
        if node.kind != "dir":
            raise _error(errno.ENOTDIR, name)
        if node.entries:
            raise _error(errno.ENOTEMPTY, name)
        self.disk.tree.change(folder, (folder, name, None))
        self._unname(node)

    def names(self, at: Dir) -> list[str]:
        self._begin("names")
        return list(self._folder(at).entries)

    def stat(self, at: Dir, name: str) -> Stat | None:
        self._begin("stat", name)
        if name.startswith("live."):
            self.checked, self.by_name = self.disk.steps, True
        node = self._folder(at).entries.get(name)
        return None if node is None else _stat(node)

    def fstat(self, handle: Handle) -> Stat:
        self._begin("fstat")
        return _stat(self._node(handle))

    # -- locks, memory, the machine

    def lock(self, handle: Handle, *, exclusive: bool) -> bool:
        self._begin("lock")
        locks = self._node(handle).locks
        for other, strong in locks.items():
            if other is not handle and (exclusive or strong):
                locks.pop(handle, None)  # flock drops the old lock before it tries for the new one
                return False
        locks[handle] = exclusive
        return True

    def lease(self, file: File) -> bool:
        self._begin("lease")
        node = self._node(file)
        if node.opened > 1 or node.mapped:
            return False
        node.leased = file
        return True

    def word(self, file: File) -> Word:
        self._begin("map")
        node = self._node(file)
        if node.size < 8:
            raise ValueError("mmap length is greater than file size")
        self.mapped.append(node)
        node.mapped += 1
        return _Word(self, node)

    def room(self) -> Room:
        self._begin("room")
        return Room(1 << 50 if self.disk.capacity is None else self.disk.capacity, self.disk.left(), 0, 0)

    def openers(self, *, but: Handle | None = None, quick: bool = False) -> dict[int, frozenset[int]]:
        self._begin("openers")
        found: dict[int, set[int]] = {}
        for process in self.disk.processes:
            handles = [one for one in process.opened.values() if one is not but]
            nodes = [one.node for one in handles if one in one.node.locks] if quick else [one.node for one in handles]
            for node in nodes if quick else [*nodes, *process.mapped]:
                found.setdefault(node.ino, set()).add(process.pid)
        return {inode: frozenset(pids) for inode, pids in found.items()}

    def trim(self) -> int:
        self._begin("trim")
        return self.disk.left()

    def background(self, job: Callable[[], None]) -> Callable[[], None] | None:
        return None

    def close(self, handle: Handle) -> None:
        self.begin("close")
        if handle.fd in self.opened:
            self._release(self.opened[handle.fd])

    # -- inside

    def _begin(self, verb: str, about: str = "") -> None:
        fault = self.begin(verb, about)
        if fault is not None:
            raise _error(fault.code or errno.EIO)

    def _next(self) -> int:
        self._made += 1
        return self._made

    def _ino(self) -> int:
        # Not from one counter: what a process makes is then the same in whatever order the others run.
        return self.pid << 24 | self._next()

    def _track(self, handle: _H) -> _H:
        self.opened[handle.fd] = handle
        handle.about = self.about
        handle.node.opened += 1
        return handle

    def _release(self, handle: SimulatedDir | SimulatedFile) -> None:
        self.opened.pop(handle.fd, None)
        handle.fd = -1
        node = handle.node
        node.opened -= 1
        node.locks.pop(handle, None)
        if node.leased is handle:
            node.leased = None
        if not node.named and not node.opened:
            self.disk.give_back(node)

    def _unname(self, node: Node) -> None:
        node.named = False
        if not node.opened:
            self.disk.give_back(node)

    def _node(self, handle: Handle, *, writable: bool = False) -> Node:
        if handle.fd < 0:
            raise _error(errno.EBADF)
        if writable and not getattr(handle, "writable", False):
            raise _error(errno.EBADF)
        node: Node = handle.node  # type: ignore[attr-defined]
        return node

    def _folder(self, at: Dir) -> Node:
        return self._node(at)

    def _lookup(self, at: Dir, name: str) -> Node:
        node = self._node(at).entries.get(name)
        if node is None:
            raise _error(errno.ENOENT, name)
        return node

    def _open(self, node: Node, name: str, *, writable: bool) -> File:
        if node.kind != "file":
            raise _error(errno.EISDIR if node.kind == "dir" and writable else errno.EMEDIUMTYPE, name)
        if node.leased is not None:
            raise _error(errno.EWOULDBLOCK, name)
        if writable:
            self.reached[name] = node
        return self._track(SimulatedFile(self._next(), node, writable=writable))


def _error(code: int, name: str = "") -> OSError:
    return OSError(code, os.strerror(code), name)


def _stat(node: Node) -> Stat:
    return Stat(node.kind, node.size, node.ino, 1, node.mtime, node.blocks * PAGE)
