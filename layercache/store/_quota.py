"""What a namespace may take before it pays first, and what it keeps: a small file of its generation."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from layercache.policy import Quota
from layercache.store._files import read_record, temporary
from layercache.store._layout import QUOTA
from layercache.store._space import RECORD

if TYPE_CHECKING:
    from layercache.store._generation import Generation

__all__ = ["quota_of", "set_quota"]


def set_quota(generation: Generation, quota: Quota) -> None:
    """Remember what the namespace may take and what it is left, in bytes, until it is purged.

    :raises StoreError: when that cannot be written.
    """
    raw = json.dumps({"limit": quota.limit, "floor": quota.floor}).encode() + b"\n"
    disk = generation.disk
    with generation.guarding("record a quota"):
        if not generation.writable or read_record(disk, generation.folder, QUOTA) == raw:
            return
        generation.check_slot()
        with generation.space.taking(lambda: RECORD, "record a quota"):
            pass  # not held for a flush
        with temporary(disk, generation.incoming, raw) as new:
            disk.rename(generation.incoming, new, generation.folder, QUOTA, replace=True)
        disk.sync(generation.folder)


def quota_of(generation: Generation) -> Quota | None:
    """Return what was remembered; ``None`` where nothing was, or it is damaged."""
    raw = read_record(generation.disk, generation.folder, QUOTA)
    with suppress(ValueError, KeyError, TypeError):
        fields = json.loads(raw or b"")
        return Quota(None if fields["limit"] is None else int(fields["limit"]), int(fields["floor"]))
    return None
