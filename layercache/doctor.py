"""Why a pull works here, or where it fails: this machine, then each source, step by step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layercache.cache import default_root
from layercache.control import Control
from layercache.errors import LayerCacheError, StoreError
from layercache.namespace import as_platform
from layercache.oci import Platform, Reference
from layercache.reports import Check
from layercache.store import Store

if TYPE_CHECKING:
    from layercache.registry import Credentials, Mirror, Tls  # imports sockets, TLS and more, which a hit does not need

__all__ = ["diagnose"]

_LOW = 1 << 30  # bytes free below which it is said
_FEW = 1000  # inodes free


def diagnose(
    reference: Reference | str,
    *,
    root: str | os.PathLike[str] | None = None,
    platform: Platform | str | None = None,
    plain_http: bool | None = None,
    credentials: Credentials | None = None,
    mirrors: Mapping[str, Sequence[Mirror | str]] | None = None,
    hosts_dir: str | os.PathLike[str] | None = None,
    tls: Tls | None = None,
    timeout: float | None = 60.0,
    cancel: threading.Event | None = None,
) -> Iterator[Check]:
    """Yield the steps of a pull of ``reference`` as they are taken, up to the first that fails.

    The parameters are those of :class:`~layercache.LayerCache` and of a pull. Looked at are: the root and its
    filesystem; then for each source (mirrors first) what kind of host it is, credentials (where they are from, never
    what they are), for ECR who AWS says we are, DNS, the connection, TLS, the answer to ``/v2/``, the clock, the token,
    what the reference means, its manifest, and one byte of its largest layer. No blob is fetched and nothing is kept; a
    root that is not there is not made. Blocks for at most ``timeout`` seconds in all.

    :raises InvalidError: for a reference, a mirror, a certificate or a ``hosts.toml`` that makes no sense.
    :raises CancelledError: on a cancel, as :class:`~layercache.errors.DeadlineError` at the end of the time.
    """
    reference = Reference.parse(reference) if isinstance(reference, str) else reference
    platform = Platform.host() if platform is None else as_platform(platform)
    control = Control(timeout=timeout, cancel=cancel)
    from layercache.registry import Registry  # noqa: PLC0415 - for who only reads, too much to import

    registry = Registry(
        reference.repository.api_host,
        plain_http=plain_http,
        credentials=credentials,
        mirrors=(mirrors or {}).get(reference.repository.host, ()),
        hosts_dir=hosts_dir,
        tls=tls,
    )
    try:
        yield _root(Path(root) if root is not None else default_root())
        yield from registry.probe(reference, platform, control=control)
    finally:
        registry.close()


def _root(path: Path) -> Check:
    start = time.monotonic()

    def check(state: str, detail: str, hint: str = "") -> Check:
        return Check("root", state, f"{path}: {detail}", hint=hint, seconds=time.monotonic() - start)  # type: ignore[arg-type]

    try:
        if not path.exists():
            parent = next(place for place in path.absolute().parents if place.exists())
            if not os.access(parent, os.W_OK | os.X_OK):
                return check("warn", f"not there, and {parent} is not writable: nothing would be kept")
            return check("ok", f"not there yet; it would be made, on {_room(parent)[0]}")
        Store(path).close()
        room, low = _room(path)
    except StoreError as error:
        # The two that a cache refuses to open with; any other it goes without, straight to the registry.
        ends = error.reason in ("unsafe", "format")
        return check("fail" if ends else "warn", error.what, error.hint)
    except (OSError, LayerCacheError) as error:
        return check("warn", f"{error}: nothing would be kept")
    return check("warn", room, "make room: what does not fit is not kept") if low else check("ok", room)


def _room(path: Path) -> tuple[str, bool]:
    """What lies below ``path`` and how much of it is free, in words; whether that is little."""
    found = os.statvfs(path)
    free, inodes = found.f_bavail * found.f_frsize, found.f_favail
    few = found.f_files > 0 and inodes < _FEW  # some filesystems count no inodes
    text = f"{_filesystem(path)}, {free / (1 << 30):.1f} GiB free" + (f", {inodes} inodes left" if few else "")
    return text, free < _LOW or few


def _filesystem(path: Path) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():  # proc(5)
        left, _, right = line.partition(" - ")
        if left.split()[2:3] == [wanted]:
            return right.split()[0]
    return "an unknown filesystem"
