"""A namespace's live generation, kept open between calls: bound at the first use, and anew after a purge."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from layercache.control import Control
from layercache.errors import NamespacePurgedError, NotFoundError, StoreError
from layercache.policy import Quota
from layercache.store import Generation, NamespaceName, Seal, Store, set_quota

__all__ = ["Binding"]

_log = logging.getLogger("layercache")

# A forked child opens what it needs for itself: neither a directory of its parent's nor a lock that another thread of
# the parent may have held is of use to it.
_forked: weakref.WeakSet[Binding] = weakref.WeakSet()


def _after_fork() -> None:
    for binding in list(_forked):
        binding._forget()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)


class Binding:
    """The way from a name to the generation that lives under it. Safe to use from several threads."""

    def __init__(self, name: NamespaceName, store: Callable[[], Store], *, seal: Seal | None = None) -> None:
        self.name = name
        self.store = store
        self._seal = seal
        self._quota: Quota | None = None
        self._lock = threading.Lock()
        self._bound: Generation | None = None
        _forked.add(self)

    def generation(self, *, create: bool, control: Control | None = None) -> Generation | None:
        """Return the live generation, made where there is none and ``create`` says so.

        :raises StoreError: when that cannot be done.
        """
        bound = self._bound
        if bound is not None and not bound.fenced:
            return bound  # as nearly every call finds it: no lock is needed to look
        with (control or Control()).holding(self._lock):
            if self._bound is not None and self._bound.fenced:
                self._bound.close()
                self._bound = None
            if self._bound is None:
                found = self.store().generation(self.name, create=create, seal=self._seal, control=control)
                self._bound = None if found is None else found.close_when_dropped()
                self._note_quota()
            return self._bound

    def existing(self) -> Generation:
        """Return the live generation.

        :raises NotFoundError: where there is none.
        """
        generation = self.generation(create=False)
        if generation is None:
            raise NotFoundError("the namespace holds nothing", hint="pull something into it")
        return generation

    def made(self, control: Control | None = None) -> Generation:
        """Return the live generation, made where there was none.

        :raises StoreError: when it cannot be.
        """
        generation = self.generation(create=True, control=control)
        if generation is None:
            raise StoreError("the namespace was purged while it was made", hint="try again")
        return generation

    def limit(self, quota: Quota) -> None:
        """Remember what the namespace may take and keeps, in this generation and those to come."""
        with self._lock:
            self._quota = quota
            self._note_quota()

    def release(self) -> None:
        """Give back what is open of the namespace itself, so that its filesystem can be unmounted. Images stay."""
        with self._lock:
            bound, self._bound = self._bound, None
        if bound is not None:
            bound.close()

    def let_go(self) -> None:
        """Do what the next call would do after a purge: give up what is open, and wipe the key, also of images."""
        with self._lock:
            if self._bound is None or not self._bound.fenced:
                return
            bound, self._bound = self._bound, None
        with suppress(NamespacePurgedError):
            bound.check()
        bound.close()

    def _note_quota(self) -> None:
        if self._bound is not None and self._quota is not None:
            try:
                set_quota(self._bound, self._quota)
            except (StoreError, NamespacePurgedError) as error:
                _log.warning("a quota is not remembered: %s", error)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._bound = None
