"""Real programs the suite runs against: Debian's docker-registry and skopeo, and the images they hold.

They are started with a minimal environment: this one's certificates, proxies and credentials are not theirs
(``AWS_CA_BUNDLE`` alone makes docker-registry panic).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from layercache.oci import MANIFEST_TYPES
from layercache.testing.images import (
    BuiltImage,
    BuiltIndex,
    build_image,
    build_index,
    build_layer,
    layer_tar,
    write_layout,
)

PROGRAMS = ("docker-registry", "skopeo")
"""Programs of the peers, by the names of the Debian packages that bring them."""

REPOSITORY = "demo/serving"

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER, SECRET = "user", "pass-canary"
"""Who may pull from a registry with :func:`passwords`."""

_HASH = "$2y$05$ZEo70udsIwNDr2eovINWgeq8Rafj6tJ6yDgC8dIbnMILT/j5XO4OC"  # bcrypt of SECRET
_ACCESS = re.compile(rb'"([A-Z]+) (\S+) HTTP/1\.[01]" (\d+)')


def missing_programs() -> list[str]:
    """Names of the programs (and Debian packages) that are not there."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


def environment(home: Path) -> dict[str, str]:
    """The environment a peer gets."""
    return {"PATH": _PATH, "HOME": str(home), "TMPDIR": str(home), "LC_ALL": "C.UTF-8"}


def skopeo(*args: str | Path, home: Path) -> bytes:
    """Run skopeo and return its standard output; its standard error is in the error if it fails."""
    command = ["skopeo", "--insecure-policy", *map(str, args)]
    done = subprocess.run(command, env=environment(home), capture_output=True, timeout=60, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Pushed:
    """An image a registry holds under the tag ``kind``.

    ``digest`` and ``manifest`` are what the registry answers with. ``source`` is what was built and pushed: of the
    Docker kinds skopeo made another manifest and config, with the same layers and DiffIDs.
    """

    kind: str
    digest: str
    manifest: bytes
    source: BuiltImage | BuiltIndex


class PeerRegistry:
    """docker-registry on a free loopback port over the directory ``store``; logs go to ``home``.

    ``storage`` is another storage section of its configuration, ``sections`` are further ones (``auth``, ``proxy``).
    """

    def __init__(
        self,
        home: Path,
        store: Path,
        pushed: Mapping[str, Pushed] | None = None,
        *,
        storage: Mapping[str, object] | None = None,
        **sections: object,
    ) -> None:
        self._config = {"storage": storage or {"filesystem": {"rootdirectory": str(store)}}, **sections}
        self.home = home
        self.store = store
        self.pushed: dict[str, Pushed] = dict(pushed or {})
        self.host = ""
        self._log = home / "docker-registry.log"
        self._forgotten = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self) -> None:
        """Start it, on the same port as the last time if there was one, and return when it answers."""
        config = {
            "version": "0.1",
            "log": {"level": "info", "formatter": "text"},
            **self._config,
            # With port 0 the kernel chooses, and the log says what: no port can be lost between asking and listening.
            "http": {"addr": self.host or "127.0.0.1:0", "secret": "none"},
        }
        path = self.home / "config.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = ["docker-registry", "serve", str(path)]
        if shutil.which("setpriv", path=_PATH) is not None:
            command = ["setpriv", "--pdeathsig", "KILL", *command]  # it must not outlive a killed test run
        start = self._log.stat().st_size if self._log.exists() else 0
        self._output = self._log.open("ab")
        self._process = subprocess.Popen(
            command,
            env=environment(self.home),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the tests, which stop it in their own time
        )
        try:
            self._await(start)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it, by its pid, and wait for that."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def reference(self, kind: str) -> str:
        """``HOST/REPOSITORY:TAG`` of an image."""
        return f"{self.host}/{REPOSITORY}:{self.pushed[kind].kind}"

    def pinned(self, kind: str) -> str:
        """``HOST/REPOSITORY@DIGEST`` of an image."""
        return f"{self.host}/{REPOSITORY}@{self.pushed[kind].digest}"

    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path and status of every request answered since :meth:`forget_requests`, oldest first."""
        size = -1
        while size != (size := self._log.stat().st_size):  # a line is written after its answer
            time.sleep(0.05)
        found = _ACCESS.findall(self._log.read_bytes()[self._forgotten :])
        return [(method.decode(), path.decode(), int(status)) for method, path, status in found]

    def forget_requests(self) -> None:
        """Begin a new list of requests."""
        self.requests()
        self._forgotten = self._log.stat().st_size

    def log_tail(self) -> str:
        """The end of its log, without what it says twice about every request."""
        if not self._log.exists():
            return ""
        lines = self._log.read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if 'level=info msg="response completed"' not in line)[-6000:]

    def push(self, kind: str, source: BuiltImage | BuiltIndex, *options: str) -> None:
        """Push an image of OCI style through skopeo, which keeps its digests unless ``options`` say otherwise."""
        layout = self.home / "layout"
        write_layout(source, layout, kind)
        target = f"docker://{self.host}/{REPOSITORY}:{kind}"
        options = options or ("--preserve-digests",)
        common = ("--quiet", "--all", "--dest-tls-verify=false")
        skopeo("copy", *common, *options, f"oci:{layout}:{kind}", target, home=self.home)
        digest, manifest = self._manifest(kind)
        self.pushed[kind] = Pushed(kind, digest, manifest, source)

    def _manifest(self, tag: str) -> tuple[str, bytes]:
        accept = ", ".join(map(str, MANIFEST_TYPES))
        request = urllib.request.Request(
            f"http://{self.host}/v2/{REPOSITORY}/manifests/{tag}", headers={"Accept": accept}
        )
        with _opener().open(request, timeout=10) as response:
            return response.headers["Docker-Content-Digest"], response.read()

    def _await(self, start: int) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                break
            found = re.search(rb"listening on ([0-9.:]+)", self._log.read_bytes()[start:])
            if found is not None:
                self.host = found[1].decode()
                try:
                    with _opener().open(f"http://{self.host}/v2/", timeout=10):
                        return
                except urllib.error.HTTPError as refused:  # it wants to know who asks: an answer, too
                    refused.close()
                    return
            time.sleep(0.01)
        raise AssertionError(f"docker-registry does not answer:\n{self.log_tail()}")


def passwords(file: Path) -> dict[str, object]:
    """Section ``auth`` of a registry that wants ``USER`` and ``SECRET``, by the htpasswd file that is written."""
    file.write_text(f"{USER}:{_HASH}\n")
    return {"htpasswd": {"realm": "a realm", "path": str(file)}}


def run_openssl(certificate: Path, key: Path) -> None:
    """Write a certificate for 127.0.0.1 that is its own authority, good for two days, and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/O=layercache tests"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, env=environment(key.parent), check=True, capture_output=True, timeout=60)


needs_nginx = pytest.mark.skipif(not shutil.which("nginx", path=_PATH), reason="needs nginx")


class Nginx:
    """nginx on free loopback ports, with ``servers``: bodies of server blocks, in which ``{0}`` is the first's host.

    The ports are bound here, too, so that none is lost between asking and listening. ``http2`` is offered over TLS, and
    all there is without.
    """

    def __init__(self, home: Path, *servers: str, tls: tuple[Path, ...] = (), http2: bool = False) -> None:
        self._sockets = []
        for _ in servers:
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", 0))  # and never listens: connections are nginx's
            self._sockets.append(one)
        self.hosts = [f"127.0.0.1:{one.getsockname()[1]}" for one in self._sockets]
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        for folder in ("body", "proxy", "other"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        kind = " reuseport" + " ssl" * bool(tls) + " http2" * http2
        secure = f"ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};" if tls else ""
        blocks = "".join(
            f"server {{ listen {host}{kind}; {secure} {body.format(*self.hosts)} }}\n"
            for host, body in zip(self.hosts, servers, strict=True)
        )
        (home / "nginx.conf").write_text(f"""
            daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
            events {{ worker_connections 256; }}
            http {{
                log_format all '$server_port $request_method $uri $status '
                    '[$http_authorization] [$http_range] $server_protocol';
                access_log {home}/access.log all;
                client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/other;
                uwsgi_temp_path {home}/other; scgi_temp_path {home}/other;
                limit_req_zone all zone=few:64k rate=20r/s;
                proxy_set_header Host $http_host; proxy_http_version 1.1; proxy_max_temp_file_size 0;
                {blocks}
            }}""")

    def start(self) -> None:
        """Start it, and return when it listens."""
        command = ["nginx", "-p", str(self._home), "-c", str(self._home / "nginx.conf")]
        if shutil.which("setpriv", path=_PATH) is not None:
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        self._process = subprocess.Popen(
            command,
            env=environment(self._home),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + 20
        while not (self._home / "pid").exists():  # written when the configuration was taken
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"nginx does not start: {(self._home / 'error.log').read_text()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Kill it, whatever it is at: its transfers break."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it and free the ports."""
        self.stop()
        for one in self._sockets:
            one.close()

    def log(self, *, least: int = 0) -> list[str]:
        """A line a request: port, method, path, status, [Authorization], [Range], protocol.

        A request is logged when nginx has seen its end, which may be after the client has: ``least`` lines are waited
        for.
        """
        file = self._home / "access.log"
        end = time.monotonic() + 20
        while True:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) >= least or time.monotonic() > end:
                return lines
            time.sleep(0.01)


def real_images() -> dict[str, BuiltImage | BuiltIndex]:
    """Images of real trees, by kind: parts of the standard library under an installed package.

    ``odd`` has what the formats allow and few writers do: many zstd frames between skippable ones, several gzip
    members, an empty layer, and the same layer twice.
    """
    library = Path(os.__file__).parent
    spec = importlib.util.find_spec("urllib3")
    assert spec is not None
    assert spec.origin is not None
    lower = layer_tar([library / "json", library / "email", library / "os.py"], under="usr/lib/python3")
    upper = layer_tar([Path(spec.origin).parent], under="usr/lib/python3/dist-packages")
    amd64 = build_image([lower, upper], platform="linux/amd64")
    arm64 = build_image([lower, upper], platform="linux/arm64/v8")
    zstd = build_image([lower, upper], platform="linux/amd64", compression="zstd")
    twice = build_layer(upper, "zstd", frames=40, skippable=True)
    odd = [twice, build_layer(lower, members=5), build_layer(layer_tar({}), "zstd"), twice]
    return {
        "oci-gzip": amd64,
        "oci-zstd": zstd,
        "oci-plain": build_image([lower, upper], platform="linux/amd64", compression="none"),
        "odd": build_image(odd, platform="linux/amd64"),
        "index": build_index([arm64, zstd]),
        "docker-gzip": amd64,
        "docker-list": build_index([arm64, amd64]),
    }


def fill(registry: PeerRegistry, images: Mapping[str, BuiltImage | BuiltIndex]) -> None:
    """Push every image; those of a Docker kind become schema 2 on the way."""
    for kind, image in images.items():
        registry.push(kind, image, *(["--format", "v2s2"] if kind.startswith("docker") else []))


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
