"""Docker's credential helpers as Debian has them: asked for what they do not have, and for what was stored in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from layercache import LayerCache, diagnose
from layercache.control import Control
from layercache.errors import UnauthorizedError
from layercache.registry import DockerConfig
from layercache.registry._helper import ask_helper
from tests import peers

NEEDED = {
    "pass": ("docker-credential-pass", "pass", "gpg"),
    "secretservice": ("docker-credential-secretservice", "dbus-daemon", "dbus-send", "gnome-keyring-daemon"),
}


@pytest.mark.skipif(not shutil.which("docker-credential-ecr-login"), reason="needs amazon-ecr-credential-helper")
@pytest.mark.parametrize("host", ["reg.example", "123456789012.dkr-ecr.us-west-2.on.aws"])
def test_the_helper_of_amazon_has_nothing_for_a_host_it_does_not_know(tmp_path: Path, host: str) -> None:
    """It ends with 1 and says so on standard output; Debian's is too old to know dual-stack names."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    assert ask_helper("ecr-login", host, control=Control(timeout=30), environ=environ) is None


@pytest.mark.skipif(not shutil.which("docker-credential-pass"), reason="needs golang-docker-credential-helpers")
def test_the_helper_of_pass_has_nothing_where_nothing_was_stored(tmp_path: Path) -> None:
    """It ends with 0, and user and secret are empty: that is nobody, not somebody without a name."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    assert ask_helper("pass", "reg.example", control=Control(timeout=30), environ=environ) is None


@pytest.mark.skipif(
    not shutil.which("docker-credential-secretservice"), reason="needs golang-docker-credential-helpers"
)
def test_a_helper_that_fails_says_why(tmp_path: Path) -> None:
    """Without a desktop there is no secret service: an error that names the helper, never a silent nobody."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with pytest.raises(UnauthorizedError, match="docker-credential-secretservice failed: "):
        ask_helper("secretservice", "reg.example", control=Control(timeout=30), environ=environ)


# --- with what is stored in them ---


class Keyring:
    """A store of secrets of its own, for one helper, which finds it by ``environ``."""

    def __init__(self, helper: str, home: Path, environ: Mapping[str, str]) -> None:
        self.helper = helper
        self.home = home
        self.environ = dict(environ)

    def run(self, *command: str, given: str = "") -> str:
        """Output of a program that works on it."""
        done = subprocess.run(command, env=self.environ, input=given, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def store(self, host: str, username: str, secret: str) -> None:
        """Keep a credential, as ``docker login`` does."""
        entry = {"ServerURL": host, "Username": username, "Secret": secret}
        self.run(f"docker-credential-{self.helper}", "store", given=json.dumps(entry))

    def erase(self, host: str) -> None:
        """Drop it, as ``docker logout`` does."""
        self.run(f"docker-credential-{self.helper}", "erase", given=host)


@contextlib.contextmanager
def password_store(home: Path) -> Iterator[Keyring]:
    """``pass`` under a key without passphrase. The agent that gpg starts ends with it."""
    keyring = Keyring("pass", home, {**peers.environment(home), "GNUPGHOME": str(home / "gpg")})
    (home / "gpg").mkdir(mode=0o700)
    make = ("gpg", "--batch", "--quiet", "--passphrase", "")
    try:
        keyring.run(*make, "--quick-generate-key", "tests@layercache.invalid", "ed25519", "cert", "never")
        listed = keyring.run("gpg", "--batch", "--list-keys", "--with-colons")
        key = next(line for line in listed.splitlines() if line.startswith("fpr:")).split(":")[9]
        keyring.run(*make, "--quick-add-key", key, "cv25519", "encr", "never")
        keyring.run("pass", "init", key)
        yield keyring
    finally:
        keyring.run("gpgconf", "--kill", "all")


@contextlib.contextmanager
def secret_service(home: Path) -> Iterator[Keyring]:
    """GNOME's keyring, unlocked, on a session bus of its own."""
    environ = {**peers.environment(home), "XDG_RUNTIME_DIR": str(home)}
    bus = ["dbus-daemon", "--session", "--nofork", "--print-address", f"--address=unix:path={home}/bus"]
    with contextlib.ExitStack() as stack:

        def start(command: list[str]) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        address = start(bus).stdout
        assert address is not None
        environ["DBUS_SESSION_BUS_ADDRESS"] = address.readline().strip()
        daemon = start(["gnome-keyring-daemon", "--foreground", "--unlock", "--components=secrets"])
        assert daemon.stdin is not None
        daemon.stdin.write("passphrase")
        daemon.stdin.close()
        keyring = Keyring("secretservice", home, environ)
        there = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/"]
        there += ["org.freedesktop.DBus.NameHasOwner", "string:org.freedesktop.secrets"]
        end = time.monotonic() + 20
        while "true" not in keyring.run(*there):  # asking for it any earlier would have the bus start another
            assert daemon.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        yield keyring


@pytest.fixture(params=["pass", "secretservice"])
def keyring(request: pytest.FixtureRequest) -> Iterator[Keyring]:
    """Return an empty store of secrets."""
    missing = [program for program in NEEDED[request.param] if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="keys-") as home:  # a short path: it holds sockets
        (home_ := Path(home) / "home").mkdir(mode=0o700)
        with (password_store if request.param == "pass" else secret_service)(home_) as keyring:
            yield keyring


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_what_a_helper_keeps_opens_a_registry(
    peer: Callable[..., peers.PeerRegistry], keyring: Keyring, root: Path, tmp_path: Path, key: str
) -> None:
    """A password that was stored by the helper pulls, a wrong one and one that was erased do not; none is shown."""
    registry = peer(auth=peers.passwords(tmp_path / "htpasswd"))
    reference = f"{registry.host}/{peers.REPOSITORY}:oci-gzip"
    (keyring.home / ".docker").mkdir()
    config = {key: {registry.host: keyring.helper} if key == "credHelpers" else keyring.helper, "auths": {}}
    (keyring.home / ".docker" / "config.json").write_text(json.dumps(config))
    credentials = DockerConfig(environ=keyring.environ)

    def pull(root: Path) -> list[str]:
        with (
            LayerCache(root, janitor=False, credentials=credentials) as cache,
            cache.namespace("a").pull(reference, platform="linux/amd64") as image,
        ):
            return [blob.source for blob in image.report.blobs]

    keyring.store(registry.host, peers.USER, peers.SECRET)
    keyring.store("other.example", peers.USER, "of-another")
    assert pull(root) == ["miss"] * 4
    steps = {one.step: one for one in diagnose(reference, root=root, credentials=credentials, platform="linux/amd64")}
    assert steps["credentials"].state == "ok"
    assert f"docker-credential-{keyring.helper}" in steps["credentials"].detail
    assert peers.SECRET not in "".join(f"{one}" for one in steps.values())

    keyring.store(registry.host, peers.USER, "wrong")
    with pytest.raises(UnauthorizedError):
        pull(tmp_path / "second")
    keyring.erase(registry.host)
    with pytest.raises(UnauthorizedError):
        pull(tmp_path / "third")
