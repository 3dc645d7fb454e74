"""Where credentials come from: docker's and podman's files, credential helpers, what is given."""

from __future__ import annotations

import base64
import json
import os
import pickle
import threading
import time
from pathlib import Path

import pytest

from layercache.control import Control
from layercache.errors import CancelledError, UnauthorizedError
from layercache.registry import Anonymous, Credential, DockerConfig, Password
from layercache.registry._helper import ask_helper

HOST = "reg.example:5000"


def entry(user: str = "user", password: str = "pass") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


class Home:
    """A home directory with docker's and podman's files, and a PATH of stub helpers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path / "bin"
        self.bin.mkdir()
        self.environ = {"HOME": str(path), "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def write(self, name: str, content: object) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    def helper(self, suffix: str, script: str) -> None:
        file = self.bin / f"docker-credential-{suffix}"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def find(self, host: str = HOST, repository: str = "") -> Credential | None:
        return DockerConfig(environ=self.environ).basic(host, repository=repository, control=Control())

    def user(self, host: str = HOST, repository: str = "") -> str | None:
        found = self.find(host, repository)
        return None if found is None else found.username


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


# --- files ---


def test_without_any_file_there_is_no_credential(home: Home) -> None:
    """Anonymous is a normal way to be."""
    assert home.find() is None


def test_the_files_are_asked_in_order(home: Home) -> None:
    """The first that has something for the registry counts; the next are asked where it has nothing."""
    environ = home.environ
    places = [
        ("config/containers/auth.json", {"XDG_CONFIG_HOME": str(home.path / "config")}),
        ("run/containers/auth.json", {"XDG_RUNTIME_DIR": str(home.path / "run")}),
        ("registry-auth.json", {"REGISTRY_AUTH_FILE": str(home.path / "registry-auth.json")}),
        (".docker/config.json", {}),
        ("docker/config.json", {"DOCKER_CONFIG": str(home.path / "docker")}),
    ]
    for name, variables in places:  # from the last to the first
        file = home.write(name, {"auths": {HOST: entry(name)}})
        environ.update(variables)
        found = home.find()
        assert found is not None
        assert (found.username, found.source) == (name, str(file))

    environ["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": {HOST: entry("inline")}})
    assert home.user() == "inline"
    environ["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": {"other.example": entry("inline")}})
    assert home.user() == "docker/config.json"


def test_podmans_file_in_the_home_directory_is_found(home: Home) -> None:
    """``XDG_CONFIG_HOME`` defaults to ``~/.config``."""
    home.write(".config/containers/auth.json", {"auths": {HOST: entry("podman")}})

    assert home.user() == "podman"


def test_a_given_file_is_the_only_one(home: Home) -> None:
    """Nothing else is looked at; one that cannot be read is an error, not anonymity."""
    home.write(".docker/config.json", {"auths": {HOST: entry("home")}})
    given = home.write("given.json", {"auths": {"other.example": entry()}})

    assert DockerConfig(given, environ=home.environ).basic(HOST, control=Control()) is None
    with pytest.raises(UnauthorizedError, match=r"missing\.json"):
        DockerConfig(home.path / "missing.json", environ=home.environ).basic(HOST, control=Control())


@pytest.mark.parametrize(
    "content", ["", "nonsense", "[]", "[" * 100_000, '{"auths":[]}', '{"auths":{"reg.example:5000":5}}']
)
def test_a_file_that_makes_no_sense_is_passed_over(home: Home, content: str) -> None:
    """It must not keep others from being used."""
    home.write(".docker/config.json", content)
    home.write(".config/containers/auth.json", {"auths": {HOST: entry("podman")}})

    assert home.user() == "podman"


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("reg.example:5000", True),
        ("https://reg.example:5000", True),
        ("https://reg.example:5000/v1/", True),
        ("http://reg.example:5000/v2/", True),
        ("https://reg.example:5000/other/", False),
        ("reg.example", False),
        ("reg.example:5001", False),
        ("https://reg.example:5000.evil.example/v1/", False),
        ("evil.example/reg.example:5000", False),
    ],
)
def test_the_keys_of_a_registry(home: Home, key: str, found: bool) -> None:
    """With and without scheme and API path; never another host or port."""
    home.write(".docker/config.json", {"auths": {key: entry()}})

    assert (home.user() is not None) is found


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_has_several_names(home: Home, key: str) -> None:
    """What docker writes, what people write, and the name of its API."""
    home.write(".docker/config.json", {"auths": {key: entry("hub")}})

    assert home.user("docker.io") == "hub"
    assert home.user(HOST) is None


def test_the_longest_path_that_leads_to_the_repository_counts(home: Home) -> None:
    """containers-auth.json(5)."""
    auths = {HOST: entry("host"), f"{HOST}/a": entry("a"), f"{HOST}/a/b/c": entry("abc"), f"{HOST}/a/bb": entry("abb")}
    home.write(".config/containers/auth.json", {"auths": auths})

    assert [home.user(HOST, name) for name in ("a/b/c/d", "a/b/c", "a/b", "a/bbb", "x", "")] == [
        "abc",
        "abc",
        "a",
        "a",
        "host",
        "host",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (entry("u", "p:q"), ("u", "p:q", "")),
        ({"username": "u", "password": "p"}, ("u", "p", "")),
        ({"identitytoken": "t"}, ("<token>", "", "t")),
        ({**entry("u", ""), "identitytoken": "t"}, ("u", "", "t")),
        ({"auth": "!!!"}, None),
        ({"auth": base64.b64encode(b"nocolon").decode()}, None),
        ({"auth": 5}, None),
        ({}, None),
    ],
)
def test_an_entry_is_read_in_each_form(home: Home, value: object, expected: tuple[str, str, str] | None) -> None:
    """``auth``, plain members, identity tokens; what makes no sense is as if absent."""
    home.write(".docker/config.json", {"auths": {HOST: value}})
    found = home.find()

    assert (found and (found.username, found.password, found.identity)) == expected


# --- helpers ---


def test_a_helper_is_asked_before_the_entries_of_its_file(home: Home) -> None:
    """``credHelpers`` of the host, else ``credsStore``; the name of the server comes without a newline."""
    home.helper("stub", 'cat > "$HOME/asked"; ' + 'printf \'{"Username":"helper","Secret":"s3cret"}\'')
    home.helper("store", 'printf \'{"Username":"store","Secret":"s"}\'')
    config = {"auths": {HOST: entry("file")}, "credHelpers": {HOST: "stub"}, "credsStore": "store"}
    home.write(".docker/config.json", config)

    found = home.find()

    assert found is not None
    assert (found.username, found.password, found.source) == ("helper", "s3cret", "docker-credential-stub")
    assert (home.path / "asked").read_bytes() == HOST.encode()
    assert home.user("other.example") == "store"


def test_docker_hub_is_asked_for_by_its_old_url(home: Home) -> None:
    """That is what docker login stored it under."""
    home.helper("stub", 'cat > "$HOME/asked"; printf \'{"Username":"u","Secret":"s"}\'')
    home.write(".docker/config.json", {"credsStore": "stub"})

    assert home.user("docker.io") == "u"
    assert (home.path / "asked").read_text() == "https://index.docker.io/v1/"


def test_a_helper_may_give_an_identity_token(home: Home) -> None:
    """The user name ``<token>`` says so."""
    home.helper("stub", 'cat >/dev/null; printf \'{"Username":"<token>","Secret":"idt"}\'')
    home.write(".docker/config.json", {"credsStore": "stub"})

    found = home.find()

    assert found is not None
    assert (found.password, found.identity) == ("", "idt")


@pytest.mark.parametrize(
    "script", ["echo 'credentials not found in native keychain'; exit 1", 'printf \'{"Username":"","Secret":""}\'']
)
def test_a_helper_that_has_nothing_leaves_the_word_to_the_entries(home: Home, script: str) -> None:
    """Its word for that is on standard output, or an answer without a secret."""
    home.helper("stub", "cat >/dev/null; " + script)
    home.write(".docker/config.json", {"auths": {HOST: entry("file")}, "credsStore": "stub"})

    assert home.user() == "file"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'the keychain is locked'; exit 1", "the keychain is locked"),
        ("exit 3", "without a word"),
        ("echo nonsense", "no JSON object"),
        ("echo '[]'", "no JSON object"),
        ("echo '{}'", "without Username and Secret"),
        ("head -c 100000 /dev/zero", "more than 65536 bytes"),
        ("yes", "more than 65536 bytes"),
    ],
)
def test_a_helper_that_fails_is_an_error_with_its_name(home: Home, script: str, message: str) -> None:
    """Only after no other place had a credential."""
    home.helper("stub", "cat >/dev/null; " + script)
    home.write(".docker/config.json", {"credsStore": "stub"})

    with pytest.raises(UnauthorizedError, match="docker-credential-stub") as caught:
        home.find()

    assert message in str(caught.value)
    home.write(".config/containers/auth.json", {"auths": {HOST: entry("podman")}})
    assert home.user() == "podman"


def test_a_missing_helper_is_an_error_with_its_name(home: Home) -> None:
    """As after copying a config file from another machine."""
    home.write(".docker/config.json", {"credsStore": "desktop"})

    with pytest.raises(UnauthorizedError, match="docker-credential-desktop cannot be run"):
        home.find()


@pytest.mark.parametrize("suffix", ["../../bin/sh", "a b", "x;y", "", "a/b", "$(id)", "x\n", "x" * 65])
def test_the_name_of_a_helper_cannot_lead_elsewhere(suffix: str, home: Home) -> None:
    """Letters, digits, dot, hyphen, underscore; nothing is run otherwise."""
    with pytest.raises(UnauthorizedError, match="not of the grammar"):
        ask_helper(suffix, HOST, control=Control(), environ=home.environ)


def test_a_helper_that_hangs_is_ended_with_what_it_started(home: Home) -> None:
    """In time, and its children too (they would keep the pipe open)."""
    home.helper("stub", 'sleep 60 & echo $! > "$HOME/child"; sleep 60')

    start = time.monotonic()
    with pytest.raises(UnauthorizedError, match="did not answer in time"):
        ask_helper("stub", HOST, control=Control(), environ=home.environ, patience=0.3)

    assert time.monotonic() - start < 2
    _await_end(int((home.path / "child").read_text()))


def test_a_helper_whose_child_keeps_the_pipe_open_is_ended_too(home: Home) -> None:
    """The helper itself ended; its child did not."""
    home.helper("stub", 'sleep 60 & echo $! > "$HOME/child"; echo "{}"')

    with pytest.raises(UnauthorizedError, match="did not answer in time"):
        ask_helper("stub", HOST, control=Control(), environ=home.environ, patience=0.3)

    _await_end(int((home.path / "child").read_text()))


def test_a_cancel_ends_a_helper(home: Home) -> None:
    """Within 0.2 s or so."""
    home.helper("stub", "sleep 60")
    cancel = threading.Event()
    timer = threading.Timer(0.2, cancel.set)
    timer.start()

    start = time.monotonic()
    with pytest.raises(CancelledError):
        ask_helper("stub", HOST, control=Control(cancel=cancel), environ=home.environ)

    assert time.monotonic() - start < 1
    timer.join()


def _await_end(pid: int) -> None:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # ended, and waiting for an init that reaps
            return
        time.sleep(0.01)
    pytest.fail("a child of the helper is still there")


# --- given ones ---


def test_a_given_password_is_for_its_registry_only() -> None:
    """Not for any other host, nor another port."""
    given = Password(HOST, "u", "canary")

    found = given.basic(HOST, control=Control())
    assert found is not None
    assert found.password == "canary"
    assert given.basic("reg.example", control=Control()) is None
    assert Anonymous().basic(HOST, control=Control()) is None


def test_no_secret_is_printed_or_written_down() -> None:
    """Neither repr nor str nor pickle; the fingerprint leads to nothing and differs where secrets do."""
    credential = Credential("user", "canary", identity="canary", source="file")

    assert "canary" not in f"{credential} {credential!r} {Password(HOST, 'u', 'canary')!r}"
    with pytest.raises(TypeError):
        pickle.dumps(credential)
    assert "canary" not in credential.fingerprint
    prints = {
        Credential("a", "bc").fingerprint,
        Credential("ab", "c").fingerprint,
        Credential("a", "b", "c").fingerprint,
    }
    assert len(prints) == 3
