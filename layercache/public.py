"""Which repositories are public: patterns of hosts and names that an operator listed. Pure.

What decides is the reference that was asked for, never the mirror that answered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from layercache.errors import InvalidPatternError, InvalidReferenceError
from layercache.oci import Repository

__all__ = ["PublicRepositories"]

_ADDRESS = re.compile(r"\[.*\]|[0-9*]+(?:\.[0-9*]+)*")
_REGISTRIES = frozenset({"ac", "co", "com", "edu", "gov", "net", "org"})
"""Second labels below which a country sells names, as in ``com.cn``."""


@dataclass(frozen=True, slots=True)
class PublicRepositories:
    """A list of patterns ``HOST/NAME``; a repository is public where one of them matches all of it.

    ``*``, once in a label of the host or in a component of the name, stands for any characters of that label or
    component: it crosses no dot, no slash and no port. ``**`` as the last component stands for one or more. A host has
    its port exactly as in references; case and ``docker.io`` are as there: ``docker.io/*`` is ``docker.io/library/*``.

    :raises InvalidPatternError: for anything else, and for a host whose domain would be anybody's: its last two labels
        (three below ``com.cn`` and the like), and every part of an address, must be given.
    """

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            _check(pattern)

    @classmethod
    def of(cls, patterns: Iterable[str]) -> PublicRepositories:
        """Return the list of these patterns, spelled as references are.

        :raises InvalidPatternError: for one that is none.
        """
        if isinstance(patterns, str):
            raise InvalidPatternError("not a list of patterns", value=patterns, hint="write [...]")
        return cls(tuple(_canonical(pattern) for pattern in patterns))

    def __contains__(self, repository: Repository) -> bool:
        return any(_matches(pattern, repository) for pattern in self.patterns)

    def __bool__(self) -> bool:
        return bool(self.patterns)


def _canonical(pattern: str) -> str:
    """Spell the host of a pattern as references spell it.

    A ``*`` becomes a letter that every part may have: what is no reference then can match none.
    """
    if not isinstance(pattern, str):
        raise InvalidPatternError("not a pattern", value=pattern)
    host, slash, name = pattern.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        raise InvalidPatternError("a pattern without a host", value=pattern, hint="write HOST/NAME")
    try:
        # Of a literal host, so that aliases and case are seen to by the one who knows them.
        host = host.lower() if "*" in host else Repository.parse(f"{host}/any/any").host
    except InvalidReferenceError as error:
        raise InvalidPatternError("not the host of a registry", value=pattern) from error
    if host == "docker.io" and "/" not in name:
        name = f"library/{name}"
    _check(f"{host}/{name}")
    return f"{host}/{name}"


def _check(pattern: str) -> None:
    host, _, name = pattern.partition("/")
    labels, components = host.partition(":")[0].split("."), name.split("/")
    deep = components[-1] == "**"
    if any(part.count("*") > 1 for part in (*labels, *(components[:-1] if deep else components))):
        raise InvalidPatternError("more than one * in a part", value=pattern, hint="** stands alone, as the last part")
    if "*" in host:
        known = 3 if labels[-2:-1] and labels[-2] in _REGISTRIES and len(labels[-1]) == 2 else 2
        if ":" in host.replace("*", "") and "*" in host.rpartition(":")[2]:
            raise InvalidPatternError("a port that is not given", value=pattern)
        if _ADDRESS.fullmatch(host.partition(":")[0]) or any("*" in label for label in labels[-known:]):
            raise InvalidPatternError(
                "a host that could be anybody's",
                value=pattern,
                hint=f"give its last {known} labels, as in *.example.com",
            )
    try:
        Repository(host.replace("*", "a"), name.replace("**", "a").replace("*", "a"))
    except InvalidReferenceError as error:
        raise InvalidPatternError(error.what.partition(":")[0], value=pattern, hint="write HOST/NAME") from error


def _matches(pattern: str, repository: Repository) -> bool:
    host, _, name = pattern.partition("/")
    components = name.split("/")
    return _all_match(_labels(host), _labels(repository.host)) and _name_matches(components, repository.name.split("/"))


def _labels(host: str) -> list[str]:
    """Return the labels of a host, the last one with its port; an IPv6 address is one."""
    return [host] if host.startswith("[") else host.split(".")


def _name_matches(wanted: list[str], found: list[str]) -> bool:
    if wanted[-1] == "**":
        fixed = len(wanted) - 1
        return len(found) > fixed and _all_match(wanted[:-1], found[:fixed])
    return _all_match(wanted, found)


def _all_match(wanted: list[str], found: list[str]) -> bool:
    return len(wanted) == len(found) and all(map(_part_matches, wanted, found))


def _part_matches(wanted: str, found: str) -> bool:
    before, star, after = wanted.partition("*")
    if not star:
        return wanted == found
    return len(found) >= len(before) + len(after) and found.startswith(before) and found.endswith(after)
