"""Digests: the names of bytes (image-spec descriptor.md, "Digests")."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NewType, Protocol

from layercache.errors import InvalidDigestError, UnsupportedError

__all__ = ["Buffer", "DiffID", "Digest", "Hasher"]

Buffer = bytes | bytearray | memoryview


class Hasher(Protocol):
    """A running hash, as :mod:`hashlib` makes them."""

    def update(self, data: Buffer, /) -> None:
        """Add the next bytes."""

    def digest(self) -> bytes:
        """Hash of the bytes so far."""

    def hexdigest(self) -> str:
        """Hash of the bytes so far, in lower-case hexadecimal."""


_HASHES: dict[str, Callable[[], Hasher]] = {"sha256": hashlib.sha256, "sha512": hashlib.sha512}

# One match decides on the hot path: the two algorithms we verify, each with its exact length.
_KNOWN = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
# The grammar for algorithms we lack. Registered names have a fixed form; anything else only has to be well formed.
_REGISTERED = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "sha512": re.compile(r"[0-9a-f]{128}"),
    "blake3": re.compile(r"[0-9a-f]{64}"),
}
_GRAMMAR = re.compile(r"([a-z0-9]+(?:[+._-][a-z0-9]+)*):([a-zA-Z0-9=_-]+)")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The name of some bytes: ``algorithm`` (sha256 or sha512) and ``encoded`` (lower-case hexadecimal).

    A value exists only if it is valid, so its text is safe in a URL, a file name or a log line.
    """

    algorithm: str
    encoded: str

    def __post_init__(self) -> None:
        _check(f"{self.algorithm}:{self.encoded}")

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Digest written as ``algorithm:encoded``; the inverse of ``str``.

        :raises InvalidDigestError: if it is not of the grammar, or has the wrong length or case for its algorithm.
        :raises UnsupportedError: if it is well formed, but of an algorithm that is not verified here.
        """
        _check(text)
        algorithm, _, encoded = text.partition(":")
        digest = _new(cls)
        _set(digest, "algorithm", algorithm)
        _set(digest, "encoded", encoded)
        return digest

    @classmethod
    def of(cls, data: Buffer, *, algorithm: str = "sha256") -> Digest:
        """Digest of ``data``, hashed here and now.

        :raises UnsupportedError: for an algorithm other than sha256 and sha512.
        """
        if algorithm not in _HASHES:
            raise UnsupportedError(f"digest algorithm {algorithm!a}", hint="use sha256 or sha512")
        state = _HASHES[algorithm]()
        state.update(data)
        return cls(algorithm, state.hexdigest())

    def hasher(self) -> Hasher:
        """Fresh hash of this digest's algorithm; compare its ``hexdigest()`` with ``encoded``."""
        return _HASHES[self.algorithm]()

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.encoded}"


_new = object.__new__
_set = object.__setattr__


def _check(text: object) -> None:
    if not isinstance(text, str):
        raise InvalidDigestError("not a digest", value=text, hint="write algorithm:hex")
    if _KNOWN.fullmatch(text) is not None:
        return
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise InvalidDigestError("not a digest", value=text, hint="write sha256: and 64 lower-case hexadecimal digits")
    algorithm, encoded = match.groups()
    form = _REGISTERED.get(algorithm)
    if form is not None and form.fullmatch(encoded) is None:
        raise InvalidDigestError(f"wrong length or case for {algorithm}", value=text)
    raise UnsupportedError(f"digest algorithm {algorithm[:64]}", hint="only sha256 and sha512 are verified")


DiffID = NewType("DiffID", Digest)
"""Digest of a layer's *uncompressed* bytes (image-spec config.md)."""
