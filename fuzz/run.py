"""Run the fuzz targets: a short seeded run with nothing installed, or a long one under Atheris. See README.md."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import random
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
_LONGEST = 4096


def mutate(rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """New input: a seed with one to eight pieces inserted, taken out, doubled, crossed with another seed or changed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 16, 64)))
        match rng.randrange(6):
            case 0:
                data[start:start] = rng.choice(tokens)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end] * rng.choice((1, 2, 70))
            case 3:
                other = rng.choice(seeds)
                data[start:] = other[rng.randint(0, len(other)) :]
            case 4:
                data[start:end] = rng.randbytes(end - start)
            case _:
                data[start:end] = rng.choice(tokens)
    return bytes(data[:_LONGEST])


def short(target: ModuleType, seed: int, *, runs: int | None, seconds: float) -> int:
    """Number of inputs tried: the seeds themselves, then mutations until ``runs`` or ``seconds`` are used up."""
    rng = random.Random(f"{seed}/{target.__name__}")
    end = time.monotonic() + seconds
    for data in target.SEEDS:
        _try(target.one, data)
    count = len(target.SEEDS)
    while count < runs if runs is not None else time.monotonic() < end:
        _try(target.one, mutate(rng, target.SEEDS, target.TOKENS))
        count += 1
    return count


def long(name: str, *, runs: int | None, seconds: float) -> None:
    """Search under Atheris, guided by coverage. Does not return: libFuzzer ends the process."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris, or leave out --atheris for a short run")
    with atheris.instrument_imports(include=["layercache", "json", "tomllib"]):
        target = load(name)
    corpus = HERE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.SEEDS):
        (corpus / f"seed-{number:03}").write_bytes(data)
    dictionary = corpus.parent / f"{name}.dict"
    words = ("".join(rf"\x{byte:02x}" for byte in token) for token in target.TOKENS)
    dictionary.write_text("".join(f'"{word}"\n' for word in words))
    limit = f"-runs={runs}" if runs is not None else f"-max_total_time={max(1, round(seconds))}"
    options = [f"-dict={dictionary}", f"-max_len={_LONGEST}", f"-artifact_prefix={corpus.parent}/", limit]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: _try(target.one, data))
    atheris.Fuzz()


def load(name: str) -> ModuleType:
    """Target of that name, from this folder."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when nothing was found. A finding ends the process with its traceback and status 1."""
    known = sorted(path.stem for path in HERE.glob("fuzz_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"one or more of {', '.join(known)} (default: all)"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=float, default=5.0, help="time for all targets together (default: 5)")
    amount.add_argument("--runs", type=int, help="number of inputs a target, instead of a time")
    parser.add_argument("--seed", type=int, help="repeat the run of this seed (default: a new one)")
    parser.add_argument("--atheris", action="store_true", help="search with Atheris; takes one target")
    options = parser.parse_args(arguments)
    targets = options.targets or known
    if unknown := sorted(set(targets) - set(known)):
        parser.error(f"no such target: {', '.join(unknown)}")
    if options.atheris:
        if len(targets) != 1:
            parser.error("--atheris takes one target")
        long(targets[0], runs=options.runs, seconds=options.seconds)
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 32)
    for name in targets:
        count = short(load(name), seed, runs=options.runs, seconds=options.seconds / len(targets))
        print(f"{name}: {count} inputs, seed {seed}, nothing found")
    return 0


def _try(one: Callable[[bytes], None], data: bytes) -> None:
    try:
        one(data)
    except BaseException:
        print(f"found by {data!r}", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
