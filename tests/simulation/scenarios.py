"""Scripted scenarios for the simulation: each is cut or fails at every call, or runs in every order of processes."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass

from layercache.store._disk import Kind
from layercache.testing._actor import REFERENCES, Actor
from layercache.testing.disk import Fault
from layercache.testing.explore import Program, faults, interleavings, power_cuts
from layercache.testing.model import CONTENTS, NAMESPACES, Content, ViolationError, orphans
from layercache.testing.simulation import started

__all__ = ["CUTS", "KILLS", "ORDERS", "Orders", "Script"]

HOME = NAMESPACES[0]
SMALL, TWIN, CHUNKS, EMPTY, _, LARGE = CONTENTS


def put(content: Content = SMALL, *, pieces: int = 2, lie: str = "", stop_after: int | None = None) -> Program:
    """Write a blob."""
    return lambda actor: actor.put(HOME, content, pieces=pieces, lie=lie, stop_after=stop_after)


def get(content: Content = SMALL) -> Program:
    """Read a blob."""
    return lambda actor: actor.get(HOME, content)


def remove(actor: Actor) -> None:
    """Drop the small blob."""
    actor.remove(HOME, SMALL.digest)


def remove_twin(actor: Actor) -> None:
    """Drop the blob of the same shard and lock."""
    actor.remove(HOME, TWIN.digest)


def purge(actor: Actor) -> None:
    """End the namespace."""
    actor.generation(HOME)
    actor.purge(HOME)


def purge_under_reader(actor: Actor) -> None:
    """End the namespace while its blob is open."""
    actor.get(HOME, SMALL, keep=True)
    actor.purge(HOME)


def recover(actor: Actor) -> None:
    """Sweep."""
    actor.recover()


def refer(number: int = 0, content: Content = SMALL) -> Program:
    """Let a reference mean a blob."""
    return lambda actor: actor.set_ref(HOME, REFERENCES[number], content)


def forget(actor: Actor) -> None:
    """Forget a reference."""
    actor.remove_ref(HOME, REFERENCES[0])


def linger(actor: Actor) -> None:
    """Keep everything open for longer than anybody waits."""
    actor.linger(10.0)


def both(*programs: Program) -> Program:
    """Do one after the other in one process."""

    def run(actor: Actor) -> None:
        for program in programs:
            program(actor)

    return run


def damage(actor: Actor) -> None:
    """Find a damaged blob twice: two readers have it open, and it is put again in between."""
    disk, model = actor.process.disk, actor.model
    actor.put(HOME, SMALL)
    other = Actor(model, disk.process())
    pairs = []
    for each in (actor, other):
        generation = each.generation(HOME)
        assert generation is not None
        pairs.append((generation, generation.open(SMALL.digest)))
    disk.rot(pairs[0][1].file.node, disk.rng)  # type: ignore[attr-defined]
    home = model.home(HOME)
    assert home is not None
    model.harmed = True
    model.blob(home, SMALL.digest).doubt(False, model.now())
    for generation, blob in pairs:
        generation.quarantine(blob, "damage")
        actor.put(HOME, SMALL)
        actor.get(HOME, SMALL)
        blob.close()
    other.close()


def planted(actor: Actor) -> None:
    """Sweep a root in which somebody put things everywhere, and in which one leftover cannot be removed."""
    disk, model = actor.process.disk, actor.model
    actor.put(HOME, SMALL)
    actor.put(HOME, TWIN)
    home = model.home(HOME)
    assert home is not None
    generation = f"{home[0]}.{home[1]}"
    shard = SMALL.digest.encoded[:2]
    stubborn = f"{EMPTY.digest.encoded}.7.0123.part"
    kinds: tuple[Kind, ...] = ("file", "dir", "other")
    for number, kind in enumerate(kinds):
        for at in ("slots", "data", "trash", "receipts", f"slots/{home[0]}", f"data/{generation}"):
            disk.plant(*at.split("/"), f"planted {number}", kind=kind)
        for part in ("in", "blobs", "meta", "refs", "locks", f"blobs/{shard}", f"meta/{shard}"):
            disk.plant("data", generation, *part.split("/"), f"planted {number}", kind=kind)
        disk.plant("data", generation, "in", f"{str(number) * 64}.7.0123.part", kind=kind)
        disk.plant("data", generation, "in", f"tmp.0123.{number}", kind=kind)
        disk.plant("data", generation, "refs", str(number) * 64, kind=kind)
        disk.plant("data", generation, "meta", shard, f"{shard}{str(number) * 62}", kind=kind)
    disk.plant("data", generation, "in", stubborn, kind="file")
    disk.plant("data", generation, "in", f"{EMPTY.digest.encoded}.9.0123.sums", kind="file")
    disk.plant("data", f"{home[0]}.{home[1] + 5}", kind="dir")
    disk.plant("trash", f"{'0' * 40}.3.12", kind="dir")
    disk.plant("trash", f"{'0' * 40}.3.12", "name", kind="file")
    model.harmed = True
    fault = Fault("remove", 1, errno.EPERM, sticky=True, about=stubborn)
    disk.faults.append(fault)
    actor.open()
    assert actor.store is not None
    failed = [leftover for leftover in actor.store.recover() if leftover.kind == "failed"]
    disk.faults.remove(fault)
    left = [text for text in orphans(disk) if stubborn not in text]
    if left or [leftover.place.rpartition("/")[2] for leftover in failed] != [stubborn]:
        raise ViolationError(f"one bad entry hindered others: {failed} {left}")


@dataclass(frozen=True)
class Script:
    """Programs, one process after the other."""

    name: str
    programs: tuple[Program, ...]
    start: str = "namespace"
    kill: bool = False
    faulty: bool = True

    def cuts(self, *, fates: int = 3, seed: int = 0, every: int = 1, offset: int = 0) -> Counter[str]:
        """Cut the power after each change, or kill the process there."""
        return power_cuts(
            started(self.start), self.programs, fates=fates, seed=seed, kill=self.kill, every=every, offset=offset
        )

    def faults(self, code: int, *, sticky: bool, seed: int = 0, every: int = 1, offset: int = 0) -> Counter[str]:
        """Let each call fail."""
        return faults(started(self.start), self.programs, code, sticky=sticky, seed=seed, every=every, offset=offset)


@dataclass(frozen=True)
class Orders:
    """Programs in every order."""

    name: str
    programs: tuple[Program, ...]
    before: Program | None = None
    opened: tuple[str, ...] = (HOME,)
    start: str = "namespace"

    def run(self, *, most: int | None = 400, seed: int = 0) -> Counter[str]:
        """Run them all, or as many."""
        return interleavings(
            started(self.start), self.programs, opened=self.opened, before=self.before, most=most, seed=seed
        )


CUTS = (
    Script("put", (put(),)),
    Script("put two chunks", (put(CHUNKS),)),
    Script("put nothing", (put(EMPTY),)),
    Script("put twins", (both(put(), put(TWIN)),)),
    Script("put, remove, put", (both(put(), remove, put()),)),
    Script("put, remove", (both(put(), remove),)),
    Script("references", (both(put(), refer(), refer(0, TWIN), refer(1), forget),)),
    Script("purge", (both(put(), refer(), purge),)),
    Script("purge, begin again", (both(put(), purge, put(TWIN)),)),
    Script("purge under a reader, begin again", (both(put(), purge_under_reader, put(TWIN)),), faulty=False),
    Script("stop half way, go on", (both(put(LARGE, pieces=3, stop_after=1), put(LARGE)),)),
    Script("damage", (damage,), faulty=False),
    Script("things planted", (planted,), faulty=False),
    Script("purge after purge", (both(put(), purge, put(), purge, put(), purge),), faulty=False),
    Script("lies", (both(put(lie="wrong"), put(lie="short"), put(lie="long"), put()),)),
    Script("make the root", (put(),), start="nothing"),
    Script("make a namespace", (put(),), start="root"),
)
KILLS = (
    Script("killed, then put", (put(), put()), kill=True),
    Script("killed, then put twin", (put(), put(TWIN)), kill=True),
    Script("killed making the root", (put(), put()), start="nothing", kill=True),
    Script("killed in purge, then put", (both(put(), purge), put()), kill=True),
    Script("killed, then recover", (both(put(), refer(), remove), both(recover, put())), kill=True),
)
ORDERS = (
    Orders("put | put", (put(), put())),
    Orders("put | put twin", (put(), put(TWIN))),
    Orders("put | lying put", (put(), put(lie="wrong"))),
    Orders("get | remove", (get(), remove), before=put()),
    Orders("put | remove", (put(), remove), before=put()),
    Orders("remove | remove", (remove, remove), before=put()),
    Orders("remove | put, get", (remove, both(put(), get())), before=put()),
    Orders("put, remove, put | put", (both(put(), remove, put()), put())),
    Orders("remove twin, put | remove", (both(remove_twin, put()), remove), before=both(put(), put(TWIN))),
    Orders("refer | forget", (refer(), forget), before=refer(0, TWIN)),
    Orders("refer | recover", (refer(), recover)),
    Orders("put | recover", (put(), recover)),
    Orders("put | purge", (put(), purge)),
    Orders("get | purge", (get(), purge), before=put()),
    Orders("purge | purge", (purge, purge), before=put()),
    Orders("recover | purge", (recover, purge), before=both(put(), refer())),
    Orders("resume | purge", (put(LARGE), purge), before=put(LARGE, pieces=3, stop_after=1)),
    Orders("purge | purge, put", (purge, both(purge, put(TWIN))), before=put()),
    Orders("begin | begin", (put(), put(TWIN)), opened=(), start="root"),
    Orders("begin | purge", (put(), purge), opened=(), start="root"),
    Orders("begin | recover", (put(), recover), opened=(), start="root"),
    Orders("root | root", (both(put(), linger), both(put(TWIN), linger)), opened=(), start="nothing"),
)
