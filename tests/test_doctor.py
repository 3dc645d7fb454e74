"""Diagnosis of a pull: each step in its turn, where it ends, and no secret in it."""

from __future__ import annotations

import base64
import email.utils
import json
import re
import threading
import time
from pathlib import Path

import pytest

from layercache import Check, diagnose
from layercache.cli import main
from layercache.errors import CancelledError, DeadlineError
from layercache.registry import Password
from layercache.registry._probe import kind_of
from layercache.testing.images import build_image, layer_tar
from layercache.testing.registry import (
    BasicAuth,
    BearerAuth,
    Headers,
    Hold,
    IgnoreRange,
    Redirect,
    ScriptedRegistry,
    Status,
)
from tests import peers

IMAGE = build_image([layer_tar({"a": bytes(range(256)) * 20})], platform="linux/amd64")
NAME = "demo/serving"
SECRET = "pass-canary"
ORDER = ["root", "host", "credentials", "dns", "connect", "ping", "clock", "auth", "resolve", "manifest", "range"]


def look(registry: ScriptedRegistry | peers.PeerRegistry, root: Path, tag: str = "1", **options: object) -> list[Check]:
    return list(diagnose(f"{registry.host}/{NAME}:{tag}", root=root, platform="linux/amd64", **options))  # type: ignore[arg-type]


def steps(checks: list[Check]) -> list[str]:
    return [check.step for check in checks]


def of(checks: list[Check], step: str) -> Check:
    return next(check for check in reversed(checks) if check.step == step)


@pytest.mark.parametrize("kind", ["oci-gzip", "index", "docker-list"])
def test_a_pull_that_works_passes_every_step(docker_registry: peers.PeerRegistry, root: Path, kind: str) -> None:
    """Against a real registry: all steps, in order, and what each found."""
    checks = look(docker_registry, root, kind)

    assert steps(checks) == ORDER
    assert {check.state for check in checks} == {"ok"}
    assert docker_registry.host in of(checks, "host").detail
    assert docker_registry.pushed[kind].digest in of(checks, "resolve").detail
    assert "2 layers" in of(checks, "manifest").detail
    assert of(checks, "range").detail.startswith("one byte of sha256:")


def test_nothing_is_kept_or_made(scripted: ScriptedRegistry, tmp_path: Path) -> None:
    """A root that is not there stays so, and no blob is asked for but one byte of it."""
    scripted.add(IMAGE, NAME, "1")
    place = tmp_path / "no" / "root"

    checks = look(scripted, place)

    assert of(checks, "root").state == "ok"
    assert "would be made" in of(checks, "root").detail
    assert not place.parent.exists()
    assert [request.headers["range"] for request in scripted.requests if "/blobs/" in request.path] == ["bytes=0-0"]


@pytest.mark.parametrize("auth", [BasicAuth("user", SECRET), BearerAuth("user", SECRET)])
def test_credentials_are_named_by_their_source_and_never_shown(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], auth: BasicAuth | BearerAuth
) -> None:
    """Neither password, nor token, nor signature, in lines, JSON or with -v; the file they are from is named."""
    with ScriptedRegistry(auth=auth) as registry:
        registry.add(IMAGE, NAME, "1")
        registry.fault("blobs/*", Redirect(), times=None)
        pair = base64.b64encode(f"user:{SECRET}".encode()).decode()
        file = tmp_path / "auth.json"
        file.write_text(json.dumps({"auths": {registry.host: {"auth": pair}}}))
        line = ["doctor", f"{registry.host}/{NAME}:1", "--root", str(root), "--auth-file", str(file), "-v"]
        line += ["--platform", "linux/amd64"]

        assert main(line) == 0
        assert main([*line, "--json"]) == 0

        out, err = capsys.readouterr()
        tokens = {request.headers.get("authorization", "").partition(" ")[2] for request in registry.requests} - {""}
        assert tokens
        for secret in (SECRET, pair, "X-Amz-", *tokens):
            assert secret not in out + err
        assert f"a password, from {file}" in out
        assert f"from {registry.storage_host}, where it was redirected to" in out


def test_wrong_credentials_end_it_and_say_whose(root: Path) -> None:
    """With Basic only the next step shows it; the message names the source and not the value."""
    with ScriptedRegistry(auth=BasicAuth("user", SECRET)) as registry:
        registry.add(IMAGE, NAME, "1")
        checks = look(registry, root, credentials=Password(registry.host, "user", "wrong-canary"))

        assert (checks[-1].step, checks[-1].state) == ("resolve", "fail")
        assert "the given password" in checks[-1].detail + checks[-1].hint
        assert "wrong-canary" not in repr(checks)
    with ScriptedRegistry(auth=BearerAuth("user", SECRET)) as registry:
        checks = look(registry, root, credentials=Password(registry.host, "user", "wrong-canary"))
        assert (checks[-1].step, checks[-1].state) == ("auth", "fail")


def test_where_nobody_listens_it_ends_at_the_connection(scripted: ScriptedRegistry, root: Path) -> None:
    """And a name that is none at DNS; nothing is said of later steps."""
    scripted.stop()
    checks = look(scripted, root)
    assert (steps(checks), checks[-1].state) == (ORDER[:5], "fail")
    assert "refused the connection" in checks[-1].detail

    checks = list(diagnose("registry.invalid/a/b:1", root=root))
    assert (checks[-1].step, checks[-1].state) == ("dns", "fail")


def test_an_absent_tag_ends_it_at_resolve(scripted: ScriptedRegistry, root: Path) -> None:
    """What the registry said is there."""
    scripted.add(IMAGE, NAME, "1")
    checks = look(scripted, root, "2")
    assert (checks[-1].step, checks[-1].state) == ("resolve", "fail")
    assert "404" in checks[-1].detail


def test_a_blob_that_is_refused_ends_it_at_the_last_step(scripted: ScriptedRegistry, root: Path) -> None:
    """Storage that says no is seen, though everything before went well."""
    scripted.add(IMAGE, NAME, "1")
    scripted.fault("blobs/*", Status(403), times=None)
    checks = look(scripted, root)
    assert (checks[-1].step, checks[-1].state) == ("range", "fail")


def test_a_registry_without_ranges_is_a_warning(scripted: ScriptedRegistry, root: Path) -> None:
    """A pull works there; a broken transfer starts over."""
    scripted.add(IMAGE, NAME, "1")
    scripted.fault("blobs/*", IgnoreRange())
    check = of(look(scripted, root), "range")
    assert check.state == "warn"
    assert "starts over" in check.detail


def test_a_wrong_clock_is_a_warning(scripted: ScriptedRegistry, root: Path) -> None:
    """Compared with what the registry says of the time, in the right direction."""
    scripted.add(IMAGE, NAME, "1")
    date = email.utils.formatdate(time.time() - 600, usegmt=True)
    scripted.fault("*", Headers(drop=("Date",), put=(("Date", date),)), times=None)
    check = of(look(scripted, root), "clock")
    assert check.state == "warn"
    assert re.search(r"this machine's is (599|60[0-2]) s ahead of", check.detail)


def test_a_mirror_that_fails_is_a_warning_where_the_registry_serves(scripted: ScriptedRegistry, root: Path) -> None:
    """The steps of both are there, each with its source, mirrors first."""
    scripted.add(IMAGE, NAME, "1")
    with ScriptedRegistry() as mirror:
        checks = look(scripted, root, mirrors={scripted.host: [mirror.host]})

    assert [check.source for check in checks] == [""] + [mirror.host] * 8 + [scripted.host] * 10
    assert [(check.step, check.source) for check in checks if check.state != "ok"] == [("resolve", mirror.host)]
    assert f"a mirror of {scripted.host}" in of(checks[:5], "host").detail


def test_a_registry_that_is_gone_is_a_warning_where_a_mirror_serves(scripted: ScriptedRegistry, root: Path) -> None:
    """A host without a way to the registry itself pulls all the same."""
    with ScriptedRegistry() as mirror:
        mirror.add(IMAGE, NAME, "1")
        scripted.stop()
        checks = look(scripted, root, mirrors={scripted.host: [mirror.host]})

    assert [(check.step, check.state) for check in checks if check.state != "ok"] == [("connect", "warn")]


def test_a_root_that_must_not_be_used_fails_and_the_rest_is_told_all_the_same(
    scripted: ScriptedRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two faults are found in one go; the exit code is 1 and the document is whole."""
    (tmp_path / "something").write_text("else")
    line = ["doctor", f"{scripted.host}/{NAME}:1", "--root", str(tmp_path), "--json"]

    assert main(line) == 1

    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [check["step"] for check in document["checks"] if check["state"] == "fail"] == ["root", "resolve"]


def test_lines_are_for_people(scripted: ScriptedRegistry, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word of state, the step, what was found; with -q only what is not well."""
    line = ["doctor", f"{scripted.host}/{NAME}:1", "--root", str(root)]
    assert main(line) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"ok    root         {root}: ")
    assert out[-1].startswith("FAIL  resolve      manifest demo/serving:1: ")
    assert main([*line, "-q"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_it_ends_at_its_deadline_and_on_a_cancel(scripted: ScriptedRegistry, root: Path) -> None:
    """A registry that never answers holds nobody."""
    gate, cancel = threading.Event(), threading.Event()
    scripted.fault("*", Hold(gate), times=None)
    start = time.monotonic()
    with pytest.raises(DeadlineError):
        look(scripted, root, timeout=0.3)
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(CancelledError):
        look(scripted, root, cancel=cancel)
    gate.set()
    assert time.monotonic() - start < 5


def test_a_proxy_is_named_without_its_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks for a fault must know that there is one."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@127.0.0.1:9")
    checks = list(diagnose("registry.example/a:1", root=root))
    assert "through the proxy 127.0.0.1:9" in of(checks, "host").detail
    assert (checks[-1].step, checks[-1].state) == ("connect", "fail")
    assert SECRET not in repr(checks)


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("docker.io", "Docker Hub"),
        ("registry-1.docker.io", "Docker Hub"),
        ("ghcr.io", "GitHub's registry"),
        ("europe-docker.pkg.dev", "Google Artifact Registry"),
        ("eu.gcr.io", "Google's registry"),
        ("acme.azurecr.io", "Azure Container Registry"),
        ("azurecr.io.example.com", "a registry by its own name"),
        ("notquay.io", "a registry by its own name"),
        ("public.ecr.aws", "Amazon ECR Public"),
        (
            "123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
            "Amazon ECR, account 123456789012 in us-gov-west-1, partition aws-us-gov (FIPS)",
        ),
    ],
)
def test_the_kind_of_a_host_is_told_by_its_whole_name(host: str, kind: str) -> None:
    """A look-alike is none."""
    assert kind_of(host) == kind
