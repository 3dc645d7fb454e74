"""What refers to a manifest: signatures, bills of materials, attestations. A pure conversation, as those of `_flow`."""

from __future__ import annotations

import re

from layercache.errors import InvalidError, LimitError, NotFoundError, PolicyError, RegistryError
from layercache.oci import Descriptor, Digest, Index, MediaType, Repository, Tag, parse_document
from layercache.registry._effects import Flow, Site
from layercache.registry._flow import document, small
from layercache.registry._url import Url, UrlError
from layercache.registry._wire import Headers

__all__ = ["fallback_tag", "referrers"]

_PAGES = 100
_MOST = 10_000
_NEXT = re.compile(r'[ \t]*<([^<>]*)>[ \t]*;(?:[^,]*;)?[ \t]*rel[ \t]*=[ \t]*"?next"?[ \t]*(?:$|[;,])', re.IGNORECASE)


def referrers(site: Site, repository: Repository, subject: Digest) -> Flow[tuple[Descriptor, ...]]:
    """Descriptors of the manifests that have ``subject`` as theirs, each once (distribution-spec, "Listing Referrers").

    A registry without that API has them in an index under a tag made of the digest; without that there are none.

    :raises PolicyError: where a next page is not of the same host.
    :raises LimitError: over 100 pages or 10,000 descriptors.
    """
    what = f"referrers of {subject} in {repository.name}"
    url = site.at(f"{repository.name}/referrers/{subject}")
    found: dict[Digest, Descriptor] = {}
    seen: set[str] = set()
    while True:
        seen.add(url.target)
        try:
            head, raw = yield from small(site, repository, url, what=what)
        except (NotFoundError, RegistryError) as error:
            if len(seen) == 1 and (isinstance(error, NotFoundError) or error.status == 406):
                return (yield from _by_tag(site, repository, subject))
            raise
        if len(seen) == 1 and not _is_index(head.headers):
            return (yield from _by_tag(site, repository, subject))
        _take(found, Index.parse(raw, content_type=head.headers.get("content-type")))
        following = _next_page(head.headers, url, what)
        if following is None:
            return tuple(found.values())
        if following.target in seen:
            raise RegistryError(f"{what}: the pages go round in a circle", host=site.authority)
        if len(seen) >= _PAGES or len(found) > _MOST:
            raise LimitError(f"{what}: more than {_PAGES} pages or {_MOST} descriptors")
        url = following


def fallback_tag(subject: Digest) -> Tag:
    """Tag of the index of referrers where a registry has no API for them ("Referrers Tag Schema")."""
    text = f"{subject.algorithm[:32]}-{subject.encoded[:64]}"
    return Tag(re.sub("[^A-Za-z0-9_.-]", "-", text))


def _by_tag(site: Site, repository: Repository, subject: Digest) -> Flow[tuple[Descriptor, ...]]:
    try:
        answer = yield from document(site, repository, fallback_tag(subject))
    except NotFoundError:
        return ()
    parsed = parse_document(answer.raw, expected=answer.descriptor.media_type)
    found: dict[Digest, Descriptor] = {}
    if isinstance(parsed, Index):  # else somebody's image has that tag
        _take(found, parsed)
    return tuple(found.values())


def _take(found: dict[Digest, Descriptor], page: Index) -> None:
    for descriptor in page.manifests:
        found.setdefault(descriptor.digest, descriptor)


def _is_index(headers: Headers) -> bool:
    try:
        return MediaType.parse(headers.get("content-type")).is_index
    except InvalidError:
        return False


def _next_page(headers: Headers, url: Url, what: str) -> Url | None:
    match = next(filter(None, map(_NEXT.match, headers.all("link"))), None)
    if match is None:
        return None
    try:
        following = url.join(match[1])
    except UrlError as error:
        raise PolicyError(f"{what}: the next page is refused: {error}", host=url.authority) from None
    if following.origin != url.origin:
        raise PolicyError(f"{what}: the next page is of another host, and refused", host=url.authority)
    return following
