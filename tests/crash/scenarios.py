"""Scripted scenarios of the store, played by an actor that tells what it begins and what it was promised.

The actor runs in a process of its own that may end at any system call, so it says every step through a pipe before and
after. :class:`Promises` reads what it said and knows what must be true afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from layercache.errors import IntegrityError, LayerCacheError, NotFoundError
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Platform, Reference
from layercache.store import Blob, Budget, Generation, Grant, NamespaceName, Ref, Seal, Store, grant, lend
from layercache.store._disk import Disk
from layercache.store._layout import PUBLIC

__all__ = [
    "CONTENTS",
    "SCENARIOS",
    "SHARED",
    "Actor",
    "Event",
    "Promises",
    "Scenario",
    "content",
    "descriptor",
    "reference",
]

Event = dict[str, Any]

PIECE = 64 << 10
ZEROS = 16
"""Every piece that is written begins with so many zero bytes: a write cut short by injection after so many bytes has
then really left on disk what it claims, because a file reads as zeros where nothing was written."""


def _bytes(tag: str, size: int) -> bytes:
    out = bytearray()
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        out += bytes(min(ZEROS, length)) + hashlib.shake_256(f"{tag} {start}".encode()).digest(max(0, length - ZEROS))
    return bytes(out)


def _twins() -> tuple[bytes, bytes]:
    """Two blobs whose digests begin alike, so that they share their directories."""
    seen: dict[str, bytes] = {}
    for number in range(1 << 12):
        data = _bytes(f"twin {number}", 3000)
        first = hashlib.sha256(data).hexdigest()[:2]
        if first in seen:
            return seen[first], data
        seen[first] = data
    raise AssertionError


CONTENTS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "small": lambda: _bytes("small", 5000),
    "chunks": lambda: _bytes("chunks", (150 << 10) + 7),
    "large": lambda: _bytes("large", (4 << 20) + 123),
    "twin-1": lambda: _twins()[0],
    "twin-2": lambda: _twins()[1],
}


def _piece(key: str) -> int:
    """Bytes of one feed: few writes for a large blob, so that there are few points to visit."""
    return PIECE if len(content(key)) < 1 << 20 else 16 * PIECE


@cache
def content(key: str) -> bytes:
    """Return the bytes of a blob of the scenarios."""
    return CONTENTS[key]()


@cache
def descriptor(key: str) -> Descriptor:
    """Return the descriptor of a blob of the scenarios."""
    data = content(key)
    return Descriptor(OCTET_STREAM, Digest.of(data), len(data))


def warm() -> None:
    """Make all contents now, before processes are forked that each would."""
    for key in CONTENTS:
        descriptor(key)


@cache
def reference(number: int) -> Reference:
    """Return a reference of the scenarios."""
    return Reference.parse(f"127.0.0.1:5000/demo/app:{number}")


SHARED = "(public)"
"""Stands for the public namespace, whose name no text can be."""


@cache
def name_of(namespace: str) -> NamespaceName:
    return PUBLIC if namespace == SHARED else NamespaceName(namespace)


class Actor:
    """Plays steps against the root below ``path``; ``say`` takes each event out of the process."""

    def __init__(self, path: Path, say: Callable[[Event], None], disk: Callable[[], Disk] | None = None) -> None:
        self.path = path
        self._say = say
        self._disk = disk
        self._store: Store | None = None
        self._generations: dict[str, Generation] = {}
        self._held: list[Blob] = []
        self.budget: Budget | None = None
        """To open the root with; an empty one stands for what was remembered, none counts nothing."""

    @property
    def store(self) -> Store:
        if self._store is None:
            raise AssertionError("the scenario opens the store first")
        return self._store

    @contextmanager
    def step(self, op: str, **what: Any) -> Iterator[None]:
        """Say that a step begins, and how it ends. A typed error goes on; anything else is a finding."""
        event = {"op": op, **what}
        self._say({**event, "is": "begun"})
        try:
            yield
        except LayerCacheError as error:
            self._say({**event, "is": "failed", "error": type(error).__name__, "text": str(error)})
            raise
        self._say({**event, "is": "done"})

    def wrong(self, text: str) -> None:
        """Say that a promise did not hold."""
        self._say({"op": "wrong", "is": "done", "text": text})

    def open(self) -> None:
        with self.step("open"):
            disk = None if self._disk is None else self._disk()
            self._store = Store(self.path, budget=self.budget, disk=disk)

    def close(self) -> None:
        """Close what is open; errors are findings, because nothing may be lost by closing."""
        for blob in self._held:
            blob.close()
        self._held.clear()
        for generation in self._generations.values():
            generation.close()
        self._generations.clear()
        if self._store is not None:
            self._store.close()

    def generation(self, namespace: str, *, seal: Seal | None = None) -> Generation:
        found = self._generations.get(namespace)
        if found is None:
            with self.step("create", ns=namespace):
                found = self.store.generation(name_of(namespace), create=True, seal=seal)
                if found is None:
                    raise AssertionError
            self._generations[namespace] = found
        return found

    def put(self, namespace: str, key: str, *, evicts: tuple[str, ...] = ()) -> None:
        """Store a blob unless it is there, and read back what a caller gets. What it ``evicts`` may go for it."""
        generation, wanted = self.generation(namespace), descriptor(key)
        with self.step("put", ns=namespace, blob=key, evicts=evicts):
            ingest = generation.begin(wanted)
            if ingest is None:
                blob = generation.open(wanted.digest)
            else:
                with ingest:
                    data = memoryview(content(key))
                    while ingest.offset < len(data):
                        start = ingest.offset
                        ingest.feed(data[start : start + _piece(key)])
                    blob = ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="scenario")
            try:
                if b"".join(map(bytes, blob.chunks())) != content(key):
                    self.wrong(f"put of {key} gave other bytes back")
            finally:
                blob.close()

    def partial(self, namespace: str, key: str, size: int) -> None:
        """Begin a blob and stop after ``size`` bytes."""
        generation = self.generation(namespace)
        with self.step("partial", ns=namespace, blob=key):
            ingest = generation.begin(descriptor(key))
            if ingest is None:
                raise AssertionError("nobody else writes here")
            with ingest:
                data = content(key)
                while ingest.offset < size:
                    ingest.feed(data[ingest.offset : min(size, ingest.offset + _piece(key))])

    def get(self, namespace: str, key: str) -> None:
        """Read a blob; damage found is a step that is done, with the blob gone."""
        generation = self.generation(namespace)
        with self.step("get", ns=namespace, blob=key):
            try:
                with generation.open(descriptor(key).digest) as blob:
                    if b"".join(map(bytes, blob.chunks())) != content(key):
                        self.wrong(f"get of {key} gave other bytes")
                    blob.pread(100, 1000)
            except (IntegrityError, NotFoundError) as error:
                self._say({"op": "lost", "ns": namespace, "blob": key, "is": "done", "error": type(error).__name__})

    def remove(self, namespace: str, key: str) -> None:
        with self.step("remove", ns=namespace, blob=key):
            self.generation(namespace).remove(descriptor(key).digest)

    def hold(self, namespace: str, key: str) -> None:
        """Open a blob and keep it open."""
        with self.step("hold", ns=namespace, blob=key):
            self._held.append(self.generation(namespace).open(descriptor(key).digest))

    def grant(self, namespace: str, key: str) -> None:
        """Let a tenant read a blob of the public namespace, which it then does."""
        generation, wanted = self.generation(namespace), descriptor(key)
        with self.step("grant", ns=namespace, blob=key):
            found = Grant(wanted.digest, wanted.size, wanted.media_type, None, "registry.example.com/demo", 1.0)
            grant(generation, [found])
            blob = lend(self.generation(SHARED), found, generation)
            if blob is None:
                self._say({"op": "unlent", "is": "done"})
                return
            with blob:
                if b"".join(map(bytes, blob.chunks())) != content(key):
                    self.wrong(f"other bytes of {key} were lent")

    def set_ref(self, namespace: str, number: int, key: str) -> None:
        with self.step("set_ref", ns=namespace, ref=number, blob=key):
            wanted = descriptor(key)
            self.generation(namespace).set_ref(Ref(reference(number), wanted, wanted.digest, Platform.host(), 1.0))

    def purge(self, namespace: str) -> None:
        with self.step("purge", ns=namespace):
            sealed = namespace in self._generations and self._generations[namespace].form.seal == "ephemeral"
            wanted = "crypto-erased" if sealed else "unlinked"
            receipt = self.store.purge(name_of(namespace), wait=1.0)
            if receipt.level != wanted:
                self._say(
                    {"op": "pending", "is": "done", "text": f"nobody reads, and the purge is only {receipt.level}"}
                )

    def recover(self) -> None:
        with self.step("recover"):
            self.store.recover()


@dataclass(frozen=True, slots=True)
class Scenario:
    """``setup`` runs whole on a whole disk, ``enter`` opens what is open beforehand, ``act`` is what gets hurt.

    One that is ``sealed`` does not survive a reboot.
    """

    name: str
    setup: Callable[[Actor], None]
    enter: Callable[[Actor], None]
    act: Callable[[Actor], None]
    sealed: bool = False


def _nothing(_: Actor) -> None:
    pass


def _opened(actor: Actor) -> None:
    actor.open()
    actor.generation("a")


def _with(*keys: str) -> Callable[[Actor], None]:
    def setup(actor: Actor) -> None:
        _opened(actor)
        for key in keys:
            actor.put("a", key)

    return setup


def _two_namespaces(actor: Actor) -> None:
    _opened(actor)
    for key in ("small", "chunks", "twin-1"):
        actor.put("a", key)
    actor.set_ref("a", 1, "small")
    actor.put("b", "small")


def _sealed(actor: Actor) -> None:
    actor.open()
    actor.generation("a", seal="ephemeral")
    for key in ("small", "chunks"):
        actor.put("a", key)
    actor.set_ref("a", 1, "small")
    actor.put("b", "small")


def _limited(actor: Actor) -> None:
    """A root that holds three blobs and has no room for a fourth."""
    actor.budget = Budget(most="1GiB", floor=0)
    _with("small", "twin-1", "large")(actor)
    taken = actor.store.space.count()
    actor.close()
    actor.budget = Budget(most=taken + (64 << 10), floor=0, high=0.99, low=0.98, policy="lru")
    actor.open()


def _opened_limited(actor: Actor) -> None:
    actor.budget = Budget()
    _opened(actor)


def _evict(actor: Actor) -> None:
    actor.hold("a", "small")
    actor.put("a", "chunks", evicts=("twin-1", "large"))
    actor.get("a", "small")


def _shared(actor: Actor) -> None:
    _with("small")(actor)
    actor.put(SHARED, "chunks")


def _lent(actor: Actor) -> None:
    _shared(actor)
    actor.grant("a", "chunks")
    actor.generation("b")
    actor.grant("b", "chunks")


def _opened_both(actor: Actor) -> None:
    _opened(actor)
    actor.generation(SHARED)


def _borrow(actor: Actor) -> None:
    actor.put(SHARED, "twin-1")
    actor.grant("a", "twin-1")
    actor.grant("a", "chunks")


def _purge_borrower(actor: Actor) -> None:
    actor.purge("a")
    actor._generations.pop("a").close()
    actor.grant("a", "chunks")


def blob_path(root: Path, key: str, *, below: str = "blobs") -> Path:
    """Return the one file of a blob, found without the store's help."""
    encoded = descriptor(key).digest.encoded
    found = [*root.glob(f"data/*/{below}/{encoded[:2]}/{encoded}")]
    if len(found) != 1:
        raise AssertionError(f"{key} is in {len(found)} places")
    return found[0]


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file, durably."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def _damaged(actor: Actor) -> None:
    _with("chunks", "small")(actor)
    actor.close()
    flip(blob_path(actor.path, "chunks"), 100_000)
    with actor.step("damage", ns="a", blob="chunks"):
        pass


def _mess(actor: Actor) -> None:
    """What crashes and strangers leave: all of it is for recovery to find."""
    _two_namespaces(actor)
    actor.partial("a", "large", 3 << 20)
    actor.close()
    with actor.step("mess"):
        _make_mess(actor.path)


def _make_mess(root: Path) -> None:
    home = blob_path(root, "chunks").parents[2]
    encoded = hashlib.sha256(b"nowhere").hexdigest()
    for part in ("blobs", "meta"):  # data without meta, meta without data
        other = hashlib.sha256(part.encode()).hexdigest()
        (home / part / other[:2]).mkdir(exist_ok=True)
        (home / part / other[:2] / other).write_bytes(b"alone")
    (home / "in" / f"{encoded}.5000.00000000dead.part").write_bytes(b"of another boot")
    (home / "in" / f"{encoded}.5000000.00000000dead.sums").write_bytes(b"of another boot")
    (home / "in" / "tmp.00000000dead.0123456789abcdef").write_bytes(b"of another boot")
    (home / "blobs" / "unknown").write_bytes(b"unknown")
    (home / "meta" / "zz").mkdir()
    (root / "data" / f"{'0' * 40}.7").mkdir()
    (root / "data" / f"{'0' * 40}.7" / "name").write_bytes(b"left by a creation that did not end")
    (root / "trash" / f"{'0' * 40}.6.0123456789abcdef").mkdir()
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _put(*keys: str) -> Callable[[Actor], None]:
    def act(actor: Actor) -> None:
        for key in keys:
            actor.put("a", key)

    return act


def _resume(actor: Actor) -> None:
    actor.partial("a", "large", 3 << 20)
    actor.put("a", "large")


def _first_open(actor: Actor) -> None:
    actor.open()


def _remove_and_put(actor: Actor) -> None:
    actor.remove("a", "chunks")
    actor.put("a", "chunks")


def _refs(actor: Actor) -> None:
    actor.set_ref("a", 1, "small")
    actor.set_ref("a", 2, "chunks")
    actor.set_ref("a", 1, "chunks")


def _heal(actor: Actor) -> None:
    actor.get("a", "chunks")
    actor.put("a", "chunks")


def _create(actor: Actor) -> None:
    actor.generation("b")
    actor.put("b", "small")


def _purge(actor: Actor) -> None:
    actor.purge("a")
    actor._generations.pop("a").close()
    actor.put("a", "twin-2")


def _purge_sealed(actor: Actor) -> None:
    actor.get("a", "chunks")
    actor.purge("a")
    actor._generations.pop("a").close()
    actor.generation("a", seal="ephemeral")
    actor.put("a", "twin-2")


def _open_only(actor: Actor) -> None:
    actor.open()


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("first-open", _nothing, _nothing, _first_open),
        Scenario("put", _with("small"), _opened, _put("chunks")),
        Scenario("put-twins", _with("small"), _opened, _put("twin-1", "twin-2")),
        Scenario("resume", _with("small"), _opened, _resume),
        Scenario("put-again", _with("small", "chunks"), _opened, _put("chunks")),
        Scenario("get", _with("small", "chunks"), _opened, lambda actor: actor.get("a", "chunks")),
        Scenario("remove", _with("small", "chunks"), _opened, lambda actor: actor.remove("a", "chunks")),
        Scenario("remove-put", _with("small", "chunks"), _opened, _remove_and_put),
        Scenario("set-ref", _with("small", "chunks"), _opened, _refs),
        Scenario("quarantine", _damaged, _opened, _heal),
        Scenario("create", _with("small"), _opened, _create),
        Scenario("purge", _two_namespaces, _opened, _purge),
        Scenario("purge-sealed", _sealed, _opened, _purge_sealed, sealed=True),
        Scenario("evict", _limited, _opened_limited, _evict),
        Scenario("grant", _shared, _opened_both, _borrow),
        Scenario("purge-borrower", _lent, _opened_both, _purge_borrower),
        Scenario("recover", _mess, _open_only, lambda actor: actor.recover()),
    )
}

State = Literal["present", "absent", "maybe", "damaged"]


@dataclass(slots=True)
class Promises:
    """What must be true after the events that were said.

    ``faulty``: calls failed while the process lived on. Then a failed put must not have become visible, a purge may say
    that it could not remove everything yet, and damage may have stayed where it was.
    ``unlocked``: it was a lock or a read that failed. The last of a put come when others may have the blob already.
    """

    faulty: bool
    unlocked: bool = False
    blobs: dict[tuple[str, str], State] = field(default_factory=dict)
    refs: dict[tuple[str, int], set[str | None]] = field(default_factory=dict)
    grants: dict[tuple[str, str], State] = field(default_factory=dict)
    half_purged: set[str] = field(default_factory=set)
    quarantined: bool = False
    findings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _noticed: set[tuple[str, str]] = field(default_factory=set)

    def hear(self, events: Iterable[Event]) -> None:
        """Take in what the actor said, in order."""
        for event in events:
            self._hear(event)

    def unreadable(self) -> None:
        """Take note that the disk said it cannot read something: that is moved aside, and fetched again."""
        for known in (self.blobs, self.grants):
            known.update({key: "maybe" for key, state in known.items() if state == "present"})
        for meant in self.refs.values():
            meant.add(None)
        self.quarantined = True

    def _hear(self, event: Event) -> None:
        end = event["is"]
        if end == "failed":
            self.errors.append(f"{event['op']}: {event['error']}: {event['text']}")
        match event["op"]:
            case "wrong" | "untyped" | "leak":
                self.findings.append(f"{event['op']}: {event['text']}")
            case "pending" if not self.faulty:
                self.findings.append(event["text"])
            case "put":
                gone: dict[tuple[str, str], State] = {(event["ns"], key): "maybe" for key in event["evicts"]}
                self.blobs.update({key: state for key, state in gone.items() if self.blobs.get(key) == "present"})
                self._put((event["ns"], event["blob"]), end)
            case "grant":
                key = (event["ns"], event["blob"])
                if end == "done":
                    self.grants[key] = "present"
                elif self.grants.get(key, "absent") == "absent":
                    self.grants[key] = "maybe"
            case "unlent" if not self.faulty:
                self.findings.append("what was granted is not there")
            case "remove":
                self.blobs[event["ns"], event["blob"]] = "absent" if end == "done" else "maybe"
            case "mess":
                self.quarantined = True
            case "damage":
                self.blobs[event["ns"], event["blob"]] = "damaged"
                self.quarantined = True
            case "get":
                key = (event["ns"], event["blob"])
                if self.blobs.get(key) == "damaged" and end == "done" and key not in self._noticed:
                    self.findings.append("damage was not noticed")
            case "lost":
                key = (event["ns"], event["blob"])
                if self.blobs.get(key) == "damaged":
                    self.blobs[key] = "damaged" if self.faulty else "absent"
                    self._noticed.add(key)
                else:
                    self.blobs[key] = "maybe"
                    self.errors.append(f"lost {event['blob']}: {event['error']}")
                self.quarantined = True
            case "set_ref":
                known = self.refs.setdefault((event["ns"], event["ref"]), {None})
                if end == "done":
                    known.clear()
                known.add(event["blob"])
            case "purge":
                self._purge(event["ns"], end)

    def _put(self, key: tuple[str, str], end: str) -> None:
        now = self.blobs.get(key, "absent")
        if end == "done":
            self.blobs[key] = "present"
        elif end == "begun" and now == "absent":
            self.blobs[key] = "maybe"
        elif end == "failed" and now == "maybe" and self.faulty and not self.unlocked:
            self.blobs[key] = "absent"

    def _purge(self, namespace: str, end: str) -> None:
        (self.half_purged.discard if end == "done" else self.half_purged.add)(namespace)
        for key, state in self.blobs.items():
            if key[0] == namespace and state != "absent":
                self.blobs[key] = "absent" if end == "done" else "maybe"
        self.grants.update({key: "absent" if end == "done" else "maybe" for key in self.grants if key[0] == namespace})
        for ref, known in self.refs.items():
            if ref[0] == namespace:
                if end == "done":
                    known.clear()
                known.add(None)


def untyped(error: BaseException) -> Event:
    """Return the finding that an error escaped which is none of ours, and where from, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in reversed(frames))
    return {"op": "untyped", "is": "done", "text": f"{type(error).__name__}: {error} from {where}"}


def read_events(raw: bytes) -> list[Event]:
    """Return the events of a pipe; a last line that was cut is none."""
    return [json.loads(line) for line in raw.split(b"\n")[:-1] if line]


def write_event(fd: int, event: Event) -> None:
    """Send an event, in one call."""
    os.write(fd, json.dumps(event).encode() + b"\n")
