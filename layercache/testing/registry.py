"""A registry on a loopback port: the pull side of the distribution specification, and faults on request.

    with ScriptedRegistry() as registry:
        registry.add(image, "demo/serving", "1.0")
        registry.fault("blobs/*", Truncate(at=100))              # the next GET of a blob is cut
        registry.fault("blobs/*", Redirect(), times=None)        # all others are sent to storage, as ECR does
        pull(f"{registry.host}/demo/serving:1.0")
        registry.requests                                        # what was asked, with headers, status and bytes

It is a real server over real sockets. It serves any number of connections, and ``stop`` leaves no thread behind.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Self
from urllib.parse import parse_qs, quote, unquote

from layercache.oci import Digest
from layercache.testing._auth import Auth, BasicAuth, BearerAuth, Gate
from layercache.testing._content import Content, pieces
from layercache.testing._faults import (
    Chunked,
    Delay,
    Disconnect,
    Drip,
    Encoded,
    Endless,
    Fault,
    Headers,
    Hold,
    IgnoreRange,
    Multipart,
    Raw,
    Redirect,
    Reset,
    Stall,
    Status,
    Substitute,
    Truncate,
    WrongBytes,
    WrongContentRange,
    WrongLength,
)
from layercache.testing._listener import Call, Listener
from layercache.testing._reply import Drop, Origin, Reply, Request, Wait, deliver, error
from layercache.testing._storage import refuse, sign, xml_error
from layercache.testing.images import BuiltImage, BuiltIndex

__all__ = [
    "BasicAuth",
    "BearerAuth",
    "Chunked",
    "Delay",
    "Disconnect",
    "Drip",
    "Drop",
    "Encoded",
    "Endless",
    "Fault",
    "Headers",
    "Hold",
    "IgnoreRange",
    "Multipart",
    "Origin",
    "Raw",
    "Redirect",
    "Reply",
    "Request",
    "Reset",
    "ScriptedRegistry",
    "Stall",
    "Status",
    "Substitute",
    "Truncate",
    "Wait",
    "WrongBytes",
    "WrongContentRange",
    "WrongLength",
]

_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")
_JSON = ("Content-Type", "application/json; charset=utf-8")
_RESOURCE = re.compile(r"/v2/(?P<repository>.+)/(?P<resource>(?:manifests|blobs)/[^/]+|tags/list)")
_STORED = re.compile(r"/storage/(?P<repository>.+)/(?P<digest>[^/]+)")


class ScriptedRegistry:
    """A registry at :attr:`host`, from :meth:`start` to :meth:`stop` or inside a ``with`` block.

    It pulls only: anything but GET and HEAD is a 405. Blobs and manifests are held by repository. Everything may
    be called from any thread, and while requests are answered.
    """

    def __init__(self, *, auth: Auth | None = None) -> None:
        self._lock = threading.Lock()
        self._blobs: dict[tuple[str, str], Content] = {}
        self._manifests: dict[tuple[str, str], tuple[bytes, str | None]] = {}
        self._tags: dict[tuple[str, str], str] = {}
        self._scripts: list[_Script] = []
        self._requests: dict[int, Request] = {}
        self._arrived = 0
        self._ahead = 0.0
        self._gate = Gate(auth, self._now)
        self._listener = Listener("registry", lambda call: self._answer("registry", call))
        self._storage = Listener("storage", lambda call: self._answer("storage", call))

    def start(self) -> None:
        """Begin to answer; after a :meth:`stop`, on the same ports with the same content, faults and log."""
        self._listener.start()
        try:
            self._storage.start()
        except BaseException:
            self._listener.stop()
            raise

    def stop(self) -> None:
        """End all connections and free the ports. Returns when no thread is left. Stopping twice is no error."""
        self._listener.stop()
        self._storage.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def host(self) -> str:
        """``127.0.0.1:PORT``, the host of a reference to this registry. Known after the first :meth:`start`."""
        return f"127.0.0.1:{self._listener.port}"

    @property
    def storage_host(self) -> str:
        """``127.0.0.1:PORT`` of the storage that :class:`Redirect` points to: strict as S3, and another origin."""
        return f"127.0.0.1:{self._storage.port}"

    # Content

    def add(self, image: BuiltImage | BuiltIndex, repository: str, tag: str | None = None) -> Digest:
        """Hold ``image`` with all it names in ``repository``, under its digest and ``tag``; return the digest."""
        if isinstance(image, BuiltIndex):
            for child in image.images:
                self.add(child, repository)
        else:
            for digest, content in image.blobs.items():
                self.put_blob(repository, content, digest=digest)
        return self.put_manifest(
            repository, image.manifest, media_type=str(image.media_type), tag=tag, digest=image.digest
        )

    def put_blob(self, repository: str, content: Content, *, digest: Digest | None = None) -> Digest:
        """Hold ``content`` as a blob of ``repository``; return its name, which ``digest`` makes any other.

        A file is read when it is asked for.
        """
        if digest is None:
            hasher = sha256()
            for piece in pieces(content):
                hasher.update(piece)
            digest = Digest.parse(f"sha256:{hasher.hexdigest()}")
        with self._lock:
            self._blobs[repository, str(digest)] = content
        return digest

    def put_manifest(
        self,
        repository: str,
        raw: bytes,
        *,
        media_type: str | None,
        tag: str | None = None,
        digest: Digest | None = None,
    ) -> Digest:
        """Hold ``raw``, whatever it is, as a manifest of ``repository``; return its name.

        ``media_type`` is sent as Content-Type; ``None`` sends none. A ``tag`` that exists moves. ``digest`` names
        the bytes something else than their sha256.
        """
        digest = digest or Digest.of(raw)
        with self._lock:
            self._manifests[repository, str(digest)] = (raw, media_type)
            if tag is not None:
                self._tags[repository, tag] = str(digest)
        return digest

    # Faults

    def fault(
        self,
        pattern: str,
        *faults: Fault,
        times: int | None = 1,
        skip: int = 0,
        method: str | None = None,
        when: Callable[[Request], bool] | None = None,
    ) -> None:
        """Answer ``times`` requests (``None``: all) that match ``pattern`` with ``faults``, applied one after another.

        ``pattern`` is a shell pattern for :attr:`Request.resource` (``blobs/*``, ``manifests/1.0``, ``token``,
        ``storage/*``), or, with a leading ``/``, for the whole path. ``skip`` lets so many of them pass first.
        ``method`` and ``when`` narrow it further; a request that cannot show the fault (a HEAD that of a body) never
        matches.

        A request gets the faults of one call: of those with a count the oldest that has turns left, else of those
        without. What the registry refuses for want of credentials is refused without using up a turn.
        """
        if not faults:
            raise ValueError("a script without a fault")
        script = _Script(pattern, faults, times, skip, method, when)
        with self._lock:
            self._scripts.append(script)
            self._scripts.sort(key=lambda script: script.left is None)  # stable: the oldest stays first

    def clear_faults(self) -> None:
        """Behave from now on."""
        with self._lock:
            self._scripts.clear()

    def advance(self, seconds: float) -> None:
        """Move the registry's clock on: storage URLs and tokens age without anybody waiting."""
        with self._lock:
            self._ahead += seconds

    def revoke_tokens(self) -> None:
        """Refuse every token given out so far."""
        self._gate.revoke()

    # Log

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request so far, in the order of arrival, also those whose reply is still under way."""
        with self._lock:
            return tuple(self._requests.values())

    def count(self, pattern: str = "*", *, method: str | None = None) -> int:
        """Number of requests so far that match ``pattern``, as in :meth:`fault`."""
        return sum(_matches(pattern, request) and method in (None, request.method) for request in self.requests)

    def clear_requests(self) -> None:
        """Forget the log."""
        with self._lock:
            self._requests.clear()

    # Answers

    def _now(self) -> float:
        return time.time() + self._ahead

    def _answer(self, listener: str, call: Call) -> tuple[Reply, Callable[[int], None]]:
        request = _request(listener, call)
        with self._lock:
            self._arrived += 1
            number = self._arrived
            self._requests[number] = request
        reply = self._refusal(request)
        if reply is None:
            reply = self._found(request)
            for fault in self._take(request):
                reply = fault.apply(reply)
        if reply.raw is None and not any(isinstance(step, Drop) for step in reply.before):
            self._note(number, status=reply.status)
        return reply, lambda count: self._note(number, sent=count)

    def _note(self, number: int, *, status: int | None = None, sent: int = 0) -> None:
        with self._lock:
            request = self._requests.get(number)
            if request is not None:  # else the log was cleared meanwhile
                status = request.status if status is None else status
                self._requests[number] = replace(request, status=status, sent=request.sent + sent)

    def _take(self, request: Request) -> tuple[Fault, ...]:
        with self._lock:
            return next((script.faults for script in self._scripts if script.takes(request)), ())

    def _refusal(self, request: Request) -> Reply | None:
        """What ``request`` gets for want of credentials, if it does."""
        if request.listener == "storage" or request.resource == "token":
            return None
        elsewhere = isinstance(self._gate.auth, BearerAuth) and self._gate.auth.elsewhere
        return self._gate.refuse(request, f"http://{self.storage_host if elsewhere else self.host}/token")

    def _found(self, request: Request) -> Reply:
        """The right reply, before any fault."""
        kind, _, name = request.resource.partition("/")
        if kind == "token":
            return self._gate.token(request)
        if request.listener == "storage":
            return self._stored(request, name)
        if request.method not in ("GET", "HEAD"):
            return error(405, "UNSUPPORTED", "this registry is read only").put(("Allow", "GET, HEAD"))
        if kind == "ping":
            return deliver(b"{}", [_JSON, _VERSION], request, ranges=False)
        if kind == "manifests":
            return self._manifest(request, name)
        if kind == "blobs":
            return self._blob(request, name)
        return self._tag_list(request)

    def _manifest(self, request: Request, name: str) -> Reply:
        with self._lock:
            digest = self._tags.get((request.repository, name), name)
            held = self._manifests.get((request.repository, digest))
        if held is None:
            return error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        raw, media_type = held
        headers = [] if media_type is None else [("Content-Type", media_type)]
        return deliver(raw, [*headers, *_named(digest)], request, ranges=False)

    def _blob(self, request: Request, digest: str) -> Reply:
        with self._lock:
            blob = self._blobs.get((request.repository, digest))
        if blob is None:
            return error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        reply = deliver(blob, [("Content-Type", "application/octet-stream"), *_named(digest)], request)
        path = f"/storage/{request.repository}/{digest}"

        def signed(seconds: float, *, session: bool) -> str:
            query = sign(request.method, path, now=self._now(), expires=seconds, session=session)
            return f"http://{self.storage_host}{path}?{query}"

        return replace(reply, origin=replace(reply.origin, sign=signed))

    def _tag_list(self, request: Request) -> Reply:
        with self._lock:
            tags = sorted(tag for repository, tag in self._tags if repository == request.repository)
        if not tags or not request.repository:
            return error(404, "NAME_UNKNOWN", "repository name not known to registry")
        query = parse_qs(request.query)
        tags = [tag for tag in tags if tag > query.get("last", [""])[0]]
        headers = [_JSON, _VERSION]
        asked = query.get("n", [""])[0]
        if asked.isdigit() and len(tags) > (most := int(asked)) > 0:
            tags = tags[:most]
            headers.append(("Link", f'<{request.path}?n={most}&last={quote(tags[-1])}>; rel="next"'))
        body = json.dumps({"name": request.repository, "tags": tags}).encode()
        return deliver(body, headers, request, ranges=False)

    def _stored(self, request: Request, digest: str) -> Reply:
        refusal = refuse(request, self._now())
        if refusal is not None:
            return refusal
        with self._lock:
            blob = self._blobs.get((request.repository, digest))
        if blob is None:
            return xml_error(404, "NoSuchKey", "The specified key does not exist.")
        # No digest header, and an ETag of the storage's own, as S3 has it.
        etag = sha256(digest.encode()).hexdigest()[:32]
        return deliver(blob, [("Content-Type", "application/octet-stream"), ("ETag", f'"{etag}"')], request)


@dataclass(slots=True)
class _Script:
    pattern: str
    faults: tuple[Fault, ...]
    left: int | None
    skip: int
    method: str | None
    when: Callable[[Request], bool] | None

    def takes(self, request: Request) -> bool:
        """Whether ``request`` is one for this script; counts it if so."""
        if self.left == 0 or self.method not in (None, request.method) or not _matches(self.pattern, request):
            return False
        needs = {fault.needs for fault in self.faults}
        if (needs - {"any"} and request.method == "HEAD") or ("range" in needs and "range" not in request.headers):
            return False
        if self.when is not None and not self.when(request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.left is not None:
            self.left -= 1
        return True


def _matches(pattern: str, request: Request) -> bool:
    return fnmatchcase(request.path if pattern.startswith("/") else request.resource, pattern)


def _request(listener: str, call: Call) -> Request:
    path, _, query = call.target.partition("?")
    plain = unquote(path)
    repository, resource = "", path
    if plain.rstrip("/") == "/v2":
        resource = "ping"
    elif plain == "/token":
        resource = "token"
    elif (match := _RESOURCE.fullmatch(plain)) is not None and listener == "registry":
        repository, resource = match["repository"], match["resource"]
    elif (match := _STORED.fullmatch(plain)) is not None and listener == "storage":
        repository, resource = match["repository"], f"storage/{match['digest']}"
    return Request(
        call.method, path, query, call.headers, resource, repository, listener, call.connection, body=call.body
    )


def _named(digest: str) -> list[tuple[str, str]]:
    return [("Docker-Content-Digest", digest), ("ETag", f'"{digest}"'), _VERSION]
