"""Fuzz target of what others write for us to read: docker's config, a helper's answer, containerd's hosts.toml."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from layercache.control import Control
from layercache.errors import InvalidError, UnauthorizedError
from layercache.registry import _helper, auth
from layercache.registry.auth import DockerConfig
from layercache.registry.hosts import read_hosts

__all__ = ["SEEDS", "TOKENS", "one"]

_CONFIG = {
    "auths": {"https://index.docker.io/v1/": {"auth": "dXNlcjpwYXNz"}, "reg.example/a": {"identitytoken": "x"}},
    "credHelpers": {"other.example": "none"},
}
_HOSTS = (
    'server = "https://s"\n[host."https://m/v2"]\ncapabilities = ["pull"]\nclient = [["a", "b"]]\ndial_timeout = "3s"'
)

# Every parser gets every input.
SEEDS = [
    json.dumps(_CONFIG).encode(),
    b'{"auths": {"reg.example": {"username": "u", "password": "p"}}}',
    b'{"auths": {"docker.io": {"auth": "dTo="}, "https://reg.example/v2/": {"auth": "Og=="}}, "credsStore": ""}',
    _HOSTS.encode(),
    b'[host."http://127.0.0.1:1"]\noverride_path = true\n[host."http://127.0.0.1:1".header]\nx = ["y"]',
    b"client = " + b"[" * 2000,
    b'ca = ["a.pem", "b.pem"]\nclient = ["c.pem"]\n',
    b'{"ServerURL": "reg.example", "Username": "<token>", "Secret": "x"}',
]
TOKENS = [
    b'"',
    b"\\",
    b",",
    b"=",
    b"-",
    b"/",
    b"9" * 30,
    b"://",
    b"[::1]",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"null",
    b"\0",
]
TOKENS += [
    b"\r\n",
    b"\xff",
    b"true",
    b"auths",
    b"auth",
    b"identitytoken",
    b"reg.example",
    b"host",
    b"server",
    b"header",
]
TOKENS += [b"client", b"ca", b"capabilities", b"dial_timeout", b"docker.io", b"credHelpers", b"credsStore"]
TOKENS += [b"Username", b"Secret", b"<token>"]

# In memory where there is a place for that: writing a file anew for each input takes milliseconds on a disk.
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_PLACE = Path(tempfile.mkdtemp(prefix="layercache-fuzz-", dir=_MEMORY))
(_PLACE / "x").mkdir()
atexit.register(shutil.rmtree, _PLACE)
_CONTROL = Control()


def _ask(suffix: str, server: str, **_: object) -> tuple[str, str] | None:
    """Stand in for a helper: a config made up here must start no program, and starting one takes milliseconds."""
    match suffix:
        case "none":
            return None
        case "broken":
            raise UnauthorizedError("it does not work")
    return "<token>" if server == "reg.example" else "user", "secret"


setattr(auth, "ask_helper", _ask)  # noqa: B010 -- not one of its names


def one(data: bytes) -> None:
    """Read one input as each of the three; raise on anything but a value or a typed refusal."""
    (_PLACE / "config.json").write_bytes(data)
    config = DockerConfig(_PLACE / "config.json", environ={})
    for host in ("docker.io", "reg.example"):
        with contextlib.suppress(UnauthorizedError):
            config.basic(host, repository="a/b", control=_CONTROL)
    with contextlib.suppress(UnauthorizedError):
        _helper._answer(data, "a helper")  # noqa: SLF001 -- between it and the input is a program
    (_PLACE / "x" / "hosts.toml").write_bytes(data)
    with contextlib.suppress(InvalidError):
        read_hosts(_PLACE, "x")
