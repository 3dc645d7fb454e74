"""How much sooner a large blob is here over several connections, from a server that gives each of them little.

nginx shapes each connection; the blob goes to the client and no further, so that the disk does not count. With
``--slow 5`` every fifth connection gets a tenth of the others' rate; then it is also measured what asking for a late
part once more gives, and what there would be to gain if parts did not have to wait in bounded memory for their turn
(as when they are written to their places): ``unbounded``.

python -m bench.ranges [--slow 5]
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
_ONCE = ("not once more", "unbounded")


def main() -> None:
    """Measure in rounds, every contender in each, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--mbit", type=int, default=200, help="what the server gives a connection, a second")
    parser.add_argument("--slow", type=int, default=0, help="every which connection gets a tenth of that")
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
        host, server = _serve(place, options.mbit, options.slow)
        try:
            costs: dict[str, list[measure.Cost]] = {"one connection": [], "several": []}
            if options.slow:
                costs = {"several": [], "not once more": [], "unbounded": [], "unbounded, once more": []}
            for number in range(options.rounds):
                order = list(costs)
                random.Random(number).shuffle(order)
                for contender in order:
                    costs[contender].append(_fetch(host, blob, contender))
        finally:
            server.terminate()
            server.wait()
    ratios = {
        f"{contender} / several": median(a.wall / b.wall for a, b in zip(some, costs["several"], strict=True))
        for contender, some in costs.items()
        if contender != "several"
    }
    middle = {contender: measure.middle(some) for contender, some in costs.items()}
    rows = [(key, f"{cost.wall:.2f}", f"{cost.cpu:.2f}") for key, cost in middle.items()]
    print(measure.table((f"{options.mib} MiB at {options.mbit} Mbit/s", "wall s", "cpu s"), rows))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} x as long")
    path = measure.save(
        "ranges-slow" if options.slow else "ranges",
        machine=machine,
        mib=options.mib,
        mbit=options.mbit,
        slow=options.slow,
        rounds=options.rounds,
        costs=costs,
        ratios=ratios,
    )
    print(f"kept in {path}")


def _serve(place: Path, mbit: int, slow: int) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{one.getsockname()[1]}"
    rate = mbit * 1_000_000 // 8
    some = "|".join(f"{number:02}" for number in range(100) if slow and number % slow == 0) or "none"
    (place / "nginx.conf").write_text(f"""
        daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; sendfile on; client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;
            fastcgi_temp_path {place}/other; uwsgi_temp_path {place}/other; scgi_temp_path {place}/other;
            map $connection $rate {{ "~({some})$" {rate // 10}; default {rate}; }}
            server {{
                listen {host}; root {place};
                location ~ /blobs/ {{ rewrite ^ /blob break; limit_rate $rate; }}
            }}
        }}""")
    command = ["nginx", "-p", str(place), "-c", str(place / "nginx.conf")]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while not (place / "pid").exists() and time.monotonic() < end and server.poll() is None:
        time.sleep(0.01)
    return host, server


def _fetch(host: str, blob: Descriptor, contender: str) -> measure.Cost:
    one, once, unbounded = contender == "one connection", contender in _ONCE, contender.startswith("unbounded")
    client = Registry(host, credentials=Anonymous())
    sha256 = hashlib.sha256()
    wall, cpu = time.perf_counter(), time.process_time()
    with (
        mock.patch.object(_upstream, "WORTH", blob.size + 1 if one else _parts.WORTH),
        mock.patch.object(_parts, "_LATE", 1e9 if once else _parts._LATE),  # noqa: SLF001
        mock.patch.object(_parts, "_SPARE", 1 << 20 if unbounded else _parts._SPARE),  # noqa: SLF001
    ):
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
