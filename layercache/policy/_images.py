"""Which blobs are used together, and what is left of an image that lost one."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from copy import copy

from layercache.policy._table import Table

__all__ = ["Images"]

_Name = tuple[str, str]
_MOST = 4096


class Images:
    """Images by namespace and name. An image is broken when a blob of it has gone, until it is noted again.

    At most as many images are kept as blobs are known, or 4096: those noted last.
    """

    def __init__(self) -> None:
        self._members: dict[_Name, tuple[int, ...]] = {}
        self._of: dict[int, list[_Name]] = {}
        self._broken: dict[_Name, int] = {}  # and when, on the table's clock

    def note(self, name: str, namespace: str, slots: Iterable[int]) -> None:
        """An image is here whole."""
        image = (namespace, name)
        members = tuple(dict.fromkeys(slots))
        if self._members.get(image) != members:
            self._drop(image)
            for slot in members:
                self._of.setdefault(slot, []).append(image)
        self._members.pop(image, None)
        self._members[image] = members
        self._broken.pop(image, None)
        while len(self._members) > max(_MOST, len(self._of)):
            self._drop(next(iter(self._members)))

    def broke(self, slot: int, table: Table) -> None:
        """A blob has gone, and with it the images it belongs to."""
        for image in list(self._of.get(slot, ())):
            if any(table.resident[member] for member in self._members[image]):
                self._broken.setdefault(image, table.clock)
            else:
                self._drop(image)

    def erase(self, slot: int) -> None:
        """Forget a blob, and the images it belongs to."""
        for image in list(self._of.get(slot, ())):
            self._drop(image)

    def remove_namespace(self, namespace: str) -> None:
        """Forget the images of a namespace."""
        for image in [image for image in self._members if image[0] == namespace]:
            self._drop(image)

    def rest(self, table: Table) -> Iterator[int]:
        """What broken images left here, that no whole image needs and nobody used since: as dear as what went of it."""
        for image in list(self._broken):
            members = self._members.get(image, ())
            gone = {table.price[slot] for slot in members if not table.resident[slot]}
            for slot in members:
                if (
                    table.resident[slot]
                    and any(_alike(table.price[slot], price) for price in gone)
                    and all(self._broken.get(other, -1) >= table.seen[slot] for other in self._of[slot])
                ):
                    yield slot

    def left_by(self, slot: int, table: Table, taken: Container[int]) -> Iterator[int]:
        """What no whole image would need any more if ``slot`` went too, and is as dear, beside those ``taken``."""
        lost = set(self._of.get(slot, ()))
        for image in list(lost):
            for other in self._members[image]:
                here = other != slot and other not in taken and table.resident[other]
                alike = here and _alike(table.price[other], table.price[slot])
                if alike and all(each in lost or each in self._broken for each in self._of[other]):
                    yield other

    def dump(self, places: dict[str, dict[int, int]]) -> dict[str, list[list[object]]]:
        """Per namespace: name, places of the members among its blobs, when it broke (or None)."""
        found: dict[str, list[list[object]]] = {}
        for image, members in self._members.items():
            place = places.get(image[0], {})
            listed = [place[slot] for slot in members if slot in place]
            found.setdefault(image[0], []).append([image[1], listed, self._broken.get(image)])
        return found

    def load(self, namespace: str, name: str, members: Collection[int], broken: int | None) -> None:
        """Take one image back."""
        self.note(name, namespace, members)
        if broken is not None:
            self._broken[namespace, name] = broken

    def settle(self) -> None:
        """Take the order that a restored state has."""
        self._members = dict(sorted(self._members.items()))
        self._broken = dict(sorted(self._broken.items()))

    def copy(self) -> Images:
        """Return an independent one."""
        other = Images()
        other._members, other._broken = copy(self._members), copy(self._broken)
        other._of = {slot: list(images) for slot, images in self._of.items()}
        return other

    def _drop(self, image: _Name) -> None:
        for slot in self._members.pop(image, ()):
            images = self._of[slot]
            images.remove(image)
            if not images:
                del self._of[slot]
        self._broken.pop(image, None)


def _alike(price: int, other: int) -> bool:
    """Whether two blobs cost about the same to fetch again, by the byte.

    What does not follows no blob of its image: a small one takes little room and costs a request of its own, and a
    large one is a lot to fetch again because a small one went.
    """
    return 4 * min(price, other) >= 3 * max(price, other)
