"""What a root takes, counted by the tests and compared with what the store counts (docs/format.md, "Room")."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from layercache.store import Store

__all__ = ["accounting", "kept_back", "on_disk"]

_APART, _BALLAST, _GENERATION = 2 << 20, 4 << 20, 96 << 10


def on_disk(root: Path) -> int:
    """Return the bytes that what lies below a root takes; what is renamed meanwhile counts once."""
    return sum(_allocated(root))


def kept_back(root: Path) -> int:
    """Return what is counted beyond what is there, while nothing is being written."""
    ballast = (root / "ballast").stat().st_blocks * 512 if (root / "ballast").exists() else 0
    generations = [*(root / "data").iterdir(), *(root / "trash").iterdir()]
    return _APART + max(0, _BALLAST - ballast) + sum(max(0, _GENERATION - on_disk(home)) for home in generations)


def accounting(root: Path, store: Store) -> Iterator[str]:
    """Yield where the count of a root that has a budget is not what a walk finds; nothing may be being written."""
    limits = store.limits
    if limits is None:
        return
    counted = store.space.counted()
    walked = store.space.count()
    found, kept = on_disk(root), kept_back(root)
    if walked != found + kept:
        yield f"a walk counts {walked} bytes, not {found} on disk and {kept} kept back"
    if counted < walked:
        yield f"{counted} bytes were counted, a walk finds {walked}"
    if found > limits.most:
        yield f"{found} bytes on disk are over the budget of {limits.most}"


def _allocated(root: Path) -> Iterator[int]:
    seen = set()
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            with suppress(FileNotFoundError):
                status = os.lstat(f"{folder}/{name}")
                if status.st_ino not in seen:
                    seen.add(status.st_ino)
                    yield status.st_blocks * 512
