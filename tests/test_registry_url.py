"""URLs: parsed strictly, joined, never printed with their query; addresses in zones."""

from __future__ import annotations

import pytest

from layercache.registry._url import Url, UrlError, Zone, zone_of

SIGNED = "https://bucket.s3.us-west-2.amazonaws.com/a/b%2Fc?X-Amz-Signature=secret&x=1"


def test_a_url_keeps_its_query_for_the_transport_only() -> None:
    """Neither str nor repr nor an f-string holds the query; ``target`` does, unchanged."""
    url = Url.parse(SIGNED)

    assert url.target == "/a/b%2Fc?X-Amz-Signature=secret&x=1"
    assert str(url) == "https://bucket.s3.us-west-2.amazonaws.com/a/b%2Fc?..."
    assert "secret" not in f"{url} {url!r} {[url]}"


@pytest.mark.parametrize(
    ("text", "authority", "target"),
    [
        ("http://Host.Example", "host.example", "/"),
        ("HTTPS://h:443/x", "h", "/x"),
        ("http://h:443/x", "h:443", "/x"),
        ("http://[::1]:5000/v2/", "[::1]:5000", "/v2/"),
        ("http://h/a#part", "h", "/a"),
        ("http://h/?", "h", "/"),
        ('http://h/a b|c"d', "h", "/a%20b%7Cc%22d"),
        ("http://h/\u00fc", "h", "/%FC"),
    ],
)
def test_a_url_is_read(text: str, authority: str, target: str) -> None:
    """Case, default ports, IPv6, fragments and loosely written characters come out in one form."""
    url = Url.parse(text)

    assert (url.authority, url.target) == (authority, target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/v2/",
        "//host/x",
        "file:///etc/passwd",
        "ftp://h/x",
        "gopher://h/",
        "javascript:alert(1)",
        "https://user:pass@h/x",
        "https://@h/x",
        "https:///x",
        "https://h:99999/",
        "https://h:0/",
        "https://h:x/",
        "https://[::1/x",
        "https://[fe80::1%25eth0]/x",
        "https://h\\@evil/x",
        "https://h/\r\nHost: evil",
        "https://h\x00/",
        "https://a..b/",
        "https://-h/",
        "https://h!/",
        "https://h/" + "x" * 20_000,
    ],
)
def test_what_is_no_url_of_a_host_is_refused_without_repeating_it(text: str) -> None:
    """Other schemes, user names, control characters, wrong hosts and ports: a typed error that does not quote it."""
    with pytest.raises(UrlError) as caught:
        Url.parse(text)

    assert len(str(caught.value)) < 80


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b?q=1", "https://reg.example/b"),
        ("b", "https://reg.example/v2/b"),
        ("../up", "https://reg.example/up"),
        ("//other.example/x", "https://other.example/x"),
        ("https://reg.example:5000/x", "https://reg.example:5000/x"),
        ("?only=query", "https://reg.example/v2/a"),
    ],
)
def test_a_location_is_relative_to_the_request(location: str, expected: str) -> None:
    """RFC 3986 section 5."""
    assert str(Url.parse("https://reg.example/v2/a?old=1").join(location)).removesuffix("?...") == expected


def test_origins_differ_in_scheme_host_or_port() -> None:
    """What credentials do not cross."""
    origins = {Url.parse(text).origin for text in ("http://h/", "https://h/", "https://h:8443/", "https://g/")}

    assert len(origins) == 4
    assert Url.parse("https://h:443/a").origin == Url.parse("https://H/b?c").origin


@pytest.mark.parametrize(
    ("address", "zone"),
    [
        ("8.8.8.8", Zone.PUBLIC),
        ("2606:4700::1111", Zone.PUBLIC),
        ("10.1.2.3", Zone.PRIVATE),
        ("172.31.0.1", Zone.PRIVATE),
        ("192.168.1.1", Zone.PRIVATE),
        ("100.64.0.1", Zone.PRIVATE),
        ("fd12::1", Zone.PRIVATE),
        ("127.0.0.1", Zone.LOOPBACK),
        ("127.8.9.10", Zone.LOOPBACK),
        ("::1", Zone.LOOPBACK),
        ("::ffff:127.0.0.1", Zone.LOOPBACK),
        ("::127.0.0.1", Zone.LOOPBACK),
        ("64:ff9b::7f00:1", Zone.LOOPBACK),
        ("2002:7f00:1::", Zone.LOOPBACK),
        ("::ffff:10.0.0.1", Zone.PRIVATE),
        ("64:ff9b::808:808", Zone.PUBLIC),
        ("169.254.169.254", None),
        ("::ffff:169.254.169.254", None),
        ("fd00:ec2::254", None),
        ("100.100.100.200", None),
        ("168.63.129.16", None),
        ("fe80::1", None),
        ("fe80::1%eth0", None),
        ("0.0.0.0", None),
        ("::", None),
        ("255.255.255.255", None),
        ("224.0.0.1", None),
        ("ff02::1", None),
        ("240.0.0.1", None),
        ("192.0.2.1", None),
        ("reg.example", None),
        ("2130706433", None),
        ("", None),
    ],
)
def test_an_address_is_in_a_zone(address: str, zone: Zone | None) -> None:
    """Metadata, link-local, multicast, unspecified and reserved addresses are in none, however they are dressed."""
    assert zone_of(address) is zone
