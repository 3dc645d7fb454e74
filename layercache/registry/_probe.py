"""What a pull meets on its way to one source, step by step, and where it ends. For people who look for a fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import TypeVar

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError, LayerCacheError, UnreachableError
from layercache.metrics import Ledger
from layercache.oci import Descriptor, Index, Manifest, Platform, Reference, descend, parse_document
from layercache.registry._chain import falls_through
from layercache.registry._driver import Driver, Session
from layercache.registry._ecr_host import PUBLIC_HOSTS, parse_ecr_host
from layercache.registry._effects import Authorise, Flow, Grant, Head, LostError
from layercache.registry._flow import ask
from layercache.registry._follow import Hop, follow, problem_of
from layercache.registry._upstream import Upstream
from layercache.registry._url import zone_of
from layercache.registry._wire import Challenge, Problem, parse_challenges, parse_date
from layercache.registry.ecr import EcrCredentials
from layercache.reports import Check, State

__all__ = ["kind_of", "probe"]

_KINDS = (
    ("docker.io", "Docker Hub"),
    ("ghcr.io", "GitHub's registry"),
    (".pkg.dev", "Google Artifact Registry"),
    ("gcr.io", "Google's registry"),
    (".azurecr.io", "Azure Container Registry"),
    ("quay.io", "Quay"),
)
_SKEW = 60.0  # seconds; AWS refuses signatures that are more than five minutes off
_SOON = 7 * 86400.0  # seconds before the end of a certificate from which on it is mentioned

_T = TypeVar("_T")
_Said = tuple[State, str, str]  # state, detail, hint


def kind_of(host: str) -> str:
    """What kind of registry a host name says, in words."""
    ecr = parse_ecr_host(host)
    if ecr is not None:
        ways = [word for word, on in (("FIPS", ecr.fips), ("dual stack", ecr.dual_stack)) if on]
        more = f" ({', '.join(ways)})" if ways else ""
        return f"Amazon ECR, account {ecr.account} in {ecr.region}, partition {ecr.partition}{more}"
    if host in PUBLIC_HOSTS:
        return "Amazon ECR Public"
    for name, kind in _KINDS:
        if host == name.lstrip(".") or host.endswith(name if name.startswith(".") else f".{name}"):
            return kind
    return "a registry by its own name"


def probe(
    upstream: Upstream, reference: Reference, platform: Platform, *, last: bool, control: Control
) -> Generator[Check, None, State]:
    """Steps of a pull of ``reference`` from one source, up to the first that fails; whether the source can serve it.

    What fails of a source that is not the ``last`` hope is a warning, where a pull goes on with the next one.

    :raises CancelledError: on a cancel, as :class:`DeadlineError` at the deadline.
    """
    steps = _Steps(upstream, reference, platform, control)
    for name, work in steps.all():
        start = time.monotonic()
        failure: LayerCacheError | None = None
        said: _Said | None = None
        try:
            said = work()
        except (CancelledError, DeadlineError):
            raise
        except LostError as lost:
            failure = UnreachableError(lost.reason, host=upstream.site.authority)
        except LayerCacheError as error:
            failure = error
        if failure is not None:
            goes_on = not last and falls_through(failure, credentials=upstream.has_credentials())
            said = ("warn" if goes_on else "fail", failure.what, failure.hint)
        if said is not None:
            state, detail, hint = said
            yield Check(name, state, detail, upstream.site.host, hint, time.monotonic() - start)
            if failure is not None:
                return state
    return "ok" if steps.root is not None and upstream.pulls else "warn"


class _Steps:
    """The steps, and what each leaves for the next."""

    def __init__(self, upstream: Upstream, reference: Reference, platform: Platform, control: Control) -> None:
        self._upstream = upstream
        self._site = upstream.site
        self._reference = reference
        self._name = reference.repository.name
        self._platform = platform
        self._control = control
        self._ledger = Ledger()
        self._head: Head | None = None
        self.root: Descriptor | None = None
        self._blob: Descriptor | None = None

    def all(self) -> list[tuple[str, Callable[[], _Said | None]]]:
        """Their names and what does them; one that says nothing does not apply."""
        return [
            ("host", self._host),
            ("credentials", self._credentials),
            ("identity", self._identity),
            ("dns", self._dns),
            ("connect", self._connect),
            ("tls", self._tls),
            ("ping", self._ping),
            ("clock", self._clock),
            ("auth", self._auth),
            ("resolve", self._resolve),
            ("manifest", self._manifest),
            ("range", self._range),
        ]

    @property
    def _session(self) -> Session:
        return self._upstream.session()

    def _run(self, flow: Flow[_T]) -> _T:
        return Driver(self._session, self._control, self._ledger, "wire").run(flow)

    def _host(self) -> _Said:
        site = self._site
        text = f"a mirror of {site.ns}" if site.ns else kind_of(site.host)
        text += f", at {site.base.scheme}://{site.authority}"
        proxy = self._session.transport.proxy(site.base)
        return "ok", f"{text}, through the proxy {proxy}" if proxy else text, ""

    def _credentials(self) -> _Said:
        try:
            found = self._upstream.credentials.basic(self._site.host, repository=self._name, control=self._control)
        except (CancelledError, DeadlineError):
            raise
        except LayerCacheError as error:  # a pull goes on anonymously
            return "warn", error.what, error.hint
        if found is None:
            return "ok", "none found: anonymous", ""
        kind = "an identity token" if found.identity else "a password"
        return "ok", f"{kind}, from {found.source or 'the given credentials'}", ""

    def _identity(self) -> _Said | None:
        credentials = self._upstream.credentials
        if not isinstance(credentials, EcrCredentials):
            return None
        try:
            arn = credentials.identity(self._site.host, control=self._control)
        except (CancelledError, DeadlineError):
            raise
        except LayerCacheError as error:  # who it is is not needed to pull
            return "warn", error.what, error.hint
        return None if arn is None else ("ok", arn, "")

    def _dns(self) -> _Said:
        addresses = self._session.transport.addresses(self._site.base, self._control)
        words = [f"{address} ({_zone(address)})" for address in addresses[:6]]
        more = f" and {len(addresses) - 6} more" if len(addresses) > 6 else ""
        return "ok", ", ".join(words) + more, ""

    def _connect(self) -> _Said:
        return "ok", f"to {self._session.transport.line(self._site.base, self._control, tls=False).peer}", ""

    def _tls(self) -> _Said | None:
        if self._site.base.scheme != "https":
            return None
        line = self._session.transport.line(self._site.base, self._control, tls=True)
        if line.until is None:
            return "warn", f"{line.tls}, with a certificate that is not verified", "skip_verify is for tests"
        text = f"{line.tls}, certificate by {line.issuer or 'an issuer without a name'} until {_day(line.until)}"
        soon = line.until - time.time() < _SOON
        return ("warn", text, "it ends soon: have it renewed") if soon else ("ok", text, "")

    def _ping(self) -> _Said:
        def flow() -> Flow[tuple[Hop, Problem]]:
            site = self._site
            headers = {"Accept-Encoding": "identity"}
            hop = yield from follow(
                "GET", site.at(""), headers, home=site.base, reach=None, grant=None, own=dict(site.headers)
            )
            return hop, (yield from problem_of("GET", hop))

        hop, problem = self._run(flow())
        self._head = hop.head
        status = hop.head.status
        if status == 200:
            return "ok", "200: it may be read without saying who one is, or says so later", ""
        if status == 401:
            schemes = ", ".join(dict.fromkeys(c.scheme for c in _challenges(hop.head))) or "nothing it names"
            return "ok", f"401: it wants {schemes}", ""
        text = f"{status} {problem.code} {problem.message}".strip()
        return "warn", f"{text} in answer to /v2/", "is this a registry?" if status == 404 else ""

    def _answer(self) -> Head:
        assert self._head is not None  # noqa: S101 -- ping comes before
        return self._head

    def _clock(self) -> _Said:
        head = self._answer()
        date = parse_date(head.headers.get("date"))
        if date is None:
            return "ok", "it does not say what time it is there", ""
        skew = head.at - date
        if abs(skew) <= _SKEW:
            return "ok", f"this machine's agrees within {_SKEW:.0f} s", ""
        way = "ahead of" if skew > 0 else "behind"
        return (
            "warn",
            f"this machine's is {abs(skew):.0f} s {way} the registry's",
            "set it: AWS refuses signatures, and TLS certificates, by the time",
        )

    def _auth(self) -> _Said:
        head = self._answer()
        challenges = _challenges(head) if head.status == 401 else None

        def flow() -> Flow[Grant | None]:
            grant: Grant | None = yield Authorise(
                self._site,
                self._name,
                challenges=challenges,
                zone=head.zone,
                reason=f"{self._site.authority} answered {head.status}",
            )
            return grant

        grant = self._run(flow())
        if grant is None:
            return "ok", "nothing is shown", ""
        source = grant.source or "the given credentials"
        if grant.scheme == "Basic":
            return "ok", f"Basic, with the password from {source}; resolve shows whether it is taken", ""
        return (
            "ok",
            f"{grant.scheme}: a token was given, {'anonymously' if source == 'anonymous' else f'for {source}'}",
            "",
        )

    def _resolve(self) -> _Said | None:
        if not self._upstream.resolves and self._reference.digest is None:
            return "ok", "it is not asked what a tag means (capabilities)", ""
        root = self.root = self._upstream.resolve(self._reference, control=self._control, ledger=self._ledger)
        return "ok", f"{root.digest}, {root.media_type}", ""

    def _manifest(self) -> _Said | None:
        root = self.root
        if root is None or not self._upstream.pulls:
            return None

        def document(descriptor: Descriptor) -> Manifest | Index:
            got = self._upstream.document(
                self._reference.repository,
                descriptor.digest,
                expected=None if descriptor == root else descriptor,  # the size of a HEAD is a claim
                tag=self._reference.tag,
                control=self._control,
                ledger=self._ledger,
            )
            return parse_document(got.raw, expected=got.descriptor.media_type)

        chosen, manifest = descend(root, self._platform, document)
        blobs = {blob.digest: blob for blob in manifest.layers}.values()
        self._blob = max((blob for blob in blobs if blob.size), key=lambda blob: blob.size, default=None)
        size = sum(blob.size for blob in blobs)
        return "ok", f"{chosen.digest} for {self._platform}: {len(manifest.layers)} layers of {size} bytes", ""

    def _range(self) -> _Said | None:
        blob = self._blob
        if blob is None:
            return None

        def flow() -> Flow[Hop]:
            headers = {"Accept-Encoding": "identity", "Accept": "*/*", "Range": "bytes=0-0"}
            path = f"{self._name}/blobs/{blob.digest}"
            what = f"blob {blob.digest}"
            accept = (200, 206, 416)
            return (
                yield from ask(
                    self._site, "GET", self._site.at(path), headers, repository=self._name, what=what, accept=accept
                )
            )[0]

        hop = self._run(flow())
        where = f"from {hop.url.authority}" + (", where it was redirected to" if hop.left else "")
        if hop.head.status == 206:
            return "ok", f"one byte of {blob.digest} {where}", ""
        return "warn", f"{blob.digest} {where}, but only whole: a broken transfer starts over", ""


def _challenges(head: Head) -> tuple[Challenge, ...]:
    return tuple(parse_challenges(head.headers.all("www-authenticate")))


def _zone(address: str) -> str:
    zone = zone_of(address)
    return "of no use" if zone is None else zone.name.lower()


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).date().isoformat()
