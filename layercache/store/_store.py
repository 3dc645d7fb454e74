"""The root: opening it safely, its namespaces and their purge."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from layercache.errors import FormatError, ReadOnlyError, StoreClosedError, StoreError, UnsafeRootError
from layercache.store._disk import Dir, Disk, File, Handle, PosixDisk
from layercache.store._faults import guarding
from layercache.store._generation import Generation
from layercache.store._health import Health
from layercache.store._layout import (
    BLOBS,
    DATA,
    FENCE,
    FORMAT,
    IN,
    LOCK_NAMES,
    LOCKS,
    META,
    NAME,
    QUARANTINE,
    RECEIPTS,
    REFS,
    ROOT_KEY,
    ROOT_LOCK,
    SLOT_LOCK,
    SLOTS,
    TRASH,
    NamespaceName,
    Slot,
    SlotState,
    format_record,
    generation_name,
    is_slot,
    parse_format,
    parse_generation_name,
    slot_name,
)
from layercache.store._purge import Purge
from layercache.store._receipts import Chain, Receipt

__all__ = ["Store", "Tenancy"]

_PATIENCE = 5.0
_FOLDERS = (SLOTS, DATA, TRASH, RECEIPTS)
_OURS = frozenset((FORMAT, ROOT_LOCK, ROOT_KEY, *_FOLDERS, "lost+found"))
_NEW = ".new"


@dataclass(frozen=True, slots=True)
class Tenancy:
    """One namespace as the root knows it: its name, where it can be told, and its state."""

    slot: Slot
    name: NamespaceName | None
    state: str
    generation: int


class Store:
    """The blobs of namespaces below one directory, shared by any number of processes and threads.

    Opening is O(1) in the number of blobs. It finishes purges that another process left unfinished.

    :param root: made if it is not there (0700). Must be on one local filesystem, belong to this user (or this user be
        root) and be writable by nobody else.
    :raises UnsafeRootError: when the root is not such a directory.
    :raises FormatError: when it holds something else, or a format this version does not read.
    """

    def __init__(self, root: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._disk = PosixDisk.open_root(root) if disk is None else disk
        self._health = Health(self._disk.now)
        self._opened: list[Handle] = [self._disk.root]
        try:
            with guarding("open the root"):
                life, self.writable = self._enter()
                self._opened.append(life)  # the root's lock, for life
                self._key = self._read_small(self._disk.root, ROOT_KEY)
                self._slots, self._data, self._trash, receipts = map(self._open_folder, _FOLDERS)
                self._chain = Chain(self._disk, receipts)
                if self.writable:
                    self._resume()
        except BaseException:
            self._close_all()
            raise

    @property
    def failing(self) -> bool:
        """True while the disk is left alone after several failures in a row: nothing is stored, hits go on."""
        return self._health.failing

    # -- namespaces

    def generation(self, name: NamespaceName, *, create: bool) -> Generation | None:
        """Return the live generation of a namespace; ``None`` where there is none and ``create`` is false.

        :raises ReadOnlyError: when one must be made and the root cannot be written.
        """
        self._check_open()
        slot = slot_name(self._key, name)
        with guarding("open a namespace"):
            generation = self._live(slot)
            if generation is not None and not generation.fenced:
                return generation
            if generation is not None:
                generation.close()
                self.purge(name)  # somebody set the word and died before the rename
            if not create:
                return None
            if not self.writable:
                raise ReadOnlyError("the root cannot be written", hint="remount it, or choose another root")
            with self._slot_locked(slot, create=True) as slot_dir:
                self._begin_generation(slot, slot_dir, name)
            return self._live(slot)

    def namespaces(self) -> list[Tenancy]:
        """Return the namespaces that are live or being purged, by slot."""
        self._check_open()
        found = []
        with guarding("list namespaces"):
            for slot in sorted(self._disk.names(self._slots)):
                state = self._state_of(slot)
                if state is not None and state.state != "dead":
                    found.append(Tenancy(slot, self._name_of(slot, state), state.state, state.generation))
        return found

    # -- purge

    def purge(self, name: NamespaceName, *, wait: float = 0.0) -> Receipt:
        """End the live generation of a namespace and remove every byte of it; return what was reached.

        From the moment the fence is durable no call in any process gives out or publishes a byte of it. Waits at most
        ``wait`` seconds for readers that still have files open; those are named in the receipt, and their files go when
        the root is opened or purged next.
        """
        self._check_open()
        if not self.writable:
            raise ReadOnlyError("the root cannot be written, so nothing can be purged", hint="remount it")
        slot = slot_name(self._key, name)
        started = self._disk.now()
        with guarding("purge a namespace"):
            if self._disk.stat(self._slots, slot) is None:
                return _nothing(slot, started)
            with self._slot_locked(slot, create=False) as slot_dir:
                left = self._finish_trash(slot, wait=wait)
                state = self._state(slot_dir)
                if state is None or state.state == "dead":
                    return left[-1] if left else _nothing(slot, started)
                return self._purge(slot, slot_dir, state.generation, wait=wait, started=started)

    def receipts(self) -> Iterator[Receipt]:
        """Yield every receipt of this root, oldest first.

        :raises StoreError: where the chain is broken.
        """
        with guarding("read the receipts"):
            yield from self._chain.read()

    # -- life

    def close(self) -> None:
        """Give the root up. Open blobs stay open. Closing twice is nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._close_all()

    # -- inside: the root

    def _open_folder(self, name: str) -> Dir:
        folder = self._disk.dir(self._disk.root, name)
        self._opened.append(folder)
        return folder

    def _close_all(self) -> None:
        for handle in reversed(self._opened):
            self._disk.close(handle)

    def _enter(self) -> tuple[File, bool]:
        """Take the root's lock for life, making the root's entries first where they are not there yet."""
        disk = self._disk
        held = set(disk.names(disk.root))
        if not held & {FORMAT, ROOT_LOCK}:
            self._check_ours()
        try:
            life = disk.create(disk.root, ROOT_LOCK, exist_ok=True)
            writable = True
        except OSError as error:
            if ROOT_LOCK not in held:
                raise
            life = disk.open(disk.root, ROOT_LOCK)
            writable = False
            reason = error
        try:
            if disk.stat(disk.root, FORMAT) is None:
                if not writable:
                    raise reason
                self._lock_within(life)
                if disk.stat(disk.root, FORMAT) is None:
                    self._check_ours()  # with the lock in hand, so that nobody is making it at the same time
                    self._make_root()
            parse_format(self._read_small(disk.root, FORMAT))
            self._lock_within(life, exclusive=False)
            self._check_flock()
        except BaseException:
            disk.close(life)
            raise
        return life, writable

    def _check_ours(self) -> None:
        """Refuse to make a root where something else is."""
        if {name.removesuffix(_NEW) for name in self._disk.names(self._disk.root)} - _OURS:
            raise FormatError("the directory holds something else", hint="choose an empty directory as root")

    def _make_root(self) -> None:
        disk = self._disk
        for name in _FOLDERS:
            if disk.stat(disk.root, name) is None:
                disk.make_dir(disk.root, name)
        receipts = disk.dir(disk.root, RECEIPTS)
        try:
            Chain(disk, receipts).prepare()
        finally:
            disk.close(receipts)
        self._write_small(disk.root, ROOT_KEY, secrets.token_bytes(32))
        disk.sync(disk.root)
        # Last: with FORMAT there, everything else is.
        self._write_small(disk.root, FORMAT, format_record())
        disk.sync(disk.root)

    def _check_flock(self) -> None:
        """Refuse a filesystem where flock lets everybody in: ours is held shared, so nobody may get it exclusively."""
        other = self._disk.open(self._disk.root, ROOT_LOCK)
        try:
            if self._disk.lock(other, exclusive=True):
                raise UnsafeRootError(
                    "locks do not exclude on the root's filesystem", hint="use a local filesystem (ext4, xfs, btrfs)"
                )
        finally:
            self._disk.close(other)

    def _resume(self) -> None:
        """Finish what interrupted purges left, where no other process is at it."""
        for slot in self._disk.names(self._slots):
            state = self._state_of(slot)
            if state is not None and state.state == "purging":
                with self._slot_locked(slot, create=False) as slot_dir:
                    state = self._state(slot_dir)
                    if state is not None and state.state == "purging":
                        self._purge(slot, slot_dir, state.generation, wait=0.0, started=self._disk.now())
        for slot in {parsed[0] for name in self._disk.names(self._trash) if (parsed := parse_generation_name(name))}:
            with self._slot_locked(slot, create=True):
                self._finish_trash(slot, wait=0.0)

    # -- inside: slots and generations

    def _live(self, slot: Slot) -> Generation | None:
        state = self._state_of(slot)
        if state is None or state.state != "live":
            return None
        try:
            generation = Generation(
                self._disk,
                self._slots,
                self._data,
                slot,
                state.generation,
                health=self._health,
                writable=self.writable,
            )
        except FileNotFoundError:
            if self._state_of(slot) != state:
                return None  # purged while we looked
            raise
        # Looked at again with its directory open: a purge may have slipped in between.
        if self._state_of(slot) != state:
            generation.close()
            return None
        return generation

    def _begin_generation(self, slot: Slot, slot_dir: Dir, name: NamespaceName) -> None:
        disk = self._disk
        state = self._state(slot_dir)
        if state is not None and state.state == "live":
            return
        if state is not None and state.state == "purging":
            self._purge(slot, slot_dir, state.generation, wait=0.0, started=disk.now())
        number = 1 if state is None else state.generation + 1
        folder = generation_name(slot, number)
        if disk.stat(self._data, folder) is not None:
            # Left by a creation that did not come to its end. Nothing was ever published in it.
            disk.rename(self._data, folder, self._trash, f"{folder}.{disk.token()}", replace=False)
        disk.make_dir(self._data, folder)
        at = disk.dir(self._data, folder)
        try:
            for child in (IN, BLOBS, META, REFS, LOCKS, QUARANTINE):
                disk.make_dir(at, child)
            locks = disk.dir(at, LOCKS)
            try:
                for lock in LOCK_NAMES:
                    disk.close(disk.create(locks, lock))
                disk.sync(locks)
            finally:
                disk.close(locks)
            self._write_small(at, FENCE, bytes(8))
            self._write_small(at, NAME, name.text.encode())
            disk.sync(at)
        finally:
            disk.close(at)
        disk.sync(self._data)
        live = str(SlotState("live", number))
        if state is None:
            disk.close(disk.create(slot_dir, live))
        else:
            disk.rename(slot_dir, str(SlotState("dead", state.generation)), slot_dir, live, replace=False)
        disk.sync(slot_dir)

    def _purge(self, slot: Slot, slot_dir: Dir, generation: int, *, wait: float, started: float) -> Receipt:
        purge = self._purge_of(slot, generation)
        purge.fence(slot_dir)
        purge.hide()
        receipt = purge.finish(wait=wait, started=started)
        purge.close_slot(slot_dir)
        return receipt

    def _finish_trash(self, slot: Slot, *, wait: float) -> list[Receipt]:
        """Go on with generations of a slot that are hidden but not gone."""
        receipts = []
        for name in sorted(self._disk.names(self._trash)):
            parsed = parse_generation_name(name)
            if parsed is not None and parsed[0] == slot:
                purge = self._purge_of(*parsed)
                receipts.append(purge.finish(wait=wait, started=self._disk.now()))
        return receipts

    def _purge_of(self, slot: Slot, generation: int) -> Purge:
        return Purge(
            self._disk,
            slots=self._slots,
            data=self._data,
            trash=self._trash,
            chain=self._chain,
            slot=slot,
            generation=generation,
        )

    @contextmanager
    def _slot_locked(self, slot: Slot, *, create: bool) -> Iterator[Dir]:
        """Open a slot and hold its lock: creating, purging and recovering a namespace exclude one another."""
        disk = self._disk
        if create and disk.stat(self._slots, slot) is None:
            with suppress(FileExistsError):
                disk.make_dir(self._slots, slot)
        if create:
            disk.sync(self._slots)
        slot_dir = disk.dir(self._slots, slot)
        try:
            lock = disk.create(slot_dir, SLOT_LOCK, exist_ok=True)
            try:
                self._lock_within(lock)
                yield slot_dir
            finally:
                disk.close(lock)
        finally:
            disk.close(slot_dir)

    def _state_of(self, slot: Slot) -> SlotState | None:
        if not is_slot(slot):
            return None
        try:
            slot_dir = self._disk.dir(self._slots, slot)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return self._state(slot_dir)
        finally:
            self._disk.close(slot_dir)

    def _state(self, slot_dir: Dir) -> SlotState | None:
        states = [state for name in self._disk.names(slot_dir) if (state := SlotState.parse(name)) is not None]
        # A listing may show a name before and after its rename; the later generation and the later state win.
        order = {"live": 0, "purging": 1, "dead": 2}
        return max(states, key=lambda state: (state.generation, order[state.state]), default=None)

    def _name_of(self, slot: Slot, state: SlotState) -> NamespaceName | None:
        for at in (self._data, self._trash):
            try:
                folder = self._disk.dir(at, generation_name(slot, state.generation))
            except FileNotFoundError:
                continue
            try:
                name = NamespaceName(self._read_small(folder, NAME).decode())
            except (OSError, ValueError, StoreError):
                continue
            finally:
                self._disk.close(folder)
            if slot_name(self._key, name) == slot:
                return name
        return None

    # -- inside: small things

    def _lock_within(self, file: File, *, exclusive: bool = True, patience: float = _PATIENCE) -> None:
        waited = 0.0
        while not self._disk.lock(file, exclusive=exclusive):
            if waited >= patience:
                raise StoreError("another process keeps a lock of the store", hint="look for a stopped process")
            self._disk.pause(0.002)
            waited += 0.002

    def _read_small(self, at: Dir, name: str) -> bytes:
        file = self._disk.open(at, name)
        try:
            raw = bytearray(min(self._disk.fstat(file).size, 1 << 16))
            return bytes(raw[: self._disk.read(file, raw, 0)])
        finally:
            self._disk.close(file)

    def _write_small(self, at: Dir, name: str, raw: bytes) -> None:
        """Write a small file whole and durable under a name that is not there yet, or was left half made."""
        disk = self._disk
        temporary = f"{name}{_NEW}"
        file = disk.create(at, temporary, exist_ok=True)
        try:
            disk.truncate(file, 0)
            disk.write(file, raw, 0)
            disk.sync(file)
        finally:
            disk.close(file)
        disk.rename(at, temporary, at, name, replace=True)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the cache is closed", hint="open it again")


def _nothing(slot: Slot, started: float) -> Receipt:
    return Receipt(
        slot=slot,
        generation=0,
        level="unlinked",
        blobs=0,
        bytes=0,
        pending=(),
        started=started,
        finished=started,
        previous="",
    )
