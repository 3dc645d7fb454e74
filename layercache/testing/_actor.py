"""A process of the little world: it works on the store as a user would, and checks every answer against the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from layercache.errors import (
    IntegrityError,
    InUseError,
    LayerCacheError,
    NamespacePurgedError,
    NoSpaceError,
    NotFoundError,
    ReadOnlyError,
    StoreError,
)
from layercache.oci import OCTET_STREAM, Digest, Platform, Reference
from layercache.store import Blob, Generation, Ingest, NamespaceName, Ref, Store
from layercache.testing._inodes import Node
from layercache.testing.disk import Process
from layercache.testing.model import CONTENTS, Content, Home, Model, Register, ViolationError, Write

__all__ = ["REFERENCES", "Actor"]

REFERENCES = (Reference.parse("127.0.0.1:5000/demo/one:1"), Reference.parse("127.0.0.1:5000/demo/two:2"))
_PLATFORM = Platform.parse("linux/amd64")


class Actor:
    """One virtual process with one store. Every method is one operation and raises only on a broken law."""

    def __init__(self, model: Model, process: Process) -> None:
        self.model = model
        self.process = process
        self.store: Store | None = None
        self.generations: dict[str, Generation] = {}
        self.leases: list[tuple[Content, Home, Blob]] = []
        self._depth = self._faulted = 0

    # -- operations

    def open(self) -> None:
        """Open the root, if it is not open."""
        if self.store is None:
            if self.process.root.closed:
                self.process.reopen()
            with self._operation(may_lack_space=True):
                self.store = Store("", disk=self.process)

    def close(self) -> None:
        """Let everything go; nothing may stay open."""
        for lease in list(self.leases):
            self.release(lease)
        for namespace in list(self.generations):
            self._forget(namespace)
        if self.store is not None:
            with self._operation():
                self.store.close()
            self.store = None
        elif not self.process.root.closed:
            self.process.close(self.process.root)
        if self.process.opened:
            names = [f"{type(handle).__name__} {handle.about!r}" for handle in self.process.opened.values()]
            raise ViolationError(f"open after everything was closed: {names}")

    def generation(self, namespace: str) -> Generation | None:
        """Return the handle of a namespace, made where there is none; ``None`` where that cannot be now."""
        self.open()
        if namespace not in self.generations and self.store is not None:
            purged = set(self.model.purged)
            with self._operation(may_lack_space=True):
                generation = self.store.generation(NamespaceName(namespace), create=True)
                if generation is not None:
                    self.generations[namespace] = generation
                    if (generation.slot, generation.generation) in purged:
                        raise ViolationError("a purged generation was handed out")
        return self.generations.get(namespace)

    def put(
        self,
        namespace: str,
        content: Content,
        *,
        pieces: int = 2,
        lie: str = "",
        stop_after: int | None = None,
        keep: bool = False,
    ) -> None:
        """Write a blob: whole, or up to a piece, or what a lying source sends."""
        generation = self.generation(namespace)
        if generation is None:
            return
        home = (generation.slot, generation.generation)
        register = self.model.blob(home, content.digest)
        with (
            self._operation(namespace, may_lack_space=True),
            self._risking((register, False)),
            self._no_remains(home, content),
        ):
            ingest = generation.begin(content.descriptor)
            if ingest is None:
                self._join(generation, register, content)
                return
            write = register.begin(True, self.model.now()) if not lie and stop_after is None else None
            try:
                blob = self._feed(ingest, home, content, pieces=pieces, lie=lie, stop_after=stop_after)
            except NamespacePurgedError:
                raise  # what it had published goes with the namespace
            except LayerCacheError:
                self._stays_out(home, content, ingest)
                raise
            finally:
                if write is not None:
                    write.ended = self.model.now()
            if blob is None:
                return
            if write is None:
                blob.close()
                raise ViolationError(f"committed what a lying source ({lie}) sent")
            write.acknowledged = True
            lease = self._lease(content, home, blob)
            self._last_look(home, self.process.moved_at)
            if not self._node(blob).spoiled and self._node(blob).content() != content.data:
                raise ViolationError("published, and its content is wrong")
            self._read(lease, register)
            if not keep:
                self.release(lease)

    def get(self, namespace: str, content: Content, *, keep: bool = False, ranges: random.Random | None = None) -> None:
        """Read a blob, whole or some ranges of it, and keep it open or not."""
        generation = self.generation(namespace)
        if generation is None:
            return
        home = (generation.slot, generation.generation)
        register = self.model.blob(home, content.digest)
        began = self.model.now()
        with self._operation(namespace), self._risking((register, False)):
            try:
                blob = generation.open(content.digest)
            except NotFoundError:
                if False not in register.allowed(began, self.model.now()):
                    raise ViolationError(f"lost: {content.digest} of {home}") from None
                return
            lease = self._lease(content, home, blob)
            self._last_look(home, self.process.read_at)
            if True not in register.allowed(began, self.model.now()):
                raise ViolationError(f"from nowhere: {content.digest} of {home}")
            self._read(lease, register, ranges)
            if not keep:
                self.release(lease)

    def remove(self, namespace: str, digest: Digest) -> None:
        """Drop a blob."""
        generation = self.generation(namespace)
        if generation is None:
            return
        register = self.model.blob((generation.slot, generation.generation), digest)
        with self._operation(namespace):
            write = register.begin(False, self.model.now())
            try:
                generation.remove(digest)
                write.acknowledged = True
            except NotFoundError:
                register.drop(write)
                if not self._excused and False not in register.allowed(write.began, self.model.now()):
                    raise ViolationError(f"lost: {digest}") from None
            except InUseError:
                register.drop(write)
            finally:
                write.ended = self.model.now()

    def list(self, namespace: str) -> None:
        """List a namespace's blobs and references."""
        generation = self.generation(namespace)
        if generation is None:
            return
        home = (generation.slot, generation.generation)
        refs = [(self.model.ref(home, str(reference)), None) for reference in REFERENCES]
        with self._operation(namespace), self._risking(*refs):
            began = self.model.now()
            found = set(generation.digests())
            self._last_look(home, 0)
            for content in CONTENTS:
                allowed = self.model.blob(home, content.digest).allowed(began, self.model.now())
                if (content.digest in found) not in allowed and not self._excused:
                    raise ViolationError(f"listed wrongly: {content.digest}")
            for _ in generation.refs():
                pass
            for _ in self.store.namespaces() if self.store else ():
                pass

    def purge(self, namespace: str, *, wait: float = 0.0) -> None:
        """End a namespace."""
        self.open()
        if self.store is None:
            return
        generation = self.generations.get(namespace)
        lived = self.model.live_of(generation.slot) if generation else 0
        with self._operation(never_busy=True):
            receipt = self.store.purge(NamespaceName(namespace), wait=wait)
            self.model.note_purge(receipt)
            if generation and lived and (generation.slot, lived) not in self.model.fenced:
                raise ViolationError("a purge has returned and the generation that lived is not fenced")

    def set_ref(self, namespace: str, reference: Reference, content: Content) -> None:
        """Let a reference mean a blob."""
        generation = self.generation(namespace)
        if generation is None:
            return
        register = self.model.ref((generation.slot, generation.generation), str(reference))
        with self._operation(namespace, may_lack_space=True):
            write = register.begin(content.digest, self.model.now())
            try:
                generation.set_ref(
                    Ref(
                        reference=reference,
                        descriptor=content.descriptor,
                        manifest=content.digest,
                        platform=_PLATFORM,
                        resolved=1.0,
                    )
                )
                write.acknowledged = True
            finally:
                write.ended = self.model.now()

    def remove_ref(self, namespace: str, reference: Reference) -> None:
        """Forget a reference."""
        generation = self.generation(namespace)
        if generation is None:
            return
        register = self.model.ref((generation.slot, generation.generation), str(reference))
        with self._operation(namespace):
            write = register.begin(None, self.model.now())
            try:
                generation.remove_ref(reference)
                write.acknowledged = True
            finally:
                write.ended = self.model.now()

    def get_ref(self, namespace: str, reference: Reference) -> None:
        """Look a reference up."""
        generation = self.generation(namespace)
        if generation is None:
            return
        home = (generation.slot, generation.generation)
        register = self.model.ref(home, str(reference))
        with self._operation(namespace), self._risking((register, None)):
            began = self.model.now()
            ref = generation.get_ref(reference)
            self._last_look(home, self.process.read_at)
            found = None if ref is None else ref.descriptor.digest
            if found not in register.allowed(began, self.model.now()):
                raise ViolationError(f"{reference} means {found}")

    def recover(self) -> int:
        """Sweep the root and return how much there was to say."""
        self.open()
        count = -1
        if self.store is not None:
            homes = list(self.model.homes())
            risks = [
                *((self.model.blob(home, content.digest), False) for home in homes for content in CONTENTS),
                *((self.model.ref(home, str(reference)), None) for home in homes for reference in REFERENCES),
            ]
            with self._operation(), self._risking(*risks):
                count = len(self.store.recover())
        return count

    def check_receipts(self) -> None:
        """Read the chain of receipts and hold it against the model."""
        self.open()
        if self.store is not None:
            with self._operation():
                self.model.check_receipts(list(self.store.receipts()))

    def release(self, lease: tuple[Content, Home, Blob]) -> None:
        """Close a blob."""
        self.leases.remove(lease)
        self.model.leases.remove((self.process, lease[1], self._node(lease[2])))
        with self._operation():
            lease[2].close()

    def linger(self, seconds: float) -> None:
        """Do nothing for a while, and keep everything open."""
        self.open()
        self.process.pause(seconds)

    # -- inside

    @property
    def _excused(self) -> bool:
        """True once a fault has hit this process in the operation."""
        return self.process.faulted > self._faulted

    @contextmanager
    def _operation(
        self, namespace: str = "", *, may_lack_space: bool = False, never_busy: bool = False
    ) -> Iterator[None]:
        """Run one operation; an error is a broken law unless the model knows why it had to come."""
        model = self.model
        if not self._depth:
            self._faulted = self.process.faulted
        self._depth += 1
        try:
            yield
        except NamespacePurgedError:
            generation = self.generations.get(namespace)
            if generation is None or (generation.slot, generation.generation) not in model.fenced:
                raise ViolationError("purged, though nobody purged it") from None
            self._forget(namespace)
        except InUseError as error:
            if never_busy:
                raise ViolationError(f"unexpected: {error}") from error
        except NoSpaceError as error:
            if not (model.full and may_lack_space) and not self._excused:
                raise ViolationError(f"no space where none is needed: {error}") from error
        except StoreError as error:
            patience = (model.stopped and "stopped process" in error.hint) or self.process.faulted >= 3
            # A root that could not be written when it was opened is read-only for whoever opened it.
            read_only = isinstance(error, ReadOnlyError) and self.store is not None and not self.store.writable
            if not self._excused and not patience and not read_only:
                raise ViolationError(f"unexpected: {error!r}") from error
        except LayerCacheError as error:
            raise ViolationError(f"unexpected: {error!r}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ViolationError(f"not a typed error: {error!r}") from error
        finally:
            self._depth -= 1

    @contextmanager
    def _risking(self, *risks: tuple[Register, object]) -> Iterator[None]:
        """Run what makes each register that value if the disk fails it: what it cannot read it moves aside.

        So from the first fault on, for everybody, also if this process dies on the way.
        """
        now = self.model.now()
        writes = [(register, register.risk(value, now, lambda: self._excused)) for register, value in risks]
        try:
            yield
        finally:
            excused, now = self._excused, self.model.now()
            for register, write in writes:
                if excused:
                    write.ended, write.possible = now, lambda: True
                else:
                    register.drop(write)

    def _stays_out(self, home: Home, content: Content, ingest: Ingest) -> None:
        """What could not be published is not visible, if the disk failed only once."""
        name = content.digest.encoded
        shard = self.model.disk.at("data", f"{home[0]}.{home[1]}", "blobs", name[:2])
        node = ingest._file.node  # type: ignore[attr-defined]  # noqa: SLF001 - to know our own
        # Once it is durable others may have it: a failure after that takes nothing back.
        shown = shard is not None and shard.entries.get(name) is node and shard.written.get(name) is not node
        if shown and self.process.faulted - self._faulted == 1:
            raise ViolationError("it could not be published, and is visible") from None

    def _join(self, generation: Generation, register: Register, content: Content) -> None:
        """Have what another writer has or had, as a second caller of a fill does."""
        began = self.model.now()
        try:
            blob = generation.open(content.digest)
        except NotFoundError:
            return
        if True not in register.allowed(began, self.model.now()):
            raise ViolationError(f"from nowhere: {content.digest}")
        try:
            generation.settle(content.digest)
            if not self._node(blob).spoiled:  # damage shows when it is read
                register.writes.append(Write(True, began, self.model.now(), acknowledged=True))
        finally:
            blob.close()

    @contextmanager
    def _no_remains(self, home: Home, content: Content) -> Iterator[None]:
        """A write for which there was no space leaves nothing."""
        try:
            yield
        except NoSpaceError:
            incoming = self.model.disk.at("data", f"{home[0]}.{home[1]}", "in")
            for name, node in (incoming.entries if incoming else {}).items():
                ours = name.startswith(content.digest.encoded) and self.process.reached.get(name) is node
                if ours and not node.locks and not self._excused and not self._elsewhere(node):
                    raise ViolationError(f"no space, and {name} stays") from None
            raise

    def _elsewhere(self, node: Node) -> bool:
        """Tell whether another process has a file open: it made the name anew, and is about to lock it."""
        others = (process for process in self.model.disk.processes if process is not self.process)
        return any(handle.node is node for process in others for handle in process.opened.values())

    def _feed(
        self, ingest: Ingest, home: Home, content: Content, *, pieces: int, lie: str, stop_after: int | None
    ) -> Blob | None:
        resumed = ingest.offset
        poison = (home, content.digest)
        if not resumed:
            self.model.poisoned.discard(poison)
        data = _lie(content.data, lie, resumed)
        step = max(1, -(-(len(data) - resumed) // pieces))
        with ingest:
            try:
                for number, start in enumerate(range(resumed, len(data), step)):
                    if number == stop_after:
                        if lie:
                            self.model.poisoned.add(poison)
                        return None
                    ingest.feed(memoryview(data)[start : start + step])
                if stop_after is not None or (lie and data == content.data):
                    return None
                return ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="simulation")
            except IntegrityError:
                if not lie and poison not in self.model.poisoned:
                    raise
                self.model.poisoned.discard(poison)
                return None

    def _lease(self, content: Content, home: Home, blob: Blob) -> tuple[Content, Home, Blob]:
        lease = (content, home, blob)
        self.leases.append(lease)
        self.model.leases.append((self.process, home, self._node(blob)))
        if not self._node(blob).named and home not in self.model.fenced:
            raise ViolationError(f"leased {content.digest} after it was removed")
        return lease

    def _read(self, lease: tuple[Content, Home, Blob], register: Register, ranges: random.Random | None = None) -> None:
        content, home, blob = lease
        try:
            if ranges is None:
                start = 0
                for piece in blob.chunks():
                    self._last_look(home, self.process.read_at)
                    if bytes(piece) != content.data[start : start + len(piece)]:
                        raise ViolationError(f"wrong bytes of {content.digest} at {start}")
                    start += len(piece)
                if start != len(content.data):
                    raise ViolationError(f"{content.digest} ends at {start}")
                return
            for _ in range(2):
                start = ranges.randint(0, len(content.data))
                length = ranges.choice([0, 1, 4096, len(content.data)])
                found = blob.pread(start, length)
                self._last_look(home, self.process.read_at)
                if found != content.data[start : start + length]:
                    raise ViolationError(f"wrong bytes of {content.digest} at {start}")
        except IntegrityError as error:
            node, name = self._node(blob), content.digest.encoded
            if not self._excused and not node.spoiled:
                raise ViolationError(f"sound, but refused: {error}") from error
            register.doubt(False, self.model.now())
            stays = self.model.disk.at("data", f"{home[0]}.{home[1]}", "blobs", name[:2], name) is node
            if stays and not self._excused and not self.model.stopped and home not in self.model.fenced:
                raise ViolationError(f"damaged, and still there: {content.digest}") from error

    def _last_look(self, home: Home, effect: int) -> None:
        """After a success: the generation was looked at after the effect, and was not fenced then."""
        if self.process.checked < effect:
            raise ViolationError(f"{home} was not looked at after the effect")
        fence = (self.model.ended if self.process.by_name else self.model.fenced).get(home)
        if fence is not None and self.process.checked > fence:
            raise ViolationError(f"{home} was given out after its fence")

    def _node(self, blob: Blob) -> Node:
        node: Node = blob.file.node  # type: ignore[attr-defined]
        return node

    def _forget(self, namespace: str) -> None:
        generation = self.generations.pop(namespace)
        with self._operation():
            generation.close()


def _lie(data: bytes, lie: str, start: int) -> bytes:
    """Return what a lying source sends instead of ``data``, the same up to ``start``."""
    if lie == "short" and start < len(data):
        return data[: max(start, len(data) - 1)]
    if lie == "long":
        return data + b"x"
    if lie == "wrong" and start < len(data):
        return data[:-1] + bytes([data[-1] ^ 1])
    return data
