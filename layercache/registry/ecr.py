"""Credentials for Amazon ECR, private and public, through boto3; docker's and podman's for every other registry.

boto3 is imported when the first token is asked for: it takes a third of a second and some 30 MiB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from layercache.control import Control
from layercache.errors import CancelledError, DeadlineError, LayerCacheError, UnauthorizedError
from layercache.registry._ecr_host import PUBLIC_HOSTS, EcrHost, parse_ecr_host
from layercache.registry._flight import Flights
from layercache.registry._wire import parse_basic, plain
from layercache.registry.auth import Credential, Credentials, DockerConfig

__all__ = ["EcrCredentials"]

_T = TypeVar("_T")

_log = logging.getLogger("layercache.registry")

_MARGIN = 60.0  # seconds before its end from which a token is not given out: a request may be long under way
_YOUNG = 10.0  # seconds in which a refused token is not asked for anew: the next one would be refused too
_AGAIN = 60.0  # seconds after a failed renewal until the next one is tried
_PUBLIC_REGION = "us-east-1"  # the only one that gives out tokens for ECR Public
# Where AWS credentials were put on purpose. The instance's own (metadata service) are no reason to ask for ECR Public:
# from inside AWS the anonymous limit is that of who is known.
_PLACED = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SHARED_CREDENTIALS_FILE",
)


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps, and is not set by anybody


@dataclass(frozen=True, slots=True)
class _Token:
    credential: Credential
    received: float
    until: float

    def usable(self, now: float) -> bool:
        return now < self.until

    @property
    def half(self) -> float:
        return (self.received + self.until) / 2


@dataclass(slots=True)
class _State:
    """What one process knows. A forked child starts with nothing: another thread may have held the lock."""

    pid: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    making: threading.Lock = field(default_factory=threading.Lock)  # sessions of boto3 make one client at a time
    flights: Flights = field(default_factory=Flights)
    tokens: dict[Hashable, _Token] = field(default_factory=dict)
    last: dict[Hashable, Hashable] = field(default_factory=dict)  # region -> key of the token it had last
    renewing: dict[Hashable, float] = field(default_factory=dict)  # key -> when to try again at the earliest
    session: Any = None
    roles: dict[str, tuple[Any, float]] = field(default_factory=dict)  # region -> session of the role, its end


class EcrCredentials:
    """Tokens for ECR hosts, recognised by their names; any other host is asked of ``otherwise`` (docker's config).

    AWS credentials come from ``session`` (a ``boto3.Session``), from ``profile``, or from boto3's default chain;
    with ``role`` (an ARN) they are used to assume that role. ``endpoint`` is the URL of the ECR API where it is not
    the region's own, such as an interface endpoint without private DNS.

    A token is kept by credential, partition, region and FIPS for all threads of the process. From half of its life on
    one thread fetches the next one while the others go on with it; past its end it is not given out. Where AWS has no
    token, ``otherwise`` is asked, too. ECR Public is asked for a token only where AWS credentials were placed on
    purpose, and read anonymously where that fails.
    """

    def __init__(
        self,
        session: Any = None,
        *,
        profile: str = "",
        role: str = "",
        endpoint: str = "",
        otherwise: Credentials | None = None,
        clock: Callable[[], float] = _now,
    ) -> None:
        if session is not None and profile:
            raise ValueError("give a session or a profile, not both")
        self._given = session
        self._profile = profile
        self._role = role
        self._endpoint = endpoint
        self._otherwise = DockerConfig() if otherwise is None else otherwise
        self._clock = clock
        self._state = _State(os.getpid())

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:
        """Token of ECR as user name and password, or what ``otherwise`` has. May block; then it watches ``control``.

        :raises UnauthorizedError: if there is none, with AWS's reason.
        """
        where = parse_ecr_host(host)
        public = host in PUBLIC_HOSTS
        if where is None and not (public and self._placed()):
            return self._otherwise.basic(host, repository=repository, control=control)
        failure: LayerCacheError
        try:
            return self._credential(where, control)
        except (CancelledError, DeadlineError):
            raise
        except LayerCacheError as error:
            failure = error
        found = self._otherwise.basic(host, repository=repository, control=control)
        if found is None:
            raise failure
        return found

    def identity(self, host: str, *, control: Control) -> str | None:
        """Who AWS says that the credentials for ``host`` belong to (an ARN); ``None`` where AWS is not asked for it.

        :raises UnauthorizedError: if there are no AWS credentials, or AWS does not say.
        """
        where = parse_ecr_host(host)
        if where is None and not (host in PUBLIC_HOSTS and self._placed()):
            return None
        state = self._here()

        def ask() -> str:
            from botocore.config import Config  # noqa: PLC0415 -- see the top

            try:
                session, _ = self._session(state, where)
                region = _PUBLIC_REGION if where is None else where.region
                tuning = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2})
                with state.making:
                    client = session.client("sts", region_name=region, config=tuning)
                with contextlib.closing(client):
                    return str(client.get_caller_identity()["Arn"])
            except Exception as error:  # noqa: BLE001 -- see _fetch
                raise _refusal(error) from None

        return _aside(ask, control)

    def eager(self, host: str) -> bool:
        """True for private ECR: it wants Basic, and takes it without asking first."""
        return parse_ecr_host(host) is not None or self._otherwise.eager(host)

    def refused(self, host: str, credential: Credential) -> None:
        """Forget a token that was refused, unless it is so young that the next one would be refused, too."""
        state, now = self._here(), self._clock()
        with state.lock:
            for key, token in list(state.tokens.items()):
                if token.credential == credential and now - token.received >= _YOUNG:
                    del state.tokens[key]
        self._otherwise.refused(host, credential)

    def __repr__(self) -> str:
        return "EcrCredentials()"

    # --- tokens ---

    def _here(self) -> _State:
        if self._state.pid != os.getpid():
            self._state = _State(os.getpid())
        return self._state

    def _credential(self, where: EcrHost | None, control: Control) -> Credential:
        state = self._here()
        region = _region(where)
        # One flight a region: whoever comes in the meantime gets the same token.
        token = state.flights.once(region, lambda: _aside(lambda: self._token(state, where), control), control)
        return dataclasses.replace(token.credential, lifetime=token.until - self._clock())

    def _token(self, state: _State, where: EcrHost | None) -> _Token:
        """Token for the AWS credentials as they are now: where those were rotated, the old token may have ended."""
        region, now = _region(where), self._clock()
        try:
            session, shown = self._session(state, where)
        except Exception as error:  # noqa: BLE001 -- see _fetch
            # The source of credentials is away; what it gave us earlier is good until its end.
            kept = state.tokens.get(state.last.get(region))
            if kept is not None and kept.usable(now):
                return kept
            raise _refusal(error) from None
        key = (shown, region)
        with state.lock:
            kept = state.tokens.get(key)
            if kept is not None and kept.usable(now):
                due = now >= kept.half and now >= state.renewing.get(key, 0.0)
                if due:
                    state.renewing[key] = float("inf")
            else:
                kept = None
        if kept is None:
            return self._fetch(state, key, session, where)
        if due:
            threading.Thread(
                target=self._renew, args=(state, key, session, where), name="layercache-ecr", daemon=True
            ).start()
        return kept

    def _renew(self, state: _State, key: Hashable, session: Any, where: EcrHost | None) -> None:
        again = 0.0
        try:
            self._fetch(state, key, session, where)
        except LayerCacheError as error:
            again = self._clock() + _AGAIN
            _log.warning("the token of %s is not renewed yet: %s", _name(where), error)
        finally:
            with state.lock:
                state.renewing[key] = again

    def _fetch(self, state: _State, key: Hashable, session: Any, where: EcrHost | None) -> _Token:
        try:
            token = self._ask(state, session, where)
        except LayerCacheError:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever boto3 and the AWS credential chain raise
            raise _refusal(error) from None
        now = self._clock()
        if not token.usable(now):
            raise UnauthorizedError(
                f"{_name(where)} gave a token that has expired already", hint="look at the clock of whoever gives it"
            )
        with state.lock:
            state.tokens = {k: t for k, t in state.tokens.items() if t.usable(now)}
            state.tokens[key] = token
            state.last[_region(where)] = key
        return token

    # --- AWS ---

    def _ask(self, state: _State, session: Any, where: EcrHost | None) -> _Token:
        from botocore.config import Config  # noqa: PLC0415 -- see the top

        options: dict[str, Any] = {"endpoint_url": self._endpoint} if self._endpoint else {}
        elsewhere = bool(options) or any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_ECR"))
        tuning: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 4}}
        if where is None:
            if os.environ.get("AWS_USE_FIPS_ENDPOINT", "").lower() == "true":
                raise UnauthorizedError("ECR Public has no FIPS endpoint", hint="unset AWS_USE_FIPS_ENDPOINT for it")
            service, region = "ecr-public", _PUBLIC_REGION
        else:
            if elsewhere:
                pass  # botocore refuses FIPS and dual stack beside an endpoint of one's own
            elif where.fips and not where.dual_stack and where.partition in ("aws", "aws-us-gov"):
                # AWS's list says this name; botocore would ask api.ecr-fips, which is not on it.
                options = {"endpoint_url": f"https://ecr-fips.{where.region}.amazonaws.com"}
            else:
                tuning.update(use_fips_endpoint=where.fips or None, use_dualstack_endpoint=where.dual_stack or None)
            service, region = "ecr", where.region
        with state.making:
            client = session.client(service, region_name=region, config=Config(**tuning), **options)
        with contextlib.closing(client):
            answer = client.get_authorization_token()
        data = answer["authorizationData"]
        data = data[0] if isinstance(data, list) else data
        date = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"].get("date", _date()))
        # Both times are AWS's: this machine's clock may be wrong. Its own counts on from here.
        life = (data["expiresAt"] - date).total_seconds()
        pair = parse_basic(data["authorizationToken"])
        if pair is None:
            raise UnauthorizedError(f"{_name(where)} answered without a token")
        method = getattr(session.get_credentials(), "method", "") or "boto3"
        now = self._clock()
        credential = Credential(*pair, source=f"{_name(where)} ({plain(str(method), most=60)})")
        return _Token(credential, now, now + life - min(_MARGIN, max(life, 0.0) / 10))

    def _session(self, state: _State, where: EcrHost | None) -> tuple[Any, str]:
        """Session to ask with, and a text that is equal for equal AWS credentials. May ask AWS for them."""
        import boto3  # noqa: PLC0415 -- see the top

        session = self._given
        if session is None:
            with state.making:
                if state.session is None:
                    state.session = boto3.Session(profile_name=self._profile or None)
                session = state.session
        if self._role:
            session = self._assumed(state, session, where)
        found = session.get_credentials()
        if found is None:
            raise UnauthorizedError(
                "no AWS credentials were found", hint="give the process a role, a profile or AWS_ACCESS_KEY_ID"
            )
        frozen = found.get_frozen_credentials()
        parts = "\0".join(str(part or "") for part in (frozen.access_key, frozen.secret_key, frozen.token))
        return session, hashlib.sha256(parts.encode()).hexdigest()

    def _assumed(self, state: _State, base: Any, where: EcrHost | None) -> Any:
        """Session of the role, assumed anew from five minutes before it ends."""
        import boto3  # noqa: PLC0415 -- see the top

        region = _PUBLIC_REGION if where is None else where.region
        with state.lock:
            session, until = state.roles.get(region, (None, 0.0))
        if self._clock() < until:
            return session
        with state.making:
            client = base.client("sts", region_name=region)
        with contextlib.closing(client):
            answer = client.assume_role(RoleArn=self._role, RoleSessionName="layercache")
        keys = answer["Credentials"]
        session = boto3.Session(
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            aws_session_token=keys["SessionToken"],
        )
        date = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"].get("date", _date()))
        life = (keys["Expiration"] - date).total_seconds()
        with state.lock:
            state.roles[region] = (session, self._clock() + life - min(300.0, life / 2))
        return session

    def _placed(self) -> bool:
        if self._given is not None or self._profile or self._role:
            return True
        return any(os.environ.get(name) for name in _PLACED) or os.path.exists(  # noqa: PTH110 -- no Path is needed
            os.path.expanduser("~/.aws/credentials")  # noqa: PTH111
        )


def _aside(work: Callable[[], _T], control: Control) -> _T:
    """Result of ``work``, done in a thread of its own: boto3 knows neither our deadline nor our cancel."""
    done: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # noqa: BLE001 -- raised again by who waits
            done.put((None, error))

    threading.Thread(target=run, name="layercache-ecr", daemon=True).start()
    while True:
        control.checkpoint()
        try:
            result, error = done.get(timeout=0.05)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def _region(where: EcrHost | None) -> Hashable:
    return "public" if where is None else (where.partition, where.region, where.fips)


def _name(where: EcrHost | None) -> str:
    return "Amazon ECR Public" if where is None else f"Amazon ECR in {where.region}"


def _date() -> str:
    return email.utils.formatdate(usegmt=True)


def _refusal(error: Exception) -> LayerCacheError:
    """What an error of boto3 means. Its object stays behind: it may hold a request with its signature."""
    if isinstance(error, LayerCacheError):
        return error
    response = getattr(error, "response", None)
    said = response.get("Error", {}) if isinstance(response, dict) else {}
    if isinstance(error, KeyError | TypeError | ValueError | AttributeError):
        return UnauthorizedError(f"AWS answered with what was not understood ({type(error).__name__})")
    text = f"{said.get('Code', '')} {said.get('Message', '')}".strip() or str(error) or type(error).__name__
    return UnauthorizedError(
        f"AWS gives no token: {plain(text)}", hint="ecr:GetAuthorizationToken must be allowed, and sts:* for a role"
    )
