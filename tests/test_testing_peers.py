"""The suite's own ground: real peers answer, hold what was pushed, stop and start; nothing is left behind."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from layercache.testing.images import BuiltImage, BuiltIndex
from tests import peers

pytest_plugins = ["pytester"]

KINDS = ["oci-gzip", "oci-zstd", "oci-plain", "odd", "index", "docker-gzip", "docker-list"]
INDEXES = {"index", "docker-list"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_registry_holds_what_was_pushed(docker_registry: peers.PeerRegistry, kind: str) -> None:
    """Every kind is there under its digest, with the manifest type its name says and the layers that were built."""
    pushed = docker_registry.pushed[kind]
    manifest = json.loads(pushed.manifest)
    flavour = "docker" if kind.startswith("docker") else "oci"

    assert pushed.digest == f"sha256:{sha256(pushed.manifest).hexdigest()}"
    assert flavour in manifest["mediaType"]
    assert ("manifests" in manifest) == (kind in INDEXES)
    if isinstance(pushed.source, BuiltImage):
        assert [layer["digest"] for layer in manifest["layers"]] == [str(d.digest) for d in pushed.source.layers]
    if flavour == "oci":
        assert pushed.manifest == pushed.source.manifest


def test_skopeo_reads_a_pushed_image(docker_registry: peers.PeerRegistry, skopeo: Callable[..., bytes]) -> None:
    """A reference of the fixtures is one that other programs understand."""
    for reference in (docker_registry.reference("oci-zstd"), docker_registry.pinned("oci-zstd")):
        raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{reference}")

        assert raw == docker_registry.pushed["oci-zstd"].manifest


def test_a_stoppable_registry_goes_and_comes_back(
    docker_registry: peers.PeerRegistry, stoppable_registry: peers.PeerRegistry
) -> None:
    """It refuses while it is stopped, has the same images at the same port afterwards, and the shared one goes on."""
    url = f"http://{stoppable_registry.host}/v2/"

    stoppable_registry.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)
    stoppable_registry.start()

    with urllib.request.urlopen(url) as response:
        assert response.status == 200
    assert stoppable_registry.host in url
    assert stoppable_registry.pinned("odd").partition("/")[2] == docker_registry.pinned("odd").partition("/")[2]
    with urllib.request.urlopen(f"http://{docker_registry.host}/v2/") as response:
        assert response.status == 200


def test_the_log_of_a_registry_counts_requests(stoppable_registry: peers.PeerRegistry) -> None:
    """Requests are listed as they were answered, and forgotten on request."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{stoppable_registry.host}/v2/nobody/tags/list")
    caught.value.close()

    assert stoppable_registry.requests()[-1] == ("GET", "/v2/nobody/tags/list", 404)
    stoppable_registry.forget_requests()
    assert stoppable_registry.requests() == []


def test_a_registry_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    """The error of a peer that gives up holds what the peer said."""
    registry = peers.PeerRegistry(tmp_path, tmp_path / "store")
    registry.host = "256.0.0.1:1"

    with pytest.raises(AssertionError, match="no such host"):
        registry.start()


def test_a_failing_skopeo_is_an_error(tmp_path: Path) -> None:
    """What skopeo says on standard error is in the error."""
    with pytest.raises(AssertionError, match="no such file"):
        peers.skopeo("inspect", f"oci:{tmp_path}/nothing:1", home=tmp_path)


def test_real_images_are_the_same_every_time(real_images: dict[str, BuiltImage | BuiltIndex]) -> None:
    """The fixtures are built from files of this machine only: twice the same digests."""
    again = peers.real_images()

    assert {kind: image.digest for kind, image in again.items()} == {k: i.digest for k, i in real_images.items()}
    assert set(again) == set(KINDS)


def test_the_root_is_empty_and_private(root: Path) -> None:
    """A cache accepts it as its root."""
    assert root.stat().st_mode & 0o777 == 0o700
    assert not list(root.iterdir())


GUARDED = """
import os, subprocess, threading

kept = []

def test_child():
    kept.append(subprocess.Popen(["sleep", "97"]))

def test_thread():
    threading.Thread(target=threading.Event().wait, name="lost", daemon=True).start()

def test_settings():
    assert "/users/own" not in os.environ.values()

def test_clean():
    thread = threading.Thread(target=subprocess.run, args=(["true"],))
    thread.start()
    thread.join()
"""


def run_under_conftest(pytester: pytest.Pytester, body: str, *, ini: str = "") -> pytest.RunResult:
    """Run the tests of text ``body`` under this suite's conftest, in a process of their own."""
    pytester.makeini(f"[pytest]\nmarkers =\n    real: x\n{ini}")
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text().replace("_GRACE = 2.0", "_GRACE = 0.1"))
    pytester.makepyfile(body)
    pytester.syspathinsert(Path(__file__).parent.parent)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs")


def test_the_guards_fail_what_leaves_something(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process or thread left behind fails its test by name; the user's settings are not seen; the tidy pass."""
    for name in ("DOCKER_CONFIG", "AWS_PROFILE", "LAYERCACHE_ROOT", "XDG_CACHE_HOME", "REGISTRY_AUTH_FILE", "no_proxy"):
        monkeypatch.setenv(name, "/users/own")

    result = run_under_conftest(pytester, GUARDED)

    result.assert_outcomes(passed=4, errors=2)
    result.stdout.re_match_lines_random(
        [
            r".*left behind: threads \[\], processes \['\d+ sleep 97 '\].*",
            r".*left behind: threads \['lost'\], processes \[\].*",
        ]
    )


def test_missing_programs_skip_and_say_so(pytester: pytest.Pytester) -> None:
    """Tests of real peers are skipped with the name of the Debian package; others run."""
    body = (
        "import pytest\n"
        "def test_fixture(docker_registry): ...\n"
        "@pytest.mark.real\ndef test_marked(): ...\n"
        "def test_other(): ...\n"
    )
    pytester.makepyfile(
        absent="from tests import peers\ndef pytest_configure():\n    peers.PROGRAMS = ('no-such-registry',)\n"
    )

    result = run_under_conftest(pytester, body, ini="addopts = -p absent\n")

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*needs no-such-registry: apt-get install no-such-registry*"])
