"""Tokens: the exchange of credentials for one, who may see a password, and how long a token is kept."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from urllib.parse import parse_qsl

import pytest

from layercache.control import Control
from layercache.errors import (
    CancelledError,
    LayerCacheError,
    LimitError,
    PolicyError,
    RateLimitedError,
    RegistryError,
    UnauthorizedError,
    UnreachableError,
)
from layercache.registry._authority import Authority
from layercache.registry._effects import Authorise, Flow, Grant, LostError, Site
from layercache.registry._token import exchange, realm_of
from layercache.registry._url import Url, Zone
from layercache.registry._wire import Challenge, Token, basic
from layercache.registry.auth import Anonymous, Credential
from tests.registry_script import SITE, Reply, Script

REALM = Url.parse("https://reg.example/token")
GOOD = Reply(200, {}, b'{"token":"fresh","expires_in":300}')
PULL = ("repository:demo/x:pull",)
BASIC = Grant("Basic", basic("user", "canary"), secrets=("canary",))


def query(script: Script, number: int = 0) -> list[tuple[str, str]]:
    return parse_qsl(script.sent[number].url.query)


# --- the exchange ---


def test_a_token_is_asked_for_by_a_get_with_the_password() -> None:
    """Service and scopes in the query; no offline token, no Docker account."""
    script = Script(GOOD)

    token = script.run(exchange(SITE, REALM, "svc", ("a:b:pull", "aws"), grant=BASIC))

    assert (token.value, token.lifetime) == ("fresh", 300)
    (send,) = script.sent
    assert (send.method, send.grant, send.form) == ("GET", BASIC, None)
    assert query(script) == [("service", "svc"), ("scope", "a:b:pull"), ("scope", "aws")]


def test_a_realm_keeps_its_own_query() -> None:
    """What the registry put there is not ours to drop."""
    script = Script(GOOD)

    script.run(exchange(SITE, Url.parse("https://reg.example/t?a=1"), "", PULL))

    assert script.sent[0].url.target == "/t?a=1&scope=repository%3Ademo%2Fx%3Apull"


def test_an_identity_token_is_posted() -> None:
    """As an OAuth2 refresh token, in the body, never in the URL."""
    script = Script(GOOD)

    script.run(exchange(SITE, REALM, "svc", PULL, identity="idt canary&"))

    (send,) = script.sent
    assert (send.method, send.grant, send.url.query) == ("POST", None, "")
    assert dict(parse_qsl((send.form or b"").decode())) == {
        "grant_type": "refresh_token",
        "refresh_token": "idt canary&",
        "client_id": "layercache",
        "service": "svc",
        "scope": PULL[0],
    }
    assert "canary" not in repr(send)


@pytest.mark.parametrize("status", [404, 405])
def test_a_realm_without_post_is_asked_by_get(status: int) -> None:
    """GCR, Artifactory and others know no POST."""
    script = Script(Reply(status), GOOD)

    script.run(exchange(SITE, REALM, "svc", PULL, identity="idt", grant=BASIC))

    assert [send.method for send in script.sent] == ["POST", "GET"]
    assert script.sent[1].grant is BASIC


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refused_exchange_is_unauthorized_and_says_whose_credentials(status: int) -> None:
    """Once; without the secrets, even if the server repeats them."""
    body = json.dumps({"details": "wrong password canary for user"}).encode()
    script = Script(Reply(status, {}, body))

    with pytest.raises(UnauthorizedError, match="wrong password") as caught:
        script.run(exchange(SITE, REALM, "svc", PULL, grant=BASIC, hint="used the credentials of some file"))

    assert "some file" in str(caught.value)
    assert "canary" not in f"{caught.value}{caught.value.args}"
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(200, {}, b"{}"), RegistryError),
        (Reply(200, {}, b'{"token":"a\\nb"}'), RegistryError),
        (Reply(404), RegistryError),
        (Reply(429, {"Retry-After": "100"}), RateLimitedError),
        (Reply(200, {}, [b"x" * (1 << 20)] * 5), LimitError),
        (Reply(200, {"Content-Length": str(2 << 20)}, b"x"), LimitError),
        (Reply(200, {}, [b'{"to', LostError("reset")]), UnreachableError),
        (LostError("no such name", tries=1), UnreachableError),
    ],
)
def test_an_exchange_that_fails_is_typed(reply: Reply | LostError, kind: type[Exception]) -> None:
    """No token, an endless reply, throttling, silence. A missing endpoint is no missing image."""
    with pytest.raises(kind) as caught:
        Script(reply).run(exchange(SITE, REALM, "svc", PULL))

    assert type(caught.value) is kind


@pytest.mark.parametrize("reply", [LostError("reset"), Reply(500), Reply(503), Reply(429)])
def test_an_exchange_is_repeated_where_that_may_help(reply: Reply | LostError) -> None:
    """With pauses, four times at most."""
    script = Script(reply, GOOD)
    assert script.run(exchange(SITE, REALM, "svc", PULL)).value == "fresh"
    assert len(script.pauses) == 1

    always = Script(reply, repeat=True)
    with pytest.raises(RegistryError):
        always.run(exchange(SITE, REALM, "svc", PULL))
    assert len(always.sent) == 4


def test_a_redirect_of_the_realm_obeys_the_rules_of_redirects() -> None:
    """The password stays, the reach narrows, https stays https (go-containerregistry #2292)."""
    script = Script(Reply(307, {"Location": "https://elsewhere.example/t"}, zone=Zone.PRIVATE), GOOD)
    script.run(exchange(SITE, Url.parse("https://auth.example/t"), "", PULL, grant=BASIC, reach=Zone.LOOPBACK))
    assert [(send.grant, send.reach) for send in script.sent] == [(BASIC, Zone.LOOPBACK), (None, Zone.PRIVATE)]

    with pytest.raises(PolicyError):
        Script(Reply(307, {"Location": "http://auth.example/t"})).run(exchange(SITE, REALM, "", PULL))


def test_the_realm_of_the_registry_itself_is_within_reach_wherever_it_is() -> None:
    """Another host, or another port of the same, only in the zone of the registry."""
    script = Script(GOOD, GOOD)

    script.run(exchange(SITE, REALM, "", PULL, reach=Zone.PUBLIC))
    script.run(exchange(SITE, Url.parse("https://reg.example:8443/t"), "", PULL, reach=Zone.PUBLIC))

    assert [send.reach for send in script.sent] == [None, Zone.PUBLIC]


@pytest.mark.parametrize(
    "realm", ["http://reg.example/t", "file:///etc/passwd", "https://u:p@h/t", "token", "", "https://h:0/"]
)
def test_an_unsafe_realm_is_refused(realm: str) -> None:
    """Not https, no host, a password in it."""
    with pytest.raises(PolicyError, match=r"realm of reg\.example refused"):
        realm_of(SITE, realm)


def test_a_plain_registry_may_have_a_plain_realm() -> None:
    """Who configured the one has allowed the other."""
    plain = Site("127.0.0.1:5000", Url.parse("http://127.0.0.1:5000/"))

    assert realm_of(plain, "http://127.0.0.1:5001/token").scheme == "http"


# --- the authority ---


class Vault:
    """Credentials that can be changed, and count."""

    def __init__(self, credential: Credential | None = None, *, eager: bool = False) -> None:
        self.credential = credential
        self.problem: LayerCacheError | None = None
        self.is_eager = eager
        self.asked: list[str] = []
        self.refusals: list[Credential] = []

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:
        assert host == SITE.host
        self.asked.append(repository)
        if self.problem is not None:
            raise self.problem
        return self.credential

    def eager(self, host: str) -> bool:
        return self.is_eager

    def refused(self, host: str, credential: Credential) -> None:
        self.refusals.append(credential)


class Desk:
    """An authority with a clock of its own, a vault, and a scripted token endpoint."""

    def __init__(self, vault: Vault | None = None, *replies: Reply, realm_hosts: frozenset[str] = frozenset()) -> None:
        self.now = 1000.0
        self.vault = vault or Vault()
        self.script = Script(*(replies or (GOOD,)), repeat=True)
        self.exchanges = 0
        self.authority = Authority(SITE, self.vault, realm_hosts=realm_hosts, clock=lambda: self.now)

    def grant(
        self,
        challenge: str | None = None,
        *,
        repository: str = "demo/x",
        refused: Grant | None = None,
        zone: Zone | None = Zone.PUBLIC,
        control: Control | None = None,
        **parameters: str,
    ) -> Grant | None:
        challenges = None if challenge is None else (Challenge(challenge, parameters),) if challenge else ()
        ask = Authorise(SITE, repository, challenges, refused, zone, reason="reg.example answered 401")
        return self.authority.grant(ask, self.run, control or Control())

    def bearer(self, *, realm: str = str(REALM), scope: str = "") -> Grant:
        found = self.grant("bearer", realm=realm, service="s", scope=scope)
        assert found is not None
        return found

    def run(self, flow: Flow[Token]) -> Token:
        self.exchanges += 1
        return self.script.run(flow)


USER = Credential("user", "canary", source="a file")


def test_nothing_is_shown_before_it_is_asked_for() -> None:
    """No credential is looked up, no token exchanged, until the registry has said how it wants to be asked."""
    desk = Desk(Vault(USER))

    assert desk.grant() is None
    assert not desk.vault.asked


def test_a_known_registry_is_asked_with_a_token_up_front() -> None:
    """For the repository at hand, also one that was never challenged."""
    desk = Desk(Vault(USER))
    first = desk.bearer(scope="repository:demo/x:pull,push")

    second = desk.grant(repository="demo/y")

    assert first.header() == "Bearer fresh"
    assert second is not None
    assert [query(desk.script, n)[-1][1] for n in (0, 1)] == ["repository:demo/x:pull,push", "repository:demo/y:pull"]


def test_the_scope_of_the_server_counts_and_is_remembered_if_it_is_of_no_repository() -> None:
    """ECR Public wants ``aws`` for everything; without a scope in the challenge it is pull."""
    desk = Desk()
    desk.bearer(scope="aws")
    desk.grant(repository="other")
    assert [query(desk.script)[-1], desk.exchanges] == [("scope", "aws"), 1]

    plain = Desk()
    plain.bearer()
    assert query(plain.script)[-1] == ("scope", "repository:demo/x:pull")


def test_bearer_comes_before_basic_and_unknown_schemes_are_skipped() -> None:
    """Whatever their order."""
    desk = Desk(Vault(USER))
    challenges = (
        Challenge("negotiate"),
        Challenge("basic", {"realm": "x"}),
        Challenge("bearer"),
        Challenge("bearer", {"realm": str(REALM)}),
    )

    grant = desk.authority.grant(Authorise(SITE, "demo/x", challenges), desk.run, Control())

    assert grant is not None
    assert grant.scheme == "Bearer"


def test_a_token_lives_as_long_as_it_said_less_a_margin() -> None:
    """Counted from its receipt on a monotonic clock; renewed before its end."""
    desk = Desk()
    desk.bearer()

    desk.now += 265
    desk.bearer()
    assert desk.exchanges == 1
    desk.now += 10
    desk.bearer()
    assert desk.exchanges == 2


def test_a_refused_token_is_not_used_again() -> None:
    """By any thread; but one that was renewed in the meantime is."""
    desk = Desk()
    old = desk.bearer()

    new = desk.grant("bearer", realm=str(REALM), service="s", refused=old)
    again = desk.grant("bearer", realm=str(REALM), service="s", refused=old)

    assert desk.exchanges == 2
    assert new is again is not old


def test_a_refusal_without_a_challenge_is_answered_as_the_last_one_was() -> None:
    """ECR says of an expired token only that it expired."""
    desk = Desk()
    old = desk.bearer()

    assert desk.grant("", refused=old) is not old
    assert desk.exchanges == 2


def test_a_first_refusal_without_a_challenge_cannot_be_answered() -> None:
    """It did not say how to log in."""
    with pytest.raises(UnauthorizedError, match="did not say how to log in"):
        Desk(Vault(USER)).grant("")


def test_basic_is_answered_with_the_password() -> None:
    """And sent up front from then on."""
    desk = Desk(Vault(USER))

    grant = desk.grant("basic", realm="x")

    assert grant is not None
    assert (grant.header(), grant.scheme) == (basic("user", "canary"), "Basic")
    up_front = desk.grant()
    assert up_front is not None
    assert up_front.header() == grant.header()
    assert desk.vault.asked == ["demo/x"]
    assert desk.exchanges == 0


def test_basic_without_credentials_says_how_to_log_in() -> None:
    """And why none were found, if something went wrong."""
    desk = Desk()
    with pytest.raises(UnauthorizedError, match=r"no credentials for it were found.*docker login reg"):
        desk.grant("basic", realm="x")

    desk = Desk()
    desk.vault.problem = UnauthorizedError("docker-credential-x cannot be run")
    with pytest.raises(UnauthorizedError, match="docker-credential-x cannot be run"):
        desk.grant("basic", realm="x")


def test_refused_basic_credentials_are_asked_for_anew_once() -> None:
    """Changed ones are shown; the same ones would be refused again."""
    desk = Desk(Vault(USER))
    old = desk.grant("basic", realm="x")

    with pytest.raises(UnauthorizedError, match="credentials of a file were refused"):
        desk.grant("basic", realm="x", refused=old)

    desk.vault.credential = Credential("user", "new")
    new = desk.grant("basic", realm="x", refused=old)
    assert new is not None
    assert new.header() == basic("user", "new")
    assert desk.vault.refusals == [USER, USER]


def test_eager_credentials_are_sent_at_once() -> None:
    """ECR takes Basic and needs no challenge."""
    desk = Desk(Vault(USER, eager=True))

    grant = desk.grant()

    assert grant is not None
    assert grant.header() == basic("user", "canary")


def test_an_anonymous_token_serves_where_there_are_no_credentials() -> None:
    """Public images; a helper that fails does not stand in their way, but is named if they are refused."""
    desk = Desk()
    assert desk.bearer().source == "anonymous"
    assert desk.script.sent[0].grant is None

    broken = Desk(None, Reply(401))
    broken.vault.problem = UnauthorizedError("docker-credential-x cannot be run")
    with pytest.raises(UnauthorizedError, match="docker-credential-x cannot be run"):
        broken.bearer()


@pytest.mark.parametrize(
    ("realm", "allowed", "shown"),
    [
        ("https://reg.example/token", frozenset(), True),
        ("https://reg.example:8443/token", frozenset(), False),
        ("https://attacker.example/token", frozenset(), False),
        ("https://reg.example.attacker.example/token", frozenset(), False),
        ("https://auth.example/token", frozenset({"auth.example"}), True),
        ("https://auth.example:8443/token", frozenset({"auth.example:8443"}), True),
        ("https://auth.example:8443/token", frozenset({"auth.example:9443"}), False),
        ("https://anything.example/token", frozenset({"*"}), True),
    ],
)
def test_a_password_goes_to_trusted_realms_only(realm: str, allowed: frozenset[str], shown: bool) -> None:
    """The registry itself and those allowed; elsewhere the exchange is anonymous."""
    desk = Desk(Vault(USER), realm_hosts=allowed)

    desk.bearer(realm=realm)

    assert (desk.script.sent[0].grant is not None) is shown


def test_a_password_that_was_held_back_is_mentioned_when_the_token_is_refused() -> None:
    """With what to do about it."""
    desk = Desk(Vault(USER), Reply(401))

    with pytest.raises(UnauthorizedError, match=r"not sent to attacker\.example.*realm_hosts"):
        desk.bearer(realm="https://attacker.example/token")


def test_docker_hub_has_its_known_realm() -> None:
    """Over https on its port, and no other."""
    hub = Site("docker.io", Url.parse("https://registry-1.docker.io/"))
    vault = Vault(USER)
    vault.basic = lambda host, *, repository="", control: USER  # type: ignore[method-assign]
    for realm, shown in (("https://auth.docker.io/token", True), ("https://auth.docker.io:8443/token", False)):
        script = Script(GOOD)
        authority = Authority(hub, vault)
        authority.grant(Authorise(hub, "library/x", (Challenge("bearer", {"realm": realm}),)), script.run, Control())
        assert (script.sent[0].grant is not None) is shown


def test_the_realm_may_be_no_nearer_than_the_registry() -> None:
    """The zone of the refusal bounds the exchange, also later."""
    desk = Desk()

    desk.grant("bearer", realm="https://auth.example/t", zone=Zone.PRIVATE)
    desk.grant(repository="demo/y")

    assert [send.reach for send in desk.script.sent] == [Zone.PRIVATE, Zone.PRIVATE]


def test_tokens_of_different_credentials_are_different() -> None:
    """Another password is another exchange, and never sees the token of the first."""
    desk = Desk(Vault(USER), Reply(200, {}, b'{"token":"t","expires_in":9000}'))
    first = desk.bearer()
    desk.vault.credential = Credential("user", "other")
    desk.now += 400  # an answer of the vault is used for five minutes; the token lives on

    second = desk.bearer()

    assert first is not second
    assert [send.grant.header() if send.grant else "" for send in desk.script.sent] == [
        basic("user", "canary"),
        basic("user", "other"),
    ]


def test_many_threads_make_one_exchange() -> None:
    """64 challenges at once, one request to the realm."""
    desk = Desk(Vault(USER))
    gate = threading.Barrier(64)
    run = desk.run

    def slow(flow: Flow[Token]) -> Token:
        threading.Event().wait(0.2)
        return run(flow)

    desk.run = slow  # type: ignore[method-assign]
    grants: list[Grant] = []

    def work() -> None:
        gate.wait()
        grants.append(desk.bearer())

    _together(64, work)

    assert desk.exchanges == 1
    assert len(set(map(id, grants))) == 1
    assert len(desk.vault.asked) == 1


def test_a_failed_exchange_reaches_who_waited_and_is_not_remembered() -> None:
    """The next one asks again."""
    desk = Desk(None, Reply(401), GOOD)
    desk.script._repeat = False

    with pytest.raises(UnauthorizedError):
        desk.bearer()

    assert desk.bearer().header() == "Bearer fresh"


def test_a_cancelled_exchange_is_taken_over() -> None:
    """The leader's cancel is not the followers': one of them does it."""
    desk = Desk()
    entered, cancel = threading.Event(), threading.Event()
    run = desk.run
    outcomes: list[object] = []

    def first(flow: Flow[Token]) -> Token:
        desk.run = run  # type: ignore[method-assign]
        entered.set()
        Control(cancel=cancel).wait(10)
        return run(flow)

    desk.run = first  # type: ignore[method-assign]

    def leader() -> None:
        with pytest.raises(CancelledError):
            desk.bearer()
        outcomes.append("cancelled")

    def follower() -> None:
        entered.wait()
        threading.Timer(0.1, cancel.set).start()
        outcomes.append(desk.bearer().header())

    _each(leader, follower)

    assert sorted(map(str, outcomes)) == ["Bearer fresh", "cancelled"]


def test_who_waits_for_an_exchange_can_be_cancelled() -> None:
    """Within a moment, though the leader goes on."""
    desk = Desk()
    entered, done = threading.Event(), threading.Event()
    run = desk.run

    def slow(flow: Flow[Token]) -> Token:
        entered.set()
        done.wait(10)
        return run(flow)

    desk.run = slow  # type: ignore[method-assign]

    def follower() -> None:
        entered.wait()
        cancel = threading.Event()
        cancel.set()
        with pytest.raises(CancelledError):
            desk.grant("bearer", realm=str(REALM), service="s", control=Control(cancel=cancel))
        done.set()

    _each(desk.bearer, follower)


def test_the_tokens_kept_are_bounded() -> None:
    """A registry that names a new service each time does not fill the memory."""
    desk = Desk(None, GOOD)

    for number in range(3000):
        desk.grant("bearer", realm=str(REALM), service=str(number))

    assert len(desk.authority._tokens) <= 1024


def test_a_grant_is_not_printed_or_written_down() -> None:
    """Neither repr nor str nor pickle nor copy; what a server repeats of it is hidden."""
    grant = Grant("Bearer", "Bearer canary-token", secrets=("canary-secret",))

    assert "canary" not in f"{grant} {grant!r}"
    assert grant.hide("a canary-token b canary-secret c") == "a ... b ... c"
    for write in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError):
            write(grant)


def test_anonymous_never_has_a_credential() -> None:
    """Nor anything to send early."""
    assert not Anonymous().eager("reg.example")


def _together(count: int, work: Callable[[], object]) -> None:
    _each(*[work] * count)


def _each(*works: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures
