"""What of an unfinished write is whole already: its chunks, as far as their sums vouch for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from layercache.errors import FormatError
from layercache.integrity import CHUNK, SUM_SIZE, chunk_index, chunk_range
from layercache.oci import Descriptor
from layercache.store._disk import Disk, File
from layercache.store._form import Buffer, Reader

if TYPE_CHECKING:
    from layercache.store._generation import Generation

__all__ = ["Arriving", "arrived", "whole_chunks"]


def arrived(generation: Generation, descriptor: Descriptor) -> int:
    """Return the bytes that whoever writes this blob now has written so far."""
    disk, form = generation.disk, generation.form
    partial = form.partial(descriptor.digest, descriptor.size, disk.boot)
    with generation.guarding(f"look for {descriptor.digest}"):
        status = disk.stat(generation.incoming, partial.data)
    return 0 if status is None else max(0, status.size - form.head)


def whole_chunks(
    disk: Disk, file: File, reader: Reader, sums: Buffer, *, head: int, size: int, start: int = 0
) -> Iterator[tuple[memoryview, bytes]]:
    """Yield the chunks from offset ``start`` on that are in the file and match ``sums``, with their sums, in order.

    Ends at the first that does not. A chunk is valid until the next one is asked for.
    """
    stored, content = memoryview(bytearray(CHUNK + SUM_SIZE)), memoryview(bytearray(CHUNK))
    for index in range(chunk_index(start), len(sums) // SUM_SIZE):
        begin, end = chunk_range(index, size)
        view = content[: max(0, end - begin)]
        raw = stored if reader.apart else view
        if not view or disk.read(file, raw[: len(view)], head + begin) < len(view):
            return
        if reader.unpack(raw, view, begin, sums) is not None:
            return
        yield view, bytes(sums[index * SUM_SIZE : (index + 1) * SUM_SIZE])


class Arriving:
    """A blob that somebody else is writing, open to be read behind him. Its digest is not proven yet.

    It is neither leased nor locked: he may publish it, drop it, or begin anew, and what is read stays what it was.
    """

    def __init__(self, generation: Generation, descriptor: Descriptor, file: File, sums: File) -> None:
        self._generation = generation
        self._disk = generation.disk
        self._name, self._size = generation.form.blob_name(descriptor.digest), descriptor.size
        self._file, self._sums = file, sums

    @staticmethod
    def of(generation: Generation, descriptor: Descriptor) -> Arriving | None:
        """Return the write that is going on; ``None`` where there is none, or it is too small to keep sums."""
        disk = generation.disk
        partial = generation.form.partial(descriptor.digest, descriptor.size, disk.boot)
        with generation.guarding(f"look at {descriptor.digest} on its way"):
            try:
                file = disk.open(generation.incoming, partial.data)
            except FileNotFoundError:
                return None
            try:
                sums = disk.open(generation.incoming, partial.sums)
            except OSError as error:
                disk.close(file)
                if isinstance(error, FileNotFoundError):
                    return None
                raise
        return Arriving(generation, descriptor, file, sums)

    def chunks(self, start: int) -> Iterator[memoryview]:
        """Yield what is whole from ``start`` on, where a chunk begins. A piece is valid until the next one.

        :raises NamespacePurgedError: once the namespace was purged.
        """
        disk, form = self._disk, self._generation.form
        with self._generation.guarding("read a blob on its way"):
            head = bytearray(form.head)
            del head[disk.read(self._file, head, 0) :]
            sums = bytearray(disk.fstat(self._sums).size // SUM_SIZE * SUM_SIZE)
            del sums[disk.read(self._sums, sums, 0) :]
            try:
                reader = form.reader(self._name, self._size, bytes(head))
            except FormatError:
                return  # it has not begun
            try:
                for view, _ in whole_chunks(
                    disk, self._file, reader, sums, head=form.head, size=self._size, start=start
                ):
                    self._generation.check()
                    yield view
            finally:
                reader.close()

    def close(self) -> None:
        """Let it go."""
        self._disk.close(self._file)
        self._disk.close(self._sums)
