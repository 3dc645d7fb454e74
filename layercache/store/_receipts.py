"""What a purge has reached, as a value and as a line of the chain of receipts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from layercache.errors import StoreError
from layercache.store._layout import Slot

__all__ = ["Level", "Proof", "Receipt", "line_hash", "parse_line", "to_line"]

Level = Literal["fenced", "unlinked", "discarded", "crypto-erased"]
Proof = Literal["", "lease", "scan"]

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a purge has reached, and no more than that. docs/purge.md says what each level means and what none does.

    ``level`` is ``fenced`` (no call gives out or publishes anything of the generation any more, its files are not all
    gone), ``unlinked`` (no name below the root and no open file of it is left), ``discarded`` (and its blocks were
    handed back to the device) or ``crypto-erased`` (it was sealed, its files are gone, and so is the last copy of its
    key, which was only ever in memory; ``trimmed`` then tells whether its blocks were handed back). While ``fenced``,
    ``pending`` are the ids of processes that still have files of it open, ``unseen`` counts files that somebody has
    open whom this process cannot see (another pid namespace or user, the kernel), and ``failed`` counts, by the name of
    the error, entries that could not be removed. ``elsewhere`` counts files that somebody gave another name, which
    still leads to them.

    ``blobs`` and ``bytes`` are what was removed; after an interruption (``resumed``) only what was removed since.
    ``proof`` says what vouches that nobody has a file open: a write lease of the kernel (``lease``), or, where it gives
    none, locks and a look through /proc (``scan``). ``trimmed`` are the bytes that the trim handed to the device.

    ``generation`` 0 means that there was nothing to purge. ``number`` is the receipt's place in the chain, from 1; 0 is
    not in it: a call whose time was over before the disk had taken the record. ``previous`` is the SHA-256 of the
    record before. ``slot`` stands for the namespace: a keyed hash of its name, which is not in the receipt. Times are
    seconds since the epoch. ``format`` 1 is of an early version, which knew less.
    """

    slot: Slot
    generation: int
    level: Level
    blobs: int = 0
    bytes: int = 0
    pending: tuple[int, ...] = ()
    unseen: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    elsewhere: int = 0
    resumed: bool = False
    proof: Proof = ""
    trimmed: int = 0
    started: float = 0.0
    finished: float = 0.0
    number: int = 0
    previous: str = ""
    format: int = _FORMAT

    @property
    def complete(self) -> bool:
        """True when nothing of this purge is left to be done."""
        return self.level != "fenced" and not (self.pending or self.unseen or self.failed)

    @property
    def ends(self) -> bool:
        """True when the generation's files are gone."""
        return self.level in ("unlinked", "discarded", "crypto-erased")

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as JSON values; docs/receipt.schema.json describes them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"pending": list(self.pending), "failed": dict(self.failed)}

    def at(self, number: int, *, previous: str) -> Receipt:
        """Return the receipt as it stands at that place of the chain."""
        return replace(self, number=number, previous=previous)


def to_line(receipt: Receipt) -> bytes:
    """Return the receipt as it is stored, with its newline."""
    return json.dumps(receipt.to_json(), separators=(",", ":"), sort_keys=True).encode() + b"\n"


def line_hash(line: bytes) -> str:
    """Return what the next record calls this one."""
    return hashlib.sha256(line).hexdigest()


def parse_line(line: bytes, number: int) -> Receipt:
    """Return the receipt of a line, without its newline, at that place of the chain.

    :raises StoreError: when it is damaged, or says that it belongs elsewhere.
    """
    try:
        values = json.loads(line)
        if "format" not in values:  # of the first version
            values |= {"format": 1, "number": number}
        receipt = Receipt(**{**values, "pending": tuple(values["pending"]), "failed": dict(values.get("failed", {}))})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"receipt {number} is damaged") from error
    if receipt.number != number:
        raise StoreError(f"receipt {number} says that it is {receipt.number!r}", hint="one was removed or moved")
    return receipt
