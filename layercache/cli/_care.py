"""The commands about room: what is taken, what may go, what must stay."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable

from layercache.cli._commands import COMMANDS as OTHERS
from layercache.cli._commands import DONE, INTEGRITY, MISSING, named, open_cache, open_namespace
from layercache.cli._output import Output, age, binary, note, printable, table
from layercache.cli._parser import UsageError
from layercache.errors import NotFoundError

__all__ = ["COMMANDS"]


def _df(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001 - one shape
    with open_cache(args) as cache:
        usage = cache.usage()
    out.document(usage.to_json())
    left = binary(max(0, min(usage.budget - usage.bytes - usage.reserved, usage.free - usage.keep_free)))
    out.lines(
        table(
            [
                [
                    binary(usage.budget),
                    binary(usage.bytes),
                    binary(usage.reserved),
                    left,
                    binary(usage.free),
                    binary(usage.keep_free),
                ]
            ],
            header=("BUDGET", "USED", "RESERVED", "LEFT", "FREE ON DISK", "KEPT FREE"),
            right=range(6),
        )
    )
    rows = [
        [
            named(one.name, one.slot, public=one.public),
            one.blobs,
            *map(binary, (one.bytes, one.reserved, one.evictable, one.pinned, one.leased)),
        ]
        for one in usage.namespaces
    ]
    if rows and not args.quiet:
        header = ("NAMESPACE", "BLOBS", "USED", "RESERVED", "EVICTABLE", "PINNED", "LEASED")
        out.lines(["", *table(rows, header=header, right=range(1, 7))])
    return DONE


def _prune(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    with open_cache(args) as cache:
        options = {"to": args.to, "older_than": args.older_than, "public": args.of_public}
        if not (args.dry_run or args.yes):
            planned = cache.prune(args.namespace, **options, dry_run=True)
            if planned and not _agreed(len(planned), sum(one.bytes for one in planned)):
                note("nothing was removed")
                return DONE
        found = cache.prune(args.namespace, **options, dry_run=args.dry_run)
    size = sum(one.bytes for one in found)
    out.document({"dry_run": args.dry_run, "bytes": size, "blobs": [one.to_json() for one in found]})
    now = time.time()
    if not args.quiet:
        rows = [
            (
                named(one.name, one.slot, public=one.public),
                out.digest(f"sha256:{one.blob}") if len(one.blob) == 64 else one.blob,
                binary(one.bytes),
                age(now - one.used),
                one.why,
            )
            for one in found
        ]
        out.lines(table(rows, header=("NAMESPACE", "BLOB", "SIZE", "LAST USED", "WHY"), right=(2, 3)) if rows else [])
    note(f"{'would remove' if args.dry_run else 'removed'} {len(found)} blobs, {binary(size)}")
    return DONE


def _janitor(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:
    with open_cache(args) as cache:
        done = cache.keep_house(timeout=args.timeout, cancel=cancel)
    out.document(done.to_json())
    out.lines(f"{finding.digest}  {finding.detail}" for finding in done.findings)
    swept = "another process sweeps" if done.swept is None else f"swept {done.swept} leftovers"
    note(f"{swept}, evicted {binary(done.evicted)}{'' if done.complete else '; there is more to read'}")
    return INTEGRITY if done.findings else DONE


def _agreed(count: int, size: int) -> bool:
    """Ask, where there is somebody to answer."""
    if not sys.stdin.isatty():
        raise UsageError("nobody to ask: give -y, or --dry-run to see what would go")
    print(f"layercache: remove {count} blobs, {binary(size)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _pin(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    with open_namespace(args) as namespace:
        pin = namespace.pin(args.name, args.reference)
    out.document(pin.to_json())
    out.lines([str(pin.digest)])
    return DONE


def _unpin(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    removed, missing = [], []
    with open_namespace(args) as namespace:
        for name in dict.fromkeys(args.names):
            try:
                namespace.unpin(name)
                removed.append(name)
            except NotFoundError:
                missing.append(name)
    out.document({"removed": removed, "missing": missing})
    if missing:
        note(f"no such pin: {', '.join(missing)}; pins shows those there are")
    return MISSING if missing else DONE


def _pins(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    with open_cache(args) as cache:
        wanted = [args.namespace] if args.namespace is not None else [one.name for one in cache.namespaces()]
        found = [(name, pin) for name in wanted if name is not None for pin in cache.namespace(name).pins()]
    out.document({"pins": [{"namespace": name, **pin.to_json()} for name, pin in found]})
    if args.quiet:
        out.lines(printable(pin.name) for _, pin in found)
        return DONE
    now = time.time()
    rows = [
        (
            name,
            pin.name,
            pin.reference,
            out.digest(pin.digest),
            age(now - pin.created),
            f"{len(pin.missing)} missing" if pin.missing else "complete",
        )
        for name, pin in found
    ]
    if rows:
        out.lines(table(rows, header=("NAMESPACE", "PIN", "REFERENCE", "DIGEST", "AGE", "STATE"), right=(4,)))
    elif not out.as_json:
        note("no pins")
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace, Output, threading.Event], int]] = {
    **OTHERS,
    "df": _df,
    "janitor": _janitor,
    "prune": _prune,
    "pin": _pin,
    "unpin": _unpin,
    "pins": _pins,
}
