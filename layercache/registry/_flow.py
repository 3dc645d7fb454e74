"""The conversations with a registry: resolve a name, get a document, fetch a blob. Pure generators of effects.

Nothing here opens a socket, reads a clock or throws dice; a test feeds the answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from layercache.errors import (
    IntegrityError,
    InvalidError,
    NotFoundError,
    PolicyError,
    RateLimitedError,
    RegistryError,
    UnreachableError,
    UnsupportedError,
)
from layercache.oci import (
    MANIFEST_TYPES,
    MAX_BYTES,
    Descriptor,
    Digest,
    MediaType,
    Reference,
    Repository,
    Tag,
    parse_document,
)
from layercache.registry._effects import (
    Authorise,
    Deliver,
    Flow,
    Grant,
    Head,
    LostError,
    Pause,
    Recall,
    Receive,
    Release,
    Remember,
    Site,
    Target,
)
from layercache.registry._follow import PIECE, Hop, coding, delay_of, follow, problem_of, refusal, small_body
from layercache.registry._token import RETRYABLE
from layercache.registry._url import Url
from layercache.registry._wire import Headers, Problem, life_of, parse_challenges, parse_content_range, parse_date

__all__ = ["Document", "RangesError", "ask", "document", "fetch", "resolve", "small"]

_ATTEMPTS = 5
_LONGEST = 60.0  # a registry that asks for a longer wait is told to the caller, who can do something else
_MISSES = 3  # connections in a row without a new byte
_SCANTY = 10  # connections in a row with less than a piece
_PLAIN = {"Accept-Encoding": "identity"}
_DOCUMENTS = {**_PLAIN, "Accept": ", ".join(str(kind) for kind in MANIFEST_TYPES)}


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as it was received. ``descriptor`` carries the proven digest and size of ``raw``."""

    descriptor: Descriptor
    raw: bytes = field(repr=False)


# --- one question ---


def ask(
    site: Site,
    method: str,
    url: Url,
    headers: Mapping[str, str],
    *,
    repository: str,
    what: str,
    accept: Collection[int] = (200,),
    attempts: int = _ATTEMPTS,
) -> Flow[tuple[Hop, Grant | None]]:
    """Open reply with a status of ``accept``, authorised, redirected and repeated as needed.

    :raises LayerCacheError: the typed error for any other answer, or for none.
    """
    grant: Grant | None = yield Authorise(site, repository)
    attempt = 0
    renewed = returned = False
    while True:
        try:
            hop = yield from follow(
                method, url, headers, home=site.base, reach=None, grant=grant, own=dict(site.headers)
            )
        except LostError as lost:
            attempt += 1
            if attempt >= min(attempts, lost.tries) or not (yield Pause(site.authority, attempt)):
                raise UnreachableError(f"{what}: {lost.reason}", host=site.authority) from lost
            continue
        status = hop.head.status
        if status in accept:
            return hop, grant
        problem = yield from problem_of(method, hop)
        if hop.left:
            # A storage host that refuses a signed URL: it may have expired. The registry gives a new one, once.
            if status in (400, 401, 403) and not returned:
                returned = True
                continue
        elif not renewed and _wants_grant(hop.head, problem, grant):
            renewed = True
            grant = yield Authorise(
                site,
                repository,
                challenges=tuple(parse_challenges(hop.head.headers.all("www-authenticate"))),
                refused=grant,
                zone=hop.head.zone,
                reason=refusal(what, hop, problem, grant=grant).what,
            )
            continue
        if status in RETRYABLE:
            attempt += 1
            delay = delay_of(hop.head)
            if attempt < attempts and delay <= _LONGEST:
                shut = status in (429, 503)
                if (yield Pause(hop.url.authority, attempt, least=delay, shut=shut)):
                    continue
        hint = f"the credentials of {grant.source} were refused" if status == 401 and grant and grant.source else ""
        raise refusal(what, hop, problem, grant=grant, hint=hint)


def _wants_grant(head: Head, problem: Problem, grant: Grant | None) -> bool:
    """Whether a refusal is about who we are, not about what we may do: it may pass with a fresh grant."""
    if head.status == 401:
        return True
    text = problem.message.lower()
    if head.status == 403:  # ECR: an expired token, without a challenge
        return grant is not None and "expired" in text and ("token" in text or "credential" in text)
    if head.status == 400:  # ECR Public: the same
        return grant is not None and problem.code == "DENIED" and "token" in text
    return False


# --- manifests and indexes ---


def resolve(site: Site, reference: Reference) -> Flow[Descriptor]:
    """What a reference names now. HEAD where the registry gives a full answer to it, else GET.

    The size of a HEAD is what the registry claims; :func:`document` proves it.
    """
    target = reference.target
    what = _what(reference.repository, target)
    refused: RegistryError | None = None
    attempts = _ATTEMPTS
    try:
        hop, _ = yield from ask(
            site,
            "HEAD",
            site.at(f"{reference.repository.name}/manifests/{target}"),
            _DOCUMENTS,
            repository=reference.repository.name,
            what=what,
        )
    except NotFoundError:
        pass  # some registries know no HEAD
    except (RateLimitedError, UnreachableError, PolicyError):
        raise
    except RegistryError as error:
        refused = error
        attempts = 1 if error.retryable else _ATTEMPTS
    else:
        yield Release()
        descriptor = _described(hop.head.headers, target)
        if descriptor is not None:
            return descriptor
    try:
        found = yield from document(site, reference.repository, target, attempts=attempts)
    except RegistryError as error:
        if refused is not None and refused.status in (401, 403) and error.status != refused.status:
            # HEAD has no body to say why; the GET's text explains, the HEAD's status stays.
            raise type(refused)(
                f"{refused.what} ({error.what})", host=refused.host, status=refused.status, code=error.code
            ) from error
        raise
    return found.descriptor


def document(
    site: Site,
    repository: Repository,
    target: Digest | Tag,
    *,
    expected: Descriptor | None = None,
    tag: Tag | None = None,
    attempts: int = _ATTEMPTS,
) -> Flow[Document]:
    """Manifest or index by digest or tag; its digest is that of the bytes that came, whatever a header says.

    ``expected`` is the descriptor that named it, if any: then its size and media type hold, too. ``tag`` is one that
    led here: a pull-through cache (ECR) imports an image when a tag of it is asked for, and knows no digest before.

    :raises IntegrityError: if the bytes are not those of the digest asked for, or contradict the registry's own header.
    """
    what = _what(repository, target)
    get = partial(small, site, repository, what=what, expected=expected, attempts=attempts)
    try:
        head, raw = yield from get(site.at(f"{repository.name}/manifests/{target}"))
    except NotFoundError:
        if not isinstance(target, Digest):
            raise
        if tag is not None and (yield from _touch(site, repository, tag)):
            return (yield from document(site, repository, target, expected=expected, attempts=attempts))
        # Some registries keep manifests as blobs only. Nothing but a 404 may lead here: after a passing failure the
        # same bytes would be taken for something else.
        head, raw = yield from get(site.at(f"{repository.name}/blobs/{target}"))
    content_type = head.headers.get("content-type")
    if _is_schema1(content_type):  # its digest is not that of its bytes; without this it would look like damage
        raise UnsupportedError(f"{what} is a Docker schema 1 manifest", hint="push it again with a current tool")
    digest = _proven(raw, target, head.headers, expected)
    parsed = parse_document(
        raw, content_type=content_type or None, expected=None if expected is None else expected.media_type
    )
    return Document(Descriptor(media_type=parsed.media_type, digest=digest, size=len(raw)), raw)


def _touch(site: Site, repository: Repository, parent: Digest | Tag) -> Flow[bool]:
    """Whether the registry has what led to something that it does not know, or did not until it was asked for this."""
    try:
        yield from document(site, repository, parent)
    except NotFoundError:
        return False
    return True


def small(
    site: Site,
    repository: Repository,
    url: Url,
    *,
    what: str,
    expected: Descriptor | None = None,
    attempts: int = _ATTEMPTS,
) -> Flow[tuple[Head, bytes]]:
    """Head and bytes of a document of the registry, which are not looked into yet."""
    attempt = 0
    while True:
        hop, _ = yield from ask(site, "GET", url, _DOCUMENTS, repository=repository.name, what=what, attempts=attempts)
        yield from _refuse_coding(hop, what)
        try:
            if expected is None or expected.size > MAX_BYTES:
                return hop.head, (yield from small_body(hop.head, cap=MAX_BYTES, what=what))
            return hop.head, (yield from small_body(hop.head, cap=expected.size, what=what, digest=expected.digest))
        except LostError as lost:
            yield Release()
            attempt += 1
            if attempt >= _MISSES or not (yield Pause(site.authority, attempt)):
                raise UnreachableError(f"{what}: {lost.reason}", host=hop.url.authority) from lost


def _proven(raw: bytes, target: Digest | Tag, headers: Headers, expected: Descriptor | None) -> Digest:
    if expected is not None and len(raw) != expected.size:
        raise IntegrityError("wrong size", digest=expected.digest, expected=expected.size, actual=len(raw))
    named = target if isinstance(target, Digest) else _digest_of(headers)
    if named is None:
        return Digest.of(raw)
    actual = Digest.of(raw, algorithm=named.algorithm)
    if actual != named:
        raise IntegrityError("wrong digest", digest=named, expected=named, actual=actual)
    return named


def _described(headers: Headers, target: Digest | Tag) -> Descriptor | None:
    """Descriptor from the fields of a HEAD, ``None`` where they do not suffice."""
    digest, size = _digest_of(headers), headers.size()
    if isinstance(target, Digest):
        if digest is not None and digest.algorithm == target.algorithm and digest != target:
            raise IntegrityError("wrong digest", digest=target, expected=target, actual=digest)
        digest = target
    try:
        kind = MediaType.parse(headers.get("content-type"))
    except InvalidError:
        return None
    if digest is None or size is None or not (kind.is_manifest or kind.is_index):
        return None
    return Descriptor(media_type=kind, digest=digest, size=size)


def _digest_of(headers: Headers) -> Digest | None:
    """``Docker-Content-Digest``, where it is there and of an algorithm that can be checked."""
    try:
        return Digest.parse(headers.get("docker-content-digest"))
    except (InvalidError, UnsupportedError):
        return None


def _is_schema1(content_type: str) -> bool:
    try:
        return MediaType.parse(content_type).is_schema1
    except InvalidError:
        return False


# --- blobs ---


class RangesError(RegistryError):
    """A registry gives all of a blob or nothing."""


def fetch(
    site: Site,
    repository: Repository,
    descriptor: Descriptor,
    *,
    offset: int = 0,
    length: int | None = None,
    parent: Digest | Tag | None = None,
    strict: bool = False,
) -> Flow[None]:
    """Deliver bytes of a blob in order, starting at ``offset``; after a break go on where it broke.

    Where the registry redirected to is remembered for as long as it says, and gone to straight; what is refused there
    is asked of the registry again.
    Nothing is delivered beyond ``descriptor.size``; whether the bytes are the right ones is for the receiver to check.
    ``parent`` is a manifest that led here, best by tag: a pull-through cache knows a blob only after its manifest.
    ``strict``: a range and nothing else; a registry that does not answer with that is not read.

    :raises RangesError: if it is ``strict``, and the registry does otherwise.
    :raises IntegrityError: if the registry has more, or in the end fewer, bytes than the descriptor says.
    :raises UnreachableError: after three connections in a row that brought nothing.
    """
    size = descriptor.size
    if not 0 <= offset <= size or (length is not None and length < 0):
        raise InvalidError("not a range of the blob", value=f"offset {offset}, length {length}, size {size}")
    end = size if length is None else min(size, offset + length)
    if offset == end and (size or length == 0):
        return
    what = f"blob {descriptor.digest} of {repository.name}"
    at = offset  # everything before it was delivered
    ranges = True
    misses = scanty = 0
    while True:
        ranged = ranges and (at > 0 or end < size)
        if strict and not ranged:
            raise RangesError(f"{what}: {site.authority} does not answer ranges", host=site.authority)
        # No If-Range: the digest tells whether it is the same content, and a mirror's tag may differ for equal bytes.
        headers = {**_PLAIN, "Accept": "*/*", **({"Range": f"bytes={at}-{end - 1}"} if ranged else {})}
        accept = (200, 206, 416) if ranged else (200,)
        hop = yield from _straight(site, repository, descriptor.digest, headers, accept)
        if hop is None:
            url = site.at(f"{repository.name}/blobs/{descriptor.digest}")
            try:
                hop, _ = yield from ask(site, "GET", url, headers, repository=repository.name, what=what, accept=accept)
            except NotFoundError:
                if parent is None or not (yield from _touch(site, repository, parent)):
                    raise
                parent = None
                continue
            if hop.left:
                now = parse_date(hop.head.headers.get("date"))
                life = life_of(hop.url.query, hop.head.at if now is None else now)
                target = Target(hop.url, hop.reach)
                yield Remember(repository.name, descriptor.digest, target if life > 0 else None, life)
        if hop.head.status != 200:
            fault = _partial_fault(hop.head, at, end, size)
            if fault:
                # A registry that answers ranges wrongly is asked without them, once; what is here already is dropped
                # from the reply.
                yield Release()
                ranges = False
                continue
        elif strict:
            yield Release()
            ranges = False
            continue
        else:
            yield from _refuse_coding(hop, what)
            declared = hop.head.headers.size()
            if declared is not None and declared > size:
                yield Release()
                raise IntegrityError("too many bytes", digest=descriptor.digest, expected=size, actual=declared)
        before = at
        position = at if hop.head.status == 206 else 0
        lost: LostError | None = None
        try:
            # One byte more than is due is asked for, so that a body that does not end shows.
            while data := (yield Receive(min(PIECE, end - position + 1))):
                start, position = position, position + len(data)
                if position > end and (end == size or hop.head.status == 206):
                    yield Release()
                    raise IntegrityError(
                        "too many bytes", digest=descriptor.digest, expected=end, actual=f"at least {position}"
                    )
                if start < at or position > end:
                    data = data[max(0, at - start) : end - start]
                if data:
                    at += len(data)
                    yield Deliver(data)
                if position >= end and end < size:
                    break
        except LostError as error:
            lost = error
        yield Release()
        if at == end:
            return
        gained = at - before
        if not gained and hop.left:  # another address, perhaps: the registry chooses
            yield Remember(repository.name, descriptor.digest, None)
        misses = 0 if gained else misses + 1
        scanty = 0 if gained >= PIECE else scanty + 1
        go_on = misses < _MISSES and scanty < _SCANTY
        if go_on and gained < PIECE:
            go_on = yield Pause(site.authority, max(1, misses))
        if go_on:
            continue
        if lost is None:  # the registry means it: its blob ends here
            raise IntegrityError("too few bytes", digest=descriptor.digest, expected=size, actual=position)
        raise UnreachableError(
            f"{what}: {lost.reason} at byte {at} of {size}, {'repeatedly' if scanty > 1 else 'once'}",
            host=hop.url.authority,
        ) from lost


def _straight(
    site: Site, repository: Repository, digest: Digest, headers: Mapping[str, str], accept: Collection[int]
) -> Flow[Hop | None]:
    """Reply of where the registry sent the last request for this blob; ``None`` if it is to be asked (again)."""
    target: Target | None = yield Recall(repository.name, digest)
    if target is None:
        return None
    try:
        hop = yield from follow("GET", target.url, headers, home=site.base, reach=target.reach, grant=None)
    except (LostError, RegistryError):
        hop = None
    if hop is not None and hop.head.status in accept and hop.head.status != 416:
        return Hop(hop.head, hop.url, True, hop.reach)
    yield Release()
    yield Remember(repository.name, digest, None)  # expired, as a rule
    return None


def _partial_fault(head: Head, first: int, end: int, size: int) -> str:
    """Why a reply to a range request is not one to rely on; empty if it is (RFC 9110 sections 14.4 and 15.3.7)."""
    if head.status == 416:
        return "the range is refused"
    if coding(head):
        return "it has a content coding"
    if head.headers.get("content-type").lower().startswith("multipart/"):
        return "it has several parts"
    got = parse_content_range(head.headers.all("content-range"))
    if got is None:
        return "it does not say which range it is"
    if got.first != first or got.last >= end or got.total not in (None, size):
        return "it is another range"
    declared = head.headers.size()
    if head.headers.all("content-length") and declared != got.last - got.first + 1:
        return "its length is not that of its range"
    return ""


def _refuse_coding(hop: Hop, what: str) -> Flow[None]:
    name = coding(hop.head)
    if name:
        yield Release()
        raise RegistryError(
            f"{what}: {hop.url.authority} sent it with a content coding nobody asked for",
            host=hop.url.authority,
            status=hop.head.status,
            hint="a proxy on the way recompresses; let it pass the bytes as they are",
        )


def _what(repository: Repository, target: Digest | Tag) -> str:
    return f"manifest {repository.name}{'@' if isinstance(target, Digest) else ':'}{target}"
