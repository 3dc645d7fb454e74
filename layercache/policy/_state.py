"""A policy as JSON values, cut by namespace, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from layercache.errors import FormatError
from layercache.policy._images import Images
from layercache.policy._orders import Order
from layercache.policy._table import Table

__all__ = ["FORMAT", "dump", "load", "reading"]

FORMAT = 1

_FACTS = ("size", "cost", "seen", "left", "resident")


def dump(table: Table, orders: Sequence[Order], images: Images) -> dict[str, Any]:
    """The clock and each order's registers; under ``namespaces`` all that names a key, a list for each column."""
    slots: dict[str, list[int]] = {}
    for slot in table.known():
        slots.setdefault(table.namespaces[slot], []).append(slot)
    places = {name: {slot: place for place, slot in enumerate(own)} for name, own in slots.items()}
    listed = images.dump(places)
    return {
        "clock": table.clock,
        "orders": [{name: getattr(order, name) for name in order.registers} for order in orders],
        "namespaces": {
            name: {
                "keys": [table.keys[slot] for slot in own],
                **{fact: _column(getattr(table, fact), own) for fact in _FACTS},
                "orders": [{col: _column(getattr(order, col), own) for col in order.columns} for order in orders],
                "images": listed.get(name, []),
            }
            for name, own in slots.items()
        },
    }


def load(state: Mapping[str, Any], table: Table, orders: Sequence[Order], images: Images) -> None:
    """Fill an empty table, its orders and images from what :func:`dump` gave."""
    table.clock = int(state["clock"])
    for name, part in state["namespaces"].items():
        own = []
        for key in part["keys"]:
            if not isinstance(key, str) or key in table.slots:
                raise ValueError("key")
            own.append(table.add(key, name))
        for slot, size, cost in zip(own, part["size"], part["cost"], strict=True):
            table.describe(slot, size, cost)
        for fact in ("seen", "left", "resident"):
            _fill(getattr(table, fact), own, part[fact])
        for order, columns in zip(orders, part["orders"], strict=True):
            while len(order.inside) < len(table):
                order.grow()
            for column in order.columns:
                _fill(getattr(order, column), own, columns[column])
        for image, members, broken in part["images"]:
            images.load(name, image, [own[place] for place in members], broken)
    for order, registers in zip(orders, state["orders"], strict=True):
        order.used = sum(table.size[slot] for slot in table.known() if order.inside[slot])
        order.relink()
        for register in order.registers:
            setattr(order, register, registers[register])


@contextmanager
def reading() -> Iterator[None]:
    """Give every surprise in a state its one name."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError("this is not a state of an eviction policy", hint="start without it") from error


def _column(column: Sequence[int] | Sequence[float], slots: Sequence[int]) -> list[int] | list[float]:
    return [column[slot] for slot in slots]


def _fill(column: Any, slots: Sequence[int], values: Sequence[Any]) -> None:
    for slot, value in zip(slots, values, strict=True):
        column[slot] = value
