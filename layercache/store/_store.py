"""The root: opening it safely, its namespaces and their purge."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from layercache.control import Control
from layercache.errors import (
    FormatError,
    KeyGoneError,
    LayerCacheError,
    ReadOnlyError,
    SealMismatchError,
    StoreClosedError,
    StoreError,
)
from layercache.reports import Finding, ReceiptsReport
from layercache.store._audit import unaccounted
from layercache.store._ballast import Ballast
from layercache.store._chain import Chain
from layercache.store._disk import Dir, Disk, File, Handle, PosixDisk
from layercache.store._evict import Evictor
from layercache.store._faults import guarding
from layercache.store._files import (
    NEW,
    PATIENCE,
    check_flock,
    fresh,
    lock_within,
    read_record,
    read_small,
    temporary,
    write_small,
)
from layercache.store._generation import Generation
from layercache.store._health import Health
from layercache.store._janitor import recover
from layercache.store._keys import KeyRecord, Keys
from layercache.store._kms import KmsKey
from layercache.store._layout import (
    ASIDE,
    BALLAST,
    BUDGET,
    DATA,
    EVICT_LOCK,
    FORMAT,
    JANITOR_LOCK,
    NAME,
    POLICY,
    PUBLIC,
    RECEIPTS,
    ROOT_KEY,
    ROOT_LOCK,
    SCRUB_LOCK,
    SEAL,
    SLOTS,
    SPACE,
    TRASH,
    NamespaceName,
    Slot,
    SlotState,
    format_record,
    generation_name,
    parse_format,
    parse_key,
    slot_name,
)
from layercache.store._leftovers import Leftover
from layercache.store._limits import Budget, Limits
from layercache.store._purge import Place
from layercache.store._receipts import Receipt
from layercache.store._scrub import scrub
from layercache.store._seal import Seal
from layercache.store._slots import Slots
from layercache.store._space import Space
from layercache.store._usage import Holding, holdings

__all__ = ["Store", "Tenancy"]

_log = logging.getLogger("layercache.store")

_BUDGET = 0.5
"""Seconds that opening spends on purges that others left; the rest goes on beside the caller."""

_FOLDERS = (SLOTS, DATA, TRASH, RECEIPTS)
_LOCKS = (JANITOR_LOCK, SCRUB_LOCK, EVICT_LOCK, SPACE)
_OURS = frozenset((FORMAT, ROOT_LOCK, ROOT_KEY, ASIDE, BALLAST, BUDGET, POLICY, *_LOCKS, *_FOLDERS, "lost+found"))


@dataclass(frozen=True, slots=True)
class Tenancy:
    """One namespace as the root knows it: its name, where it can be told and is a tenant's, and its state."""

    slot: Slot
    name: NamespaceName | None
    state: str
    generation: int
    seal: Seal | None
    public: bool = False


class Store:
    """The blobs of namespaces below one directory, shared by any number of processes and threads.

    Opening is O(1) in the number of blobs. It finishes purges that another process left unfinished.

    :param root: made if it is not there (0700). Must be on one local filesystem, belong to this user (or this user be
        root) and be writable by nobody else.
    :param budget: how much the root may take. ``None``: nothing is counted, nothing evicted, and nothing refused before
        the disk is full. One that says nothing of its own stands for what was said of this root last.
    :param kms: wraps the keys of namespaces with ``seal="kms"``.
    :raises UnsafeRootError: when the root is not such a directory.
    :raises FormatError: when it holds something else, or a format this version does not read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        budget: Budget | None = None,
        kms: KmsKey | None = None,
        disk: Disk | None = None,
        memory: Callable[[str, bool], Disk | None] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._disk = PosixDisk.open_root(root) if disk is None else disk
        self._health = Health(self._disk.now)
        self.evictor: Evictor | None = None
        self._opened: list[Handle] = [self._disk.root]
        try:
            with guarding("open the root"):
                life, self.writable = self._enter()
                self._opened.append(life)  # the root's lock, for life
                self._key = parse_key(read_small(self._disk, self._disk.root, ROOT_KEY))
                self.public = slot_name(self._key, PUBLIC)
                self._folders = [self._open_folder(name) for name in _FOLDERS]
                self._slots_dir, self._data, self._trash, receipts = self._folders
                ballast = Ballast(self._disk)
                self._chain = Chain(self._disk, receipts, ballast)
                self._place = Place(self._disk, self._slots_dir, self._data, self._trash, self._chain, ballast)
                self._keys = Keys(self._disk, self._key, kms=kms, memory=memory)
                self.space = Space(self._disk, self._limits(budget))
                self._slots = Slots(
                    self._place, health=self._health, keys=self._keys, space=self.space, writable=self.writable
                )
                if self.space.limits is not None:
                    self.evictor = Evictor(self._disk, self._slots, self.space, self.space.limits, public=self.public)
                    self.space.evict = self.evictor.evict
                if self.writable:
                    ballast.prepare()
                    self._slots.resume(budget=_BUDGET)
        except BaseException:
            self._close_all()
            raise

    @property
    def limits(self) -> Limits | None:
        """What the root may take, in bytes; ``None`` where it was opened without a budget."""
        return self.space.limits

    @property
    def failing(self) -> bool:
        """True while the disk is left alone after several failures in a row: nothing is stored, hits go on."""
        return self._health.failing

    # -- namespaces

    def generation(
        self, name: NamespaceName, *, create: bool, seal: Seal | None = None, control: Control | None = None
    ) -> Generation | None:
        """Return the live generation of a namespace; ``None`` where there is none and ``create`` is false.

        One that is made is sealed as ``seal`` says. One whose key is gone for good is ended first.

        :raises ReadOnlyError: when one must be made and the root cannot be written.
        :raises SealError: when it is to be sealed, and cannot be, or its key cannot be had.
        :raises SealMismatchError: when the one that lives should be sealed and is not, or otherwise.
        """
        self._check_open()
        slot = slot_name(self._key, name)
        with guarding("open a namespace"):
            try:
                generation = self._slots.live(slot, control=control)
            except KeyGoneError:
                if not self.writable:
                    raise
                with self._slots.locked(slot, create=False) as slot_dir:
                    self._slots.end_lost(slot, slot_dir)
                generation = self._slots.live(slot)
            if generation is not None and not generation.fenced:
                if seal is not None and seal != generation.form.seal:
                    how = f"sealed otherwise ({generation.form.seal})" if generation.form.seal else "not sealed"
                    generation.close()
                    raise SealMismatchError(f"the namespace is there and {how}", hint="purge it first")
                return generation
            if generation is not None:
                generation.close()
                self.purge(name, wait=0.0)  # somebody set the word and died before the rename
            if not create:
                return None
            self._check_writable()
            if seal is not None:
                self._use_feature(SEAL)
            with closing(self._slots.begin(slot, name, seal=seal, control=control or Control())):
                return self._slots.live(slot, control=control)

    def namespaces(self) -> list[Tenancy]:
        """Return the namespaces that are live or being purged, by slot."""
        self._check_open()
        found = []
        with guarding("list namespaces"):
            for slot in self._slots.names():
                state = self._slots.state_of(slot)
                if state is not None and state.state != "dead":
                    record = self._slots.key_record(generation_name(slot, state.generation))
                    seal = None if record is None else record.seal
                    name = None if slot == self.public else self._name_of(slot, state)
                    found.append(Tenancy(slot, name, state.state, state.generation, seal, slot == self.public))
        return found

    # -- purge

    def purge(self, name: NamespaceName, *, wait: float = 5.0, trim: bool = False) -> Receipt:
        """End the live generation of a namespace and remove every byte of it; return what was reached.

        From the moment the fence is durable no call in any process gives out or publishes a byte of it. From then on
        this waits at most ``wait`` seconds (and a tenth) for readers and for the files to go. What is left goes on
        beside the caller, and when he is gone it is finished by the next to open or purge.

        :param trim: then hand the blocks to the device (``discarded``), where that can be done.
        """
        return self.purge_all([name], wait=wait, trim=trim)[0]

    def purge_all(self, names: Sequence[NamespaceName], *, wait: float = 5.0, trim: bool = False) -> list[Receipt]:
        """Purge several namespaces, all fenced before any is waited for; return a receipt for each, in their order."""
        self._check_open()
        started = self._disk.now()
        slots = [slot_name(self._key, name) for name in names]
        with guarding("purge a namespace"):
            self._check_writable()
            found = self._slots.end(list(dict.fromkeys(slots)), wait=wait, started=started, trim=trim)
        receipts = dict(zip(dict.fromkeys(slots), found, strict=True))
        return [receipts[slot] or _nothing(slot, started) for slot in slots]

    def resume_purges(self, *, wait: float | None = 5.0) -> list[Receipt]:
        """Go on with every purge of this root that is not at its end; return what each has reached.

        With no ``wait`` (``None``) there is nothing to return, and nothing is recorded but an end.
        """
        self._check_open()
        with guarding("finish purges"):
            self._check_writable()
            return self._slots.end_left(wait=wait)

    def recover(self) -> tuple[Leftover, ...]:
        """Sweep what crashes left behind and return it; a second time finds nothing but what failed.

        Goes over every entry of the root, so it takes as long as a listing of all namespaces. Other processes go on
        meanwhile, and nothing that is held is touched. Safe to interrupt anywhere. An unfinished write of this boot
        stays where it can be gone on with; what is not ours is moved aside, never served, never deleted.

        :raises InUseError: when another process is at it.
        :raises ReadOnlyError: when the root cannot be written.
        """
        self._check_open()
        folders = dict(zip(_FOLDERS, self._folders, strict=True))
        with guarding("recover the root"):
            self._check_writable()
            found = recover(self._disk, self._slots, folders=folders)
            if self.space.limits is not None:
                self.space.count()
            return found

    def holdings(self) -> list[Holding]:
        """Return what each living generation takes, and how much of that could go. Looks at every blob."""
        self._check_open()
        with guarding("look at namespaces"):
            return list(holdings(self._slots, self.space, public=self.public))

    def scrub(self, *, older_than: float, rate: float, control: Control) -> Iterator[Finding]:
        """Compare every blob not compared with its digest for ``older_than`` seconds, at ``rate`` bytes a second.

        Yields what is damaged; it was moved aside, a miss from now on. Ends at once where another process is at it.
        """
        self._check_open()
        if self.writable:
            with guarding("scrub the root"):
                yield from scrub(self._disk, self._slots, older_than=older_than, rate=rate, control=control)

    def receipts(self) -> Iterator[Receipt]:
        """Yield every receipt of this root, oldest first.

        :raises StoreError: where the chain is broken.
        """
        with guarding("read the receipts"):
            yield from self._chain.read()

    def verify_receipts(self, *, after: str = "") -> ReceiptsReport:
        """Return what is wrong with the receipts, by the chain itself and by what the slots say has ended.

        :param after: the hash of a receipt that must be among them.
        """
        self._check_open()
        with guarding("read the receipts"):
            links = self._chain.links()
            problems = [*links.problems, *unaccounted(self._place, self._slots, links.receipts)]
        if after and after not in links.hashes:
            problems.append("the receipt of the given hash is not there")
        return ReceiptsReport(len(links.hashes), links.hashes[-1] if links.hashes else "", tuple(problems))

    # -- life

    def note_uses(self) -> None:
        """Write down what was used in this process since the last time, for whichever process evicts next."""
        if not self._closed and self.writable and self.limits is not None:
            self._slots.note_uses()

    def close(self) -> None:
        """Give the root up. Open blobs stay open. Closing twice is nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self.writable and self.limits is not None:
            self._slots.note_uses()
        self._slots.stop()
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
        writable = True
        try:
            life = disk.create(disk.root, ROOT_LOCK, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or ROOT_LOCK not in held:
                raise
            life = disk.open(disk.root, ROOT_LOCK)
            writable = False
        try:
            if writable:
                self._see_to_root(life)
            parse_format(read_small(disk, disk.root, FORMAT))
            lock_within(disk, life, exclusive=False)
            check_flock(disk, ROOT_LOCK)
            if writable:
                # Whoever made the root may have died before this: nothing may be built on names that can be lost.
                disk.sync(disk.root)
        except BaseException:
            disk.close(life)
            raise
        return life, writable

    def _see_to_root(self, life: File) -> None:
        """Make the root where it is not there yet, or wait for whoever is making it."""
        disk = self._disk
        waited = 0.0
        while disk.stat(disk.root, FORMAT) is None:
            if disk.lock(life, exclusive=True):
                if disk.stat(disk.root, FORMAT) is None:
                    self._check_ours()  # with the lock in hand, so that nobody is making it at the same time
                    self._make_root()
                return
            # Not until the lock can be had: the one who made the root keeps it, shared, for life.
            if waited >= PATIENCE:
                raise StoreError("another process keeps a lock of the store", hint="look for a stopped process")
            disk.pause(0.002)
            waited += 0.002

    def _check_ours(self) -> None:
        """Refuse to make a root where something else is."""
        if {name.removesuffix(NEW) for name in self._disk.names(self._disk.root)} - _OURS:
            raise FormatError("the directory holds something else", hint="choose an empty directory as root")

    def _make_root(self) -> None:
        disk = self._disk
        for name in _FOLDERS:
            if disk.stat(disk.root, name) is None:
                disk.make_dir(disk.root, name)
        receipts = disk.dir(disk.root, RECEIPTS)
        try:
            Chain(disk, receipts, Ballast(disk)).prepare()
        finally:
            disk.close(receipts)
        # Never a second one: names of slots that are there hang from it.
        if disk.stat(disk.root, ROOT_KEY) is None:
            write_small(disk, disk.root, ROOT_KEY, parse_key(fresh(disk)))
        for name in _LOCKS:  # a full disk could not make them when a sweep is needed most
            disk.close(disk.create(disk.root, name, exist_ok=True))
        disk.sync(disk.root)
        # Last: with FORMAT there, everything else is.
        write_small(disk, disk.root, FORMAT, format_record())
        disk.sync(disk.root)

    def _limits(self, budget: Budget | None) -> Limits | None:
        """Return what a budget comes to here, and remember it where it says something."""
        if budget is None:
            return None
        disk = self._disk
        raw = read_record(disk, disk.root, BUDGET)
        if budget == Budget():
            with suppress(LayerCacheError):
                budget = budget if raw is None else Budget.unpack(raw)
        elif self.writable and raw != budget.pack():
            try:
                with temporary(disk, disk.root, budget.pack()) as new:
                    disk.rename(disk.root, new, disk.root, BUDGET, replace=True)
                disk.sync(disk.root)
            except OSError as error:
                _log.warning("the budget is not remembered: %s", error)  # a full disk must not keep anybody out
        return budget.limits(disk.room())

    def _use_feature(self, feature: str) -> None:
        """Note in FORMAT that the root uses something an older version must not pass over."""
        disk = self._disk
        used = parse_format(read_small(disk, disk.root, FORMAT))
        if feature not in used:
            with temporary(disk, disk.root, format_record(used | {feature})) as new:
                disk.rename(disk.root, new, disk.root, FORMAT, replace=True)
        disk.sync(disk.root)

    # -- inside: small things

    def _name_of(self, slot: Slot, state: SlotState) -> NamespaceName | None:
        for at in (self._data, self._trash):
            try:
                folder = self._disk.dir(at, generation_name(slot, state.generation))
            except FileNotFoundError:
                continue
            try:
                raw, record = read_small(self._disk, folder, NAME), KeyRecord.read(self._disk, folder)
                if record is not None:
                    form = self._keys.load(folder, record, generation_name(slot, state.generation))
                    if form is None:
                        continue
                    try:
                        raw = form.unpack(NAME, NAME, raw)
                    finally:
                        form.close()
                name = NamespaceName(raw.decode())
            except (OSError, ValueError, StoreError):
                continue
            finally:
                self._disk.close(folder)
            if slot_name(self._key, name) == slot:
                return name
        return None

    def _check_writable(self) -> None:
        """Refuse what changes the root while it cannot be written; one that could not be when it was opened may be now.

        :raises ReadOnlyError: then.
        """
        with self._lock:
            if self.writable:
                return
            life, self.writable = self._enter()
            if self.writable:
                self._opened.append(life)
            else:
                self._disk.close(life)
            self._slots.writable = self.writable
        if not self.writable:
            raise ReadOnlyError("the root cannot be written", hint="remount it, or choose another root")
        self._slots.resume(budget=_BUDGET)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the cache is closed", hint="open it again")


def _nothing(slot: Slot, started: float) -> Receipt:
    return Receipt(slot=slot, generation=0, level="unlinked", started=started, finished=started)
