"""Listing what refers to a manifest: by the API, page by page, and by the tag that stands in for it."""

from __future__ import annotations

import hashlib
import json

import pytest

from layercache.errors import InvalidManifestError, LimitError, NotFoundError, PolicyError, RegistryError
from layercache.oci import OCI_INDEX, OCI_MANIFEST, Digest
from layercache.registry._referrers import fallback_tag, referrers
from tests.registry_script import REPOSITORY, SITE, Reply, Script

SUBJECT = Digest.of(b"an image")


def page(*numbers: int, link: str = "", kind: str = str(OCI_INDEX)) -> Reply:
    manifests = [
        {"mediaType": str(OCI_MANIFEST), "digest": str(Digest.of(b"%d" % number)), "size": 100 + number}
        for number in numbers
    ]
    body = json.dumps({"schemaVersion": 2, "mediaType": str(OCI_INDEX), "manifests": manifests}).encode()
    return Reply(200, {"Content-Type": kind, **({"Link": link} if link else {})}, body)


def sizes(*replies: Reply) -> tuple[list[int], Script]:
    script = Script(*replies)
    found = script.run(referrers(SITE, REPOSITORY, SUBJECT))
    return [descriptor.size - 100 for descriptor in found], script


def test_what_refers_to_a_manifest_is_listed() -> None:
    found, script = sizes(page(1, 2))
    assert found == [1, 2]
    assert script.paths == [f"GET /v2/demo/x/referrers/{SUBJECT}"]


@pytest.mark.parametrize(
    "first", [Reply(404), Reply(406), page(7, kind="application/json"), Reply(200, {"Content-Type": "text/html"}, b"?")]
)
def test_a_registry_without_the_api_has_them_under_a_tag(first: Reply) -> None:
    found, script = sizes(first, page(3))
    assert found == [3]
    assert script.paths[1] == f"GET /v2/demo/x/manifests/sha256-{SUBJECT.encoded}"
    assert sizes(first, Reply(404))[0] == []


def test_the_tag_of_a_long_digest_is_cut() -> None:
    encoded = hashlib.sha512(b"x").hexdigest()
    assert fallback_tag(Digest.parse(f"sha512:{encoded}")) == f"sha512-{encoded[:64]}"


def test_an_image_under_that_tag_is_no_list() -> None:
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": str(Digest.of(b"{}")), "size": 2}
    body = json.dumps({"schemaVersion": 2, "mediaType": str(OCI_MANIFEST), "config": config, "layers": []}).encode()
    assert sizes(Reply(404), Reply(200, {"Content-Type": str(OCI_MANIFEST)}, body))[0] == []


def test_pages_are_followed_and_each_is_listed_once() -> None:
    found, script = sizes(
        page(1, 2, link='<?last=2>; rel="next"'),
        page(2, 3, link=f"</v2/demo/x/referrers/{SUBJECT}?last=3>; foo=bar; rel=next"),
        page(4, link='<https://elsewhere.example/>; rel="prev"'),
    )
    assert found == [1, 2, 3, 4]
    assert [path.partition("?")[2] for path in script.paths] == ["", "last=2", "last=3"]


@pytest.mark.parametrize(
    ("link", "error"),
    [
        ('<https://elsewhere.example/v2/>; rel="next"', PolicyError),
        ('<http://reg.example/v2/>; rel="next"', PolicyError),
        ('<https://reg.example:444/v2/>; rel="next"', PolicyError),
        ('<https://user:pw@reg.example/v2/>; rel="next"', PolicyError),
        (f'</v2/demo/x/referrers/{SUBJECT}>; rel="next"', RegistryError),
    ],
)
def test_the_next_page_is_of_the_same_host_and_a_new_one(link: str, error: type[Exception]) -> None:
    script = Script(page(1, link=link))
    with pytest.raises(error):
        script.run(referrers(SITE, REPOSITORY, SUBJECT))
    assert len(script.sent) == 1


def test_pages_without_end_come_to_one() -> None:
    script = Script(*(page(number, link=f'<?last={number}>; rel="next"') for number in range(200)))
    with pytest.raises(LimitError):
        script.run(referrers(SITE, REPOSITORY, SUBJECT))
    assert len(script.sent) == 100


def test_a_later_page_that_is_missing_or_no_index_is_an_error() -> None:
    with pytest.raises(NotFoundError):
        sizes(page(1, link='<?last=1>; rel="next"'), Reply(404))
    with pytest.raises(InvalidManifestError):
        sizes(page(1, link='<?last=1>; rel="next"'), Reply(200, {"Content-Type": str(OCI_INDEX)}, b"[]"))
