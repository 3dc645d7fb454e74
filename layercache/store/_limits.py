"""How much of a filesystem a root may take, as the caller says it and in bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from layercache.errors import FormatError, InvalidError
from layercache.policy import POLICIES
from layercache.store._disk import Room

__all__ = ["Amount", "Budget", "Limits"]

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for end, base in (("", 1024), ("ib", 1024), ("b", 1000))
    for power, prefix in enumerate("kmgtpe", 1)
}
_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*|%)\s*")
_FLOOR_SHARE, _FLOOR_MOST, _FLOOR_INODES = 0.05, 10 << 30, 0.01
_DEFAULT = "80%"


@dataclass(frozen=True, slots=True)
class Amount:
    """So many bytes, or such a share of a filesystem."""

    bytes: int = 0
    share: float | None = None

    @staticmethod
    def parse(value: int | str) -> Amount:
        """Return the amount that ``"200GiB"``, ``"80%"`` or a number of bytes says. ``G`` is ``GiB``, ``GB`` is 10^9.

        :raises InvalidError: for anything else.
        """
        hint = 'say "200GiB", "80%" or a number of bytes'
        if type(value) is int and value >= 0:
            return Amount(value)
        match = _TEXT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise InvalidError("not an amount of space", value=value, hint=hint)
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and number <= 100:
            return Amount(share=number / 100)
        if unit not in _UNITS:
            raise InvalidError("not an amount of space", value=value, hint=hint)
        return Amount(int(match[1]) * _UNITS[unit] if "." not in match[1] else int(number * _UNITS[unit]))

    def of(self, total: int) -> int:
        """Return the bytes, ``total`` being those of the filesystem."""
        return self.bytes if self.share is None else int(self.share * total)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a caller wants: ``most`` for the root, ``floor`` left free for the rest of the machine.

    Over ``high`` of the budget housekeeping evicts, and whoever evicts goes down to ``low`` of it. ``None`` stands for
    the default: 80 % of the filesystem, and 5 % of it left free, but no more than 10 GiB. ``policy`` is the name of the
    order in which blobs go.
    """

    most: int | str | None = None
    floor: int | str | None = None
    high: float = 0.95
    low: float = 0.90
    policy: str = "default"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise InvalidError("watermarks are two shares of the budget", value=(self.high, self.low))
        if self.policy not in POLICIES:
            raise InvalidError("not an eviction policy", value=self.policy, hint=f"one of {', '.join(POLICIES)}")
        for value in (self.most, self.floor):
            if value is not None:
                Amount.parse(value)

    def limits(self, room: Room) -> Limits:
        """Return what this comes to on a filesystem."""
        most = Amount.parse(_DEFAULT if self.most is None else self.most).of(room.total)
        default = min(int(_FLOOR_SHARE * room.total), _FLOOR_MOST)
        floor = default if self.floor is None else Amount.parse(self.floor).of(room.total)
        inodes = int(_FLOOR_INODES * room.total_inodes) if self.floor is None or floor else 0
        return Limits(most, floor, inodes, int(self.high * most), int(self.low * most), self.policy)

    def pack(self) -> bytes:
        """Return it as the root keeps it."""
        fields = {
            "budget": self.most,
            "floor": self.floor,
            "high": self.high,
            "low": self.low,
            "policy": self.policy,
        }
        return json.dumps(fields).encode() + b"\n"

    @staticmethod
    def unpack(raw: bytes) -> Budget:
        """Undo :meth:`pack`.

        :raises FormatError: when it is not one.
        """
        try:
            fields = json.loads(raw)
            return Budget(
                fields["budget"], fields["floor"], float(fields["high"]), float(fields["low"]), fields["policy"]
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError("the record of the root's budget is damaged", hint="give the budget again") from error


@dataclass(frozen=True, slots=True)
class Limits:
    """A budget in bytes: ``most`` for all below the root; ``floor`` bytes and ``floor_inodes`` are left to others."""

    most: int
    floor: int
    floor_inodes: int
    high: int
    low: int
    policy: str
