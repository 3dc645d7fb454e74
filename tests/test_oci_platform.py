"""Platforms: which images a host runs, and in which order it prefers them."""

from __future__ import annotations

import platform as python_platform
from pathlib import Path

import pytest

from layercache.errors import InvalidPlatformError
from layercache.oci import Platform, _host

parse = Platform.parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm64/v8", Platform("linux", "arm64", "v8")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("windows(10.0.17763.1)/amd64", Platform("windows", "amd64", os_version="10.0.17763.1")),
        (
            "windows(10.0+win32k)/amd64",
            Platform("windows", "amd64", os_version="10.0", os_features=frozenset({"win32k"})),
        ),
        ("linux(+a+b)/amd64", Platform("linux", "amd64", os_features=frozenset({"a", "b"}))),
    ],
)
def test_parse_is_the_inverse_of_str(text: str, value: Platform) -> None:
    """The written form holds every field."""
    assert parse(text) == value
    assert str(value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("linux/x86_64", "linux/amd64"),
        ("Linux/AMD64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/armv7l", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/armv7l/v6", "linux/arm/v6"),
        ("linux/arm64/8", "linux/arm64/v8"),
        ("linux/i686", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
        ("linux/mips/8", "linux/mips/8"),
    ],
)
def test_other_spellings_become_the_specifications(text: str, value: str) -> None:
    """What uname and people say is the same platform in Go's words."""
    assert str(parse(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linux",
        "linux/",
        "/amd64",
        "linux/arm/v7/x",
        "linux /amd64",
        "linux/amd64\n",
        "li\u00f1ux/amd64",
        "linux(/amd64",
        "linux()x/amd64",
        "linux/../..",
        "linux/" + "a" * 65,
        "l" * 1_000_000,
        "windows(" + "+a" * 100_000,
    ],
)
def test_parse_refuses_what_is_no_platform(text: str) -> None:
    """Only os/architecture[/variant], in plain characters."""
    with pytest.raises(InvalidPlatformError):
        parse(text)


@pytest.mark.parametrize("value", [None, 5, b"linux/amd64"])
def test_parser_and_constructor_refuse_what_is_no_text(value: object) -> None:
    """A value of another type gives the same typed error."""
    with pytest.raises(InvalidPlatformError):
        parse(value)  # type: ignore[arg-type]
    with pytest.raises(InvalidPlatformError):
        Platform("linux", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, [], "linux/amd64", {"os": 1}, {"os.features": "x"}, {"os.features": [1]}])
def test_of_refuses_wrong_types(value: object) -> None:
    """Only an object of strings is a platform."""
    with pytest.raises(InvalidPlatformError):
        Platform.of(value)


@pytest.mark.parametrize("value", ["a\x1b[31m", "a\n", "\u202e", "a" * 256])
@pytest.mark.parametrize("field", ["os", "architecture", "variant", "os.version"])
def test_of_refuses_what_would_disturb_a_terminal(field: str, value: str) -> None:
    """Fields end up in messages: control characters and endless text do not."""
    with pytest.raises(InvalidPlatformError):
        Platform.of({"os": "linux", "architecture": "amd64", field: value})


def test_of_reads_what_the_specification_writes() -> None:
    """Every field, unknown ones ignored, missing ones empty."""
    value = {
        "os": "windows",
        "architecture": "amd64",
        "variant": "v2",
        "os.version": "10.0.1",
        "os.features": ["win32k"],
        "features": ["reserved"],
    }
    found = Platform.of(value)
    del value["features"]
    assert found.to_json() == value
    assert Platform.of({}) == Platform("", "")


@pytest.mark.parametrize(
    ("host", "best_first"),
    [
        ("linux/arm/v8", ["v8", "v7", "v6", "v5"]),
        ("linux/arm/v7", ["v7", "v6", "v5"]),
        ("linux/arm/v6", ["v6", "v5"]),
        ("linux/arm", ["v7", "v6", "v5"]),
        ("linux/arm64", ["v8"]),
        ("linux/arm64/v8", ["v8"]),
        ("linux/arm64/v8.2", ["v8.2", "v8.1", "v8"]),
        ("linux/arm64/v9", ["v9", "v8.5", "v8.4", "v8.3", "v8.2", "v8.1", "v8"]),
        ("linux/amd64", ["v1"]),
        ("linux/amd64/v3", ["v3", "v2", "v1"]),
        ("linux/amd64/v9", ["v9", "v1"]),
        ("linux/ppc64le/power9", ["power9", "power8"]),
        ("linux/riscv64", ["rva20u64"]),
        ("linux/s390x", [""]),
        ("linux/s390x/z15", ["z15", ""]),
    ],
)
def test_candidates_by_host(host: str, best_first: list[str]) -> None:
    """A host runs its own variant and the older ones, in that order."""
    assert list(parse(host).candidates()) == best_first


@pytest.mark.parametrize(
    ("host", "image", "rank"),
    [
        ("linux/arm/v7", "linux/arm/v7", 0),
        ("linux/arm/v7", "linux/arm", 0),
        ("linux/arm/v7", "linux/arm/v6", 1),
        ("linux/arm/v7", "linux/arm/v5", 2),
        ("linux/arm/v6", "linux/arm/v7", None),
        ("linux/arm64", "linux/arm64/v8", 0),
        ("linux/arm64/v8", "linux/arm64", 0),
        ("linux/arm64/v8", "linux/arm64/v8.0", 0),
        ("linux/arm64", "linux/arm64/v9", None),
        ("linux/arm64/v9", "linux/arm64", 6),
        ("linux/arm64", "linux/arm/v7", None),
        ("linux/amd64/v3", "linux/amd64/v3", 0),
        ("linux/amd64/v3", "linux/amd64/v2", 1),
        ("linux/amd64/v3", "linux/amd64", 2),
        ("linux/amd64/v3", "linux/amd64/v1", 2),
        ("linux/amd64", "linux/amd64/v2", None),
        ("linux/amd64", "linux/386", None),
        ("linux/amd64", "windows/amd64", None),
        ("linux/s390x", "linux/s390x", 0),
        ("linux/s390x", "linux/s390x/z15", None),
        ("linux/odd/x.0", "linux/odd/x.0", 0),
        ("windows(10.0.17763.1)/amd64", "windows(10.0.17763.999)/amd64", 0),
        ("windows(10.0.17763.1)/amd64", "windows(10.0.20348.1)/amd64", None),
        ("windows(10.0.17763)/amd64", "windows/amd64", 0),
        ("windows/amd64", "windows(10.0.17763)/amd64", 0),
        ("linux(5.10)/amd64", "linux(6.1)/amd64", 0),
        ("windows(+win32k)/amd64", "windows(+win32k)/amd64", 0),
        ("windows(+win32k)/amd64", "windows/amd64", 0),
        ("windows/amd64", "windows(+win32k)/amd64", None),
    ],
)
def test_rank_by_host(host: str, image: str, rank: int | None) -> None:
    """Variants by the specification's table; Windows by major, minor and build; features must all be there."""
    assert parse(host).rank(parse(image)) == rank
    assert parse(host).matches(parse(image)) is (rank is not None)


def test_host_is_this_machine() -> None:
    """The host's own platform is well formed and runs images for itself."""
    host = Platform.host()
    assert parse(str(host)) == host
    assert host.matches(Platform(host.os, host.architecture, host.variant))
    assert host == Platform.host()
    if python_platform.machine() == "x86_64":
        assert (host.os, host.architecture) == ("linux", "amd64")
        assert host.matches(Platform("linux", "amd64"))


V2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = "avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("", "v1"),
        (f"sse sse2 {V4}", "v1"),
        (V2, "v2"),
        (f"{V2} {V3}", "v3"),
        (f"{V4} {V3} {V2} rtm", "v4"),
        (V3, "v1"),
        (f"{V2} {V3[:-6]}", "v2"),
    ],
)
def test_processor_level_needs_all_its_flags(flags: str, level: str) -> None:
    """A level counts only with every flag of its own and of those below."""
    assert _host.level_of(flags.split()) == level


def test_processor_level_is_read_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from the flags of the kernel; other processors have none, nor a host that hides its flags."""
    read = _host.amd64_level.__wrapped__
    monkeypatch.setattr(python_platform, "machine", lambda: "aarch64")
    assert read() == ""
    monkeypatch.setattr(python_platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags\t\t: fpu {V2}\nbugs : none\n")
    assert read() == "v2"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\n")
    assert read() == ""

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert read() == ""
