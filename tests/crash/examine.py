"""What a fresh process finds in a root after something went wrong: recover it, compare it with what was promised.

It looks twice: through the library, as a caller would, and at the tree itself, where every entry must be accounted for.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Generator, Iterator
from pathlib import Path

from layercache import cli
from layercache.errors import IntegrityError, LayerCacheError, NotFoundError
from layercache.integrity import CHUNK
from layercache.oci import OCTET_STREAM, Digest
from layercache.store import Budget, Generation, Store, granted, lend
from layercache.store._disk import Disk
from tests.crash.room import accounting
from tests.crash.scenarios import CONTENTS, SHARED, Promises, content, descriptor, name_of, reference

__all__ = ["examine", "finish_purges", "report", "stray"]

_LOCKS = {"root.lock", "janitor.lock", "scrub.lock", "evict.lock"}
_ROOT = _LOCKS | {"FORMAT", "root.key", "slots", "data", "trash", "receipts"}
_ROOT_MAY = {"aside", "ballast", "space", "budget", "policy", "stats", "foreground", "lost+found"}
_SLOT = re.compile(r"[0-9a-f]{40}")
_GENERATION = {"blobs", "meta", "in", "refs", "locks", "bad", "fence", "name"}
_GENERATION_MAY = {"lock", "pins", "grants", "hints", "policy", "quota", "key"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.(\d+)\.([0-9a-f]+)\.(part|sums)")


def examine(
    root: Path, promises: Promises, *, disk: Disk | None = None, boot: str, recovered: bool = False
) -> list[str]:
    """Return what is wrong with the root below ``root``, after one recovery of it.

    ``boot`` names the boot whose partials may stay. The library is asked by a store on ``disk``.
    """
    findings: list[str] = []
    try:
        store = Store(root, budget=Budget() if (root / "budget").exists() else None, disk=disk)
    except Exception as error:  # noqa: BLE001 - whatever it is, the root is lost to its user
        return [f"the root does not open: {type(error).__name__}: {error}"]
    try:
        if not recovered:
            store.recover()
        findings += [f"after recovery: {entry}" for entry in stray(root, boot, quarantined=promises.quarantined)]
        findings += accounting(root, store)
        findings += _contents(store, promises)
        findings += _grants(store, promises)
        findings += _puts(store, promises)
        findings += [f"after a new put: {entry}" for entry in stray(root, boot, quarantined=promises.quarantined)]
        findings += [f"after a new put: {entry}" for entry in accounting(root, store)]
    except LayerCacheError as error:
        findings.append(f"a typed error on a whole disk: {type(error).__name__}: {error}")
    finally:
        store.close()
    return findings


def finish_purges(root: Path) -> Iterator[str]:
    """Let ``layercache purge --resume`` finish what there is; yield what it leaves, and what its receipts lack."""
    if not (root / "FORMAT").exists():
        return
    for command in (["purge", "--resume"], ["receipts", "verify"]):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = cli.main([*command, "--root", str(root)])
        if code:
            yield f"layercache {' '.join(command)} ends with {code}: {told.getvalue()!r}"
    yield from (f"after layercache purge --resume: {path.name} is in trash" for path in root.glob("trash/*"))
    yield from (f"after layercache purge --resume: slot says {path.name}" for path in root.glob("slots/*/purging.*"))


def _contents(store: Store, promises: Promises) -> Iterator[str]:
    by_namespace: dict[str, dict[str, bool]] = {}
    for namespace in sorted({key[0] for key in promises.blobs} | {key[0] for key in promises.refs}):
        generation = store.generation(name_of(namespace), create=False)
        found = by_namespace[namespace] = {}
        for key in CONTENTS:
            expected = promises.blobs.get((namespace, key), "absent")
            there = generation is not None and (yield from _read(generation, key, damaged=expected == "damaged"))
            if there is None:
                continue
            found[key] = there
            if expected == "present" and not there:
                yield f"{key} was published in {namespace} and is gone"
            if expected == "absent" and there:
                yield f"{key} must not be in {namespace}, and is"
        if namespace in promises.half_purged:
            states = {
                found.get(key)
                for (home, key), state in promises.blobs.items()
                if home == namespace and state == "maybe"
            }
            if len(states) > 1:
                yield f"half of {namespace} is purged"
        if generation is None:
            continue
        try:
            listed = set(generation.digests())
            if unknown := listed - {descriptor(key).digest for key, there in found.items() if there}:
                yield f"listed, but not to be had: {', '.join(map(str, unknown))}"
            yield from _refs(generation, namespace, promises)
        finally:
            generation.close()


def _read(generation: Generation, key: str, *, damaged: bool = False) -> Generator[str, None, bool | None]:
    """Return whether a blob is there; ``None`` after a finding about it."""
    try:
        with generation.open(descriptor(key).digest) as blob:
            if b"".join(map(bytes, blob.chunks())) != content(key):
                yield f"wrong bytes of {key} were handed out"
                return None
    except NotFoundError:
        return False
    except IntegrityError as error:
        if damaged:
            return False
        yield f"damage of {key} that nobody did: {error}"
        return None
    return True


def _refs(generation: Generation, namespace: str, promises: Promises) -> Iterator[str]:
    known: dict[Digest | None, str | None] = {descriptor(key).digest: key for key in CONTENTS}
    for (home, number), allowed in promises.refs.items():
        if home == namespace:
            ref = generation.get_ref(reference(number))
            meant = None if ref is None else known.get(ref.descriptor.digest, "something else")
            if meant not in allowed:
                yield f"reference {number} of {namespace} means {meant}, not one of {allowed}"


def _grants(store: Store, promises: Promises) -> Iterator[str]:
    """Yield what a tenant can read of the public namespace and must not, or the other way round."""
    public = store.generation(name_of(SHARED), create=False)
    for (namespace, key), expected in promises.grants.items():
        generation = store.generation(name_of(namespace), create=False)
        found = None if generation is None else granted(generation, descriptor(key).digest)
        if found is None and expected == "present":
            yield f"{namespace} was granted {key} and cannot read it"
        if found is not None and expected == "absent":
            yield f"{namespace} must not read {key}, and may"
        if found is not None and generation is not None and public is not None:
            blob = lend(public, found, generation)
            if blob is not None:
                with blob:
                    if b"".join(map(bytes, blob.chunks())) != content(key):
                        yield f"wrong bytes of {key} were lent"
        if generation is not None:
            generation.close()
    if public is not None:
        public.close()


def _puts(store: Store, promises: Promises) -> Iterator[str]:
    """Put every blob that was in play again: it must be accepted, and be right."""
    for namespace, key in sorted(promises.blobs):
        generation = store.generation(name_of(namespace), create=True)
        if generation is None:
            yield f"{namespace} cannot be made again"
            continue
        try:
            ingest = generation.begin(descriptor(key))
            if ingest is not None:
                with ingest:
                    ingest.feed(content(key)[ingest.offset :])
                    ingest.commit(media_type=OCTET_STREAM, diff_id=None, origin="again").close()
            if not (yield from _read(generation, key)):
                yield f"{key} was put again in {namespace} and is not there"
        finally:
            generation.close()


def stray(root: Path, boot: str, *, quarantined: bool) -> Iterator[str]:
    """Yield every entry of a root that nothing accounts for."""
    entries = {path.name for path in root.iterdir()}
    yield from (f"{name} is missing" for name in _ROOT - entries)
    yield from (f"{name} is unknown" for name in entries - _ROOT - _ROOT_MAY)
    live = set()
    for slot in (root / "slots").iterdir():
        states = [path.name for path in slot.iterdir() if path.name != "lock"]
        if not _SLOT.fullmatch(slot.name) or len(states) > 1:
            yield f"slot {slot.name} holds {states}"
        for state in states:
            word, _, number = state.partition(".")
            if word == "live":
                live.add(f"{slot.name}.{number}")
            elif word != "dead":
                yield f"slot {slot.name} is {state}"
    yield from (f"{path.name} is left in trash" for path in (root / "trash").iterdir())
    for path in (root / "receipts").iterdir():
        if not re.fullmatch(r"lock|segment\.\d{6}", path.name):
            yield f"receipts/{path.name} is unknown"
    homes = {path.name for path in (root / "data").iterdir()}
    yield from (f"data/{name} belongs to no live slot" for name in homes - live)
    yield from (f"data/{name} is missing" for name in live - homes)
    for home in sorted(homes & live):
        yield from _stray_of(root / "data" / home, boot, quarantined)


def _stray_of(home: Path, boot: str, quarantined: bool) -> Iterator[str]:
    entries = {path.name for path in home.iterdir()}
    yield from (f"{name} is missing" for name in _GENERATION - entries)
    yield from (f"{name} is unknown" for name in entries - _GENERATION - _GENERATION_MAY)
    pairs: dict[str, set[str]] = {}
    for part in ("blobs", "meta"):
        pairs[part] = set()
        for folder in (home / part).iterdir():
            if not re.fullmatch(r"[0-9a-f]{2}", folder.name) or not folder.is_dir():
                yield f"{part}/{folder.name} is unknown"
                continue
            for path in folder.iterdir():
                pairs[part].add(path.name)
                if not _DIGEST.fullmatch(path.name) or path.name[:2] != folder.name:
                    yield f"{part}/{folder.name}/{path.name} is unknown"
    yield from (f"blob {name} has no meta" for name in pairs["blobs"] - pairs["meta"])
    yield from (f"meta {name} has no blob" for name in pairs["meta"] - pairs["blobs"])
    for path in (home / "in").iterdir():
        match = _PARTIAL.fullmatch(path.name)
        if match is None or match[2] != boot or int(match[1]) < 4 * CHUNK:
            yield f"in/{path.name} ({path.stat().st_size} bytes) is left"
    if not quarantined:  # what is moved aside stays for the operator to look at
        yield from (f"bad/{path.name} is left" for path in (home / "bad").iterdir())
    locks = sorted(path.name for path in (home / "locks").iterdir())
    if locks != list("0123456789abcdef"):
        yield f"the locks are {locks}"


def report(failed: list[tuple[str, list[str]]]) -> None:
    """Print what failed, by kind of finding: how often, and the commands that replay the first few of each."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for command, findings in failed:
        for finding in findings:
            kind = re.sub(r"\b[0-9a-f]{8,}\b|\d+", "#", finding)
            if command not in {seen for seen, _ in kinds.setdefault(kind, [])}:
                kinds[kind].append((command, finding))
    for seen in sorted(kinds.values(), key=len, reverse=True):
        print(f"FAILED {len(seen)} times: {seen[0][1]}")
        print("\n".join(f"    {command}" for command, _ in seen[:3]))
