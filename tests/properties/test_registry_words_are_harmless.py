"""Law: whatever a registry writes into a header or a small body, reading it never fails and never leaks.

Also whatever stands in a docker config: the result is a credential, none, or a typed error.
"""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from layercache.control import Control
from layercache.errors import UnauthorizedError
from layercache.registry import Credential, DockerConfig
from layercache.registry._url import Url, UrlError, zone_of
from layercache.registry._wire import (
    Headers,
    parse_basic,
    parse_challenges,
    parse_content_range,
    parse_problem,
    parse_retry_after,
    parse_scopes,
    parse_token,
    parse_warnings,
    plain,
)

PIECES = st.lists(
    st.sampled_from(
        ['"', "\\", ",", "=", " ", "\t", "Bearer", "Basic", "realm", "x", "https://a/", "/", "-", "\x00", "\xff"]
    )
)
HEADER = st.one_of(st.text(max_size=200), PIECES.map("".join))
MEMBERS = ["auths", "credsStore", "credHelpers", "auth", "identitytoken", "username", "password", "reg.example:5000"]
MEMBERS += ["errors", "code", "message", "token", "access_token", "expires_in"]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=5),
    max_leaves=20,
)
BODY = st.one_of(st.binary(max_size=300), JSON.map(json.dumps).map(str.encode))


@given(st.lists(HEADER, max_size=3))
def test_challenges_are_read_whatever_they_are(values: list[str]) -> None:
    """Schemes are not empty, names are lower case, and each parameter occurs once."""
    for challenge in parse_challenges(values):
        assert challenge.scheme
        assert challenge.scheme == challenge.scheme.lower()
        assert all(name == name.lower() for name in challenge.parameters)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(max_size=30), min_size=1, max_size=4))
def test_a_challenge_that_was_quoted_comes_back(parameters: dict[str, str]) -> None:
    """Reading is the inverse of writing, with whatever in the quotes."""
    quoted = [
        f'{k}="{v.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}"' for k, v in parameters.items()
    ]

    (challenge,) = parse_challenges(["Bearer " + ", ".join(quoted)])

    assert challenge.parameters == parameters


@given(HEADER, st.floats(0, 1e10))
def test_hints_are_read_whatever_they_are(value: str, now: float) -> None:
    """No wait is negative, no range is out of order, no scope comes twice."""
    delay = parse_retry_after(value, now=now)
    assert delay is None or delay >= 0
    found = parse_content_range([value])
    assert found is None or 0 <= found.first <= found.last
    scopes = parse_scopes(value)
    assert len(set(scopes)) == len(scopes)
    parse_warnings([value])
    parse_basic(value)
    zone_of(value)


@given(BODY, st.lists(st.tuples(st.sampled_from(["x-request-id", "x"]), HEADER), max_size=2))
def test_error_bodies_are_read_whatever_they_are(body: bytes, headers: list[tuple[str, str]]) -> None:
    """What comes out is short and printable."""
    problem = parse_problem(body, Headers(headers))

    for text in (problem.code, problem.message, problem.request_id):
        assert len(text) <= 303
        assert all(c.isprintable() for c in text)


@given(BODY)
def test_token_replies_are_read_whatever_they_are(body: bytes) -> None:
    """A token fits into a header and lives for a minute to a day."""
    token = parse_token(body)

    assert token is None or (token.value.isprintable() and " " not in token.value and 60 <= token.lifetime <= 86400)


@given(st.one_of(HEADER, st.builds("https://{}{}".format, HEADER, HEADER)), HEADER)
def test_urls_are_urls_or_typed_errors(text: str, location: str) -> None:
    """One that was read can be sent: its parts are printable ASCII, and it reads back as itself."""
    for read in (lambda: Url.parse(text), lambda: Url.parse("https://reg.example/v2/x?y=z").join(location)):
        try:
            url = read()
        except UrlError:
            continue
        assert (url.authority + url.target).isascii()
        assert (url.authority + url.target).isprintable()
        assert " " not in url.authority + url.target
        assert Url.parse(f"{url.scheme}://{url.authority}{url.target}") == url


@given(st.text(max_size=50), st.from_regex(r"[A-Za-z0-9]{8,20}", fullmatch=True), st.text(max_size=50))
def test_a_signature_in_a_url_never_survives(before: str, secret: str, after: str) -> None:
    """Whatever stands around it."""
    text = plain(f"{before} https://h.example/p?X-Amz-Signature=9{secret}9&x=1 {after}", most=10_000)

    assert f"9{secret}9" not in text


@given(JSON)
def test_docker_configs_are_read_whatever_they_are(config: object) -> None:
    """A credential with something to show, none, or a typed error; helpers with odd names are never run."""
    environ = {"DOCKER_AUTH_CONFIG": json.dumps(config), "PATH": "/nonexistent"}
    try:
        found = DockerConfig(environ=environ).basic("reg.example:5000", control=Control())
    except UnauthorizedError:
        return
    assert found is None or (isinstance(found, Credential) and bool(found.password or found.identity))
