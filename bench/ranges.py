"""How much sooner a large blob is here over several connections, from a server that gives each of them little.

nginx shapes each connection; the blob goes to the client and no further, so that the disk does not count.

python -m bench.ranges
"""

from __future__ import annotations

import argparse
import hashlib
import random
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

from bench import measure
from layercache.control import Control
from layercache.metrics import Ledger
from layercache.oci import OCTET_STREAM, Descriptor, Digest, Repository
from layercache.registry import Anonymous, Registry, _parts, _upstream

_MIB = 1 << 20


def main() -> None:
    """Measure in rounds, every contender in each, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--mbit", type=int, default=200, help="what the server gives a connection, a second")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layercache-bench.") as name:
        place = Path(name)
        place.chmod(0o755)  # nginx serves as somebody else
        machine = measure.machine(place, ("nginx",))
        file = place / "blob"
        sha256 = hashlib.sha256()
        with file.open("wb") as out:
            for number in range(options.mib):
                piece = random.Random(number).randbytes(_MIB)
                sha256.update(piece)
                out.write(piece)
        blob = Descriptor(OCTET_STREAM, Digest.parse(f"sha256:{sha256.hexdigest()}"), file.stat().st_size)
        host, server = _serve(place, options.mbit)
        try:
            costs: dict[str, list[measure.Cost]] = {"one connection": [], "several": []}
            for number in range(options.rounds):
                order = list(costs)
                random.Random(number).shuffle(order)
                for contender in order:
                    costs[contender].append(_fetch(host, blob, one=contender == "one connection"))
        finally:
            server.terminate()
            server.wait()
    ratio = median(a.wall / b.wall for a, b in zip(costs["one connection"], costs["several"], strict=True))
    middle = {contender: measure.middle(some) for contender, some in costs.items()}
    rows = [(key, f"{cost.wall:.2f}", f"{cost.cpu:.2f}") for key, cost in middle.items()]
    print(measure.table((f"{options.mib} MiB at {options.mbit} Mbit/s", "wall s", "cpu s"), rows))
    print(f"{ratio:.2f} x as fast")
    path = measure.save(
        "ranges",
        machine=machine,
        mib=options.mib,
        mbit=options.mbit,
        rounds=options.rounds,
        costs=costs,
        ratios={"one connection / several": ratio},
    )
    print(f"kept in {path}")


def _serve(place: Path, mbit: int) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{one.getsockname()[1]}"
    (place / "nginx.conf").write_text(f"""
        daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; sendfile on; client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;
            fastcgi_temp_path {place}/other; uwsgi_temp_path {place}/other; scgi_temp_path {place}/other;
            server {{
                listen {host}; root {place};
                location ~ /blobs/ {{ rewrite ^ /blob break; limit_rate {mbit * 1_000_000 // 8}; }}
            }}
        }}""")
    command = ["nginx", "-p", str(place), "-c", str(place / "nginx.conf")]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while not (place / "pid").exists() and time.monotonic() < end and server.poll() is None:
        time.sleep(0.01)
    return host, server


def _fetch(host: str, blob: Descriptor, *, one: bool) -> measure.Cost:
    client = Registry(host, credentials=Anonymous())
    sha256 = hashlib.sha256()
    wall, cpu = time.perf_counter(), time.process_time()
    with mock.patch.object(_upstream, "WORTH", blob.size + 1 if one else _parts.WORTH):
        pieces = client.fetch(Repository(host, "any/image"), blob, control=Control(), ledger=Ledger())
        for piece in pieces:
            sha256.update(piece)
    cost = measure.Cost(time.perf_counter() - wall, time.process_time() - cpu)
    client.close()
    if sha256.hexdigest() != blob.digest.encoded:
        raise SystemExit("other bytes came")
    return cost


if __name__ == "__main__":
    main()
