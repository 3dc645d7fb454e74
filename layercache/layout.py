"""An OCI image layout in a directory (image-spec, image-layout.md): what other tools open.

Everything inside the directory is reached through directory descriptors and no symlink is followed, so that a layout
that others may write to cannot send our writes elsewhere. Each file appears under its name whole and synced, and
``index.json`` is the last one to change: whatever fails before leaves the old index, and all it names, in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercache.errors import InUseError, InvalidError, NoSpaceError, NotFoundError, ReadOnlyError, StoreError
from layercache.integrity import Buffer, Verifier
from layercache.oci import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
    parse_document,
)

__all__ = ["REF_NAME", "write_layout"]

REF_NAME = "org.opencontainers.image.ref.name"
"""The annotation that names an entry of ``index.json``."""

_TEMP = ".layercache-"
"""How the names of unfinished files begin. A killed export may leave one; it does not make a directory "not empty"."""

_LAYOUT = {"imageLayoutVersion": "1.0.0"}
_OCI_TYPES = {
    str(docker): str(oci)
    for docker, oci in (
        (DOCKER_CONFIG, OCI_CONFIG),
        (DOCKER_LAYER, OCI_LAYER),
        (DOCKER_LAYER_GZIP, OCI_LAYER_GZIP),
        (DOCKER_LAYER_ZSTD, OCI_LAYER_ZSTD),
    )
}
_INDEX_LIMIT = 4 << 20
_LOCK_WAIT = 10.0
_HINT = "name a new directory, an empty one, or an OCI image layout"


def write_layout(
    directory: str | os.PathLike[str],
    *,
    descriptor: Descriptor,
    reference_name: str | None,
    blobs: Iterable[tuple[Descriptor, Iterator[Buffer]]],
) -> Descriptor:
    """Make ``directory`` an OCI image layout of ``descriptor`` and ``blobs``; return what the index names.

    That is ``descriptor``, unless it is a Docker schema 2 manifest or list. Tools look for OCI types only in a layout's
    index, so then its OCI form, of another digest, is put beside the original and named instead.

    The directory may be absent, empty, or a layout already; then the image is added to it: an entry of the same
    reference name (or, without a name, of the same digest) is replaced and all others stay. A file already there with
    the right size is taken as that blob and its iterator is closed unread. Each blob written is checked against its
    size and digest. Memory: one buffer. Several processes may export into one layout at a time.

    Blocks on the disk: each file is synced before it gets its name.

    :raises InvalidError: the directory is something else, or holds a symlink where a layout has a file or directory.
    :raises IntegrityError: a blob's bytes are not what its descriptor says; the index has not changed.
    :raises NotFoundError: neither ``blobs`` nor the directory has ``descriptor`` itself.
    :raises InUseError: another process keeps the index locked.
    :raises StoreError: the disk refuses (:class:`NoSpaceError`, :class:`ReadOnlyError`, ...).
    """
    path = os.fspath(directory)
    with _mapped(path), contextlib.ExitStack() as stack:
        Path(path).mkdir(parents=True, exist_ok=True)
        top = stack.enter_context(_opened(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
        _begin(top, path)
        parent = stack.enter_context(_folder(top, "blobs"))
        root = stack.enter_context(_folder(parent, descriptor.digest.algorithm))
        folders = {descriptor.digest.algorithm: root}
        for blob, chunks in blobs:
            algorithm = blob.digest.algorithm
            if algorithm not in folders:
                folders[algorithm] = stack.enter_context(_folder(parent, algorithm))
            _put(folders[algorithm], blob, chunks)
        if not _held(root, descriptor.digest, descriptor.size):
            raise NotFoundError(f"{descriptor.digest} itself is not among the blobs to export; the index is unchanged")
        if descriptor.media_type in (DOCKER_MANIFEST, DOCKER_LIST):
            descriptor, raw = _as_oci(descriptor, _read(root, descriptor.digest.encoded) or b"")
            _put(root, descriptor, iter([raw]))
        # Names before the index that relies on them: after a power cut the index never names an absent blob.
        for folder in (*folders.values(), parent):
            os.fsync(folder)
        with _locked(top):
            index = _merged(_read(top, "index.json"), descriptor, reference_name)
            _publish(top, "index.json", [_dump(index)])
            os.fsync(top)
        return descriptor


def _begin(top: int, path: str) -> None:
    """Refuse what is neither empty nor a layout; make an empty directory an empty layout."""
    names = [name for name in os.listdir(top) if not name.startswith(_TEMP)]
    if not names:
        _publish(top, "oci-layout", [_dump(_LAYOUT)])
        return
    raw = _read(top, "oci-layout")
    try:
        marker = None if raw is None else json.loads(raw)
    except (ValueError, RecursionError):
        marker = None
    if not isinstance(marker, dict) or marker.get("imageLayoutVersion") != _LAYOUT["imageLayoutVersion"]:
        raise InvalidError("not empty, and not an OCI image layout of version 1.0.0", value=path, hint=_HINT)
    # A broken index is found before gigabytes are written, not after.
    _entries(_read(top, "index.json"))


def _entries(raw: bytes | None) -> dict[str, Any]:
    """Return the index as JSON, an empty one if there is none yet (an export that was killed early)."""
    if raw is None:
        return {"schemaVersion": 2, "mediaType": str(OCI_INDEX), "manifests": []}
    # Parsed for its checks only: what is kept are the entries as they were written, with fields we do not know.
    if not isinstance(parse_document(raw, expected=OCI_INDEX), Index):
        raise InvalidError("index.json of the layout is not an image index", hint=_HINT)
    index: dict[str, Any] = json.loads(raw)
    return index


def _merged(raw: bytes | None, descriptor: Descriptor, name: str | None) -> dict[str, Any]:
    index = _entries(raw)
    entry = descriptor.to_json()
    annotations = {key: value for key, value in descriptor.annotations.items() if key != REF_NAME}
    entry.pop("annotations", None)
    if name:
        annotations[REF_NAME] = name
    if annotations:
        entry["annotations"] = annotations
    index["manifests"] = [old for old in index["manifests"] if not _replaces(entry, old, name)] + [entry]
    return index


def _replaces(entry: dict[str, Any], old: dict[str, Any], name: str | None) -> bool:
    old_name = (old.get("annotations") or {}).get(REF_NAME)
    return bool(old_name == name) if name else old_name is None and bool(old["digest"] == entry["digest"])


def _as_oci(descriptor: Descriptor, raw: bytes) -> tuple[Descriptor, bytes]:
    """Return a Docker schema 2 document in OCI's media types. Their JSON is the same otherwise, as is the config's."""
    verifier = Verifier(descriptor.digest, descriptor.size)  # it may have been in the directory before
    verifier.feed(raw)
    verifier.finish()
    parse_document(raw, expected=descriptor.media_type)
    document = json.loads(raw)
    # The manifests a list names stay as they are: tools take those from the list whatever their type.
    for part in (document, document.get("config") or {}, *(document.get("layers") or ())):
        part["mediaType"] = _OCI_TYPES.get(part.get("mediaType"), part.get("mediaType"))
    media_type = OCI_INDEX if descriptor.media_type == DOCKER_LIST else OCI_MANIFEST
    document["mediaType"] = str(media_type)
    converted = _dump(document)
    digest = Digest.of(converted, algorithm=descriptor.digest.algorithm)
    return replace(descriptor, media_type=media_type, digest=digest, size=len(converted), data=None), converted


def _put(folder: int, blob: Descriptor, chunks: Iterator[Buffer]) -> None:
    try:
        if not _held(folder, blob.digest, blob.size):
            _publish(folder, blob.digest.encoded, _checked(blob, chunks))
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            close()


def _checked(blob: Descriptor, chunks: Iterator[Buffer]) -> Iterator[Buffer]:
    verifier = Verifier(blob.digest, blob.size)
    for chunk in chunks:
        verifier.feed(chunk)
        yield chunk
    verifier.finish()


def _held(folder: int, digest: Digest, size: int) -> bool:
    """Say whether the blob is there at its full size. Anything but a plain file under its name is refused."""
    try:
        found = os.stat(digest.encoded, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise InvalidError(
            "not a plain file in the layout", value=f"blobs/{digest.algorithm}/{digest.encoded}", hint=_HINT
        )
    return found.st_size == size


def _publish(folder: int, name: str, chunks: Iterable[Buffer]) -> None:
    """Write under a name of its own, sync, then take the final name. On failure nothing of it remains."""
    temp = f"{_TEMP}{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _opened(os.open(temp, flags, 0o666, dir_fd=folder)) as handle:
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[os.write(handle, view) :]
            os.fsync(handle)
            os.replace(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=folder)
            raise


def _read(top: int, name: str) -> bytes | None:
    """Return a small plain file of the layout, or None if absent. A fifo or device does not make us wait."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=top)
    except FileNotFoundError:
        return None
    with _opened(handle):
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InvalidError("not a plain file in the layout", value=name, hint=_HINT)
        raw = b""
        while piece := os.read(handle, _INDEX_LIMIT + 1 - len(raw)):
            raw += piece
        if len(raw) > _INDEX_LIMIT:
            raise InvalidError("larger than 4 MiB in the layout", value=name, hint=_HINT)
        return raw


@contextlib.contextmanager
def _folder(parent: int, name: str) -> Iterator[int]:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with _opened(os.open(name, flags, dir_fd=parent)) as folder:
        yield folder


@contextlib.contextmanager
def _opened(handle: int) -> Iterator[int]:
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(top: int) -> Iterator[None]:
    """Hold the layout while its index is read and replaced, so that two exports do not lose each other's entry."""
    end = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(top, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                raise InUseError("another process keeps the layout's index locked", hint="try again later") from None
            time.sleep(0.01)
        except OSError:
            # A filesystem without locks on directories (NFS): as good as it gets there, and a lone export is right.
            break
    yield  # the lock goes with the descriptor


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[None]:
    """Turn what the operating system says into this library's errors."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST):
            raise InvalidError(
                f"not a directory, or a symlink inside a layout ({reason})", value=path, hint=_HINT
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"no room to export to {path!r}", hint="free some space there and export again"
            ) from error
        if error.errno == errno.EROFS:
            raise ReadOnlyError(f"cannot export to {path!r}, a read-only filesystem", hint=_HINT) from error
        raise StoreError(f"cannot export to {path!r} ({reason})", hint="check its owner and mode") from error


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
