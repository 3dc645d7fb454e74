"""A tmpfs beside a simulated disk: where the keys of sealed namespaces are, and what a power cut empties."""

from __future__ import annotations

from collections.abc import Callable

from layercache.store._disk import Disk
from layercache.testing._failing import Fault, KilledError
from layercache.testing.disk import Process, SimulatedDisk

__all__ = ["Tmpfs"]


class Tmpfs:
    """The directory for keys of one simulated machine; hand ``of(process)`` to a store as its ``memory``."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self._users: list[_User] = []

    def of(self, owner: Process) -> Callable[[str, bool], Disk | None]:
        """Return what opens the directory for a process of the disk beside it; its calls are steps of that one."""

        def memory(_place: str, _create: bool) -> Disk:  # noqa: FBT001 - as the store asks
            user = _User(self, owner)
            self._users.append(user)
            return user

        return memory

    def empty(self) -> None:
        """Lose it all, as by a power cut."""
        self.reap()
        self.disk, self._users = SimulatedDisk(), []

    def names(self) -> list[str]:
        """Return the names of the key files that are there."""
        return sorted(self.disk.tree.root.entries)

    def content(self) -> bytes:
        """Return what is in all of them."""
        return b"".join(self.disk.tree.root.entries[name].content() for name in self.names())

    def reap(self) -> None:
        """End those whose process has died: the kernel drops their locks."""
        for user in self._users:
            if user.owner.dead and not user.dead:
                user.kill()


class _User(Process):
    def __init__(self, tmpfs: Tmpfs, owner: Process) -> None:
        self._tmpfs = tmpfs
        self.owner = owner
        super().__init__(tmpfs.disk, owner.pid)

    def begin(self, verb: str, about: str = "") -> Fault | None:
        """Let the owner's turn come first: others may run, and it may die. A tmpfs has no faults."""
        disk = self.owner.disk
        disk.steps += 1
        if not self.owner.dead and disk.hook is not None:
            disk.hook(self.owner, f"memory {verb}")
        self._tmpfs.reap()
        if self.owner.dead:
            raise KilledError
        return super().begin(verb, about)
