"""Conversations with a registry, without a socket: what is asked, in which order, and what is made of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from layercache.errors import (
    DeniedError,
    IntegrityError,
    InvalidError,
    InvalidManifestError,
    LayerCacheError,
    LimitError,
    NotFoundError,
    PolicyError,
    RateLimitedError,
    RegistryError,
    UnauthorizedError,
    UnreachableError,
    UnsupportedError,
)
from layercache.oci import MANIFEST_TYPES, OCI_INDEX, OCI_MANIFEST, Descriptor, Digest, Reference, parse_tag
from layercache.registry._effects import Grant, LostError, Send
from layercache.registry._flow import document, fetch, resolve
from layercache.registry._url import Zone
from tests.registry_script import NOW, REFERENCE, REPOSITORY, SITE, Reply, Script, Scripted, asked_range, blob, partial

CONFIG = blob(b"{}")
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": str(OCI_MANIFEST),
        "config": CONFIG.to_json(),
        "layers": [],
        "something": {"new": True},
    }
).encode()
DIGEST = Digest.of(MANIFEST)
TAG = parse_tag("1")
TYPED = {"Content-Type": str(OCI_MANIFEST)}
FULL = {**TYPED, "Content-Length": str(len(MANIFEST)), "Docker-Content-Digest": str(DIGEST)}
DATA = bytes(range(256)) * 20_000  # five pieces
BLOB = blob(DATA)
RESET = LostError("reg.example: the connection was reset")
MIB = 1 << 20


def found(**headers: str) -> Reply:
    return Reply(200, {**TYPED, **headers}, MANIFEST)


def refused(status: int, code: str = "", message: str = "", **headers: str) -> Reply:
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


# --- resolve ---


def test_a_tag_is_resolved_by_one_head() -> None:
    """Where HEAD gives type, digest and length, nothing else is asked."""
    script = Script(Reply(200, FULL))

    descriptor = script.run(resolve(SITE, REFERENCE))

    assert descriptor == Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=len(MANIFEST))
    assert script.paths == ["HEAD /v2/demo/x/manifests/1"]


def test_every_manifest_request_accepts_all_types_and_identity_and_has_no_range() -> None:
    """A registry that does not see the stored type in Accept may convert it, which changes the digest."""
    script = Script(Reply(405), found())

    script.run(resolve(SITE, REFERENCE))

    for send in script.sent:
        assert send.headers["Accept"].split(", ") == [str(kind) for kind in MANIFEST_TYPES]
        assert send.headers["Accept-Encoding"] == "identity"
        assert "Range" not in send.headers


@pytest.mark.parametrize(
    "head",
    [
        Reply(404),
        Reply(405),
        Reply(400),
        Reply(501),
        Reply(200, {name: value for name, value in FULL.items() if name != "Docker-Content-Digest"}),
        Reply(200, {name: value for name, value in FULL.items() if name != "Content-Length"}),
        Reply(200, {**FULL, "Content-Type": "text/plain"}),
        Reply(200, {**FULL, "Content-Type": ""}),
        Reply(200, {**FULL, "Docker-Content-Digest": "sha256:../../x"}),
        Reply(200, {**FULL, "Docker-Content-Digest": "blake3:" + "a" * 64}),
        Reply(200, {**FULL, "Content-Length": "a lot"}),
    ],
)
def test_a_head_that_does_not_suffice_is_followed_by_a_get(head: Reply) -> None:
    """No HEAD, or one without what is needed: the body is fetched and hashed."""
    script = Script(head, found())

    assert script.run(resolve(SITE, REFERENCE)).digest == DIGEST
    assert script.paths == ["HEAD /v2/demo/x/manifests/1", "GET /v2/demo/x/manifests/1"]


def test_a_refused_head_is_explained_by_a_get_and_keeps_its_status() -> None:
    """HEAD has no body; the text of the GET's error appears, under the HEAD's status."""
    reason = refused(401, "UNAUTHORIZED", "pull needs a licence")
    script = Script(Reply(403), reason, reason)

    with pytest.raises(DeniedError, match="pull needs a licence") as caught:
        script.run(resolve(SITE, REFERENCE))

    assert (caught.value.status, caught.value.code) == (403, "UNAUTHORIZED")


def test_a_refusal_of_both_says_why() -> None:
    """The same status twice: the GET's own error."""
    script = Script(Reply(403), refused(403, "DENIED", "not for you"))

    with pytest.raises(DeniedError, match="403 DENIED: not for you") as caught:
        script.run(resolve(SITE, REFERENCE))

    assert (caught.value.host, caught.value.status, caught.value.code) == ("reg.example", 403, "DENIED")


def test_an_absent_tag_is_not_found() -> None:
    """Absence is the one error that is a miss."""
    with pytest.raises(NotFoundError, match=r"manifest demo/x:1.*MANIFEST_UNKNOWN"):
        Script(Reply(404), refused(404, "MANIFEST_UNKNOWN")).run(resolve(SITE, REFERENCE))


def test_a_rate_limited_head_is_not_followed_by_a_get() -> None:
    """That would be one more request to a host that has too many."""
    script = Script(Reply(429, {"Retry-After": "300"}))

    with pytest.raises(RateLimitedError):
        script.run(resolve(SITE, REFERENCE))

    assert len(script.sent) == 1


def test_a_pinned_reference_keeps_its_digest_whatever_the_header_says() -> None:
    """Another digest of the same algorithm in the header is a contradiction; one of another algorithm is ignored."""
    pinned = Reference(REPOSITORY, TAG, DIGEST)
    other = {**FULL, "Docker-Content-Digest": str(Digest.of(MANIFEST, algorithm="sha512"))}
    wrong = {**FULL, "Docker-Content-Digest": str(Digest.of(b"other"))}

    assert Script(Reply(200, other)).run(resolve(SITE, pinned)).digest == DIGEST
    with pytest.raises(IntegrityError):
        Script(Reply(200, wrong)).run(resolve(SITE, pinned))


def test_the_length_of_a_head_is_a_claim_that_the_document_corrects() -> None:
    """Proxies that compress on the way make it differ (oras-go #1176); size and digest of the body count."""
    claimed = Script(Reply(200, {**FULL, "Content-Length": "500"})).run(resolve(SITE, REFERENCE))
    proven = Script(found()).run(document(SITE, REPOSITORY, claimed.digest)).descriptor

    assert (claimed.size, proven.size) == (500, len(MANIFEST))


# --- documents ---


@pytest.mark.parametrize(
    "headers",
    [
        TYPED,
        FULL,
        {"Content-Type": f"{OCI_MANIFEST}; charset=utf-8"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/octet-stream"},
        {},
        {**TYPED, "Docker-Content-Digest": str(Digest.of(b"other"))},
        {**TYPED, "Docker-Content-Digest": str(Digest.of(MANIFEST, algorithm="sha512"))},
    ],
)
def test_a_document_by_digest_is_proven_by_its_bytes_alone(headers: dict[str, str]) -> None:
    """Headers about type and digest may be absent, vague or wrong; the bytes are those asked for."""
    got = Script(Reply(200, headers, MANIFEST)).run(document(SITE, REPOSITORY, DIGEST))

    assert got.descriptor == Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=len(MANIFEST))
    assert got.raw == MANIFEST


def test_other_bytes_than_those_asked_for_are_refused_though_the_header_fits_them() -> None:
    """The header of the same reply proves nothing (CVE-2025-24882)."""
    other = MANIFEST + b" "
    reply = Reply(200, {**TYPED, "Docker-Content-Digest": str(Digest.of(other))}, other)

    with pytest.raises(IntegrityError) as caught:
        Script(reply).run(document(SITE, REPOSITORY, DIGEST))

    assert (caught.value.expected, caught.value.actual) == (str(DIGEST), str(Digest.of(other)))


def test_a_digest_is_checked_with_its_own_algorithm() -> None:
    """sha512 asked for is sha512 compared."""
    digest = Digest.of(MANIFEST, algorithm="sha512")

    assert Script(found()).run(document(SITE, REPOSITORY, digest)).descriptor.digest == digest


def test_a_document_by_tag_gets_the_digest_of_its_bytes() -> None:
    """ECR sends no digest header with a GET; one that is there must fit, also with sha512."""
    long = Digest.of(MANIFEST, algorithm="sha512")

    def by_tag(**headers: str) -> Digest:
        return Script(Reply(200, {**TYPED, **headers}, MANIFEST)).run(document(SITE, REPOSITORY, TAG)).descriptor.digest

    assert by_tag() == DIGEST
    assert by_tag(**{"Docker-Content-Digest": str(DIGEST)}) == DIGEST
    assert by_tag(**{"Docker-Content-Digest": str(long)}) == long
    assert by_tag(**{"Docker-Content-Digest": "nonsense"}) == DIGEST
    with pytest.raises(IntegrityError):
        by_tag(**{"Docker-Content-Digest": str(Digest.of(b"other"))})


def test_a_contradicting_type_is_refused_by_tag_and_outranked_by_a_descriptor() -> None:
    """image-spec media-types.md, "Media Type Conflicts"."""
    reply = Reply(200, {"Content-Type": "application/vnd.docker.distribution.manifest.v2+json"}, MANIFEST)
    expected = Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=len(MANIFEST))

    with pytest.raises(InvalidManifestError):
        Script(reply).run(document(SITE, REPOSITORY, TAG))
    got = Script(reply).run(document(SITE, REPOSITORY, DIGEST, expected=expected))
    assert got.descriptor.media_type == OCI_MANIFEST


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    ],
)
def test_schema_1_is_unsupported_not_damaged(kind: str) -> None:
    """Its digest is not that of its bytes; the error must not say so."""
    reply = Reply(200, {"Content-Type": kind}, b'{"schemaVersion":1}')

    with pytest.raises(UnsupportedError, match="schema 1"):
        Script(reply).run(document(SITE, REPOSITORY, DIGEST))


def test_manifest_and_index_in_one_are_refused_under_either_type() -> None:
    """CVE-2021-41190."""
    raw = json.dumps({"schemaVersion": 2, "manifests": [], "layers": [], "config": CONFIG.to_json()}).encode()

    for kind in (OCI_INDEX, OCI_MANIFEST):
        with pytest.raises(InvalidManifestError):
            Script(Reply(200, {"Content-Type": str(kind)}, raw)).run(document(SITE, REPOSITORY, TAG))


def test_a_manifest_kept_as_a_blob_is_found_after_a_404() -> None:
    """The fallback of containerd, for digests only."""
    script = Script(Reply(404), Reply(200, {"Content-Type": "application/octet-stream"}, MANIFEST))

    assert script.run(document(SITE, REPOSITORY, DIGEST)).descriptor.media_type == OCI_MANIFEST
    assert script.paths == [f"GET /v2/demo/x/manifests/{DIGEST}", f"GET /v2/demo/x/blobs/{DIGEST}"]


@pytest.mark.parametrize(
    "reply", [Reply(500), Reply(401), Reply(403), Reply(429), Reply(410), RESET, Reply(503, {"Retry-After": "1"})]
)
def test_nothing_but_a_404_leads_to_the_blobs(reply: Scripted) -> None:
    """After a passing failure the same bytes would be taken for something else (containerd #13017)."""
    script = Script(reply, repeat=True)

    with pytest.raises(RegistryError):
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert not any("/blobs/" in path for path in script.paths)


def test_a_tag_never_leads_to_the_blobs() -> None:
    """A blob has no tag."""
    script = Script(Reply(404))

    with pytest.raises(NotFoundError):
        script.run(document(SITE, REPOSITORY, TAG))


@pytest.mark.parametrize("declared", [True, False])
def test_a_document_over_four_mebibytes_is_an_error_not_a_cut(declared: bool) -> None:
    """A length says so before a byte is read; without one, one byte over the cap is read and no more."""
    size = 4 * MIB + 1
    headers = {**TYPED, "Content-Length": str(size)} if declared else TYPED
    script = Script(Reply(200, headers, [b"x" * MIB] * 100))

    with pytest.raises(LimitError, match="4194304"):
        script.run(document(SITE, REPOSITORY, TAG))

    assert script.received == (0 if declared else size)


def test_a_document_may_be_exactly_four_mebibytes() -> None:
    """The cap itself is allowed."""
    raw = MANIFEST + b" " * (4 * MIB - len(MANIFEST))

    assert Script(Reply(200, TYPED, raw)).run(document(SITE, REPOSITORY, TAG)).descriptor.size == 4 * MIB


@pytest.mark.parametrize("raw", [MANIFEST + b" ", MANIFEST[:-1]])
def test_a_document_of_another_size_than_its_descriptor_is_refused(raw: bytes) -> None:
    """At most one byte more than the descriptor says is read."""
    expected = Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=len(MANIFEST))
    script = Script(Reply(200, TYPED, raw + b" " * 100 if len(raw) > len(MANIFEST) else raw))

    with pytest.raises(IntegrityError, match=r"too many bytes|wrong size"):
        script.run(document(SITE, REPOSITORY, DIGEST, expected=expected))

    assert script.received <= len(MANIFEST) + 1


def test_a_document_that_breaks_off_is_asked_for_again() -> None:
    """From its start: documents are never asked for in ranges."""
    script = Script(Reply(200, TYPED, [MANIFEST[:10], RESET]), found())

    assert script.run(document(SITE, REPOSITORY, DIGEST)).raw == MANIFEST
    assert all(asked_range(send) is None for send in script.sent)


def test_a_document_that_always_breaks_off_is_given_up() -> None:
    """Three times, then a typed error."""
    script = Script(Reply(200, TYPED, (MANIFEST[:10], RESET)), repeat=True)

    with pytest.raises(UnreachableError, match="reset"):
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert len(script.sent) == 3


@pytest.mark.parametrize("body", [MANIFEST, b"\x1f\x8b"])
def test_a_content_coding_nobody_asked_for_is_refused(body: bytes) -> None:
    """The digest is over the stored bytes; what a proxy makes of them is not decoded, so it cannot be a bomb."""
    reply = Reply(200, {**TYPED, "Content-Encoding": "gzip"}, body)
    script = Script(reply)

    with pytest.raises(RegistryError, match="content coding"):
        script.run(document(SITE, REPOSITORY, TAG))

    assert script.received == 0


# --- authorisation ---


def bearer(token: str = "t") -> Grant:
    return Grant("Bearer", f"Bearer {token}")


CHALLENGE = {"WWW-Authenticate": 'Bearer realm="https://reg.example/token",service="s",scope="aws"'}


def test_a_challenge_is_answered_once_and_the_request_repeated() -> None:
    """The challenges, what was shown, and where the refusal came from go to who has the credentials."""
    first, second = bearer("old"), bearer("new")
    script = Script(Reply(401, CHALLENGE, zone=Zone.PRIVATE), found(), grants=[first, second])

    script.run(document(SITE, REPOSITORY, DIGEST))

    up_front, refusal = script.asked
    assert (up_front.repository, up_front.challenges) == ("demo/x", None)
    assert refusal.challenges is not None
    assert refusal.challenges[0].parameters["scope"] == "aws"
    assert (refusal.refused, refusal.zone) == (first, Zone.PRIVATE)
    assert [send.grant for send in script.sent] == [first, second]


@pytest.mark.parametrize(
    ("reply", "again"),
    [
        (refused(401, "UNAUTHORIZED", ""), True),
        (refused(403, "DENIED", "Your authorization token has expired. Reauthenticate and try again."), True),
        (refused(400, "DENIED", "Your Authorization Token is invalid."), True),
        (refused(403, "DENIED", "requested access to the resource is denied"), False),
        (refused(400, "NAME_INVALID", "bad"), False),
        (refused(400, "DENIED", "other"), False),
    ],
)
def test_a_refusal_of_the_grant_is_renewed_once_and_no_other(reply: Reply, again: bool) -> None:
    """401; an expired token of ECR (403) and of ECR Public (400); a plain 403 or 400 is final at once."""
    script = Script(reply, repeat=True, grants=[bearer("1"), bearer("2"), bearer("3")])

    with pytest.raises(RegistryError):
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert len(script.sent) == (2 if again else 1)


def test_without_a_grant_a_talk_of_expiry_is_final() -> None:
    """Nothing was shown that could be renewed."""
    script = Script(refused(403, "DENIED", "your token has expired"), repeat=True)

    with pytest.raises(DeniedError):
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert len(script.sent) == 1


def test_what_the_server_repeats_of_the_grant_is_taken_out() -> None:
    """Neither the message nor the arguments of the error hold the token or the password."""
    grant = Grant("Basic", "Basic dTpjYW5hcnk=", secrets=("canary-password",))
    reply = refused(400, "X", "you sent dTpjYW5hcnk= that is canary-password at https://h/?sig=canary-password")

    with pytest.raises(RegistryError) as caught:
        Script(reply, grants=[grant]).run(document(SITE, REPOSITORY, DIGEST))

    text = f"{caught.value} {caught.value!r} {caught.value.args}"
    assert "canary" not in text
    assert "dTpjYW5hcnk=" not in text


# --- redirects ---


def location(to: str, status: int = 307, zone: Zone | None = Zone.PUBLIC) -> Reply:
    return Reply(status, {"Location": to}, b"moved", zone=zone)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_without_credentials(status: int) -> None:
    """Scheme, host and port are the bound; the query arrives unchanged."""
    grant = bearer()
    script = Script(location("https://s3.example/b?X-Amz-Signature=s", status), Reply(200, {}, DATA), grants=[grant])

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert [send.grant for send in script.sent] == [grant, None]
    assert script.sent[1].url.target == "/b?X-Amz-Signature=s"
    assert script.data == DATA


@pytest.mark.parametrize(
    "elsewhere", ["https://s3.example/b", "https://reg.example:8443/b", "https://reg.example.evil.example/b"]
)
def test_credentials_do_not_come_back_after_they_were_left(elsewhere: str) -> None:
    """There and back again: the second visit of the registry is anonymous too."""
    script = Script(location(elsewhere), location("https://reg.example/again"), Reply(200, {}, DATA), grants=[bearer()])

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert [send.grant is None for send in script.sent] == [False, True, True]


def test_credentials_stay_within_the_registry() -> None:
    """A relative redirect of the same origin keeps them."""
    grant = bearer()
    script = Script(location("/elsewhere"), Reply(200, {}, DATA), grants=[grant])

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert [send.grant for send in script.sent] == [grant, grant]
    assert str(script.sent[1].url) == "https://reg.example/elsewhere"


def test_a_challenge_of_another_host_gets_nothing() -> None:
    """No exchange, no credentials; the registry is asked once more for a better redirect, then it is an error.

    CVE-2020-15157; go-containerregistry #2349.
    """
    attack = Reply(401, {"WWW-Authenticate": 'Bearer realm="https://evil.example/token"'})
    script = Script(
        location("https://evil.example/b"), attack, location("https://evil.example/b"), attack, grants=[bearer()]
    )

    with pytest.raises(UnauthorizedError, match=r"evil\.example answered 401") as caught:
        script.run(fetch(SITE, REPOSITORY, BLOB))

    assert caught.value.host == "evil.example"
    assert len(script.asked) == 1
    assert [send.grant is None for send in script.sent] == [False, True, False, True]


def test_the_reach_of_a_redirect_narrows_with_every_host() -> None:
    """A loopback registry may lead to loopback; once a public host was passed, only public ones follow."""
    hops = [
        location("https://a.example/", zone=Zone.LOOPBACK),
        location("https://b.example/", zone=Zone.PRIVATE),
        location("https://c.example/", zone=Zone.PUBLIC),
        location("https://d.example/", zone=Zone.LOOPBACK),
        Reply(200, {}, DATA),
    ]
    script = Script(*hops)

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert [send.reach for send in script.sent] == [None, Zone.LOOPBACK, Zone.PRIVATE, Zone.PUBLIC, Zone.PUBLIC]


def test_a_redirect_to_the_registry_itself_is_not_bounded() -> None:
    """It was allowed to be where it is by who configured it."""
    script = Script(location("https://a.example/"), location("https://reg.example/x"), Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert [send.reach for send in script.sent] == [None, Zone.PUBLIC, None]


def test_a_host_in_no_zone_leads_to_public_hosts_only() -> None:
    """A registry on a link-local address is not a licence for link-local redirects."""
    script = Script(location("https://a.example/", zone=None), Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.sent[1].reach is Zone.PUBLIC


@pytest.mark.parametrize(
    "to",
    [
        "http://reg.example/x",
        "http://other.example/",
        "ftp://h/",
        "file:///etc/passwd",
        "https://u:p@h/",
        "https://h:x/",
    ],
)
def test_an_unsafe_location_is_refused_without_quoting_it(to: str) -> None:
    """From https to http, another scheme, a password in it: refused, and never retried."""
    script = Script(location(to + "?sig=canary"))

    with pytest.raises(PolicyError, match=r"redirect of reg\.example refused") as caught:
        script.run(fetch(SITE, REPOSITORY, BLOB))

    assert "canary" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize("headers", [[], [("Location", "/a"), ("Location", "/b")]])
def test_a_redirect_to_nowhere_or_to_two_places_is_an_error(headers: list[tuple[str, str]]) -> None:
    """Exactly one Location."""
    with pytest.raises(RegistryError, match="without saying where"):
        Script(Reply(307, headers)).run(fetch(SITE, REPOSITORY, BLOB))


def test_ten_redirects_are_followed_and_no_more() -> None:
    """Also a loop ends."""
    script = Script(*[location(f"/{n}") for n in range(10)], Reply(200, {}, DATA))
    script.run(fetch(SITE, REPOSITORY, BLOB))
    assert len(script.sent) == 11

    loop = Script(location("/loop"), repeat=True)
    with pytest.raises(RegistryError, match="more than 10"):
        loop.run(fetch(SITE, REPOSITORY, BLOB))
    assert len(loop.sent) == 11


def test_an_expired_storage_url_costs_one_more_request_to_the_registry() -> None:
    """S3 says so with 403 or 400; the registry signs a new one. A second refusal is final."""
    expired = Reply(403, {}, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
    there = location("https://s3.example/b?sig=1")
    script = Script(there, expired, there, Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert len(script.sent) == 4
    with pytest.raises(DeniedError, match=r"s3\.example answered 403 AccessDenied: Request has expired"):
        Script(there, expired, there, expired).run(fetch(SITE, REPOSITORY, BLOB))


# --- repetition ---


@pytest.mark.parametrize("reply", [RESET, *(Reply(status) for status in (408, 429, 500, 502, 503, 504))])
def test_what_may_pass_is_repeated(reply: Scripted) -> None:
    """Lost connections and the statuses that a later try may change."""
    script = Script(reply, reply, found())

    script.run(document(SITE, REPOSITORY, DIGEST))

    assert [pause.attempt for pause in script.pauses] == [1, 2]


@pytest.mark.parametrize("status", [400, 402, 403, 404, 405, 406, 409, 410, 416, 418, 451, 501, 505, 304, 204])
def test_what_will_not_pass_is_not_repeated(status: int) -> None:
    """One request, one typed error with its status."""
    script = Script(Reply(status))

    with pytest.raises(LayerCacheError) as caught:
        script.run(document(SITE, REPOSITORY, TAG))

    assert len(script.sent) == 1
    assert isinstance(caught.value, NotFoundError if status == 404 else RegistryError)
    assert getattr(caught.value, "status", status) == status


@pytest.mark.parametrize(
    ("lost", "requests"), [(RESET, 5), (LostError("refused", tries=3), 3), (LostError("no such name", tries=1), 1)]
)
def test_a_host_that_never_answers_is_given_up(lost: LostError, requests: int) -> None:
    """After five tries, after three where nobody listens, at once where it is hopeless."""
    script = Script(lost, repeat=True)

    with pytest.raises(UnreachableError) as caught:
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert len(script.sent) == requests
    assert caught.value.retryable
    assert caught.value.__cause__ is lost


def test_a_spent_budget_ends_the_repetition_at_once() -> None:
    """The pause says no: the last answer is the error."""
    script = Script(Reply(503), repeat=True, patience=1)

    with pytest.raises(RegistryError) as caught:
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert (len(script.sent), caught.value.status) == (2, 503)


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "Tue, 14 Nov 2023 22:13:25 GMT"}, 5.0),
        ({"Retry-After": "Tue, 14 Nov 2023 10:00:09 GMT", "Date": "Tue, 14 Nov 2023 10:00:00 GMT"}, 9.0),
        ({"Retry-After": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0.0),
        ({"Retry-After": "abc"}, 0.0),
        ({}, 0.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_a_registry_asks_for_is_kept_and_shuts_the_host(
    headers: dict[str, str], least: float, status: int
) -> None:
    """Both forms; a date counts from the registry's own clock; past and senseless ones say nothing."""
    assert NOW == 1_700_000_000.0
    script = Script(Reply(status, headers), found())

    script.run(document(SITE, REPOSITORY, DIGEST))

    (pause,) = script.pauses
    assert (pause.host, pause.least, pause.shut) == ("reg.example", least, True)


def test_a_wait_over_a_minute_is_the_callers_to_make() -> None:
    """It fails at once, with the seconds in the error."""
    script = Script(refused(429, "TOOMANYREQUESTS", "slow down", Retry_After="999999"))

    with pytest.raises(RateLimitedError, match="TOOMANYREQUESTS: slow down") as caught:
        script.run(document(SITE, REPOSITORY, DIGEST))

    assert caught.value.retry_after == 999999.0
    assert not script.pauses


def test_a_throttled_storage_shuts_its_own_host() -> None:
    """Not the registry's."""
    there = location("https://s3.example/b")
    script = Script(there, Reply(503), there, Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert [pause.host for pause in script.pauses] == ["s3.example"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, UnauthorizedError), (403, DeniedError), (404, NotFoundError), (429, RateLimitedError), (500, RegistryError)],
)
@pytest.mark.parametrize(
    "body", [b"", b"<html><title>oops</title>", b'{"errors":[{"code":"C","message":"m"}]}', b"\xff"]
)
def test_a_refusal_is_typed_whatever_its_body(status: int, kind: type[Exception], body: bytes) -> None:
    """JSON, HTML, nothing, garbage."""
    script = Script(Reply(status, {"X-Request-Id": "abc"}, body), repeat=True, patience=0)

    with pytest.raises(kind, match=rf"reg\.example answered {status}.*request abc"):
        script.run(document(SITE, REPOSITORY, TAG))


@pytest.mark.parametrize("body", [(b"x" * MIB,) * 3, (b"{", RESET)])
def test_an_error_text_that_is_endless_or_breaks_off_says_nothing(body: tuple[bytes | LostError, ...]) -> None:
    """No more than a mebibyte and a byte of it is read; the status counts."""
    script = Script(Reply(403, {}, body))

    with pytest.raises(DeniedError, match=r"reg\.example answered 403$"):
        script.run(document(SITE, REPOSITORY, TAG))

    assert script.received <= MIB + 1


# --- blobs ---


def test_a_blob_comes_in_pieces_of_a_mebibyte() -> None:
    """One GET, no HEAD, no Range, identity; the last piece is shorter."""
    script = Script(Reply(200, {"Content-Length": str(len(DATA))}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA
    assert [len(piece) for piece in script.delivered] == [MIB] * 4 + [len(DATA) - 4 * MIB]
    assert script.paths == [f"GET /v2/demo/x/blobs/{BLOB.digest}"]
    assert script.sent[0].headers["Accept-Encoding"] == "identity"
    assert asked_range(script.sent[0]) is None


@pytest.mark.parametrize("data", [b"", b"{}"])
def test_a_tiny_blob_is_a_blob(data: bytes) -> None:
    """Size 0 is a size: it is asked for, without a Range, and must be empty."""
    script = Script(Reply(200, {"Content-Length": str(len(data))}, data))

    script.run(fetch(SITE, REPOSITORY, blob(data)))

    assert script.data == data
    assert asked_range(script.sent[0]) is None


def test_a_blob_of_unknown_length_is_bounded_by_its_descriptor() -> None:
    """Chunked, or ended by the connection."""
    script = Script(Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA


@pytest.mark.parametrize("length", [None, len(DATA) + 1])
@pytest.mark.parametrize("data", [DATA, b""])
def test_a_blob_that_is_too_long_is_cut(data: bytes, length: int | None) -> None:
    """A length says so at once; without one at most a byte over the size is read, and no byte of that piece is used."""
    headers = {} if length is None else {"Content-Length": str(length)}
    script = Script(Reply(200, headers, [data, b"x" * MIB, b"x" * MIB]))

    with pytest.raises(IntegrityError, match="too many bytes"):
        script.run(fetch(SITE, REPOSITORY, blob(data)))

    assert script.received <= (0 if length else len(data) + 1)
    assert data.startswith(script.data)


@pytest.mark.parametrize("cut", [0, 1, MIB, MIB + 5, len(DATA) // 2, len(DATA) - 1])
def test_a_broken_blob_is_resumed_where_it_broke(cut: int) -> None:
    """A bounded range from the first missing byte; no byte comes twice. Through the registry where nothing came."""
    there = location("https://s3.example/b?sig=1")
    rest = Reply(200, {}, DATA) if cut == 0 else partial(DATA, cut)
    again = [location("https://s3.example/b?sig=2")] if cut == 0 else []
    script = Script(there, Reply(200, {}, [DATA[:cut], RESET]), *again, rest)

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA
    assert asked_range(script.sent[2]) == (None if cut == 0 else (cut, len(DATA) - 1))
    assert script.sent[2].url.authority == ("reg.example" if cut == 0 else "s3.example")
    assert "If-Range" not in script.sent[2].headers


def test_an_early_end_is_resumed_like_a_break() -> None:
    """A short body without an error is a broken transfer."""
    script = Script(Reply(200, {}, DATA[:100]), partial(DATA, 100))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA


def test_a_registry_that_ignores_the_range_is_read_from_its_start() -> None:
    """The prefix is dropped, never appended (containerd #12291)."""
    script = Script(Reply(200, {}, [DATA[: 2 * MIB + 7], RESET]), Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA


def test_part_of_a_blob_is_asked_for_by_a_bounded_range() -> None:
    """``offset`` and ``length``; a longer length ends at the end."""
    first = Script(partial(DATA, 5, 14))
    first.run(fetch(SITE, REPOSITORY, BLOB, offset=5, length=10))
    assert (first.data, asked_range(first.sent[0])) == (DATA[5:15], (5, 14))

    last = Script(partial(DATA, len(DATA) - 3))
    last.run(fetch(SITE, REPOSITORY, BLOB, offset=len(DATA) - 3, length=100))
    assert last.data == DATA[-3:]


def test_part_of_a_blob_from_a_registry_without_ranges() -> None:
    """What is before and after it is dropped; what is after it is not read."""
    script = Script(Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB, offset=5, length=10))

    assert script.data == DATA[5:15]
    assert script.received < MIB


@pytest.mark.parametrize(("offset", "length"), [(len(DATA), None), (7, 0), (len(DATA), 5)])
def test_an_empty_part_asks_for_nothing(offset: int, length: int | None) -> None:
    """No request for no byte."""
    script = Script()

    script.run(fetch(SITE, REPOSITORY, BLOB, offset=offset, length=length))

    assert not script.sent


@pytest.mark.parametrize(("offset", "length"), [(-1, None), (len(DATA) + 1, None), (0, -1)])
def test_a_part_outside_the_blob_is_refused(offset: int, length: int | None) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidError):
        Script().run(fetch(SITE, REPOSITORY, BLOB, offset=offset, length=length))


SIZE = len(DATA)
FAULTS: dict[str, Reply] = {
    "no Content-Range": Reply(206, {}, DATA[100:]),
    "two of them": Reply(206, [("Content-Range", f"bytes 100-{SIZE - 1}/{SIZE}")] * 2, DATA[100:]),
    "another unit": Reply(206, {"Content-Range": f"octets 100-{SIZE - 1}/{SIZE}"}, DATA[100:]),
    "garbage": Reply(206, {"Content-Range": "bytes what"}, DATA[100:]),
    "earlier": partial(DATA, 99),
    "later": partial(DATA, 101),
    "beyond the end": Reply(206, {"Content-Range": f"bytes 100-{SIZE}/*"}, DATA[100:] + b"x"),
    "reversed": Reply(206, {"Content-Range": f"bytes {SIZE - 1}-100/{SIZE}"}, DATA[100:]),
    "another total": Reply(206, {"Content-Range": f"bytes 100-{SIZE - 1}/{SIZE + 1}"}, DATA[100:]),
    "another length": partial(DATA, 100, put={"Content-Length": "5"}),
    "several parts": partial(DATA, 100, put={"Content-Type": "multipart/byteranges; boundary=x"}),
    "a content coding": partial(DATA, 100, put={"Content-Encoding": "gzip"}),
    "unsatisfiable": Reply(416, {"Content-Range": f"bytes */{SIZE}"}, b"no"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_partial_reply_is_not_used_and_ranges_are_given_up(fault: Reply) -> None:
    """Not a byte of it; the blob is asked for whole, once, and its prefix dropped."""
    script = Script(Reply(200, {}, [DATA[:100], RESET]), fault, Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA
    assert [asked_range(send) for send in script.sent] == [None, (100, SIZE - 1), None]


@pytest.mark.parametrize(
    "good",
    [
        partial(DATA, 100),
        Reply(206, {"Content-Range": f"bytes 100-{SIZE - 1}/*"}, DATA[100:]),
        partial(DATA, 100, put={"Content-Length": str(SIZE - 100), "Content-Type": "application/octet-stream"}),
    ],
)
def test_a_right_partial_reply_is_used(good: Reply) -> None:
    """With or without total, type and length; whether ranges work is learnt from the 206 alone."""
    script = Script(Reply(200, {}, [DATA[:100], RESET]), good)

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA


def test_a_range_that_is_answered_in_part_is_continued() -> None:
    """RFC 9110: a server may send less of a range than was asked for."""
    script = Script(partial(DATA, 5, 2 * MIB), partial(DATA, 2 * MIB + 1))

    script.run(fetch(SITE, REPOSITORY, BLOB, offset=5))

    assert script.data == DATA[5:]


def test_a_partial_reply_nobody_asked_for_is_an_error() -> None:
    """No Range was sent."""
    with pytest.raises(RegistryError, match="206"):
        Script(partial(DATA, 0)).run(fetch(SITE, REPOSITORY, BLOB))


def test_a_coded_blob_is_refused() -> None:
    """Nothing is decoded, so nothing can blow up."""
    script = Script(Reply(200, {"Content-Encoding": "gzip"}, DATA))

    with pytest.raises(RegistryError, match="content coding"):
        script.run(fetch(SITE, REPOSITORY, BLOB))

    assert not script.delivered


def dripping(count: int) -> Callable[[Send], Reply]:
    """A registry that sends ``count`` bytes a connection and breaks."""

    def answer(send: Send) -> Reply:
        first, _ = asked_range(send) or (0, 0)
        body: list[bytes | LostError] = [DATA[first : first + count], RESET]
        if first == 0:
            return Reply(200, {}, body)
        return Reply(206, {"Content-Range": f"bytes {first}-{SIZE - 1}/{SIZE}"}, body)

    return answer


@pytest.mark.parametrize(("count", "requests"), [(0, 3), (1, 10), (MIB - 1, 5), (2 * MIB, 3)])
def test_resuming_is_bounded_by_progress(count: int, requests: int) -> None:
    """Three connections without a byte, or ten with little, end it; a mebibyte each gets through."""
    script = Script(dripping(count), repeat=True)

    if count < MIB - 1:
        with pytest.raises(UnreachableError, match="reset"):
            script.run(fetch(SITE, REPOSITORY, BLOB))
    else:
        script.run(fetch(SITE, REPOSITORY, BLOB))
        assert script.data == DATA

    assert len(script.sent) == requests


def test_a_blob_that_is_really_too_short_is_an_integrity_error() -> None:
    """It ends in the same place each time, without a break."""
    short = DATA[:100]

    def answer(send: Send) -> Reply:
        return Reply(200, {"Content-Length": "100"}, short) if asked_range(send) is None else Reply(416)

    script = Script(answer, repeat=True)

    with pytest.raises(IntegrityError, match="too few bytes") as caught:
        script.run(fetch(SITE, REPOSITORY, BLOB))

    assert (caught.value.expected, caught.value.actual) == (str(SIZE), "100")


def test_a_break_behind_the_last_byte_does_no_harm() -> None:
    """All bytes are there; whether they are right is the receiver's to check."""
    script = Script(Reply(200, {}, [DATA, RESET]))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert script.data == DATA


def test_an_absent_blob_is_not_found() -> None:
    """With the digest in the message."""
    with pytest.raises(NotFoundError, match=str(BLOB.digest)):
        Script(refused(404, "BLOB_UNKNOWN")).run(fetch(SITE, REPOSITORY, BLOB))


def test_no_blob_request_is_a_head() -> None:
    """ECR Public answers 401 to each; a URL signed for GET is good for GET only."""
    script = Script(location("https://s3.example/b"), Reply(200, {}, DATA))

    script.run(fetch(SITE, REPOSITORY, BLOB))

    assert {send.method for send in script.sent} == {"GET"}


def test_a_head_is_redirected_as_a_head() -> None:
    """A URL that was signed for HEAD gets a HEAD."""
    script = Script(location("https://s3.example/m"), Reply(200, FULL))

    script.run(resolve(SITE, REFERENCE))

    assert {send.method for send in script.sent} == {"HEAD"}
