"""An image as a caller holds it: its layers, leased while it is open, and their two views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

from layercache import codec, stream
from layercache.errors import NotFoundError
from layercache.integrity import Buffer
from layercache.oci import Compression, Config, Descriptor, DiffID, Digest, Manifest, MediaType, Platform, Reference
from layercache.reports import PullReport
from layercache.store import Blob

__all__ = ["Image", "Layer"]


class Layer:
    """One blob, open for reading: a layer of an image, or any blob by its digest.

    Held by the store it is leased until :meth:`close`, and every chunk is verified before a byte of it is given out.
    Where the store could not take it (:attr:`bypass`), each stream comes from the registry and is verified at its end:
    the last piece is held back until the digest is right.

    Close it, or use it in a ``with`` statement; its streams end with it.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        diff_id: DiffID | None,
        *,
        blob: Blob | None,
        fetch: Callable[[], Iterator[bytes]] | None = None,
    ) -> None:
        self.descriptor = descriptor
        self.diff_id = diff_id
        self._blob = blob
        self._fetch = fetch

    @property
    def digest(self) -> Digest:
        """Digest of the bytes as the registry has them."""
        return self.descriptor.digest

    @property
    def size(self) -> int:
        """Bytes of :meth:`compressed`."""
        return self.descriptor.size

    @property
    def media_type(self) -> MediaType:
        """What the manifest says it is."""
        return self.descriptor.media_type

    @property
    def bypass(self) -> bool:
        """True where the store does not hold it."""
        return self._blob is None

    def compressed(self) -> stream.ByteStream:
        """Return a stream of the bytes as the registry has them. Blocks on the disk, or on the network in a bypass.

        :raises IntegrityError: from a read, on the chunk that is damaged; none of it is given out.
        :raises NamespacePurgedError: from a read, once the namespace was purged.
        """
        return stream.ByteStream(self._chunks())

    def uncompressed(self) -> stream.ByteStream:
        """Return a stream of the tar inside, decompressed as it is read.

        The last read compares all of it with the DiffID that the image's config gives, where there is one, before it
        reports the end.

        :raises IntegrityError: from a read, as in :meth:`compressed`, and on a wrong DiffID.
        :raises CorruptStreamError: from a read, when the compressed data is damaged, cut, or has something behind it.
        :raises LimitError: from a read, when it expands beyond all reason.
        """
        return stream.ByteStream(self._uncompressed())

    def close(self) -> None:
        """Give up the lease. Closing twice is nothing."""
        if self._blob is not None:
            self._blob.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Layer {self.digest} {self.size} bytes>"

    def _chunks(self) -> Iterator[Buffer]:
        if self._blob is not None:
            yield from self._blob.chunks()
        elif self._fetch is not None:
            yield from stream.verified(self._fetch(), self.descriptor)
        else:
            raise NotFoundError(f"{self.digest} is not held and has no source")

    def _uncompressed(self) -> Iterator[Buffer]:
        chunks = self._chunks()
        compression: Compression | None = self.media_type.compression
        if compression is None:
            # The type does not say: an artifact, or a blob that was put without one.
            head = next(chunks, b"")
            compression = codec.sniff(bytes(head[:16]))
            chunks = _chain(head, chunks)
        yield from stream.uncompressed(chunks, compression, self.diff_id, digest=self.digest)


def _chain(head: Buffer, rest: Iterator[Buffer]) -> Iterator[Buffer]:
    yield head
    yield from rest


class Image:
    """What a pull gives: the manifest for one platform and its layers, in order, leased while this is open.

    ``config`` is ``None`` for artifacts, whose config is not an image's. A layer that the manifest names twice is in
    ``layers`` twice.
    """

    def __init__(
        self,
        *,
        reference: Reference,
        digest: Digest,
        platform: Platform,
        manifest: Manifest,
        config: Config | None,
        layers: tuple[Layer, ...],
        held: tuple[Blob, ...],
        report: PullReport,
    ) -> None:
        self.reference = reference
        self.digest = digest
        self.platform = platform
        self.manifest = manifest
        self.config = config
        self.layers = layers
        self.report = report
        self._held = held

    def close(self) -> None:
        """Give up the leases of all its blobs. Closing twice is nothing."""
        for blob in self._held:
            blob.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Image {self.reference} {self.digest} {len(self.layers)} layers>"
