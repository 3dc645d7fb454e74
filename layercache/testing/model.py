"""What the store has promised so far, seen from outside, and what must therefore be true.

A :class:`Register` is one fact (a blob is here, a reference means this). Every operation on it is a write that began at
one step and ended at another, acknowledged or not. What a reader may find is every write that no acknowledged later one
has certainly replaced: so much holds for any number of processes, for processes that die, and after a power cut.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from layercache.errors import FormatError
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store import Meta, NamespaceName, Receipt, Ref
from layercache.store._form import PlainForm
from layercache.store._layout import LOCK_NAMES, SlotState, is_temporary, parse_blob_name, ref_name, slot_name
from layercache.store._store import _OURS
from layercache.testing._inodes import Node
from layercache.testing.disk import Process, SimulatedDisk

__all__ = ["CONTENTS", "NAMESPACES", "Content", "Model", "Register", "ViolationError", "Write", "orphans", "unsound"]

NAMESPACES = ("acme/one", "acme/two")
"""The namespaces of the little world."""

Home = tuple[str, int]
"""A generation: slot and number."""


class ViolationError(AssertionError):
    """A law of the store does not hold."""


@dataclass(frozen=True, slots=True)
class Content:
    """A blob of the little world that is played in."""

    data: bytes = field(repr=False)
    digest: Digest
    descriptor: Descriptor = field(repr=False)


@cache
def _contents() -> tuple[Content, ...]:
    rng = random.Random(20)
    sizes = [3000, 3000, 70_000, 0, (1 << 20) + 5000, (5 << 20) + 77]
    found: list[Content] = []
    for size in sizes:
        data = rng.randbytes(size)
        while found and size == 3000 and Digest.of(data).encoded[:2] != found[0].digest.encoded[:2]:
            data = rng.randbytes(size)
        digest = Digest.of(data)
        found.append(Content(data, digest, Descriptor(media_type=OCTET_STREAM, digest=digest, size=size)))
    return tuple(found)


CONTENTS = _contents()
"""Two blobs of one shard and lock, one of two chunks, an empty one, one over 1 MiB, one that can be resumed."""


@dataclass(slots=True)
class Write:
    """One operation on a register, in :meth:`Model.now` time."""

    value: object
    began: int
    ended: float = math.inf
    acknowledged: bool = False
    possible: Callable[[], bool] = lambda: True
    """Whether it can have had any effect."""


class Register:
    """One fact over time."""

    __slots__ = ("initial", "writes")

    def __init__(self, initial: object) -> None:
        self.initial = initial
        self.writes: list[Write] = []

    def begin(self, value: object, now: int) -> Write:
        """Note that somebody begins to make it ``value``."""
        write = Write(value, now)
        self.writes.append(write)
        return write

    def risk(self, value: object, now: int, possible: Callable[[], bool]) -> Write:
        """Note that somebody begins what makes it ``value`` if ``possible`` says so."""
        write = Write(value, now, possible=possible)
        self.writes.append(write)
        return write

    def doubt(self, value: object, now: int) -> None:
        """Note that it may have become ``value`` just now."""
        self.writes.append(Write(value, now, now))

    def drop(self, write: Write) -> None:
        """Note that the operation certainly did nothing."""
        self.writes.remove(write)

    def allowed(self, began: float, ended: float = math.inf) -> list[object]:
        """Return what a look that began and ended then may find."""
        settled = max((write.began for write in self.writes if write.acknowledged and write.ended < began), default=-1)
        values = [
            write.value for write in self.writes if write.ended >= settled and write.began <= ended and write.possible()
        ]
        return values if settled >= 0 else [self.initial, *values]


@dataclass(slots=True)
class Model:
    """The promises of one root. Tells at once when one that can be seen on the disk itself is broken."""

    disk: SimulatedDisk
    blobs: dict[tuple[Home, Digest], Register] = field(default_factory=dict)
    refs: dict[tuple[Home, str], Register] = field(default_factory=dict)
    fenced: dict[Home, int] = field(default_factory=dict)
    """The step from which on nothing of a generation may be given out."""
    ended: dict[Home, int] = field(default_factory=dict)
    """The step from which on its slot says so."""
    purged: dict[Home, str] = field(default_factory=dict)
    """Generations whose purge has returned, with the level it said."""
    receipts: list[Receipt] = field(default_factory=list)
    leases: list[tuple[Process, Home, Node]] = field(default_factory=list)
    """Blobs that are open, by who has them."""
    full: bool = False
    """The disk has an end."""
    harmed: bool = False
    """Something was damaged, or could not be read: then something may have been moved aside."""
    stopped: bool = False
    """Some process was stopped for a while, so that others may run out of patience with it."""
    poisoned: set[tuple[Home, Digest]] = field(default_factory=set)
    """Partials that a liar left."""

    _time: int = 0

    def __post_init__(self) -> None:
        self.disk.watch = self._watch

    def now(self) -> int:
        """Return the next point in time, later than all before."""
        self._time += 1
        return self._time

    def blob(self, home: Home, digest: Digest) -> Register:
        """Return the register of a blob: whether it is here."""
        return self.blobs.setdefault((home, digest), Register(initial=False))

    def ref(self, home: Home, name: str) -> Register:
        """Return the register of a reference: what it means."""
        return self.refs.setdefault((home, name), Register(None))

    def promised(self) -> Iterator[tuple[Home, Digest]]:
        """Yield the blobs that must be here."""
        now = self.now()
        for (home, digest), register in self.blobs.items():
            if home not in self.fenced and False not in register.allowed(now):
                yield home, digest

    def live(self, home: Home) -> bool:
        """Tell whether the slot says that this generation lives."""
        return self.disk.at("slots", home[0], f"live.{home[1]}") is not None

    def live_of(self, slot: str) -> int:
        """Return the live generation of a slot, 0 where there is none."""
        node = self.disk.at("slots", slot)
        states = [state for name in (node.entries if node else ()) if (state := SlotState.parse(name))]
        return next((state.generation for state in states if state.state == "live"), 0)

    def _never_was(self, home: Home) -> bool:
        """Tell whether a power cut took the beginning of a generation: its number is for the next to begin."""
        slot = self.disk.at("slots", home[0])
        states = (SlotState.parse(name) for name in (slot.entries if slot else ()))
        return all(state.generation < home[1] for state in states if state)

    def homes(self) -> Iterator[Home]:
        """Yield the last generation of each namespace, and the one that may begin any time."""
        key = self.disk.at("root.key")
        if key is None:
            return
        for namespace in NAMESPACES:
            slot = slot_name(key.content(), NamespaceName(namespace))
            folder = self.disk.at("slots", slot)
            states = [SlotState.parse(name) for name in (folder.entries if folder else ())]
            last = max((state.generation for state in states if state), default=0)
            yield from ((slot, last), (slot, last + 1))

    def home(self, namespace: str) -> Home | None:
        """Return the live generation of a namespace."""
        key = self.disk.at("root.key")
        if key is None:
            return None
        slot = slot_name(key.content(), NamespaceName(namespace))
        generation = self.live_of(slot)
        return (slot, generation) if generation else None

    def note_purge(self, receipt: Receipt) -> None:
        """Take in what a purge has said."""
        self.receipts.append(receipt)
        if receipt.generation:
            home = (receipt.slot, receipt.generation)
            self.purged[home] = receipt.level
            if self.live(home):
                raise ViolationError(f"a purge has returned, and {home} lives")
            if receipt.level == "unlinked":
                self._gone(home)

    def after_crash(self) -> None:
        """Check what must hold on the bare disk after a power cut, before anybody repaired anything."""
        for damage in unsound(self.disk):
            raise ViolationError(damage)
        self.leases = []
        slots = self.disk.at("slots")
        for slot in slots.entries if slots else ():
            generation = self.live_of(slot)
            if generation and self.disk.at("data", f"{slot}.{generation}", "bad") is None:
                raise ViolationError(f"{slot} lives without a directory")
        for home in list(self.fenced):
            # A fence that was not durable is none: its purge had not returned.
            word = self.disk.at("data", f"{home[0]}.{home[1]}", "fence")
            lives_on = self.live(home) and word is not None and not word.pages
            if home not in self.purged and (lives_on or self._never_was(home)):
                del self.fenced[home]
        self.ended = {home: step for home, step in self.ended.items() if home in self.fenced and not self.live(home)}
        for home, level in self.purged.items():
            if self.live(home):
                raise ViolationError(f"{home} lives again after its purge has returned")
            if self.disk.at("data", f"{home[0]}.{home[1]}") is not None:
                # Only what is in trash is gone on with by whoever opens the root next.
                raise ViolationError(f"{home} is back among the namespaces after its purge has returned")
            if level == "unlinked":
                self._gone(home)

    def check_receipts(self, found: list[Receipt]) -> None:
        """Every receipt given out is in the chain, and every generation that ended has one that says so, once."""
        for receipt in self.receipts:
            if receipt.generation and receipt not in found:
                raise ViolationError("a receipt is lost")
        ends = Counter((receipt.slot, receipt.generation) for receipt in found if receipt.level == "unlinked")
        slots = self.disk.at("slots")
        for slot, folder in (slots.entries if slots else {}).items():
            for state in filter(None, map(SlotState.parse, folder.entries)):
                for number in range(1, state.generation + (state.state == "dead")):
                    if ends[slot, number] != 1:
                        raise ViolationError(f"generation {number} has {ends[slot, number]} receipts of its end")

    def check_aside(self) -> None:
        """Nothing sound was moved aside, if nothing was damaged."""
        for path, node in self.disk.files("data"):
            if "bad" in path and not self.harmed and not node.spoiled:
                raise ViolationError(f"{'/'.join(path)} was moved aside, and nothing was wrong with it")

    def _gone(self, home: Home) -> None:
        name = f"{home[0]}.{home[1]}"
        for node in self.disk.tree.walk(self.disk.tree.root):
            if node.home == name:
                raise ViolationError(f"something of {home} has a name after its receipt said unlinked")
        for process, held, _ in self.leases:
            if held == home and not process.dead:
                raise ViolationError(f"a blob of {home} is open after its receipt said unlinked")

    def _watch(self, process: Process, what: str, node: Node, name: str) -> None:
        if what == "word":
            slot, _, generation = node.home.rpartition(".")
            self.fenced.setdefault((slot, int(generation)), self.disk.steps)
        elif what == "rename" and name.startswith("purging."):
            slots = self.disk.at("slots")
            for slot, folder in (slots.entries if slots else {}).items():
                if folder.entries.get(name) is node:
                    home = (slot, int(name.partition(".")[2]))
                    self.fenced.setdefault(home, self.disk.steps)
                    self.ended[home] = self.disk.steps
        elif what == "remove" and node.home:
            slot, _, number = node.home.rpartition(".")
            home = (slot, int(number))
            if home in self.fenced:
                return
            own = process.opened.values()
            guarded = "." in name or any(content.digest.encoded == name for content in CONTENTS)
            locks = self.disk.at("data", node.home, "locks")
            if len(name) == 1 and self.live(home) and locks is not None and name not in locks.entries:
                raise ViolationError(f"lock file {name} was unlinked")
            # A record's writer keeps the lock of its temporary a little longer than the record has its place.
            placed = "." not in name
            others = (handle for handle in node.locks if handle not in own)
            if guarded and any(not (placed and is_temporary(getattr(handle, "about", ""))) for handle in others):
                raise ViolationError(f"{name} was unlinked while another process holds its lock")
            if any(held is node and not reader.dead for reader, _, held in self.leases):
                raise ViolationError(f"{name} was unlinked while it is open")


def unsound(disk: SimulatedDisk) -> Iterator[str]:
    """Yield what is visible under the name of a blob without being that blob whole (damage done on purpose apart)."""
    data = disk.at("data")
    for generation, folder in (data.entries if data else {}).items():
        blobs = folder.entries.get("blobs")
        for shard in (blobs.entries if blobs else {}).values():
            for name, node in shard.entries.items():
                if node.kind == "file" and not node.spoiled and not _whole(name, node):
                    yield f"{generation}: {name} has {node.size} bytes that are not its content"


def orphans(disk: SimulatedDisk) -> Iterator[str]:
    """Yield everything below the root that nothing leads to: what a complete recovery must not leave."""
    root = disk.tree.root
    known = _OURS
    yield from (f"root: {name}" for name in root.entries if name not in known)
    if "FORMAT" not in root.entries:
        return  # nothing was promised here yet
    slots, data, trash = (root.entries[name] for name in ("slots", "data", "trash"))
    yield from (f"trash: {name}" for name in trash.entries)
    living: set[str] = set()
    for slot, folder in slots.entries.items():
        states = [name for name in folder.entries if name != "lock"]
        parsed = [state for name in states if (state := SlotState.parse(name))]
        if len(states) > 1 or len(parsed) != len(states) or any(state.state == "purging" for state in parsed):
            yield f"slot {slot}: {states}"
        living.update(f"{slot}.{state.generation}" for state in parsed if state.state == "live")
    for name in sorted(data.entries.keys() ^ living):
        yield f"data: {name} {'has no slot' if name in data.entries else 'is missing'}"
    for name, folder in data.entries.items():
        for text in _orphans_within(folder, f"{disk.boots:012x}"):
            yield f"{name}: {text}"


def _orphans_within(folder: Node, boot: str) -> Iterator[str]:
    parts = {"in", "blobs", "meta", "refs", "locks", "bad", "fence", "name"}
    if parts != folder.entries.keys():
        yield f"entries {sorted(parts ^ folder.entries.keys())}"
        return
    if any(page.strip(b"\0") for page in folder.entries["fence"].pages.values()) or folder.entries["fence"].size != 8:
        yield "fence"
    names = {
        kind: {f"{shard}/{name}" for shard, at in folder.entries[kind].entries.items() for name in at.entries or [""]}
        for kind in ("blobs", "meta")
    }
    for kind, found in names.items():
        names[kind] = {name for name in found if not name.endswith("/")}
    yield from (f"{name} has blob or record only" for name in sorted(names["blobs"] ^ names["meta"]))
    for shard, at in folder.entries["meta"].entries.items():
        for name, node in at.entries.items():
            if not _record(name, node, shard) and not node.spoiled:
                yield f"meta {name} is damaged"
    incoming = folder.entries["in"].entries
    for name, node in incoming.items():
        partial = PlainForm().parse_partial(name)
        if partial is None or partial.boot != boot or {partial.data, partial.sums} - incoming.keys():
            yield f"in/{name} of {node.size} bytes"
    for name, node in folder.entries["refs"].entries.items():
        if not _reference(name, node):
            yield f"refs/{name}"
    yield from (f"locks/{name}" for name in folder.entries["locks"].entries if name not in LOCK_NAMES)


def _whole(name: str, node: Node) -> bool:
    digest = parse_blob_name(name)
    if digest is None:
        return False
    for content in CONTENTS:
        if content.digest == digest:
            return node.size == len(content.data) and node.content() == content.data
    return hashlib.new(digest.algorithm, node.content()).hexdigest() == digest.encoded


def _record(name: str, node: Node, shard: str) -> bool:
    try:
        return str(Meta.unpack(node.content()).digest.encoded) == name and name.startswith(shard)
    except FormatError:
        return False


def _reference(name: str, node: Node) -> bool:
    try:
        return ref_name(Ref.unpack(node.content()).reference) == name
    except FormatError:
        return False
