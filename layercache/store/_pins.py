"""Pins: durable, named holds of an image's blobs against eviction. A purge takes them with their generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layercache.errors import FormatError, InvalidError, LayerCacheError, NotFoundError
from layercache.oci import Digest, Reference
from layercache.store._disk import Dir
from layercache.store._files import read_record, temporary
from layercache.store._layout import PINS, pack_record, unpack_record
from layercache.store._space import RECORD

if TYPE_CHECKING:
    from layercache.store._generation import Generation
    from layercache.store._read import Blob

__all__ = ["Pin", "check_pin_name", "has_pins", "pin", "pinned", "pins", "unpin"]

_MAGIC = b"LCpin_1\n"
_LONGEST = 255


@dataclass(frozen=True, slots=True)
class Pin:
    """A hold called ``name``: the image that ``reference`` meant at ``created`` (seconds since the epoch)."""

    name: str
    reference: Reference
    digest: Digest
    blobs: tuple[Digest, ...]
    created: float

    def pack(self) -> bytes:
        """Return the record as stored."""
        fields = {
            "name": self.name,
            "reference": str(self.reference),
            "digest": str(self.digest),
            "blobs": [str(blob) for blob in self.blobs],
            "created": self.created,
        }
        return pack_record(_MAGIC, fields)

    @staticmethod
    def unpack(raw: bytes) -> Pin:
        """Undo :meth:`pack`.

        :raises FormatError: when the record is not whole or not sensible.
        """
        fields = unpack_record(_MAGIC, raw)
        try:
            return Pin(
                str(fields["name"]),
                Reference.parse(fields["reference"]),
                Digest.parse(fields["digest"]),
                tuple(map(Digest.parse, fields["blobs"])),
                float(fields["created"]),
            )
        except (LayerCacheError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError("a pin is damaged") from error


def check_pin_name(name: str) -> str:
    """Return the name of a pin: 1 to 255 bytes of text.

    :raises InvalidError: for anything else.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _LONGEST:
        raise InvalidError("a pin's name is text of 1 to 255 bytes")
    return name


def pin(generation: Generation, new: Pin, *, hold: Callable[[Digest], Blob]) -> None:
    """Keep the blobs of an image, durably, in place of what a pin of that name kept before.

    :param hold: opens a blob of it, wherever it is.
    :raises NotFoundError: when a blob is not here; nothing changed.
    """
    disk = generation.disk
    with ExitStack() as held, generation.guarding("record a pin"):
        generation.check_slot()
        # Leased until the pin is there: who evicts looks at the pins once it has a blob to itself.
        for digest in new.blobs:
            held.enter_context(hold(digest))
        with generation.space.taking(lambda: RECORD, "record a pin"):
            pass
        if disk.stat(generation.folder, PINS) is None:
            with suppress(FileExistsError):
                disk.make_dir(generation.folder, PINS)
        disk.sync(generation.folder)
        name = generation.form.pin_name(new.name)
        at = disk.dir(generation.folder, PINS)
        try:
            raw = generation.form.pack(PINS, name, new.pack())
            with temporary(disk, generation.incoming, raw) as record, generation.lock(name):
                generation.check_slot()
                disk.rename(generation.incoming, record, at, name, replace=True)
            disk.sync(at)
        finally:
            disk.close(at)
    generation.check()


def unpin(generation: Generation, name: str) -> None:
    """Let go of what a pin keeps.

    :raises NotFoundError: when there is none of that name.
    """
    disk, file = generation.disk, generation.form.pin_name(name)
    with generation.guarding("remove a pin"), generation.lock(file):
        generation.check_slot()
        at = _folder(generation)
        try:
            if at is None or disk.stat(at, file) is None:
                raise NotFoundError("no pin of that name", hint="pins shows those there are")
            disk.remove(at, file)
            disk.sync(at)
        finally:
            if at is not None:
                disk.close(at)


def pins(generation: Generation) -> Iterator[Pin]:
    """Yield the pins, by name on disk; a damaged one is passed over."""
    for found in _each(generation):
        if found is not None:
            yield found
    generation.check()


def pinned(generation: Generation) -> frozenset[str] | None:
    """Return the file names of the blobs that are pinned; ``None`` where that cannot be told: then all may be."""
    names: set[str] = set()
    for found in _each(generation):
        if found is None:
            return None
        names.update(map(generation.form.blob_name, found.blobs))
    return frozenset(names)


def has_pins(generation: Generation) -> bool:
    """Tell whether a pin was ever made in a generation."""
    with generation.guarding("look for pins"):
        return generation.disk.stat(generation.folder, PINS) is not None


def _each(generation: Generation) -> Iterator[Pin | None]:
    disk = generation.disk
    with generation.guarding("list pins"):
        at = _folder(generation)
        if at is None:
            return
        try:
            for name in sorted(disk.names(at)):
                raw = read_record(disk, at, name)
                if raw is None:
                    continue  # unpinned just now
                try:
                    yield None if generation.form.keyless else Pin.unpack(generation.form.unpack(PINS, name, raw))
                except FormatError:
                    yield None
        finally:
            disk.close(at)


def _folder(generation: Generation) -> Dir | None:
    try:
        return generation.disk.dir(generation.folder, PINS)
    except FileNotFoundError:
        return None
