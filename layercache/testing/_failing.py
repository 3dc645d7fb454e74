"""How a virtual process, or a call of it, comes to grief."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Fault", "KilledError"]


class KilledError(BaseException):
    """The virtual process is no more. No verb does anything any more, so unwinding changes nothing."""


_NEVER_FAIL = frozenset(("close", "pause", "start_flush", "openers"))


@dataclass(slots=True)
class Fault:
    """One system call that fails: the ``nth`` call of ``verb`` from now on, in every process.

    ``verb`` ``*`` is any that can fail. ``about`` limits it to calls about a name that contains it.
    ``code`` is an ``errno``, or 0 for a read that gives half of what is there. What such a failure leaves is left: half
    of a write, pages that a failed fsync calls clean. ``sticky`` fails all later calls too.
    """

    verb: str
    nth: int
    code: int
    sticky: bool = False
    about: str = ""
    fired: int = 0

    def hits(self, verb: str, about: str) -> bool:
        """Count a call and tell whether it is the one that fails."""
        matches = verb not in _NEVER_FAIL if self.verb == "*" else verb == self.verb
        if not matches or self.nth <= 0 or self.about not in about:
            return False
        self.nth -= 1
        if self.nth:
            return False
        self.nth = int(self.sticky)
        self.fired += 1
        return True
