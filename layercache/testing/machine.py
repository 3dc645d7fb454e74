"""A stateful test of the store for hypothesis: long histories of a few processes on a disk that forgets.

``StoreMachine`` is a ``RuleBasedStateMachine``; its ``TestCase`` runs under unittest and pytest. Where seeds let
processes interleave, this one lets operations follow each other for long, kills a process or cuts the power in the
middle of one, and shrinks what it finds to the few steps that matter.
"""

from __future__ import annotations

import errno
import random
import sys
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layercache.testing._actor import REFERENCES, Actor
from layercache.testing.disk import Fault, KilledError, Process
from layercache.testing.model import CONTENTS, NAMESPACES, Content, Model, ViolationError, orphans, unsound
from layercache.testing.simulation import judge, started

__all__ = ["StoreMachine"]

_PROCESSES = 3
_VERBS = ("create", "open", "read", "write", "reserve", "truncate", "sync", "rename", "remove", "names", "dir", "lock")

_who = st.integers(0, _PROCESSES - 1)
_namespaces = st.sampled_from(NAMESPACES)
_contents = st.sampled_from(CONTENTS[:4])
_references = st.sampled_from(REFERENCES)
_step = st.integers(1, 120)
_chance = st.integers(0, 1 << 32).map(random.Random)
"""Drawn before the operation: drawing in the middle of one could end it there."""


class StoreMachine(RuleBasedStateMachine):
    """Processes put, read, remove, purge and recover; the disk fails, fills up, rots and loses what was not flushed.

    The laws: what is published is whole and stays; a visible name has the content it stands for; nothing of a purged
    generation is given out, and nothing of it stays; namespaces share nothing; what is open is not removed; nothing is
    left over after a recovery; every error has its type.
    """

    @initialize(start=st.sampled_from(("namespace", "root", "nothing")))
    def begin(self, start: str) -> None:
        """Begin with a disk on which there is already something, or nothing."""
        self.disk = started(start).clone()
        self.model = Model(self.disk)
        self.actors: list[Actor] = []
        self._boot()

    def _boot(self) -> None:
        self.actors = [Actor(self.model, self.disk.process()) for _ in range(_PROCESSES)]

    # -- operations

    @rule(who=_who, namespace=_namespaces, content=_contents, pieces=st.integers(1, 3), keep=st.booleans())
    def put(self, who: int, namespace: str, content: Content, pieces: int, *, keep: bool) -> None:
        """Write a blob."""
        self.actors[who].put(namespace, content, pieces=pieces, keep=keep)

    @rule(who=_who, namespace=_namespaces, stop=st.integers(0, 3))
    def suspend(self, who: int, namespace: str, stop: int) -> None:
        """Write some of a large blob."""
        self.actors[who].put(namespace, CONTENTS[5], pieces=3, stop_after=stop)

    @rule(who=_who, namespace=_namespaces)
    def resume(self, who: int, namespace: str) -> None:
        """Write the rest of it."""
        self.actors[who].put(namespace, CONTENTS[5], pieces=3)

    @rule(
        who=_who,
        namespace=_namespaces,
        content=_contents,
        lie=st.sampled_from(("short", "long", "wrong")),
        stop=st.none() | st.integers(0, 2),
    )
    def lie(self, who: int, namespace: str, content: Content, lie: str, stop: int | None) -> None:
        """Write what a lying source sends."""
        self.actors[who].put(namespace, content, pieces=3, lie=lie, stop_after=stop)

    @rule(who=_who, namespace=_namespaces, content=_contents, keep=st.booleans())
    def get(self, who: int, namespace: str, content: Content, *, keep: bool) -> None:
        """Read a blob."""
        self.actors[who].get(namespace, content, keep=keep)

    @rule(who=_who, namespace=_namespaces, content=st.sampled_from(CONTENTS), rng=_chance)
    def pread(self, who: int, namespace: str, content: Content, rng: random.Random) -> None:
        """Read ranges of a blob."""
        self.actors[who].get(namespace, content, ranges=rng)

    @rule(who=_who)
    def release(self, who: int) -> None:
        """Close what a process has open."""
        for lease in list(self.actors[who].leases):
            self.actors[who].release(lease)

    @rule(who=_who, namespace=_namespaces, content=_contents)
    def remove(self, who: int, namespace: str, content: Content) -> None:
        """Drop a blob."""
        self.actors[who].remove(namespace, content.digest)

    @rule(who=_who, namespace=_namespaces, reference=_references, content=st.none() | _contents)
    def refer(self, who: int, namespace: str, reference: object, content: Content | None) -> None:
        """Let a reference mean a blob, or nothing."""
        actor = self.actors[who]
        if content is None:
            actor.remove_ref(namespace, reference)  # type: ignore[arg-type]
        else:
            actor.set_ref(namespace, reference, content)  # type: ignore[arg-type]
        actor.get_ref(namespace, reference)  # type: ignore[arg-type]

    @rule(who=_who, namespace=_namespaces)
    def list(self, who: int, namespace: str) -> None:
        """List a namespace."""
        self.actors[who].list(namespace)

    @rule(who=_who, namespace=_namespaces, wait=st.sampled_from((0.0, 0.02)))
    def purge(self, who: int, namespace: str, wait: float) -> None:
        """End a namespace; the next operation on it begins anew."""
        self.actors[who].purge(namespace, wait=wait)

    @rule(who=_who)
    def recover(self, who: int) -> None:
        """Sweep; only what is held or was made since may stay."""
        actor = self.actors[who]
        found = actor.recover()
        held = any(each.leases for each in self.actors)
        if found >= 0 and not held and not self.disk.faults and not self.model.full:
            for left in orphans(self.disk):
                raise ViolationError(f"left after recovery: {left}")

    @rule(who=_who)
    def reopen(self, who: int) -> None:
        """Close a store; the next operation opens it again."""
        self.actors[who].close()

    # -- what happens from outside

    @rule(rng=_chance)
    def crash(self, rng: random.Random) -> None:
        """Cut the power between two operations."""
        self._crash(rng)

    @rule(who=_who, step=_step, power=st.booleans(), rng=_chance, what=st.integers(0, 6))
    def interrupt(self, who: int, step: int, what: int, rng: random.Random, *, power: bool) -> None:
        """Kill a process, or cut the power, in the middle of an operation."""
        actor = self.actors[who]
        namespace, content = rng.choice(NAMESPACES), rng.choice(CONTENTS[:4])
        operations: tuple[Callable[[], object], ...] = (
            lambda: actor.put(namespace, content),
            lambda: actor.put(namespace, content, lie="wrong"),
            lambda: actor.remove(namespace, content.digest),
            lambda: actor.purge(namespace),
            lambda: actor.set_ref(namespace, REFERENCES[0], content),
            actor.recover,
            lambda: actor.put(namespace, CONTENTS[5]),
        )
        left = step

        def count(process: Process, _: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                process.kill()

        self.disk.hook = count
        try:
            operations[what]()
        except KilledError:
            pass
        finally:
            self.disk.hook = None
        if not actor.process.dead:
            return
        if power:
            self._crash(rng)
        else:
            self._bury(actor)
            self.actors[who] = Actor(self.model, self.disk.process())

    @rule(verb=st.sampled_from(_VERBS), nth=st.integers(1, 30), code=st.sampled_from((errno.EIO, errno.ENOSPC)))
    def fail(self, verb: str, nth: int, code: int) -> None:
        """Let a coming call fail."""
        self.disk.faults.append(Fault(verb, nth, code))
        self.model.harmed = True

    @precondition(lambda self: not self.model.full)
    @rule(pages=st.integers(0, 30))
    def fill(self, pages: int) -> None:
        """Let the disk be nearly full."""
        self.model.full = True
        self.disk.capacity = (self.disk.used + pages) * 4096

    @precondition(lambda self: self.model.full)
    @rule()
    def widen(self) -> None:
        """Let there be space again."""
        self.model.full, self.disk.capacity = False, None

    @rule(rng=_chance)
    def rot(self, rng: random.Random) -> None:
        """Damage a blob where it lies."""
        files = [(path, node) for path, node in self.disk.files("data") if path[1] == "blobs" and len(path) == 4]
        if files:
            path, node = rng.choice(files)
            self.disk.rot(node, rng)
            self.model.harmed = True
            slot, _, number = path[0].partition(".")
            for content in CONTENTS:
                if content.digest.encoded == path[3]:
                    self.model.blob((slot, int(number)), content.digest).doubt(value=False, now=self.model.now())

    def _crash(self, rng: random.Random) -> None:
        self.disk.crash(rng)
        self.model.after_crash()
        self._boot()

    def _bury(self, actor: Actor) -> None:
        self.disk.processes.remove(actor.process)
        self.model.leases = [lease for lease in self.model.leases if lease[0] is not actor.process]

    # -- laws that hold at any time

    @invariant()
    def visible_means_whole(self) -> None:
        """What has the name of a blob is that blob."""
        for damage in unsound(self.disk) if hasattr(self, "disk") else ():
            raise ViolationError(damage)

    @invariant()
    def nothing_has_two_names(self) -> None:
        """No file is in two places: namespaces, and generations, share nothing."""
        if hasattr(self, "disk"):
            nodes = [node.ino for node in self.disk.tree.walk(self.disk.tree.root)]
            if len(nodes) != len(set(nodes)):
                raise ViolationError("a file has two names")

    def teardown(self) -> None:
        """Recover and hold what is there against every promise."""
        if hasattr(self, "disk") and sys.exc_info()[0] is None:
            self.disk.faults = []
            for actor in self.actors:
                actor.close()
            self.disk.processes = []
            self.model.leases = []
            judge(self.model, random.Random(0))
