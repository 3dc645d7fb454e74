"""A key in the memory of this process: wiped when the last user is done, or when a purge says so."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from layercache.errors import NamespacePurgedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["Context", "Key", "copy", "forget"]

# Every key of this process, so that a purge finds those of other handles and a forked child can wipe its copies.
_keys: weakref.WeakSet[Key] = weakref.WeakSet()
_keys_lock = threading.RLock()


def _wipe_copies() -> None:
    global _keys_lock  # noqa: PLW0603 - the parent may have held it in another thread
    _keys_lock = threading.RLock()
    for key in list(_keys):
        key._lock = threading.RLock()  # noqa: SLF001 - of this module
        key.wipe()
    _keys.clear()


os.register_at_fork(after_in_child=_wipe_copies)


class Context:
    """What encrypts and decrypts under one derived key, until the key it came from is wiped."""

    __slots__ = ("__weakref__", "_aead", "aad")

    def __init__(self, aead: AESGCM, aad: bytes) -> None:
        self._aead: AESGCM | None = aead
        self.aad = aad

    @property
    def aead(self) -> AESGCM:
        """The cipher.

        :raises NamespacePurgedError: once the key was wiped.
        """
        if self._aead is None:
            raise NamespacePurgedError("the namespace's key was forgotten", hint="get a new handle to begin anew")
        return self._aead

    def wipe(self) -> None:
        """Forget it."""
        self._aead = None


class Key:
    """32 bytes that are in no repr, log or file of ours. It begins with one user.

    ``release`` is called once, when it was wiped: it gives up what tells other processes that this one has the key.
    """

    def __init__(self, name: str, raw: bytearray, *, release: Callable[[], None]) -> None:
        self.name = name
        self._raw = raw
        self._release = release
        self._lock = threading.RLock()  # the collector may drop a user in the middle of a call
        self._users = 1
        self._derived: list[bytearray] = []
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._wiped = False
        with _keys_lock:
            _keys.add(self)

    def hold(self) -> None:
        """Count one more user."""
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        """Count one user less; the last one wipes it."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.forget()

    def copy(self) -> bytearray | None:
        """Return its bytes, for another key of the same name; ``None`` once it was wiped."""
        with self._lock:
            return None if self._wiped else bytearray(self._raw)

    def derive(self, salt: bytes, info: bytes) -> bytearray:
        """Return 32 bytes by HKDF-SHA256, which go when the key goes.

        :raises NamespacePurgedError: once the key was wiped.
        """
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

        derived = bytearray(32)
        with self._lock:
            if self._wiped:
                raise NamespacePurgedError("the namespace's key was forgotten", hint="get a new handle to begin anew")
            HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive_into(self._raw, derived)
            self._derived.append(derived)
        return derived

    def context(self, salt: bytes, info: bytes, aad: bytes) -> Context:
        """Return AES-256-GCM under a derived key.

        :raises NamespacePurgedError: once the key was wiped.
        """
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra

        derived = self.derive(salt, info)
        context = Context(AESGCM(derived), aad)
        with self._lock:
            _zero(derived)
            self._derived = [other for other in self._derived if other is not derived]
            self._contexts.add(context)
            if self._wiped:
                context.wipe()
        return context

    def wipe(self) -> None:
        """Overwrite it and end everything that was derived from it. Once is enough."""
        self._wiped = True
        _zero(self._raw)
        for derived in self._derived:
            _zero(derived)
        for context in list(self._contexts):
            context.wipe()

    def forget(self) -> None:
        """Wipe it, and tell other processes."""
        with self._lock:
            done, self._wiped = self._wiped, True
            self.wipe()
        if not done:
            self._release()

    def __repr__(self) -> str:
        return "Key(...)"


def copy(name: str) -> bytearray | None:
    """Return the bytes of a key of that name that this process has; ``None`` where it has none."""
    with _keys_lock:
        found = [key for key in _keys if key.name == name]
    return next((raw for key in found if (raw := key.copy()) is not None), None)


def forget(name: str) -> None:
    """Forget every key of that name in this process."""
    with _keys_lock:
        found = [key for key in _keys if key.name == name]
    for key in found:
        key.forget()


def _zero(raw: bytearray) -> None:
    raw[:] = bytes(len(raw))
