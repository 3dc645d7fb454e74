"""An image as a caller holds it: its layers, leased while it is open, and their two views."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from typing import Self

from layercache import codec, stream
from layercache.errors import IntegrityError, NotFoundError, UnsupportedError
from layercache.integrity import Buffer
from layercache.oci import Compression, Config, Descriptor, DiffID, Digest, Manifest, MediaType, Platform, Reference
from layercache.reports import PullReport
from layercache.store import Blob

__all__ = ["Image", "Layer"]

_SENT_AT_ONCE = 8 << 20  # bytes between two looks at whether the namespace lives


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

    def pread(self, offset: int, length: int) -> bytes:
        """Bytes of :meth:`compressed` from ``offset`` on, ``length`` of them, fewer at the end. For several threads.

        Reads and verifies every chunk that is touched (1 MiB, the first 64 KiB apart); blocks on the disk.

        :raises IntegrityError: where one of them is damaged.
        :raises NamespacePurgedError: once the namespace was purged.
        :raises UnsupportedError: in a bypass, which can only be verified at its end.
        """
        return self._stored().pread(offset, length)

    def fileno(self) -> int:
        """Descriptor of the file that holds the bytes of :meth:`compressed`, read-only, for zero-copy and mapping.

        Nothing verifies what is read through it: it was right when it was stored, and what the disk made of it since is
        not looked at. After a purge the bytes are still there for who has the descriptor, or a copy or mapping of it,
        and the receipt names the process as pending until they are gone. It is the layer's own: do not close it, nor
        use it after :meth:`close`; the lease is a lock on it.

        :raises UnsupportedError: in a sealed namespace, where no file holds these bytes, and in a bypass.
        :raises NamespacePurgedError: once the namespace was purged.
        """
        return self._stored().descriptor()

    def sendfile_to(self, fd: int, *, offset: int = 0, length: int | None = None) -> int:
        """Copy bytes of :meth:`compressed` to ``fd`` within the kernel, and return how many: fewer only at the end.

        As unverified as :meth:`fileno`, but that it ends at a purge within 8 MiB. ``fd`` is a socket, pipe or file;
        this blocks as long as it takes none, also where it is set not to block.

        :raises OSError: what the kernel says of ``fd`` (a peer that is gone).
        :raises IntegrityError: where the file is shorter than the blob; what there was was sent.
        :raises UnsupportedError: as from :meth:`fileno`.
        :raises NamespacePurgedError: once the namespace was purged.
        """
        if offset < 0 or (length is not None and length < 0):
            raise ValueError("offset and length must not be negative")
        blob = self._stored()
        at, end = offset, self.size if length is None else min(self.size, offset + length)
        while at < end:
            try:
                count = os.sendfile(fd, blob.descriptor(), at, min(end - at, _SENT_AT_ONCE))
            except BlockingIOError:
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()
                continue
            if not count:
                raise IntegrityError("the file is too short", digest=self.digest, expected=self.size, actual=at)
            at += count
        blob.descriptor()
        return max(0, end - offset)

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

    def _stored(self) -> Blob:
        if self._blob is None:
            raise UnsupportedError(
                f"{self.digest} is not held, so that it is verified only at its end", hint="read it with compressed()"
            )
        return self._blob

    def _chunks(self) -> Iterator[Buffer]:
        if self._blob is not None:
            return self._blob.chunks()
        return self._fetched()

    def _fetched(self) -> Iterator[Buffer]:
        if self._fetch is None:
            raise NotFoundError(f"{self.digest} is not held and has no source")
        yield from stream.verified(self._fetch(), self.descriptor)

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
