"""References: every spelling of a name, and everything that is not one, told apart before any I/O."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from layercache.errors import InvalidReferenceError, UnsupportedError
from layercache.oci import Digest, Reference, Repository, Tag, parse_tag

DIGEST = Digest.of(b"manifest")
SHA512 = Digest.of(b"manifest", algorithm="sha512")


@pytest.mark.parametrize(
    ("text", "host", "name", "tag", "digest"),
    [
        ("127.0.0.1:5000/demo/serving:1.0", "127.0.0.1:5000", "demo/serving", "1.0", None),
        ("127.0.0.1:5000/demo", "127.0.0.1:5000", "demo", "latest", None),
        ("localhost/demo", "localhost", "demo", "latest", None),
        ("localhost:5000/demo:5000", "localhost:5000", "demo", "5000", None),
        ("[::1]:5000/demo:1", "[::1]:5000", "demo", "1", None),
        ("[0:0:0::1]/demo:1", "[::1]", "demo", "1", None),
        ("alpine", "docker.io", "library/alpine", "latest", None),
        ("alpine:3.20", "docker.io", "library/alpine", "3.20", None),
        ("user/app", "docker.io", "user/app", "latest", None),
        ("docker.io/alpine", "docker.io", "library/alpine", "latest", None),
        ("index.docker.io/user/app", "docker.io", "user/app", "latest", None),
        ("docker://ghcr.io/org/app:v1", "ghcr.io", "org/app", "v1", None),
        ("Registry.Example.COM:443/a__b/c-d.e--f", "registry.example.com:443", "a__b/c-d.e--f", "latest", None),
        (f"alpine@{DIGEST}", "docker.io", "library/alpine", None, DIGEST),
        (f"ghcr.io/o/a:v1@{DIGEST}", "ghcr.io", "o/a", "v1", DIGEST),
        (f"ghcr.io/o/a@{SHA512}", "ghcr.io", "o/a", None, SHA512),
        ("foo.bar", "docker.io", "library/foo.bar", "latest", None),
        ("docker.io:5000/foo", "docker.io:5000", "foo", "latest", None),
        ("index.docker.io:443/foo", "index.docker.io:443", "foo", "latest", None),
        ("x.y/z", "x.y", "z", "latest", None),
        ("xn--bcher-kva.example/z", "xn--bcher-kva.example", "z", "latest", None),
        ("a:65535/z:" + "T" * 128, "a:65535", "z", "T" * 128, None),
        ("a:1/z:_.-", "a:1", "z", "_.-", None),
        (
            "123456789012.dkr.ecr.us-west-2.amazonaws.com/lmi:0.30",
            "123456789012.dkr.ecr.us-west-2.amazonaws.com",
            "lmi",
            "0.30",
            None,
        ),
    ],
)
def test_references_are_read(text: str, host: str, name: str, tag: str | None, digest: Digest | None) -> None:
    """Hosts, defaults, ports, tags and digests, as the field writes them."""
    found = Reference.parse(text)
    assert found == Reference(Repository(host, name), None if tag is None else Tag(tag), digest)
    assert Reference.parse(str(found)) == found


BAD = [
    "",
    " ",
    "/",
    ":",
    "@",
    "alpine ",
    "alpine\n",
    "al pine",
    "alpine:",
    "alpine:" + "t" * 129,
    "alpine:-x",
    "alpine:.x",
    "alpine:a/b",
    "alpine:\u00e9",
    "alpine:1:2",
    "alpine@",
    "alpine@sha256:",
    "alpine@sha256:../../../x",
    "alpine@sha256:" + "A" * 64,
    "alpine@sha256:" + "a" * 63,
    f"alpine@{DIGEST}@{DIGEST}",
    f"@{DIGEST}",
    str(DIGEST),
    str(SHA512),
    DIGEST.encoded,
    f"{DIGEST.encoded}:tag",
    "sha256:abc",
    "Alpine",
    "user/App",
    "User/app",
    "a//b",
    "/a",
    "a/",
    "a/..",
    "../a",
    "a/./b",
    "%2e%2e/a",
    "a/%2e%2e/b",
    "a/b%2fc",
    "a/b?c",
    "a/b#c",
    "a\\b",
    "a/b\0",
    "a_-b",
    "a..b",
    "-a",
    "a-",
    "a___b",
    "http://ghcr.io/a",
    "https://ghcr.io/a/b:c",
    "docker://",
    "docker://docker://a",
    "ghcr.io/",
    "ghcr.io/:tag",
    "ghcr.io./a",
    ".ghcr.io/a",
    "-x.io/a",
    "x-.io/a",
    "a_b.io/a",
    "host:/a",
    "host:0/a",
    "host:00080/a",
    "host:65536/a",
    "host:99999999999/a",
    "host:80:80/a",
    "host:x/a",
    "host:\u0661/a",
    "[::1/a",
    "::1/a",
    "[::1]x/a",
    "[::1]:/a",
    "[::1%25eth0]:5000/a",
    "[127.0.0.1]/a",
    "[:::]/a",
    "[]/a",
    "127.0.0.1:5000/",
    "user@ghcr.io/a",
    "user:secret@ghcr.io/a",
    "x.io/" + "a" * 251,
    "a" * 1_000_000,
    "a-" * 500_000,
    "a/" * 500_000,
    "x.io/" + "a--" * 300_000,
    "." * 1_000_000 + "/a",
]


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:40]))
def test_what_is_no_reference_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traversal, escapes, upper case, empty parts, URLs, lone digests: a typed error, and no socket was opened."""

    def opened(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", opened)
    with pytest.raises(InvalidReferenceError):
        Reference.parse(text)


@pytest.mark.parametrize("value", [None, 5, b"alpine", ["alpine"]])
def test_what_is_no_text_is_refused(value: object) -> None:
    """A value of another type gives the same typed error."""
    with pytest.raises(InvalidReferenceError):
        Reference.parse(value)  # type: ignore[arg-type]
    with pytest.raises(InvalidReferenceError):
        Repository.parse(value)  # type: ignore[arg-type]
    with pytest.raises(InvalidReferenceError):
        parse_tag(value)  # type: ignore[arg-type]


def test_digest_of_an_unknown_algorithm_is_unsupported() -> None:
    """The reference is well formed; we cannot verify it."""
    with pytest.raises(UnsupportedError):
        Reference.parse("alpine@blake3:" + "a" * 64)


def test_host_and_name_share_255_characters() -> None:
    """The longest name that clients agree on is read, one more character is refused."""
    assert len(str(Repository.parse("x.io/" + "a" * 250))) == 255
    with pytest.raises(InvalidReferenceError, match="255"):
        Repository.parse("x.io/" + "a" * 251)
    with pytest.raises(InvalidReferenceError, match="255"):
        Repository.parse("a" * 250)  # docker.io/library/ counts


@pytest.mark.parametrize(
    ("text", "api_host"),
    [
        ("alpine", "registry-1.docker.io"),
        ("index.docker.io/a/b", "registry-1.docker.io"),
        ("ghcr.io/a", "ghcr.io"),
        ("[::1]:5000/a", "[::1]:5000"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000"),
    ],
)
def test_api_host_is_where_the_registry_lives(text: str, api_host: str) -> None:
    """Only Docker's hub has another host for its API than in its names."""
    assert Repository.parse(text).api_host == api_host


@pytest.mark.parametrize("text", ["ghcr.io/a/b:tag", f"ghcr.io/a@{DIGEST}", "docker://ghcr.io/a", "a:1"])
def test_repository_has_no_tag(text: str) -> None:
    """A repository is a name alone."""
    with pytest.raises(InvalidReferenceError):
        Repository.parse(text)


@pytest.mark.parametrize(
    ("host", "name"),
    [("", "a"), ("GHCR.io", "a"), ("ghcr.io", "A"), ("ghcr.io", ""), ("index.docker.io", "a"), (None, "a"), ("x", 5)],
)
def test_constructors_check_like_the_parser(host: Any, name: Any) -> None:
    """No invalid or second spelling can be built around the parser."""
    with pytest.raises(InvalidReferenceError):
        Repository(host, name)


def test_reference_names_something() -> None:
    """Neither tag nor digest names no image; a tag is checked wherever it comes from."""
    repository = Repository("ghcr.io", "a")
    with pytest.raises(InvalidReferenceError):
        Reference(repository)
    with pytest.raises(InvalidReferenceError):
        Reference(repository, Tag("../x"))


def test_digest_decides_over_the_tag() -> None:
    """What is asked for is the digest where there is one; pinning keeps the tag for people to read."""
    found = Reference.parse("ghcr.io/a:v1")
    assert found.target == "v1"
    pinned = found.with_digest(DIGEST)
    assert pinned.target == DIGEST
    assert str(pinned) == f"ghcr.io/a:v1@{DIGEST}"
    assert found.digest is None


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@ghcr.io/a:v1",
        "user:hunter2@ghcr.io/a",
        "user:hunter2@ghcr.io",
        "user:hunter2@ghcr.io:5000",
        "user:hun@hunter2@ghcr.io/a",
        f"https://user:hunter2@ghcr.io/a@{DIGEST}",
        "https://ghcr.io/a?token=hunter2",
        "ghcr.io/a:v1?X-Amz-Signature=hunter2",
        "ghcr.io/a@sha256:abc?hunter2",
    ],
)
def test_errors_hold_no_password(text: str) -> None:
    """What a user pasted by mistake is not repeated: neither in the message nor in its cause."""
    with pytest.raises((InvalidReferenceError, UnsupportedError)) as caught:
        Reference.parse(text)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in f"{error} {vars(error)}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_errors_say_what_to_do() -> None:
    """The message names the input and how it should have been written."""
    for text, advice in [
        ("https://ghcr.io/a", "leave out http"),
        ("Alpine", "lower-case"),
        (str(DIGEST), "NAME@sha256"),
        ("alpine@sha256:abc", "NAME@sha256"),
    ]:
        with pytest.raises(InvalidReferenceError, match=advice) as caught:
            Reference.parse(text)
        assert caught.value.value == repr(text)
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.parse("ghcr.io/a?b=c")
    assert caught.value.value == "'ghcr.io/a?...'"
