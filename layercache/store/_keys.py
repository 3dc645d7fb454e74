"""Where the keys of sealed generations are, one a generation.

An ephemeral one is in a file on a tmpfs, bound to its root and its boot; one of a key service in the generation,
wrapped.

Whoever has loaded one has the generation's file ``key`` open, locked shared: so a purge, which unlinks that file last
and only when nobody has it open, knows by the kernel's word that nobody has the key. A reboot takes the file on the
tmpfs, and with it all that was sealed under it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from layercache.control import Control
from layercache.errors import FormatError, SealError
from layercache.store import _secret
from layercache.store._disk import Dir, Disk, File
from layercache.store._files import fresh, read_record
from layercache.store._kms import KmsKey
from layercache.store._layout import KEY
from layercache.store._memory import open_memory, refuse_swap, swapped_out, usual_place
from layercache.store._seal import Seal, SealedForm
from layercache.store._secret import Key

__all__ = ["KeyRecord", "Keys", "need_extra"]

_MAGIC = b"LCkey_1\n"
_ID = re.compile(r"[0-9a-f]{64}")
_SIZE = 32


def need_extra() -> None:
    """Refuse where what encrypts is not installed.

    :raises SealError: then.
    """
    if find_spec("cryptography") is None:
        raise SealError("sealing needs the cryptography package", hint="pip install 'layercache[seal]'")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """The file ``key`` of a sealed generation: what leads to its key. Nothing of the key is in it in clear.

    Of an ephemeral one: of which boot it is, kept where, and how many pages the machine had written to swap when it was
    made (-1: not known). Of one of a key service: the key, ``wrapped``.
    """

    seal: Seal
    id: str
    boot: str = ""
    place: str = ""
    swapped: int = -1
    wrapped: bytes = b""

    def pack(self) -> bytes:
        """Return it as stored."""
        fields: dict[str, str | int] = {"seal": self.seal, "id": self.id}
        if self.seal == "kms":
            fields |= {"wrapped": base64.b64encode(self.wrapped).decode()}
        else:
            fields |= {"boot": self.boot, "place": self.place, "swapped": self.swapped}
        return json.dumps(fields).encode() + b"\n"

    @staticmethod
    def read(disk: Disk, folder: Dir) -> KeyRecord | None:
        """Return that of an open generation's directory; ``None`` where it is not sealed.

        :raises FormatError: where it is damaged.
        """
        if disk.stat(folder, KEY) is None:
            return None
        try:
            fields = json.loads(read_record(disk, folder, KEY) or b"")
            seal, name = fields["seal"], fields["id"]
            if seal not in ("ephemeral", "kms") or not _ID.fullmatch(name):
                raise FormatError("the key record of a namespace is of another kind", hint="use a newer version")
            if seal == "kms":
                return KeyRecord("kms", name, wrapped=base64.b64decode(fields["wrapped"], validate=True))
            swapped = int(fields.get("swapped", -1))
            return KeyRecord("ephemeral", name, str(fields["boot"]), str(fields["place"]), swapped)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError("the key record of a namespace is damaged", hint="purge the namespace") from error


class Keys:
    """The keys of one root's generations. ``memory`` opens a directory for them; in a simulation, a simulated one."""

    def __init__(
        self,
        disk: Disk,
        root_key: bytes,
        *,
        kms: KmsKey | None = None,
        memory: Callable[[str, bool], Disk | None] | None = None,
    ) -> None:
        self._disk = disk
        self._kms = kms or KmsKey()
        self._root = hashlib.sha256(b"layercache root\0" + root_key).digest()
        self._memory = memory or (lambda place, create: open_memory(place, create=create))
        self._real = memory is None

    def make(self, generation: str, seal: Seal, control: Control | None = None) -> tuple[KeyRecord, SealedForm]:
        """Return a new key for a generation. With ``kms`` this asks the service: hold no lock of the store.

        :raises SealError: where it cannot be kept safely, or the key service gives none.
        """
        need_extra()
        if self._real:
            refuse_swap()
        if seal == "kms":
            secret, wrapped = self._kms.generate(self._context(generation), control)
            record = KeyRecord("kms", fresh(self._disk).hex(), wrapped=wrapped)
            return record, self._form(record, secret, generation, lambda: None)
        place, swapped = usual_place(), self._swapped()
        memory = self._memory(place, True)
        if memory is None:
            raise SealError("there is no directory for keys")
        try:
            name, file = self._new_file(memory)
            try:
                secret = bytearray(fresh(self._disk))
                memory.write(file, self._head(generation) + secret, 0)
            except BaseException:
                memory.close(file)
                raise
        finally:
            memory.close(memory.root)
        record = KeyRecord("ephemeral", name, self._disk.boot, place, swapped)
        return record, self._form(record, secret, generation, lambda: memory.close(file))

    def load(
        self, folder: Dir, record: KeyRecord, generation: str, control: Control | None = None
    ) -> SealedForm | None:
        """Return the form under the key of a generation, whose directory is open; ``None`` where the key is gone.

        :raises SealError: where it may be there and cannot be had now.
        """
        need_extra()
        if self.lost(record):
            return None
        if self._real:
            refuse_swap()
        given: bytearray | None = None
        if record.seal == "kms":
            # Before its record is held: a purge must not wait for the service. One that overtakes this erases no key.
            # What this process has already is not asked for again.
            given = _secret.copy(record.id) or self._kms.unwrap(record.wrapped, self._context(generation), control)
        try:
            # Before a key in memory is looked at: from here on no purge takes it for one that nobody has.
            holding = self._disk.open(folder, KEY)
        except (FileNotFoundError, BlockingIOError):
            return None  # a purge is at it, or was
        secret: bytearray | None = None
        try:
            if self._disk.lock(holding, exclusive=False):
                secret = given or self._kept(record, generation)
        finally:
            if secret is None:
                self._disk.close(holding)
        if secret is None:
            return None
        return self._form(record, secret, generation, lambda: self._disk.close(holding))

    def keyless(self, record: KeyRecord, generation: str) -> SealedForm:
        """Return the form of a sealed generation for whoever needs no key."""
        return SealedForm(record.seal, None, generation, fresh=lambda: fresh(self._disk))

    def _form(self, record: KeyRecord, secret: bytearray, generation: str, release: Callable[[], None]) -> SealedForm:
        key = Key(record.id, secret, release=release)
        return SealedForm(record.seal, key, generation, fresh=lambda: fresh(self._disk))

    def lost(self, record: KeyRecord) -> bool:
        """Tell whether the key is gone for good, so that nothing under it can ever be read."""
        if record.seal == "kms":
            return False  # what the service does not give now it may give later
        if record.boot != self._disk.boot:
            return True
        memory = self._memory(record.place, False)
        if memory is None:
            return True
        try:
            return memory.stat(memory.root, record.id) is None
        finally:
            memory.close(memory.root)

    def forget(self, record: KeyRecord, generation: str) -> Callable[[], None] | None:
        """Wipe a key in this process and in its file: nobody can load it any more. Once more is nothing.

        Returns ``None`` where it cannot be said that this was the last copy but for those in processes that have the
        generation's ``key`` open: it was on the disk, wrapped; its file is of another boot or not to be seen from here;
        or memory went to a disk since it was made. Else, what removes the wiped file, to be called when a receipt has
        said so: until then the file lets another process say it.

        :raises SealError: (or ``OSError``) where the file is there and cannot be reached.
        """
        _secret.forget(record.id)
        if record.seal == "kms" or record.boot != self._disk.boot:
            return None
        memory = self._memory(record.place, False)
        if memory is None:
            return None  # it may be where only others look
        head = self._head(generation)
        try:
            if memory.stat(memory.root, record.id) is None:
                return None  # who knows by whom; another container may see another tmpfs under this name
            file = memory.create(memory.root, record.id, exist_ok=True)
            try:
                raw = bytearray(len(head))
                if memory.read(file, raw, 0) < len(raw) or raw != head:
                    return None
                memory.write(file, bytes(_SIZE), len(head))
                memory.truncate(file, len(head))
            finally:
                memory.close(file)
        finally:
            memory.close(memory.root)
        return (lambda: self._remove(record)) if self._kept_off_disks(record) else None

    def sweep(self, records: Callable[[], Iterable[KeyRecord]]) -> int:
        """Remove the key files of this root that no generation's record names; return how many.

        ``records`` reads those that there are now.
        """
        known = list(records())
        removed = 0
        for place in sorted({usual_place(), *(record.place for record in known if record.boot == self._disk.boot)}):
            try:
                memory = self._memory(place, False)
            except SealError:
                continue
            if memory is None:
                continue
            try:
                for name in sorted(set(memory.names(memory.root)) - {record.id for record in known}):
                    with suppress(OSError):
                        removed += self._sweep(memory, name, records)
            finally:
                memory.close(memory.root)
        return removed

    def _sweep(self, memory: Disk, name: str, records: Callable[[], Iterable[KeyRecord]]) -> bool:
        if not _ID.fullmatch(name):
            return False
        file = memory.open(memory.root, name)
        try:
            start = _MAGIC + self._root
            raw = bytearray(len(start))
            del raw[memory.read(file, raw, 0) :]
            # An empty one is nobody's: whoever made it died before he wrote to it.
            if (raw and raw != start) or not memory.lock(file, exclusive=True):
                return False
            # With the lock in hand: whoever made it just now has let go of it after its record was there.
            if any(record.id == name for record in records()):
                return False
            memory.remove(memory.root, name)
            return True
        finally:
            memory.close(file)

    def _new_file(self, memory: Disk) -> tuple[str, File]:
        """Return an empty file of a fresh name, locked: no sweep takes it before the generation's record names it."""
        while True:
            name = fresh(self._disk).hex()
            file = memory.create(memory.root, name)
            if memory.lock(file, exclusive=False) and memory.stat(memory.root, name) is not None:
                return name, file
            memory.close(file)  # a sweep came between the two calls and took it for a leftover

    def _kept(self, record: KeyRecord, generation: str) -> bytearray | None:
        memory = self._memory(record.place, False)
        if memory is None:
            return None
        head = self._head(generation)
        raw = bytearray(len(head) + _SIZE)
        try:
            file = memory.open(memory.root, record.id)
            try:
                count = memory.read(file, raw, 0)
            finally:
                memory.close(file)
        except FileNotFoundError:
            return None
        finally:
            memory.close(memory.root)
        secret = raw[len(head) :]
        whole = count == len(raw) and raw[: len(head)] == head
        raw[:] = bytes(len(raw))
        return secret if whole else None

    def _remove(self, record: KeyRecord) -> None:
        if (memory := self._memory(record.place, False)) is not None:
            try:
                with suppress(FileNotFoundError):
                    memory.remove(memory.root, record.id)
            finally:
                memory.close(memory.root)

    def _kept_off_disks(self, record: KeyRecord) -> bool:
        """Tell whether no page of memory has gone to swap since the key was made, nor can just now."""
        try:
            if self._real:
                refuse_swap()
        except SealError:
            return False
        return record.swapped >= 0 and self._swapped() == record.swapped

    def _swapped(self) -> int:
        return swapped_out() if self._real else 0

    def _context(self, generation: str) -> dict[str, str]:
        """Bind a wrapped key to its place. KMS logs it in clear: neither is a tenant's name."""
        return {"layercache-root": self._root.hex(), "layercache-generation": generation}

    def _head(self, generation: str) -> bytes:
        return _MAGIC + self._root + hashlib.sha256(f"{self._disk.boot} {generation}".encode()).digest()
