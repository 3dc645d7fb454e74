"""Platforms, and which images one can run (image-spec image-index.md and "Platform Variants")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from layercache.errors import InvalidPlatformError
from layercache.oci import _host, _ijson

__all__ = ["Platform"]

_TOKEN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"  # noqa: S105 -- a grammar, no secret
_TEXT = re.compile(
    rf"(?P<os>{_TOKEN})(?:\((?P<version>[A-Za-z0-9_.-]{{0,64}})(?P<features>(?:\+{_TOKEN}){{0,64}})\))?"
    rf"/(?P<architecture>{_TOKEN})(?:/(?P<variant>{_TOKEN}))?"
)
_PRINTABLE = re.compile(r"[ -~]{0,255}")

# What uname and people say, in the words of the specification (Go's GOARCH).
_ALIASES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "armel": ("arm", "v6"),
    "loongarch64": ("loong64", ""),
}
_SYSTEMS = {"macos": "darwin", "win32": "windows"}

# Variants of an architecture, least first: a machine runs its own and all before it.
_LADDERS = {
    "amd64": ("v1", "v2", "v3", "v4"),
    "ppc64le": ("power8", "power9", "power10"),
    "riscv64": ("rva20u64", "rva22u64", "rva23u64"),
    "arm": ("v5", "v6", "v7", "v8"),
}
# What an empty variant means.
_PLAIN = {"amd64": "v1", "ppc64le": "power8", "riscv64": "rva20u64", "arm": "v7", "arm64": "v8"}
_ARM64 = re.compile(r"v([89])(?:\.([0-9]))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and a processor, of a host or of an image.

    The fields are the image-spec's: ``os`` and ``architecture`` in Go's words, ``variant`` of the processor,
    ``os_version`` (Windows) and ``os_features``. A field of an image that does not say is empty.
    """

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for value in (self.os, self.architecture, self.variant, self.os_version, *self.os_features):
            # These end up in messages and on terminals.
            if not isinstance(value, str) or _PRINTABLE.fullmatch(value) is None:
                raise InvalidPlatformError("not the field of a platform", value=value)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Platform written as ``os/architecture[/variant]``, as in ``linux/arm64/v8``; the inverse of ``str``.

        Names that ``uname`` uses (``x86_64``, ``aarch64``) are put in the words of the specification. The version and
        features of an operating system go in brackets: ``windows(10.0.17763+win32k)/amd64``.

        :raises InvalidPlatformError: if it is not of that form.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InvalidPlatformError("not a platform", value=text, hint="write os/architecture[/variant]")
        features = frozenset(filter(None, (match["features"] or "").split("+")))
        return _spell(match["os"], match["architecture"], match["variant"] or "", match["version"] or "", features)

    @classmethod
    def of(cls, value: object) -> Platform:
        """Platform of an index entry or a config: their JSON object, parsed. Fields that are missing are empty.

        :raises InvalidPlatformError: if it is not an object, or a field is of the wrong type or not printable.
        """
        error = InvalidPlatformError
        fields = _ijson.members(value, "platform", error)
        system = _ijson.text(fields.get("os"), "os", error)
        architecture = _ijson.text(fields.get("architecture"), "architecture", error)
        variant = _ijson.text(fields.get("variant"), "variant", error)
        version = _ijson.text(fields.get("os.version"), "os.version", error)
        features = _ijson.sequence(fields.get("os.features"), "os.features", error)
        needed = frozenset(_ijson.text(item, "os.features", error) for item in features)
        return _spell(system, architecture, variant, version, needed)

    @classmethod
    def host(cls) -> Platform:
        """Platform of this machine. On x86 the variant (v1 to v4) is what the processor says; read once a process."""
        return _spell(*_host.uname(), _host.amd64_level(), "", frozenset())

    def candidates(self) -> tuple[str, ...]:
        """Processor variants this platform runs, best first; an empty one is an image that does not say.

        Where the specification says what an empty variant means (v1 on amd64, v8 on arm64, v7 on arm), that stands for
        both. Only variants of the same architecture: a 32-bit image is never chosen for a 64-bit host.
        """
        ladder = _LADDERS.get(self.architecture)
        plain = _PLAIN.get(self.architecture, "")
        variant = self.variant or plain
        if self.architecture == "arm64" and (match := _ARM64.fullmatch(variant)):
            found = _arm64(int(match[1]), int(match[2] or 0))
        elif ladder is not None and variant in ladder:
            found = list(reversed(ladder[: ladder.index(variant) + 1]))
        else:
            found = [variant] if variant == plain else [variant, plain]
        return tuple(found)

    def rank(self, image: Platform) -> int | None:
        """How well this host runs an image: 0 is best, ``None`` is not at all.

        Windows compares major, minor and build of ``os_version``, where both have one; the features an image asks for
        must all be there.
        """
        if (self.os, self.architecture) != (image.os, image.architecture):
            return None
        if not image.os_features <= self.os_features:
            return None
        if self.os == "windows" and self.os_version and image.os_version and _build(self) != _build(image):
            return None
        variant = image.variant or _PLAIN.get(image.architecture, "")
        if image.architecture == "arm64":
            variant = variant.removesuffix(".0")
        found = self.candidates()
        return found.index(variant) if variant in found else None

    def matches(self, image: Platform) -> bool:
        """True if this host runs images of that platform."""
        return self.rank(image) is not None

    def to_json(self) -> dict[str, object]:
        """Object of the image-spec, without the fields that are empty."""
        found: dict[str, object] = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            found["os.version"] = self.os_version
        if self.os_features:
            found["os.features"] = sorted(self.os_features)
        if self.variant:
            found["variant"] = self.variant
        return found

    def __str__(self) -> str:
        system = self.os
        if self.os_version or self.os_features:
            system += f"({'+'.join([self.os_version, *sorted(self.os_features)])})"
        return f"{system}/{self.architecture}" + (f"/{self.variant}" if self.variant else "")


def _spell(os: str, architecture: str, variant: str, version: str, features: frozenset[str]) -> Platform:
    os, architecture = os.lower(), architecture.lower()
    architecture, implied = _ALIASES.get(architecture, (architecture, ""))
    if architecture in ("arm", "arm64") and variant in ("5", "6", "7", "8", "9"):
        variant = f"v{variant}"  # as early builders wrote it
    return Platform(_SYSTEMS.get(os, os), architecture, variant or implied, version, features)


def _arm64(major: int, minor: int) -> list[str]:
    # Armv9.n holds all of Armv8.(n+5); v8 is written without its ".0".
    found = [(major, m) for m in range(minor, -1, -1)]
    if major == 9:
        found += [(8, m) for m in range(min(minor + 5, 9), -1, -1)]
    return [f"v{a}.{b}" if b else f"v{a}" for a, b in found]


def _build(platform: Platform) -> list[str]:
    return platform.os_version.split(".")[:3]
