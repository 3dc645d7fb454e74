"""Where the keys of sealed generations are: one a generation, in a file on a tmpfs, bound to its root and its boot.

Whoever has loaded one holds a shared lock on its file. A reboot takes the file, and with it all that was sealed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from layercache.errors import FormatError, SealError
from layercache.store import _secret
from layercache.store._disk import Dir, Disk, File
from layercache.store._files import fresh, read_record, write_small
from layercache.store._layout import KEY
from layercache.store._memory import open_memory, refuse_swap, usual_place
from layercache.store._seal import SealedForm
from layercache.store._secret import Key

__all__ = ["KeyRecord", "Keys", "need_extra"]

_MAGIC = b"LCkey_1\n"
_ID = re.compile(r"[0-9a-f]{64}")


def need_extra() -> None:
    """Refuse where what encrypts is not installed.

    :raises SealError: then.
    """
    if find_spec("cryptography") is None:
        raise SealError("sealing needs the cryptography package", hint="pip install 'layercache[seal]'")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """The file ``key`` of a sealed generation: which key, of which boot, kept where. No part of the key is in it."""

    id: str
    boot: str
    place: str

    def pack(self) -> bytes:
        """Return it as stored."""
        return json.dumps({"seal": "ephemeral", "id": self.id, "boot": self.boot, "place": self.place}).encode() + b"\n"

    @staticmethod
    def read(disk: Disk, folder: Dir) -> KeyRecord | None:
        """Return that of an open generation's directory; ``None`` where it is not sealed.

        :raises FormatError: where it is damaged.
        """
        if disk.stat(folder, KEY) is None:
            return None
        try:
            fields = json.loads(read_record(disk, folder, KEY) or b"")
            if fields["seal"] != "ephemeral" or not _ID.fullmatch(fields["id"]):
                raise FormatError("the key record of a namespace is of another kind", hint="use a newer version")
            return KeyRecord(str(fields["id"]), str(fields["boot"]), str(fields["place"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError("the key record of a namespace is damaged", hint="purge the namespace") from error


class Keys:
    """The keys of one root's generations. ``memory`` opens a directory for them; in a simulation, a simulated one."""

    def __init__(
        self, disk: Disk, root_key: bytes, *, memory: Callable[[str, bool], Disk | None] | None = None
    ) -> None:
        self._disk = disk
        self._root = hashlib.sha256(b"layercache root\0" + root_key).digest()
        self._memory = memory or (lambda place, create: open_memory(place, create=create))
        self._real = memory is None

    def make(self, generation: str) -> tuple[KeyRecord, SealedForm]:
        """Return a new key for a generation, in memory only.

        :raises SealError: where it cannot be kept there safely.
        """
        need_extra()
        if self._real:
            refuse_swap()
        record = KeyRecord(fresh(self._disk).hex(), self._disk.boot, usual_place())
        memory = self._memory(record.place, True)
        if memory is None:
            raise SealError("there is no directory for keys")
        try:
            write_small(memory, memory.root, record.id, self._head(generation) + fresh(self._disk))
        finally:
            memory.close(memory.root)
        form = self.load(record, generation)
        if form is None:
            raise SealError("the key went while it was made", hint="look at what clears the directory for keys")
        return record, form

    def load(self, record: KeyRecord, generation: str) -> SealedForm | None:
        """Return the form under a generation's key; ``None`` where the key is gone for good.

        :raises SealError: where it may be there and cannot be had now.
        """
        need_extra()
        if record.boot != self._disk.boot:
            return None
        if self._real:
            refuse_swap()
        memory = self._memory(record.place, False)
        if memory is None:
            return None
        try:
            file = memory.open(memory.root, record.id)
        except FileNotFoundError:
            return None
        finally:
            memory.close(memory.root)
        return self._loaded(memory, file, record, generation)

    def _loaded(self, memory: Disk, file: File, record: KeyRecord, generation: str) -> SealedForm | None:
        head = self._head(generation)
        raw = bytearray(len(head) + 32)
        locked = memory.lock(file, exclusive=False)
        if not locked or memory.read(file, raw, 0) < len(raw) or raw[: len(head)] != head:
            memory.close(file)
            return None  # a purge has it, or had it
        secret = raw[len(head) :]
        raw[:] = bytes(len(raw))
        key = Key(record.id, secret, release=lambda: memory.close(file))
        return SealedForm(key, generation, fresh=lambda: fresh(self._disk))

    def keyless(self, generation: str) -> SealedForm:
        """Return the form of a sealed generation for whoever needs no key."""
        return SealedForm(None, generation, fresh=lambda: fresh(self._disk))

    def lost(self, record: KeyRecord) -> bool:
        """Tell whether the key is gone for good, so that nothing under it can ever be read."""
        if record.boot != self._disk.boot:
            return True
        memory = self._memory(record.place, False)
        if memory is None:
            return True
        try:
            return memory.stat(memory.root, record.id) is None
        finally:
            memory.close(memory.root)

    def forget(self, record: KeyRecord) -> tuple[int, ...] | None:
        """Wipe a key in this process and destroy its file; return the processes that still have it.

        ``None`` where it cannot be said: memory may have reached a disk. An empty result means: no copy of it is left.
        """
        _secret.forget(record.id)
        if record.boot == self._disk.boot and (memory := self._memory(record.place, False)) is not None:
            try:
                with suppress(FileNotFoundError):
                    file = memory.create(memory.root, record.id, exist_ok=True)
                    try:
                        memory.truncate(file, 0)
                        if not memory.lock(file, exclusive=True):
                            # Its name stays, empty, until the last one has let go of the key: then it can be said.
                            return memory.holders(frozenset({memory.fstat(file).inode}), but=file)
                        memory.remove(memory.root, record.id)
                    finally:
                        memory.close(file)
            finally:
                memory.close(memory.root)
        try:
            if self._real:
                refuse_swap()
        except SealError:
            return None
        return ()

    def _head(self, generation: str) -> bytes:
        return _MAGIC + self._root + hashlib.sha256(f"{self._disk.boot} {generation}".encode()).digest()
