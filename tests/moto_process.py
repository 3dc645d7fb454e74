"""moto's server in a process of its own, and boto3 pointed to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

__all__ = ["CALL", "Moto", "point"]

CALL = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"


class Moto:
    """moto's server in a process of its own."""

    def __init__(self, home: Path, life: float | None) -> None:
        self._down = home / "down"
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "DOWN": str(self._down)}
        if life is not None:
            env["LIFE"] = str(life)
        self._output = (home / f"moto-{life}.out").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("moto_server.py"))],
            env=env,
            stdout=self._output,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while not self._lines() and time.monotonic() < end and self._process.poll() is None:
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self._lines()[0].strip()}"

    def _lines(self) -> list[str]:
        return Path(self._output.name).read_text().splitlines()

    def calls(self, target: str = CALL) -> list[str]:
        """Signing scopes of the calls so far, oldest first."""
        found = [json.loads(line) for line in self._lines()[1:]]
        return [call["scope"] for call in found if call["target"] == target]

    def down(self, *, is_down: bool = True) -> None:
        """Answer every call with 500 from now on, or no longer."""
        if is_down:
            self._down.touch()
        else:
            self._down.unlink(missing_ok=True)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()


def point(monkeypatch: pytest.MonkeyPatch, moto: Moto) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-canary")
    monkeypatch.setenv("AWS_REGION", "ap-south-1")  # where nothing else says which
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
