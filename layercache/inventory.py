"""What a tenant can read, seen as blobs and images, without the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from layercache.errors import IntegrityError, InUseError, NotFoundError
from layercache.oci import Descriptor, Digest, Index, Manifest, descend, parse_document
from layercache.reports import BlobInfo, Finding, ImageInfo, PinInfo
from layercache.store import Blob, Pin, Ref
from layercache.view import View

__all__ = [
    "blob_info",
    "findings",
    "image_info",
    "only_needed_by",
    "pin_info",
    "stored_descriptor",
    "stored_document",
    "unique",
]


def blob_info(view: View, blob: Blob) -> BlobInfo:
    """Return what is known of an open blob."""
    meta = blob.meta
    return BlobInfo(
        digest=meta.digest,
        size=meta.size,
        media_type=meta.media_type,
        diff_id=meta.diff_id,
        origin=meta.origin,
        created=meta.created,
        verified=view.verified(blob),
        public=blob.lent,
    )


def image_info(view: View, ref: Ref) -> ImageInfo:
    """Return what is known of an image. Where its manifest is not here, its layers are not known either."""
    parts = [ref.descriptor]

    def load(descriptor: Descriptor) -> Manifest | Index:
        parts.append(descriptor)
        return stored_document(view, descriptor)

    try:
        _, manifest = descend(ref.descriptor, ref.platform, load)
        parts += [manifest.config, *manifest.layers]
    except (NotFoundError, InUseError):
        pass
    known = unique(tuple(parts))
    digests = tuple(part.digest for part in known)
    if ref.manifest not in digests:
        digests += (ref.manifest,)
    return ImageInfo(
        reference=ref.reference,
        digest=ref.descriptor.digest,
        manifest=ref.manifest,
        platform=ref.platform,
        size=sum(part.size for part in known),
        resolved=ref.resolved,
        blobs=digests,
        missing=tuple(digest for digest in digests if not view.has(digest)),
    )


def pin_info(view: View, pin: Pin) -> PinInfo:
    """Return what is known of a pin."""
    missing = tuple(digest for digest in pin.blobs if not view.has(digest))
    return PinInfo(pin.name, pin.reference, pin.digest, pin.blobs, missing, pin.created)


def findings(
    view: View, digest: Digest | None = None, *, mend: Callable[[Blob], bool] | None = None
) -> Iterator[Finding]:
    """Read one blob, or every one, again and yield what is wrong. A damaged one is moved aside, or mended.

    :param mend: given a blob that was moved aside, puts it right and tells whether it did.
    :raises NotFoundError: when the one asked for is not here.
    """
    for one in view.digests() if digest is None else (digest,):
        known = view.has(one)
        try:
            with view.open(one) as blob:
                try:
                    blob.verify()
                    view.mark_verified(blob)
                except IntegrityError as error:
                    yield _finding("content", one, error.what, mended=mend is not None and mend(blob))
        except NotFoundError:
            if known:
                yield _finding("record", one, "what is known of it is missing or damaged", mended=False)
            elif digest is not None:
                raise


def _finding(kind: str, digest: Digest, what: str, *, mended: bool) -> Finding:
    then = "it was mended" if mended else "it will be fetched again"
    return Finding(kind, digest, f"{what}; {then}", repaired=mended)


def only_needed_by(view: View, ref: Ref) -> tuple[Digest, ...]:
    """Return the blobs of an image that no other reference's image has."""
    others = (image_info(view, other) for other in view.own.refs() if other.reference != ref.reference)
    needed = {digest for other in others for digest in other.blobs}
    return tuple(digest for digest in image_info(view, ref).blobs if digest not in needed)


def stored_descriptor(view: View, digest: Digest) -> Descriptor:
    """Return the descriptor under which a blob was stored.

    :raises NotFoundError: when it is not here.
    """
    with view.open(digest) as blob:
        return Descriptor(blob.meta.media_type, digest, blob.size)


def stored_document(view: View, descriptor: Descriptor) -> Manifest | Index:
    """Return a manifest or index that is here.

    :raises NotFoundError: when it is not here.
    """
    with view.open(descriptor.digest) as blob:
        return parse_document(blob.pread(0, blob.size), expected=descriptor.media_type)


def unique(descriptors: tuple[Descriptor, ...]) -> tuple[Descriptor, ...]:
    """Return the descriptors in order, each digest once."""
    return tuple({descriptor.digest: descriptor for descriptor in descriptors}.values())
