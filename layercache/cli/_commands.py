"""The commands: each takes the parsed arguments, speaks to the cache, prints, and returns its exit code."""

from __future__ import annotations

import argparse
import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layercache.cache import LayerCache, default_root
from layercache.cli._output import Output, age, binary, note, pairs, printable, table
from layercache.cli._parser import UsageError
from layercache.cli._progress import progress
from layercache.contents import Contents
from layercache.doctor import diagnose
from layercache.errors import InUseError, InvalidError, NotFoundError, UnsupportedError
from layercache.namespace import Namespace
from layercache.oci import OCTET_STREAM, Digest, MediaType, Platform, Reference
from layercache.registry import DockerConfig, Tls
from layercache.reports import BlobInfo, Check, ImageInfo, NamespaceInfo, PullReport
from layercache.store import Receipt

__all__ = [
    "COMMANDS",
    "DONE",
    "FAILED",
    "INTEGRITY",
    "MISSING",
    "PARTLY",
    "USAGE",
    "named",
    "open_cache",
    "open_namespace",
]

DONE, FAILED, USAGE, MISSING, INTEGRITY, PARTLY = range(6)

_BASE64_STEP = 3 << 18
"""Bytes encoded at a time: a multiple of three, so that the pieces join to one text."""


def _pull(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:
    reference = Reference.parse(args.reference)
    platform = Platform.parse(args.platform) if args.platform is not None else None
    with open_namespace(args, create=True, public=args.patterns, **_access(args, reference)) as namespace:
        with (
            progress(quiet=args.quiet, verbose=args.verbose, no_progress=args.no_progress) as show,
            namespace.pull(
                reference,
                platform=platform,
                plain_http=True if args.plain_http else None,
                jobs=args.jobs,
                fresh=args.fresh,
                timeout=args.timeout,
                cancel=cancel,
                progress=show,
            ) as image,
        ):
            report = image.report
        out.document(report.to_json())
        out.lines([str(report.digest)])
        if not args.quiet:
            rows = [
                (blob.digest, binary(blob.size), blob.source, "public" if blob.public else blob.reason)
                for blob in report.blobs
            ]
            out.lines(table(rows, right=[1]))
        return _judge(report, args)


def _judge(report: PullReport, args: argparse.Namespace) -> int:
    if report.stale:
        note("the registry did not answer: this is the digest the tag had when it last did; --fresh makes it an error")
    layers = [blob for blob in report.blobs if not _is_document(blob.media_type)] or report.blobs
    bypassed = [blob for blob in layers if blob.source == "bypass"]
    if bypassed:
        reasons = ", ".join(sorted({blob.reason for blob in bypassed if blob.reason})) or "the store refused"
        note(f"{len(bypassed)} of {len(layers)} layers could not be kept ({reasons}); check the root and its disk")
    elif not args.quiet:
        fetched = f"{binary(report.bytes_fetched)} in {report.seconds:.1f} s, {report.requests} requests"
        note(f"{report.reference}: {len(report.blobs)} blobs, fetched {fetched}")
    return PARTLY if len(bypassed) == len(layers) else DONE


def _is_document(media_type: MediaType) -> bool:
    return media_type.is_manifest or media_type.is_index or media_type.is_config


def _ls(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001 - one shape
    if args.namespace is not None or args.of_public:
        return _ls_namespace(args, out)
    found: list[NamespaceInfo] = []
    if _root(args).is_dir():
        with LayerCache(_root(args), janitor=False) as cache:
            found = sorted(cache.namespaces(), key=lambda one: one.name or one.slot)
    out.document({"namespaces": [one.to_json() for one in found]})
    names = [named(one.name, one.slot, public=one.public) for one in found]
    if args.quiet:
        out.lines(printable(name) for name in names)
    elif found:
        states = [one.state if one.seal is None else f"{one.state}, {one.seal}" for one in found]
        sizes = [(one.blobs, binary(one.bytes)) for one in found]
        rows = [(name, state, *size) for name, state, size in zip(names, states, sizes, strict=True)]
        out.lines(table(rows, header=("NAMESPACE", "STATE", "BLOBS", "SIZE"), right=(2, 3)))
    elif not out.as_json:
        note(f"no namespaces in {_root(args)}")
    return DONE


def _ls_namespace(args: argparse.Namespace, out: Output) -> int:
    with _open_contents(args) as contents:
        found = contents.images() if isinstance(contents, Namespace) else ()
        images = sorted(found, key=lambda image: str(image.reference))
        blobs = sorted(contents.blobs(), key=lambda blob: str(blob.digest))
    out.document({"images": [one.to_json() for one in images], "blobs": [one.to_json() for one in blobs]})
    if args.quiet:
        out.lines(str(blob.digest) for blob in blobs)
        return DONE
    if not (images or blobs or out.as_json):
        note("nothing in this namespace")
    now = time.time()
    of_images = {digest for image in images for digest in image.blobs}
    sections = [_images(images, out, now), _blobs([one for one in blobs if one.digest not in of_images], out, now)]
    out.lines("\n\n".join("\n".join(section) for section in sections if section).splitlines())
    return DONE


def _images(images: list[ImageInfo], out: Output, now: float) -> list[str]:
    rows = [
        (
            image.reference,
            out.digest(image.digest),
            binary(image.size),
            age(now - image.resolved),
            "complete" if image.complete else f"incomplete ({len(image.missing)} missing)",
        )
        for image in images
    ]
    return list(table(rows, header=("REFERENCE", "DIGEST", "SIZE", "AGE", "STATE"), right=(2, 3))) if rows else []


def _blobs(blobs: list[BlobInfo], out: Output, now: float) -> list[str]:
    rows = [(out.digest(blob.digest), binary(blob.size), age(now - blob.created), blob.media_type) for blob in blobs]
    return list(table(rows, header=("BLOB", "SIZE", "AGE", "MEDIA TYPE"), right=(1, 2))) if rows else []


def _inspect(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    digest = _digest(args.digest)
    with _open_contents(args) as contents:
        info = contents.stat(digest).to_json()
    out.document(info)
    out.lines(pairs(info))
    return DONE


def _cat(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    digest = _digest(args.digest)
    with (
        _open_contents(args) as contents,
        contents.open(digest) as layer,
        layer.uncompressed() if args.uncompressed else layer.compressed() as stream,
    ):
        if out.as_json:
            _cat_base64(str(digest), stream.chunks(), out)
        else:
            for chunk in stream.chunks():
                out.data(chunk)
    return DONE


def _export(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    target = _target(args.target)
    with open_namespace(args) as namespace:
        digest = namespace.export(target, args.directory)
    name = str(target) if isinstance(target, Reference) else None
    out.document({"digest": str(digest), "directory": args.directory, "reference": name})
    out.lines([str(digest)])
    return DONE


def _put(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    media_type = MediaType.parse(args.media_type) if args.media_type is not None else OCTET_STREAM
    if not Path(args.file).exists():
        raise NotFoundError(f"no file {args.file!r}")
    with open_namespace(args, create=True) as namespace:
        info = namespace.put(args.file, media_type=media_type)
    out.document(info.to_json())
    out.lines([str(info.digest)])
    return DONE


def _verify(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    digest = _digest(args.digest) if args.digest is not None else None
    findings = []
    with _open_contents(args) as contents:
        for finding in contents.verify(digest, repair=args.repair, plain_http=args.plain_http or None):
            findings.append(finding)
            out.lines(table([(finding.kind, finding.digest, finding.detail)]))
    out.document({"findings": [finding.to_json() for finding in findings]})
    left = sum(not finding.repaired for finding in findings)
    if left:
        note(f"{left} of {len(findings)} findings are not repaired; pull again to replace what was moved aside")
    elif not args.quiet:
        note(f"{len(findings)} findings, all repaired" if findings else "nothing found")
    return INTEGRITY if findings else DONE


def _rm(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    targets = list(dict.fromkeys(_target(text) for text in args.targets))
    removed, missing, in_use = [], [], []
    with _open_contents(args) as contents:
        if not isinstance(contents, Namespace) and any(isinstance(target, Reference) for target in targets):
            raise UsageError("the public namespace holds blobs, no images; name them by digest")
        for target in targets:
            try:
                if isinstance(contents, Namespace) and isinstance(target, Reference):
                    contents.remove_image(target)
                elif isinstance(target, Digest):
                    contents.remove(target)
            except NotFoundError:
                missing.append(str(target))
            except InUseError as error:
                in_use.append(str(target))
                note(f"{target}: {error}")
            else:
                removed.append(str(target))
    out.document({"removed": removed, "missing": missing, "in_use": in_use})
    if not args.quiet:
        out.lines(removed)
    if missing and not args.ignore_missing:
        note(f"not there: {', '.join(missing)}; ls -n NS shows what is, --ignore-missing accepts it")
    if in_use:
        return PARTLY if removed else FAILED
    return MISSING if missing and not args.ignore_missing else DONE


def _purge(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    if args.namespace is not None or args.of_public:
        with _open_contents(args) as contents:
            receipts = [contents.purge(wait=args.wait, trim=args.trim)]
        out.document(receipts[0].to_json())
        out.lines(pairs(receipts[0].to_json()))
    else:
        with open_cache(args) as cache:
            if args.resume:
                receipts = cache.resume_purges(wait=args.wait)
                rows = [(receipt.slot, receipt) for receipt in receipts]
                documents = [receipt.to_json() for receipt in receipts]
            else:
                rows = list(cache.purge_matching(args.match, wait=args.wait, trim=args.trim).items())
                receipts = [receipt for _, receipt in rows]
                documents = [{"namespace": name, **receipt.to_json()} for name, receipt in rows]
        out.document({"receipts": documents})
        out.lines(
            f"{printable(name)}  {receipt.generation}  {receipt.level}  {_left(receipt)}".rstrip()
            for name, receipt in rows
        )
    if all(not receipt.generation for receipt in receipts):
        note("there was nothing, or nothing left, to purge")
    if all(receipt.complete for receipt in receipts):
        return DONE
    note("fenced, but its bytes are not all gone: once its users end, the next command on this root removes the rest")
    return PARTLY


def _left(receipt: Receipt) -> str:
    """Say what keeps a purge from its end."""
    parts = [f"open in {' '.join(map(str, receipt.pending))}"] if receipt.pending else []
    parts += [f"{receipt.unseen} open elsewhere"] if receipt.unseen else []
    return ", ".join(parts + [f"{count} {name}" for name, count in receipt.failed.items()])


def _receipts(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:  # noqa: ARG001
    with open_cache(args) as cache:
        if args.action != "verify":
            receipts = list(cache.receipts())
            out.document({"receipts": [receipt.to_json() for receipt in receipts]})
            columns = ((one.number, one.slot, one.generation, one.level, one.blobs, one.bytes) for one in receipts)
            out.lines("  ".join(map(str, row)) for row in columns)
            return DONE
        report = cache.verify_receipts(after=args.after or "")
    out.document(report.to_json())
    out.lines([*report.problems, f"{report.count} receipts, the last is {report.last}"])
    return INTEGRITY if report.problems else DONE


def _doctor(args: argparse.Namespace, out: Output, cancel: threading.Event) -> int:
    reference = Reference.parse(args.reference)
    checks: list[Check] = []
    for check in diagnose(
        reference,
        root=_root(args),
        platform=None if args.platform is None else Platform.parse(args.platform),
        plain_http=True if args.plain_http else None,
        timeout=args.timeout,
        cancel=cancel,
        **_access(args, reference),
    ):
        checks.append(check)
        state = "FAIL" if check.state == "fail" else check.state
        text = f"{check.detail}; {check.hint}" if check.hint else check.detail
        if not (args.quiet and check.state == "ok"):
            out.lines([printable(f"{state:<4}  {check.step:<11}  {text}")])
    failed = any(check.state == "fail" for check in checks)
    out.document({"reference": str(reference), "ok": not failed, "checks": [check.to_json() for check in checks]})
    return FAILED if failed else DONE


COMMANDS: dict[str, Callable[[argparse.Namespace, Output, threading.Event], int]] = {
    "pull": _pull,
    "ls": _ls,
    "inspect": _inspect,
    "cat": _cat,
    "export": _export,
    "put": _put,
    "verify": _verify,
    "rm": _rm,
    "purge": _purge,
    "receipts": _receipts,
    "doctor": _doctor,
}


@contextmanager
def open_namespace(args: argparse.Namespace, *, create: bool = False, **access: Any) -> Iterator[Namespace]:
    """Yield the namespace that was named, of the root that was named."""
    with open_cache(args, create=create, **access) as cache:
        yield cache.namespace(args.namespace, seal=getattr(args, "seal", None))


@contextmanager
def _open_contents(args: argparse.Namespace) -> Iterator[Contents]:
    """Yield what is held by the namespace that was named, or by the public one."""
    with open_cache(args) as cache:
        yield cache.public_namespace() if args.of_public else cache.namespace(args.namespace)


def named(name: str | None, slot: str, *, public: bool) -> str:
    """What to call a namespace in a table."""
    return "(public)" if public else f"(slot {slot})" if name is None else name


@contextmanager
def open_cache(args: argparse.Namespace, *, create: bool = False, **access: Any) -> Iterator[LayerCache]:
    """Yield the cache at the root that was named; one that is not there is an error, or made."""
    root = _root(args)
    if not create and not root.is_dir():
        raise NotFoundError(f"no cache at {str(root)!r}", hint="name its directory with --root")
    with LayerCache(root, janitor=False, **access) as cache:
        yield cache


def _access(args: argparse.Namespace, reference: Reference) -> dict[str, Any]:
    return {
        "credentials": None if args.auth_file is None else DockerConfig(args.auth_file),
        "mirrors": {reference.repository.host: args.mirror},
        "hosts_dir": args.hosts_dir,
        "tls": Tls(tuple(args.ca), args.cert or "") if args.ca or args.cert else None,
    }


def _root(args: argparse.Namespace) -> Path:
    if args.root == "":
        raise InvalidError("an empty --root", hint="name a directory")
    return default_root() if args.root is None else Path(args.root)


def _target(text: str) -> Digest | Reference:
    """A digest if it begins like one; ``sha256:abc`` is a bad digest, not the tag ``abc`` of an image ``sha256``."""
    return _digest(text) if text.startswith(("sha256:", "sha512:")) else Reference.parse(text)


def _digest(text: str) -> Digest:
    try:
        return Digest.parse(text)
    except UnsupportedError as error:  # well formed, but to the one who typed it still wrong usage
        raise UsageError(str(error)) from error


def _cat_base64(digest: str, chunks: Iterator[bytes | bytearray | memoryview], out: Output) -> None:
    """Stream the one JSON document. An error cuts it, so that no program takes damaged bytes for whole ones."""
    out.data(f'{{"digest": "{digest}", "encoding": "base64", "data": "'.encode())
    size, rest = 0, b""
    for chunk in chunks:
        size += len(chunk)
        data = rest + bytes(chunk)
        whole = len(data) - len(data) % 3
        for start in range(0, whole, _BASE64_STEP):
            out.data(base64.b64encode(data[start : min(whole, start + _BASE64_STEP)]))
        rest = data[whole:]
    out.data(base64.b64encode(rest) + f'", "size": {size}}}\n'.encode())
