"""What a warm, verified, sequential read costs in a sealed namespace beside one in clear, alone and with SHA-256.

The floors are what neither can do without: a plain read of the file from the page cache with XXH3 of each MiB, and
AES-256-GCM of as much from one buffer into another, with nothing read; and the same without the tag, which proves
nothing, to see what the cipher itself takes of it.

python -m bench.sealed
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import xxhash
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench import measure
from layercache import LayerCache, Namespace
from layercache.oci import OCTET_STREAM, Digest

_MIB = 1 << 20


def main() -> None:
    """Measure in rounds, every contender in each, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="layercache-bench.") as name,
        tempfile.TemporaryDirectory(prefix="layercache-bench.", dir="/dev/shm") as keys,
    ):
        os.environ["LAYERCACHE_KEYS"] = keys
        place = Path(name)
        machine = measure.machine(place, ())
        file = place / "blob"
        file.write_bytes(random.Random(1).randbytes(1 << 20) * options.mib)
        with LayerCache(place / "root", janitor=False) as cache:
            clear, sealed = cache.namespace("clear"), cache.namespace("sealed", seal="ephemeral")
            digest = clear.put(file, media_type=OCTET_STREAM).digest
            sealed.put(file, media_type=OCTET_STREAM)
            contenders: dict[str, Callable[[], None]] = {
                "clear": lambda: _read(clear, digest),
                "sealed": lambda: _read(sealed, digest),
                "clear + sha256": lambda: _read(clear, digest, hashlib.sha256()),
                "sealed + sha256": lambda: _read(sealed, digest, hashlib.sha256()),
                "floor: read + XXH3": lambda: _floor_clear(file),
                "floor: AES-256-GCM": lambda: _floor_sealed(options.mib),
                "floor: AES-256-CTR": lambda: _floor_cipher(options.mib),
            }
            costs: dict[str, list[measure.Cost]] = {contender: [] for contender in contenders}
            for number in range(options.rounds + 1):  # the first warms up
                order = list(contenders)
                random.Random(number).shuffle(order)
                for contender in order:
                    cost = _cost(contenders[contender])
                    if number:
                        costs[contender].append(cost)
            sealed.purge()
    ratios = {
        f"{two} / {one}": median(b.cpu / a.cpu for a, b in zip(costs[one], costs[two], strict=True))
        for one, two in (
            ("clear", "sealed"),
            ("clear + sha256", "sealed + sha256"),
            ("clear", "floor: AES-256-GCM"),
            ("floor: read + XXH3", "floor: AES-256-GCM"),
            ("floor: read + XXH3", "floor: AES-256-CTR"),
        )
    }
    middle = {contender: measure.middle(some) for contender, some in costs.items()}
    per_gib = 1024 / options.mib
    rows = [(key, f"{cost.wall * per_gib:.3f}", f"{cost.cpu * per_gib:.3f}") for key, cost in middle.items()]
    print(measure.table(("read of 1 GiB", "wall s", "cpu s"), rows))
    print(*(f"{key}: {ratio:.2f} x the CPU" for key, ratio in ratios.items()), sep="\n")
    path = measure.save("sealed", machine=machine, mib=options.mib, rounds=options.rounds, costs=costs, ratios=ratios)
    print(f"kept in {path}")


def _read(namespace: Namespace, digest: Digest, into: hashlib._Hash | None = None) -> None:
    with namespace.open(digest) as layer, layer.compressed() as stream:
        for chunk in stream.chunks():
            if into is not None:
                into.update(chunk)


def _floor_clear(file: Path) -> None:
    buffer = memoryview(mmap.mmap(-1, 8 * _MIB))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            for start in range(0, count, _MIB):
                xxhash.xxh3_128_digest(buffer[start : start + _MIB])


def _floor_sealed(mib: int) -> None:
    cipher, nonce, aad = AESGCM(bytes(32)), bytes(12), bytes(32)
    sealed, clear = (memoryview(mmap.mmap(-1, size)) for size in (_MIB + 4096, _MIB))
    raw = cipher.encrypt(nonce, bytes(_MIB), aad)
    sealed[: len(raw)] = raw
    for _ in range(mib):
        cipher.decrypt_into(nonce, sealed[: len(raw)], aad, clear)


def _floor_cipher(mib: int) -> None:
    cipher = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).decryptor()
    sealed, clear = (memoryview(mmap.mmap(-1, size)) for size in (_MIB, _MIB + 4096))
    for _ in range(mib):
        cipher.update_into(sealed, clear)


def _cost(work: Callable[[], None]) -> measure.Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return measure.Cost(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
