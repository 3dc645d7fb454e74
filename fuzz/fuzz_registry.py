"""Fuzz target of what registries and environments write: challenges, ranges, tokens, errors, URLs, proxies."""

from __future__ import annotations

import contextlib

from layercache.errors import InvalidError
from layercache.registry._ecr_host import parse_ecr_host
from layercache.registry._proxy import Proxies
from layercache.registry._url import Url, UrlError
from layercache.registry._wire import (
    Headers,
    parse_challenges,
    parse_content_range,
    parse_problem,
    parse_retry_after,
    parse_scopes,
    parse_token,
    parse_warnings,
    plain,
)

__all__ = ["SEEDS", "TOKENS", "one"]

# The first byte only tells the seeds apart: every parser gets every input.
SEEDS = [
    b'c Negotiate YII=, Basic realm="x, \\"y", Bearer realm="https://a/token?x=1",service="s",scope="repository:a:pull"',
    b"r bytes 0-99/100",
    b"a Tue, 24 Nov 2026 09:00:00 GMT",
    b't {"access_token": "abc", "expires_in": 300}',
    b'e {"errors": [{"code": "DENIED", "message": "see https://a/b?X-Amz-Signature=c"}]}',
    b"e <?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>m</Message></Error>",
    b"u https://127.0.0.1:5000/v2/?a=b#c",
    b'w 299 - "quoted \\" text"',
    b"p http://user:pass@proxy.example:3128",
    b"|\xc3??:\xb9,",
    b"n123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
]
TOKENS = [
    b'"',
    b"\\",
    b",",
    b"=",
    b"Bearer ",
    b"realm=",
    b"bytes ",
    b"-",
    b"/",
    b"*",
    b"9" * 30,
    b"@",
    b"://",
    b"[::1]",
]
TOKENS += [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"null",
    b"\0",
    b"\r\n",
    b"\xff",
    b"?X-Amz-Signature=",
]


def one(data: bytes) -> None:
    """Parse one input; raise on anything but a value or a typed refusal."""
    body = data[1:]
    text = body.decode("latin-1")
    for challenge in parse_challenges([text]):
        parse_scopes(challenge.parameters.get("scope", ""))
    parse_content_range([text])
    parse_retry_after(text, now=0.0)
    parse_warnings([text])
    parse_ecr_host(text)
    token = parse_token(body)
    if token is not None and not (token.value.isprintable() and 60 <= token.lifetime <= 86400):
        raise AssertionError(f"{token!r}")
    problem = parse_problem(body, Headers([("x-request-id", text)]))
    if len(problem.message) > 400 or "canary" in plain(f"{text[:500]} https://a/?X-Amz-Signature=canary"):
        raise AssertionError(f"{problem!r}")
    try:
        url = Url.parse(text.strip())
    except UrlError:
        url = Url.parse("https://reg.example/")
    with contextlib.suppress(InvalidError):
        Proxies.of({"HTTPS_PROXY": text.replace("\0", ""), "NO_PROXY": text}).of_url(url)
