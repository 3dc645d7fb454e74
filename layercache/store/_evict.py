"""Eviction: what is here is told to the policy, and what the policy says goes, by one process at a time.

Nothing that is needed for it must survive: uses that were not written down and a policy's state that is lost make it
choose worse, not wrong. Its lock is not the sweep's: a fill that needs room cannot wait for a sweep.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import xxhash

from layercache.errors import FormatError, InUseError, LayerCacheError, NotFoundError, SealError
from layercache.policy import Policy, Quota, Source, Victim
from layercache.store import _removal
from layercache.store._disk import Dir, Disk
from layercache.store._faults import guarding
from layercache.store._files import PATIENCE, lock_within, read_record
from layercache.store._generation import Generation
from layercache.store._grants import kept
from layercache.store._layout import EVICT_LOCK, POLICY, Slot, generation_name, parse_generation_name
from layercache.store._limits import Limits
from layercache.store._pins import has_pins
from layercache.store._quota import quota_of
from layercache.store._slots import Slots
from layercache.store._space import Space
from layercache.store._uses import Use, take_uses

__all__ = ["Evictor", "generations", "stored"]

_log = logging.getLogger("layercache.store")

_ROUNDS = 4
"""Times that the policy is asked again because what it chose was in use."""


@dataclass(slots=True)
class _Scene:
    """What is here: the policy that knows of it, and what must not go."""

    policy: Policy
    quotas: dict[str, Quota] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    used: dict[str, float] = field(default_factory=dict)
    """When each blob was used last, or came; in seconds since the epoch."""


class Evictor:
    """Makes room in one root.

    :param public: the slot of the public namespace, whose blobs are kept by the pins of others, too.
    """

    def __init__(self, disk: Disk, slots: Slots, space: Space, limits: Limits, *, public: Slot) -> None:
        self._disk = disk
        self._slots = slots
        self._public = public
        self._space = space
        self._limits = limits
        self._name = limits.policy

    def evict(self, wanted: Callable[[], int]) -> bool:
        """Evict at least the bytes that are wanted once it is this process's turn; false where so much cannot go.

        :raises StoreError: when another process keeps the lock.
        """
        with self._alone():
            need = wanted()
            if need <= 0:
                return True  # who was at it before has made room for us, too
            freed = sum(self._each(_removal.clear_damaged))
            if freed < need:
                with self._looking() as scene:
                    freed += self._evict(scene, need - freed)
            return freed >= need

    def prune(
        self, need: int | None, *, slot: Slot | None, older_than: float, dry_run: bool
    ) -> list[tuple[Victim, float]]:
        """Evict as much as can go, at most ``need`` bytes where given; return what went and when it was used last.

        :param slot: of this namespace only.
        :param older_than: only what was not used for so many seconds.
        :param dry_run: nothing goes; what is open somewhere may be among the answer.
        :raises StoreError: when the root cannot be written, or another process keeps the lock.
        """
        state = None if slot is None else self._slots.state_of(slot)
        folder = None if slot is None or state is None else generation_name(slot, state.generation)
        with guarding("evict"), self._alone(), self._looking() as scene:
            before = self._disk.now() - older_than
            skip = scene.kept | {key for key, used in scene.used.items() if older_than and used > before}
            most = sum(scene.policy.usage(name) for name in {key.partition("/")[0] for key in scene.used})
            policy = scene.policy.copy() if dry_run else scene.policy
            victims = policy.victims(most if need is None else need, skip=skip, quotas=scene.quotas, namespace=folder)
            if not dry_run:
                with _Openings(self._slots) as opened:
                    victims = [victim for victim in victims if self._drop(scene, opened, victim)]
            return [(victim, scene.used[victim.key]) for victim in victims]

    def tidy(self) -> int:
        """Evict down to the low watermark if the root is over the high one; return the bytes that went.

        :raises StoreError: when the root cannot be written, or somebody keeps a lock.
        """
        with guarding("evict"):
            used = self._space.count()
        if used <= self._limits.high:
            return 0
        gone = self.prune(used - self._limits.low, slot=None, older_than=0.0, dry_run=False)
        return sum(victim.size for victim, _ in gone)

    # -- inside

    def _evict(self, scene: _Scene, need: int) -> int:
        freed = 0
        for _ in range(_ROUNDS):
            victims = scene.policy.victims(need - freed, skip=scene.kept, quotas=scene.quotas)
            if not victims or sum(victim.size for victim in victims) < need - freed:
                break
            with _Openings(self._slots) as opened:
                for victim in victims:
                    freed += self._drop(scene, opened, victim)
            if freed >= need:
                break
        return freed

    def _drop(self, scene: _Scene, opened: _Openings, victim: Victim) -> int:
        folder, _, name = victim.key.partition("/")
        try:
            generation = opened.generation(folder)
            if generation is None:
                scene.policy.remove_namespace(folder)
                return 0
            freed = _removal.evict(generation, name, may_go=partial(self._may_go, generation, name))
        except NotFoundError:
            scene.policy.forget(victim.key)
            return 0
        except InUseError:
            scene.kept.add(victim.key)
            return 0
        except (OSError, LayerCacheError) as error:
            _log.warning("a blob could not be evicted: %s", error)
            scene.kept.add(victim.key)
            return 0
        scene.policy.evict(victim.key)
        return freed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock: one process evicts at a time."""
        lock = self._disk.create(self._disk.root, EVICT_LOCK, exist_ok=True)
        try:
            lock_within(self._disk, lock, patience=PATIENCE)
            yield
        finally:
            self._disk.close(lock)

    @contextmanager
    def _looking(self) -> Iterator[_Scene]:
        """Know what is here, and keep what was learned; the lock is held."""
        scene = self._look()
        try:
            yield scene
        finally:
            with suppress(OSError, LayerCacheError):
                self._keep(scene.policy)

    def _look(self) -> _Scene:
        parts: dict[str, Any] = {}
        here: dict[str, tuple[float, int]] = {}
        uses: list[tuple[Use, str]] = []
        quotas: dict[str, Quota] = {}
        stay: set[str] = set()
        for generation in generations(self._slots):
            folder = generation_name(generation.slot, generation.generation)
            with _by_itself():
                held = kept(self._slots, generation, self._public)
                found = {f"{folder}/{name}": (created, size) for name, created, size in stored(generation)}
                quota = quota_of(generation)
                part = _load(self._disk, generation.folder)
                generation.note_uses()
                fresh = take_uses(self._disk, generation.folder)
                for name, time in _last(fresh).items():
                    if f"{folder}/{name}" in found:
                        found[f"{folder}/{name}"] = (time, found[f"{folder}/{name}"][1])
                        _mark(generation, name, time)
                uses += [(use, folder) for use in fresh]
                here |= found
                stay |= {key for key in found if held is None or key.rpartition("/")[2] in held}
                quotas |= {} if quota is None else {folder: quota}
                parts |= {} if part is None else {folder: part}
        scene = _Scene(self._restored(parts), quotas, stay, {key: time for key, (time, _) in here.items()})
        _tell(scene.policy, here, uses)
        return scene

    def _restored(self, parts: dict[str, Any]) -> Policy:
        root = _load(self._disk, self._disk.root)
        if root is not None and root.get("policy") == self._name:
            with suppress(FormatError, TypeError, ValueError, AttributeError):
                # Parts may be of other moments than the rest: the clock must not be behind any of them.
                clock = max([root.get("clock", 0), *(max(part.get("seen", [0]), default=0) for part in parts.values())])
                policy = Policy.restore(root | {"namespaces": parts, "clock": clock})
                if policy.capacity != self._limits.low:
                    policy.resize(self._limits.low)
                return policy
        return Policy(self._name, capacity=self._limits.low)

    def _keep(self, policy: Policy) -> None:
        state = policy.state()
        parts = state.pop("namespaces")
        for generation in generations(self._slots):
            part = parts.get(generation_name(generation.slot, generation.generation))
            if part is not None:
                with _by_itself():
                    _save(self._disk, self._space, generation.folder, part)
        _save(self._disk, self._space, self._disk.root, state)

    def _may_go(self, generation: Generation, name: str) -> bool:
        """Look at the pins once more, now that nobody has the blob: whoever pins it holds it meanwhile."""
        held = kept(self._slots, generation, self._public)
        return held is not None and name not in held

    def _each(self, call: Callable[[Generation], int]) -> Iterator[int]:
        for generation in generations(self._slots):
            with _by_itself():
                yield call(generation)


class _Openings:
    """Generations by the name of their directory, the last one kept open."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._last: tuple[str, Generation | None] = ("", None)

    def generation(self, folder: str) -> Generation | None:
        """Return it; ``None`` where it does not live any more."""
        if self._last[0] != folder:
            self.close()
            parsed = parse_generation_name(folder)
            found = None if parsed is None else _live(self._slots, parsed[0])
            if found is not None and parsed is not None and found.generation != parsed[1]:
                found.close()
                found = None
            self._last = (folder, found)
        return self._last[1]

    def close(self) -> None:
        """Close what is open."""
        if self._last[1] is not None:
            self._last[1].close()
        self._last = ("", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _live(slots: Slots, slot: Slot) -> Generation | None:
    """Return the generation that lives in a slot; with its key, where that can be had, if pins need it."""
    generation = slots.live(slot, keyless=True)
    if generation is None or not generation.form.keyless or not has_pins(generation):
        return generation
    try:
        keyed = slots.live(slot)
    except SealError:
        return generation
    generation.close()
    return keyed


@contextmanager
def _by_itself() -> Iterator[None]:
    """Let one namespace that fails hinder no other."""
    try:
        yield
    except (OSError, LayerCacheError) as error:
        _log.warning("a namespace could not be looked at: %s", error)


def generations(slots: Slots) -> Iterator[Generation]:
    """Yield each generation that lives, open until the next one is asked for. One that fails hinders no other."""
    for slot in slots.names():
        try:
            generation = _live(slots, slot)
        except (OSError, LayerCacheError) as error:
            _log.warning("a namespace could not be looked at: %s", error)
            continue
        if generation is not None:
            try:
                yield generation
            finally:
                generation.close()


def stored(generation: Generation) -> Iterator[tuple[str, float, int]]:
    """Yield what is here: file name, when it came, bytes it takes."""
    disk = generation.disk
    with generation.guarding("list blobs"):
        for name in generation.blobs.names():
            if generation.form.is_blob(name):
                with generation.blobs.folder(name) as blobs:
                    status = None if blobs is None else disk.stat(blobs, name)
                if status is not None:
                    yield name, status.mtime, max(1, status.allocated)


def _tell(policy: Policy, here: dict[str, tuple[float, int]], uses: list[tuple[Use, str]]) -> None:
    """Tell the policy what came, what went and what was used since it knew last, in the order of time."""
    for key in [key for key in policy.keys() if key not in here]:  # noqa: SIM118 - not a mapping
        policy.forget(key)
    sources: dict[str, Source] = {}
    for use, folder in uses:
        if use.kind == "i" and math.isfinite(use.rtt) and 0 < use.bandwidth < math.inf:
            sources[f"{folder}/{use.names[0]}"] = Source(max(0.0, use.rtt), use.bandwidth)
    events: list[tuple[float, int, str, tuple[str, ...]]] = []
    for key, (created, _) in here.items():
        if key not in policy:
            events.append((created, 0, key, ()))
    for use, folder in uses:
        if use.kind == "h":
            events.append((use.time, 1, f"{folder}/{use.names[0]}", ()))
        elif use.kind == "m":
            events.append((use.time, 2, f"{folder}/{use.names[0]}", use.names[1:]))
    for _, kind, key, names in sorted(events):
        folder = key.partition("/")[0]
        if kind == 0:
            policy.insert(key, here[key][1], namespace=folder, source=sources.get(key))
        elif kind == 1:
            policy.hit(key)
        else:
            policy.image(key, [f"{folder}/{name}" for name in names], namespace=folder)


def _last(uses: list[Use]) -> dict[str, float]:
    """Return when each blob was used last."""
    times = sorted((use.time, use.names[0]) for use in uses if use.kind == "h" and math.isfinite(use.time))
    return {name: time for time, name in times}


def _mark(generation: Generation, name: str, when: float) -> None:
    """Let the modification time of a blob say when it was used last."""
    with suppress(FileNotFoundError), generation.blobs.folder(name) as blobs:
        if blobs is not None:
            file = generation.disk.open(blobs, name)
            try:
                generation.disk.touch(file, when)
            finally:
                generation.disk.close(file)


def _load(disk: Disk, at: Dir) -> dict[str, Any] | None:
    """Return the part of a policy's state that was kept in a directory; ``None`` where there is no whole one."""
    with suppress(OSError, ValueError, RecursionError):
        raw = read_record(disk, at, POLICY)
        if raw is not None and xxhash.xxh3_128_digest(raw[16:]) == raw[:16]:
            part = json.loads(raw[16:])
            return part if isinstance(part, dict) else None
    return None


def _save(disk: Disk, space: Space, at: Dir, part: dict[str, Any]) -> None:
    body = json.dumps(part, separators=(",", ":")).encode()
    raw = xxhash.xxh3_128_digest(body) + body
    file = disk.create(at, POLICY, exist_ok=True)
    try:
        with space.offered(max(0, len(raw) + 4096 - disk.fstat(file).allocated)) as fits:
            # In place: one that was cut, or that a power cut took, does not match its sum and is as good as none.
            if fits:
                disk.write(file, raw, 0)
            disk.truncate(file, len(raw) if fits else 0)
    finally:
        disk.close(file)
