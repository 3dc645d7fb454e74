"""The sealed form of a generation: names that are keyed hashes, records and chunks under AES-256-GCM. Pure.

One key per generation, in memory only. From it, by HKDF-SHA256: a key for the names, and for each record and each
attempt to write a blob a key of its own under a fresh salt. So no nonce is ever used twice, also where a write is gone
on with after a source had lied. docs/format.md has the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Iterator
from typing import Literal

from layercache.errors import FormatError
from layercache.integrity import SUM_SIZE, chunk_count, chunk_range
from layercache.oci import Digest, Reference
from layercache.store._form import Buffer, Reader, Writer, pieces
from layercache.store._layout import Partial
from layercache.store._secret import Context, Key

__all__ = ["HEAD", "SALT", "Seal", "SealedForm"]

Seal = Literal["ephemeral", "kms"]
"""Where the key of a sealed generation is: in memory only, or wrapped by a key service."""

SALT = 32
"""Bytes of a salt."""

HEAD = 4096
"""Bytes before the first chunk: a page, so that chunks lie as they do in a plain file."""

_RECORD_MAGIC, _BLOB_MAGIC = b"LCsealR\n", b"LCsealB\n"
_FIXED = struct.Struct(">8sQI")
_RUN = struct.Struct(f">Q{SALT}s")
_MOST_RUNS = (HEAD - _FIXED.size) // _RUN.size
_NAME = re.compile(r"[0-9a-f]{64}")
_STEM = re.compile(r"[0-9a-f]{64}(?:\.(?:0|[1-9][0-9]{0,18}))?")
"""Of a partial. One without a size is of an older version: swept, not gone on with."""
_NO_NONCE = bytes(12)  # one message per key

Run = tuple[int, bytes]
"""One attempt to write a blob: the first chunk it wrote, and its salt."""


class SealedForm:
    """Names, records and chunks under the key of one generation of one namespace.

    Without a key it still tells what can be of this form, which is all that a sweep asks.

    :param fresh: returns a new salt.
    """

    head = HEAD

    def __init__(self, seal: Seal, key: Key | None, place: str, *, fresh: Callable[[], bytes]) -> None:
        self.seal = seal
        self._key = key
        self._place = place
        self.fresh = fresh
        self._names = key.derive(b"", self._info("names", "")) if key is not None else bytearray()

    @property
    def key(self) -> Key:
        """The key.

        :raises FormatError: where it is not at hand, so that nothing can be read.
        """
        if self._key is None:
            raise FormatError("the namespace is sealed, and its key is not at hand")
        return self._key

    @property
    def keyless(self) -> bool:
        """True where only names can be judged."""
        return self._key is None

    def close(self) -> None:
        """Be one user of the key less."""
        if self._key is not None:
            self._key.drop()

    def forget(self) -> None:
        """Wipe the key, for every handle of this process that shares it."""
        if self._key is not None:
            self._key.forget()

    def blob_name(self, digest: Digest) -> str:
        return self._hashed("blob", str(digest))

    def is_blob(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None

    def digest(self, name: str) -> Digest | None:  # noqa: ARG002 - only its record tells
        return None

    def ref_name(self, reference: Reference) -> str:
        return self._hashed("ref", str(reference))

    def pin_name(self, name: str) -> str:
        return self._hashed("pin", name)

    def partial(self, digest: Digest, size: int, boot: str) -> Partial:
        return Partial(f"{self._hashed('partial', f'{digest} {size}')}.{self.head + size}", boot)

    def parse_partial(self, name: str) -> Partial | None:
        return Partial.parse(name, stem=_STEM)

    def pack(self, kind: str, name: str, raw: bytes) -> bytes:
        head = _RECORD_MAGIC + self.fresh()
        context = self.key.context(head[8:], self._info(kind, name), head)
        return head + context.aead.encrypt(_NO_NONCE, raw, head)

    def unpack(self, kind: str, name: str, raw: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

        head = raw[: 8 + SALT]
        if len(raw) < len(_RECORD_MAGIC) + SALT + SUM_SIZE or not head.startswith(_RECORD_MAGIC):
            raise FormatError("a sealed record is damaged")
        context = self.key.context(head[8:], self._info(kind, name), head)
        try:
            return context.aead.decrypt(_NO_NONCE, raw[8 + SALT :], head)
        except InvalidTag as error:
            raise FormatError("a sealed record is damaged, or of another place") from error

    def reader(self, name: str, size: int, head: bytes) -> Reader:
        return _SealedReader(self, name, size, _parse_head(head, size))

    def writer(self, name: str, size: int, *, head: bytes = b"") -> Writer:
        runs = _parse_head(head, size) if head else []
        if len(runs) >= _MOST_RUNS:
            raise FormatError("a sealed blob was gone on with too often")
        return _SealedWriter(self, name, size, runs)

    def context(self, name: str, size: int, runs: list[Run]) -> Context:
        """Return what seals the chunks of the last of ``runs``. It is bound to the runs before it, too."""
        bound = hashlib.sha256(_FIXED.pack(_BLOB_MAGIC, size, 0)).digest()
        for run in runs:
            bound = hashlib.sha256(bound + _RUN.pack(*run)).digest()
        return self.key.context(runs[-1][1], self._info("blobs", name), bound)

    def _info(self, kind: str, name: str) -> bytes:
        return f"layercache seal 1\0{self._place}\0{kind}\0{name}".encode()

    def _hashed(self, kind: str, text: str) -> str:
        self.key  # noqa: B018 - refuses where there is none
        return hmac.digest(bytes(self._names), f"{kind}\0{text}".encode(), "sha256").hex()


class _SealedReader:
    apart = True

    def __init__(self, form: SealedForm, name: str, size: int, runs: list[Run]) -> None:
        self._size = size
        self._last = chunk_count(size) - 1
        self._key: Key | None = form.key
        self._runs = [(run[0], form.context(name, size, runs[: at + 1])) for at, run in enumerate(runs)]
        form.key.hold()

    def unpack(self, stored: memoryview, into: memoryview, start: int, sums: Buffer) -> int | None:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

        for index, begin, end in pieces(start, len(into), self._size):
            context = next((context for first, context in reversed(self._runs) if first <= index), None)
            if context is None:
                return index
            # The tag goes where the cipher wants it, right behind the chunk, and what it covers is put back.
            after = slice(end - start, end - start + SUM_SIZE)
            covered = bytes(stored[after])
            stored[after] = sums[index * SUM_SIZE : (index + 1) * SUM_SIZE]
            try:
                context.aead.decrypt_into(
                    _nonce(index, last=index == self._last),
                    stored[begin - start : after.stop],
                    context.aad,
                    into[begin - start : end - start],
                )
            except InvalidTag:
                return index
            finally:
                stored[after] = covered
        return None

    def close(self) -> None:
        key, self._key = self._key, None
        if key is not None:
            key.drop()


class _SealedWriter:
    def __init__(self, form: SealedForm, name: str, size: int, runs: list[Run]) -> None:
        self._form, self._name, self._size = form, name, size
        self._last = chunk_count(size) - 1
        self._runs = runs
        self._context: Context | None = None
        self._index = 0
        self._waiting = bytearray()
        self.sums = bytearray()

    def keep(self, chunk: memoryview, total: bytes) -> None:  # noqa: ARG002 - its tag vouches for it
        self.sums += total
        self._index += 1

    def feed(self, data: Buffer) -> Iterator[tuple[int, Buffer]]:
        view = memoryview(data)
        while view:
            start, end = chunk_range(self._index, self._size)
            taken = min(len(view), end - start - len(self._waiting))
            if not self._waiting and taken == end - start:
                yield from self._chunk(view[:taken], start)
            else:
                # Content of a chunk that is not whole waits in memory: on disk there is never a byte in clear.
                self._waiting += view[:taken]
                if len(self._waiting) == end - start:
                    whole, self._waiting = self._waiting, bytearray()
                    yield from self._chunk(whole, start)
            view = view[taken:]

    def finish(self) -> Iterator[tuple[int, Buffer]]:
        if self._context is None:
            self._runs = [run for run in self._runs if run[0] < self._index]
            yield 0, self._head()

    def _chunk(self, content: Buffer, start: int) -> Iterator[tuple[int, Buffer]]:
        if self._context is None:
            # Never under the key of an earlier attempt: it may have sealed other bytes as this chunk.
            self._runs = [*(run for run in self._runs if run[0] < self._index), (self._index, self._form.fresh())]
            self._context = self._form.context(self._name, self._size, self._runs)
            yield 0, self._head()
        nonce = _nonce(self._index, last=self._index == self._last)
        sealed = memoryview(self._context.aead.encrypt(nonce, content, self._context.aad))
        yield HEAD + start, sealed[:-SUM_SIZE]
        self.sums += sealed[-SUM_SIZE:]
        self._index += 1

    def _head(self) -> bytes:
        fixed = _FIXED.pack(_BLOB_MAGIC, self._size, len(self._runs))
        return (fixed + b"".join(_RUN.pack(*run) for run in self._runs)).ljust(HEAD, b"\0")


def _nonce(index: int, *, last: bool) -> bytes:
    return bytes(3) + index.to_bytes(8, "big") + bytes([last])


def _parse_head(head: bytes, size: int) -> list[Run]:
    if len(head) != HEAD:
        raise FormatError("a sealed blob does not begin as it should")
    magic, found, count = _FIXED.unpack_from(head)
    if magic != _BLOB_MAGIC or found != size or count > _MOST_RUNS:
        raise FormatError("a sealed blob does not begin as it should")
    runs = [_RUN.unpack_from(head, _FIXED.size + at * _RUN.size) for at in range(count)]
    firsts = [first for first, _ in runs]
    if firsts != sorted(set(firsts)) or any(first >= chunk_count(size) for first in firsts):
        raise FormatError("a sealed blob does not begin as it should")
    return runs
