"""Headers and small bodies of registries: challenges, retry hints, ranges, errors, tokens, warnings."""

from __future__ import annotations

import pytest

from layercache.registry._wire import (
    Challenge,
    ContentRange,
    Headers,
    Problem,
    backoff,
    life_of,
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

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


# --- headers ---


def test_a_field_is_found_whatever_its_case_and_as_often_as_it_came() -> None:
    """Names ignore case; order and repetition are kept; values are not in the repr."""
    headers = Headers([("X-A", " 1 "), ("x-a", "2"), ("Location", "https://h/?X-Amz-Signature=s")])

    assert headers.all("x-A") == [" 1 ", "2"]
    assert headers.get("X-a") == "1"
    assert headers.get("absent") == ""
    assert "Signature" not in repr(headers)


@pytest.mark.parametrize(
    ("values", "size"),
    [(["5"], 5), ([" 5 "], 5), (["5", "5"], 5), (["5", "6"], None), (["-5"], None), (["5x"], None), ([], None)],
)
def test_a_length_counts_if_it_is_one_number(values: list[str], size: int | None) -> None:
    """Two different ones, signs and garbage are no length."""
    assert Headers([("Content-Length", value) for value in values]).size() == size


# --- challenges ---

BEARER = Challenge("bearer", {"realm": "https://a/token", "service": "s", "scope": "repository:x:pull,push"})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (['Bearer realm="https://a/token",service="s",scope="repository:x:pull,push"'], [BEARER]),
        (['BEARER  Realm = "https://a/token" , SERVICE=s,scope="repository:x:pull,push"'], [BEARER]),
        (['Basic realm="x, y"'], [Challenge("basic", {"realm": "x, y"})]),
        (['Basic realm="a \\"quoted\\" \\\\ one"'], [Challenge("basic", {"realm": 'a "quoted" \\ one'})]),
        (
            ['Negotiate, Basic realm="x, y", Bearer realm="r"'],
            [Challenge("negotiate"), Challenge("basic", {"realm": "x, y"}), Challenge("bearer", {"realm": "r"})],
        ),
        (["Negotiate YIIabc+/==, Basic realm=x"], [Challenge("negotiate"), Challenge("basic", {"realm": "x"})]),
        (["NTLM TlRM", "Basic realm=x"], [Challenge("ntlm"), Challenge("basic", {"realm": "x"})]),
        (["Basic"], [Challenge("basic")]),
        (["Basic,"], [Challenge("basic")]),
        (["Basic realm=x,realm=y"], [Challenge("basic", {"realm": "x"})]),
        (['Bearer realm="unterminated'], [Challenge("bearer", {"realm": "unterminated"})]),
        (['Bearer realm="odd\\'], [Challenge("bearer", {"realm": "odd"})]),
        (['Bearer realm=""'], [Challenge("bearer", {"realm": ""})]),
        (['"stray, Basic realm=x" Bearer realm=y'], [Challenge("bearer", {"realm": "y"})]),
        ([""], []),
        ([",,, "], []),
        (["=x"], [Challenge("x")]),
        (["\x00\xff()"], []),
    ],
)
def test_challenges_are_read(values: list[str], expected: list[Challenge]) -> None:
    """Every field, every challenge in it, quotes with escapes and commas; garbage is passed over."""
    assert parse_challenges(values) == expected


def test_scopes_of_one_repository_are_merged_and_sorted() -> None:
    """Actions come together; a scope that is no resource, as of ECR Public, stays as it is."""
    assert parse_scopes("repository:b:push,pull repository:a:pull repository:b:pull aws") == (
        "aws",
        "repository:a:pull",
        "repository:b:pull,push",
    )
    assert parse_scopes("") == ()


# --- tokens ---


@pytest.mark.parametrize(
    ("body", "value", "life"),
    [
        (b'{"token":"t"}', "t", 60),
        (b'{"access_token":"a"}', "a", 60),
        (b'{"token":"t","access_token":"a","expires_in":300}', "t", 300),
        (b'{"token":"","access_token":"a","expires_in":5}', "a", 60),
        (b'{"token":"t","expires_in":"900"}', "t", 900),
        (b'{"token":"t","expires_in":null}', "t", 60),
        (b'{"token":"t","expires_in":-1}', "t", 60),
        (b'{"token":"t","expires_in":true}', "t", 60),
        (b'{"token":"t","expires_in":1e99}', "t", 60),
        (b'{"token":"t","expires_in":9999999}', "t", 86400),
    ],
)
def test_a_token_is_read_with_its_life(body: bytes, value: str, life: float) -> None:
    """Both names; a missing, short or senseless life is 60 seconds, none is longer than a day."""
    token = parse_token(body)

    assert token is not None
    assert (token.value, token.lifetime) == (value, life)
    assert "'t'" not in repr(token)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"token":5}', b'{"token":"a\\r\\nX: y"}', b'{"token":"a b"}', b"\xff", b"[" * 10**5]
)
def test_what_holds_no_token_is_none(body: bytes) -> None:
    """Also a token that would end the header it goes into, and JSON of a hundred thousand levels."""
    assert parse_token(body) is None


# --- retry hints ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("999999", 999999.0),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
        ("Tuesday, 14-Nov-23 22:14:20 GMT", 60.0),
        ("Tue, 14 Nov 2023 22:13:20 GMT", None),
        ("Mon, 13 Nov 2023 00:00:00 GMT", None),
        ("abc", None),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("9" * 5000, None),
        ("Tue, 99 Nov 2023 22:14:20 GMT", None),
        ("Tue, 14 Nov 999999 22:14:20 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms(value: str, expected: float | None) -> None:
    """Seconds, or a date to come; a past date and garbage say nothing."""
    assert parse_retry_after(value, now=NOW) == expected


def test_backoff_doubles_up_to_its_cap_with_jitter() -> None:
    """From 0.2 s on, at most 30 s, at least a tenth of it by chance."""
    assert [backoff(n, 1.0) for n in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.8])
    assert backoff(1000, 1.0) == 30.0
    assert backoff(4, 0.0) <= 0.9 * backoff(4, 0.999)


# --- ranges ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["bytes 0-9/10"], ContentRange(0, 9, 10)),
        (["Bytes  5-5/*"], ContentRange(5, 5, None)),
        ([], None),
        (["bytes 0-9/10", "bytes 0-9/10"], None),
        (["octets 0-9/10"], None),
        (["bytes 9-0/10"], None),
        (["bytes 0-10/10"], None),
        (["bytes */10"], None),
        (["bytes 0-/10"], None),
        (["bytes -5-9/10"], None),
        (["bytes 0-9"], None),
        (["bytes 0-9/10 x"], None),
        (["bytes 0-" + "9" * 30 + "/*"], None),
        (["what"], None),
    ],
)
def test_a_content_range_is_read_or_is_none(values: list[str], expected: ContentRange | None) -> None:
    """Exactly one, in bytes, with its ends in order and within its total."""
    assert parse_content_range(values) == expected


# --- error bodies ---

S3 = b"""<?xml version="1.0"?>
<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><Token-0>SECRET</Token-0>
<RequestId>R1</RequestId><StringToSign>SECRET</StringToSign></Error>"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            b'{"errors":[{"code":"DENIED","message":"no pull","detail":{"a":1}}]}',
            Problem("DENIED", "no pull", "id"),
        ),
        (b'{"errors":[{"code":"TOOMANYREQUESTS"}]}', Problem("TOOMANYREQUESTS", "TOOMANYREQUESTS", "id")),
        (b'{"errors":[]}', Problem("", "", "id")),
        (b'{"details":"incorrect username or password"}', Problem("", "incorrect username or password", "id")),
        (b'{"error":"invalid_grant","error_description":"bad"}', Problem("invalid_grant", "bad", "id")),
        (b'{"message":"m"}', Problem("", "m", "id")),
        (b'{"errors":[{"code":5,"message":["x"]}]}', Problem("", "", "id")),
        (b'{"errors":["x"]}', Problem("", "", "id")),
        (b'"just text"', Problem("", "just text", "id")),
        (S3, Problem("ExpiredToken", "The provided token has expired.", "id")),
        (b"<html><head><title>502 Bad\n Gateway</title></head>...", Problem("", "502 Bad Gateway", "id")),
        (b"<p>nothing</p>", Problem("", "", "id")),
        (b"upstream timed out\nmore", Problem("", "upstream timed out", "id")),
        (b"", Problem("", "", "id")),
        (b"\xff\xfe\x00", Problem("", "\ufffd\ufffd", "id")),
        (b"[" * 100_000, Problem("", "[" * 300 + "...", "id")),
        (b'{"errors":[{"code":"A B","message":"x"}]}', Problem("", "x", "id")),
    ],
)
def test_an_error_body_of_any_kind_says_what_it_can(body: bytes, expected: Problem) -> None:
    """OCI JSON, other JSON, S3's XML, HTML, text, nothing, garbage."""
    assert parse_problem(body, Headers([("x-amzn-RequestId", "id")])) == expected


def test_a_request_id_comes_from_the_body_where_no_header_has_it() -> None:
    """S3's is in the XML."""
    assert parse_problem(S3, Headers()).request_id == "R1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://h/p?X-Amz-Signature=SECRET&b=SECRET now", "see https://h/p?... now"),
        ("at https://user:SECRET@h/p", "at https://h/p"),
        ("X-Amz-Signature=SECRET&x=1", "X-Amz-Signature=...&x=1"),
        ("Authorization: Bearer SECRET", "Authorization: ..."),
        ("refresh_token=SECRET", "refresh_token=..."),
        ("a\r\nb\x1b[31mc\x00d", "a b [31mc d"),
    ],
)
def test_foreign_text_is_made_plain(text: str, expected: str) -> None:
    """One line, no control characters, no query and no password of a URL."""
    assert plain(text) == expected


def test_foreign_text_is_short() -> None:
    """A message of a mebibyte does not become ours."""
    assert len(plain("x" * (1 << 20))) <= 303


# --- the rest ---


def test_warnings_of_the_specification_are_read() -> None:
    """Code 299 only; quotes may be escaped."""
    values = ['299 - "old \\"tag\\""', '110 anderson/1.3.37 "stale"', '299 - "a", 299 - "b"', "299 broken"]

    assert parse_warnings(values) == ['old "tag"', "a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dTpw", ("u", "p")),
        ("dTpwOnE=", ("u", "p:q")),
        ("dTo=", ("u", "")),
        ("OnA=", None),
        ("dQ==", None),
        ("!!!", None),
        ("", None),
        ("/////w==", None),
    ],
)
def test_an_auth_entry_is_split_at_its_first_colon(text: str, expected: tuple[str, str] | None) -> None:
    """Base64 of ``user:password``; anything else makes no sense."""
    assert parse_basic(text) == expected


@pytest.mark.parametrize(
    ("query", "life"),
    [
        ("X-Amz-Date=20251124T155900Z&X-Amz-Expires=200&X-Amz-Signature=x", 110.0),
        ("X-Amz-Date=20251124T160000Z&X-Amz-Expires=3600", 300.0),
        ("x-goog-date=20251124T160000Z&x-goog-expires=90", 60.0),
        ("Expires=1764000100&Signature=x&Key-Pair-Id=k", 70.0),
        ("sv=2023&se=2025-11-24T16%3A01%3A40Z&sig=x", 70.0),
        ("X-Amz-Date=20251124T150000Z&X-Amz-Expires=60", -3570.0),
        ("", 60.0),
        ("token=abc", 60.0),
        ("X-Amz-Expires=60", 0.0),
        ("X-Amz-Date=yesterday&X-Amz-Expires=60", 0.0),
        ("Expires=inf", 0.0),
        ("Expires=nan", 0.0),
        ("se=soon", 0.0),
    ],
)
def test_a_signed_url_says_how_long_it_may_be_used(query: str, life: float) -> None:
    """Less a margin, and not above five minutes; one that makes no sense is not kept."""
    assert life_of(query, 1_764_000_000.0) == life  # 2025-11-24T16:00:00Z
