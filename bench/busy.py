"""What a busy host costs: a cold pull over TLS, and a warm verified read, beside a spinning thread of the same process.

    python -m bench.busy [--mib N] [--rounds N] [--unmanaged]

The same beside a spinning *process* is what it is compared with: that one takes as much of the machine, and never the
GIL. The registry is docker-registry behind nginx, which speaks TLS. ``--unmanaged`` adds, once, a pull on threads of
the busy process (``workers=0``), which takes about a hundred times as long.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median

from bench import measure
from layercache import LayerCache
from layercache.registry import Tls
from layercache.testing.images import build_image
from tests.peers import REPOSITORY, Nginx, PeerRegistry, missing_programs, run_openssl

_SPIN = "while True: pass"
_BESIDE = ("nothing", "a process", "a thread")


def main() -> None:
    """Measure in rounds, every contender in each, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unmanaged", action="store_true")
    options = parser.parse_args()
    if lacking := [*missing_programs(), *measure.missing("nginx", "openssl")]:
        sys.exit(f"not installed: {', '.join(lacking)}")
    with tempfile.TemporaryDirectory(prefix="layercache-bench.") as name, ExitStack() as stack:
        place = Path(name)
        about = measure.machine(place, ("nginx", "openssl"))
        reference, tls = _registry(place, options.mib, stack)
        pulls: dict[str, list[float]] = {beside: [] for beside in _BESIDE}
        reads: dict[str, list[float]] = {beside: [] for beside in _BESIDE}
        for number in range(options.rounds):
            order = list(_BESIDE)
            random.Random(number).shuffle(order)
            for beside in order:
                with LayerCache(place / f"root-{number}-{beside.split()[-1]}", janitor=False, tls=tls) as cache:
                    measure.settle()
                    with _spinning(beside):
                        pulls[beside].append(_pull(cache, reference, beside))
                        reads[beside].append(_read(cache, reference))
                    cache.prune()
        unmanaged = _unmanaged(place, reference, tls) if options.unmanaged else None
    base = "a process"
    ratios = {
        what: median(one / other for one, other in zip(some["a thread"], some[base], strict=True))
        for what, some in (("pull", pulls), ("read", reads))
    }
    rows = [(beside, f"{median(pulls[beside]):.2f}", f"{median(reads[beside]):.3f}") for beside in _BESIDE]
    print(measure.table((f"{options.mib} MiB, spinning beside it", "pull s", "read s"), rows))
    print(f"a thread over a process: pull {ratios['pull']:.2f} (bar 1.15), read {ratios['read']:.2f} (bar 2)")
    if unmanaged is not None:
        print(f"on threads of the busy process: pull {unmanaged:.1f} s, {unmanaged / median(pulls['nothing']):.0f} x")
    path = measure.save(
        "busy", machine=about, mib=options.mib, pulls=pulls, reads=reads, ratios=ratios, unmanaged=unmanaged
    )
    print(f"kept in {path}")


def _registry(place: Path, mib: int, stack: ExitStack) -> tuple[str, Tls]:
    home = place / "registry"
    home.mkdir()
    certificate, key = home / "ca.pem", home / "key.pem"
    run_openssl(certificate, key)
    registry = PeerRegistry(home, home / "store")
    registry.start()
    stack.callback(registry.stop)
    rng = random.Random(7)
    layers = [b"".join(rng.randbytes(1 << 20) for _ in range(size)) for size in (mib * 3 // 4, mib // 4)]
    registry.push("busy", build_image(layers, compression="none"))
    front = Nginx(home, f"location / {{{{ proxy_pass http://{registry.host}; }}}}", tls=(certificate, key))
    front.start()
    stack.enter_context(closing(front))
    return f"{front.hosts[0]}/{REPOSITORY}:busy", Tls(ca=(str(certificate),))


@contextmanager
def _spinning(what: str) -> Iterator[None]:
    if what == "a process":
        with subprocess.Popen([sys.executable, "-c", _SPIN]) as process:
            try:
                yield
            finally:
                process.kill()
        return
    stop = threading.Event()
    spinner = threading.Thread(target=_spin, args=(stop,), daemon=True)
    if what == "a thread":
        spinner.start()
    try:
        yield
    finally:
        stop.set()
        if spinner.ident is not None:
            spinner.join()


def _spin(stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        for _ in range(10_000):
            number += 1


def _pull(cache: LayerCache, reference: str, beside: str) -> float:
    start = time.perf_counter()
    with cache.namespace("bench").pull(reference) as image:
        took = time.perf_counter() - start
        if any(layer.worker != (beside == "a thread") for layer in image.report.blobs if layer.size > 32 << 20):
            print(f"beside {beside}, by a worker: {[layer.worker for layer in image.report.blobs]}", file=sys.stderr)
    return took


def _read(cache: LayerCache, reference: str) -> float:
    with cache.namespace("bench").pull(reference) as image:
        start = time.perf_counter()
        for layer in image.layers:
            with layer.compressed() as stream:
                for _ in stream.chunks():
                    pass
        return time.perf_counter() - start


def _unmanaged(place: Path, reference: str, tls: Tls) -> float:
    with LayerCache(place / "unmanaged", janitor=False, tls=tls, workers=0) as cache, _spinning("a thread"):
        start = time.perf_counter()
        cache.namespace("bench").pull(reference).close()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
