"""Housekeeping from inside an embedding process: one thread, now and then, in whichever process is first."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError, InUseError, LayerCacheError
from layercache.reports import Finding, Housekeeping
from layercache.store import Store

__all__ = ["SCRUB_PERIOD", "SCRUB_RATE", "Janitor", "keep_house"]

_log = logging.getLogger("layercache")

SCRUB_PERIOD = 30 * 86400.0
"""Seconds within which every byte is read again and compared, while some process has the root open."""

SCRUB_RATE = 16 << 20
"""Bytes a second that a scrub reads at most."""

_FIRST, _INTERVAL, _NOTES = 60.0, 900.0, 20.0

_OFTEN = 5.0
"""Seconds after which an idle process has let go of what another one purged: above all of its key."""


def keep_house(store: Store, *, sweep: bool = True, control: Control) -> Housekeeping:
    """Sweep, finish purges, evict and scrub, as far as that is due and no other process is at it.

    A deadline ends the scrub, which goes on there the next time.

    :raises CancelledError: on a cancel.
    :raises StoreError: when the root cannot be written.
    """
    swept = None
    if sweep:
        with suppress(InUseError):
            leftovers = store.recover()
            swept = len(leftovers)
            for leftover in leftovers:
                _log.info("swept %s: %s", leftover.kind, leftover.place)
    if swept is None:  # a sweep does that, too
        store.resume_purges(wait=None)
    store.note_uses()
    freed = 0 if store.evictor is None else store.evictor.tidy()
    if freed:
        _log.info("evicted %d bytes", freed)
    findings: list[Finding] = []
    complete = True
    try:
        # Half of the period is left for a scrub that comes late or takes long.
        for finding in store.scrub(older_than=SCRUB_PERIOD / 2, rate=SCRUB_RATE, control=control):
            _log.warning("scrub: %s: %s", finding.digest, finding.detail)
            findings.append(finding)
    except DeadlineError:
        complete = False
    return Housekeeping(swept, freed, tuple(findings), complete)


class Janitor:
    """A daemon thread that sweeps what crashes left, once, evicts and scrubs what is due, every quarter of an hour.

    What was used is written down more often, so that whichever process evicts knows of it. Where another process is at
    it, this one lets it. A short-lived process never begins. Every few seconds it calls ``let_go``, which makes no
    system call as a rule.
    """

    def __init__(self, store: Callable[[], Store], *, let_go: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._let_go = let_go
        self._stop = threading.Event()
        self._swept = False
        self._thread = threading.Thread(target=self._run, name="layercache-janitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for that; it stops between two pieces of a blob."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def tick(self) -> None:
        """Do what is due now. Blocks until it is done or stopped."""
        store = self._store()
        if store.writable and not store.failing:
            done = keep_house(store, sweep=not self._swept, control=Control(cancel=self._stop))
            self._swept = self._swept or done.swept is not None

    def _run(self) -> None:
        due, notes = _FIRST, _NOTES
        while not self._stop.wait(_OFTEN):
            self._let_go()
            due -= _OFTEN
            notes -= _OFTEN
            if notes > 0 and due > 0:
                continue
            notes = _NOTES
            try:
                self._store().note_uses()
                if due <= 0:
                    due = _INTERVAL
                    self.tick()
            except CancelledError:
                return
            except LayerCacheError as error:
                _log.warning("housekeeping failed: %s", error)
