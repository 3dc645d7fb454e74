"""From an index to the manifest for one platform (image-spec image-index.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from layercache.errors import InvalidManifestError, LimitError, NotFoundError
from layercache.oci._descriptor import Descriptor
from layercache.oci._digest import Digest
from layercache.oci._manifest import MAX_DESCRIPTORS, Index, Manifest
from layercache.oci._platform import Platform

__all__ = ["MAX_INDEXES", "descend", "select"]

MAX_INDEXES = 3
"""Indexes on the way to a manifest, the first one counted."""

_MAX_LOADS = 64
_SHOWN = 20


def select(index: Index, platform: Platform, *, allow_unspecified: bool = True) -> Descriptor:
    """Entry of ``index`` for ``platform``: the first of those with the best variant.

    Entries of unknown media types and attestations are passed over. An entry that names no platform is taken only when
    no other fits, and only if ``allow_unspecified``; whether its image fits is then for its config to say.

    :raises NotFoundError: if none fits; the message lists the platforms that are there.
    """
    for descriptor in _choices(index, platform, allow_unspecified=allow_unspecified):
        return descriptor
    raise _absent([index], platform)


def descend(
    root: Descriptor,
    platform: Platform,
    load: Callable[[Descriptor], Manifest | Index],
    *,
    allow_unspecified: bool = True,
) -> tuple[Descriptor, Manifest]:
    """Descriptor and manifest for ``platform``, found from ``root`` through nested indexes.

    ``load`` gives the verified document of a descriptor; it is called for those on the way only, each at most once.
    Indexes are tried in the order of :func:`select`, the next one when one has nothing for the platform.

    :raises NotFoundError: if none fits.
    :raises InvalidManifestError: if an index leads back to itself.
    :raises LimitError: over three levels of indexes, 64 documents or 10,000 descriptors.
    """
    search = _Search(platform, load, allow_unspecified=allow_unspecified)
    found = search.walk(root, ())
    if found is None:
        raise _absent(search.seen, platform)
    return found


class _Search:
    # A class: a function that calls itself is a cycle, and would keep what loads until it is collected.
    def __init__(
        self, platform: Platform, load: Callable[[Descriptor], Manifest | Index], *, allow_unspecified: bool
    ) -> None:
        self._platform, self._load, self._allow_unspecified = platform, load, allow_unspecified
        self.seen: list[Index] = []
        self._done: set[Digest] = set()

    def walk(self, descriptor: Descriptor, above: tuple[Digest, ...]) -> tuple[Descriptor, Manifest] | None:
        if descriptor.digest in above:
            raise InvalidManifestError("an index leads back to itself", value=str(descriptor.digest))
        if descriptor.digest in self._done:
            return None
        if len(above) == MAX_INDEXES and descriptor.media_type.is_index:
            raise LimitError(f"more than {MAX_INDEXES} indexes inside each other")
        if len(self.seen) == _MAX_LOADS:
            raise LimitError(f"more than {_MAX_LOADS} nested indexes without an image for {self._platform}")
        document = self._load(descriptor)
        if isinstance(document, Manifest):
            return descriptor, document
        if len(above) == MAX_INDEXES:
            raise LimitError(f"more than {MAX_INDEXES} indexes inside each other")
        self.seen.append(document)
        if sum(len(index.manifests) for index in self.seen) > MAX_DESCRIPTORS:
            raise LimitError(f"more than {MAX_DESCRIPTORS} descriptors in nested indexes")
        for entry in _choices(document, self._platform, allow_unspecified=self._allow_unspecified):
            found = self.walk(entry, (*above, descriptor.digest))
            if found is not None:
                return found
        self._done.add(descriptor.digest)
        return None


def _choices(index: Index, platform: Platform, *, allow_unspecified: bool) -> Iterator[Descriptor]:
    ranked: list[tuple[int, Descriptor]] = []
    unspecified: list[Descriptor] = []
    for entry in _images(index):
        if _unspecified(entry):
            unspecified.append(entry)
        elif entry.platform is not None and (rank := platform.rank(entry.platform)) is not None:
            ranked.append((rank, entry))
    ranked.sort(key=lambda pair: pair[0])  # stable: the first of equals stays first
    yield from (entry for _, entry in ranked)
    # A nested index seldom names a platform: its own entries do.
    yield from (entry for entry in unspecified if allow_unspecified or entry.media_type.is_index)


def _images(index: Index) -> Iterator[Descriptor]:
    for entry in index.manifests:
        known = entry.media_type.is_manifest or entry.media_type.is_index
        if known and "vnd.docker.reference.type" not in entry.annotations and not _unknown(entry.platform):
            yield entry


def _unknown(platform: Platform | None) -> bool:
    return platform is not None and platform.os == platform.architecture == "unknown"


def _unspecified(entry: Descriptor) -> bool:
    return entry.platform is None or not (entry.platform.os or entry.platform.architecture)


def _absent(indexes: list[Index], platform: Platform) -> NotFoundError:
    held = {str(entry.platform): None for index in indexes for entry in _images(index) if not _unspecified(entry)}
    names = [*held]
    there = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return NotFoundError(f"no image for {platform} in the index", hint=f"it has {there or 'no image for any platform'}")
