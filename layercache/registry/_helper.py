"""The protocol of docker's credential helpers: one question to a program, one answer, within bounds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping

from layercache.control import Control
from layercache.errors import UnauthorizedError
from layercache.registry._wire import plain

__all__ = ["ask_helper"]

_SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST = 64 << 10  # bytes of an answer
_PATIENCE = 30.0  # seconds; a helper may ask a cloud for a token
_ABSENT = "credentials not found in native keychain"


def ask_helper(
    suffix: str, server: str, *, control: Control, environ: Mapping[str, str], patience: float = _PATIENCE
) -> tuple[str, str] | None:
    """User name and secret that ``docker-credential-<suffix> get`` has for ``server``; ``None`` if it has none.

    Blocks for at most ``patience`` seconds; ends the helper, and what it started, on a cancel.

    :raises UnauthorizedError: if the helper is missing, fails, hangs, says too much or what makes no sense.
    """
    if _SUFFIX.fullmatch(suffix) is None:
        raise UnauthorizedError("the name of a credential helper is not of the grammar")
    name = f"docker-credential-{suffix}"
    try:
        # No shell; a session of its own, so that its children end with it.
        helper = subprocess.Popen(  # noqa: S603
            [name, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environ),
            start_new_session=True,
        )
    except OSError as error:
        raise UnauthorizedError(f"{name} cannot be run ({type(error).__name__})") from error
    try:
        with contextlib.suppress(BrokenPipeError), helper.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(server.encode())  # without a newline: it would be part of the name
        output = _output(helper, name, control, time.monotonic() + patience)
    except BaseException:
        if helper.returncode is None:  # not reaped: the number is still its own, also if it is a zombie with children
            with contextlib.suppress(ProcessLookupError):
                os.killpg(helper.pid, signal.SIGKILL)
        raise
    finally:
        helper.stdout.close()  # type: ignore[union-attr]
        helper.wait()
    if helper.returncode != 0:  # the message of a failure comes on stdout
        message = output.decode("utf-8", "replace").strip()
        if _ABSENT in message:
            return None
        raise UnauthorizedError(f"{name} failed: {plain(message, most=200) or 'without a word'}")
    return _answer(output, name)


def _output(helper: subprocess.Popen[bytes], name: str, control: Control, until: float) -> bytes:
    pipe = helper.stdout
    assert pipe is not None  # noqa: S101 -- it was asked for
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            control.checkpoint()
            if time.monotonic() > until:
                raise UnauthorizedError(f"{name} did not answer in time")
            if not selector.select(0.05):
                continue
            data = os.read(pipe.fileno(), _MOST)
            if not data:
                break
            output += data
            if len(output) > _MOST:
                raise UnauthorizedError(f"{name} said more than {_MOST} bytes")
    while helper.poll() is None:  # it closed its output, but may not have ended
        if time.monotonic() > until:
            raise UnauthorizedError(f"{name} did not end in time")
        control.wait(0.005)
    return output


def _answer(output: bytes, name: str) -> tuple[str, str] | None:
    try:
        reply = json.loads(output)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise UnauthorizedError(f"{name} answered with what is no JSON object")
    username, secret = reply.get("Username"), reply.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise UnauthorizedError(f"{name} answered without Username and Secret")
    return (username, secret) if secret else None
