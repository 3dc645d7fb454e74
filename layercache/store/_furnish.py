"""What is in the directory of a generation when it begins: every place that a rename or a lock will need."""

from __future__ import annotations

from layercache.store._disk import Dir, Disk
from layercache.store._files import write_small
from layercache.store._form import Form
from layercache.store._keys import KeyRecord
from layercache.store._layout import FENCE, KEY, LOCK_NAMES, LOCKS, NAME, PARTS, NamespaceName

__all__ = ["furnish"]


def furnish(disk: Disk, data: Dir, folder: str, *, name: NamespaceName, record: KeyRecord | None, form: Form) -> None:
    """Make everything of a generation in its new, empty directory. Durable when it returns."""
    at = disk.dir(data, folder)
    try:
        for child in PARTS:
            disk.make_dir(at, child)
        locks = disk.dir(at, LOCKS)
        try:
            for lock in LOCK_NAMES:
                disk.close(disk.create(locks, lock))
            disk.sync(locks)
        finally:
            disk.close(locks)
        write_small(disk, at, FENCE, bytes(8))
        write_small(disk, at, NAME, form.pack(NAME, NAME, name.raw))
        if record is not None:
            write_small(disk, at, KEY, record.pack())
        disk.sync(at)
    finally:
        disk.close(at)
    disk.sync(data)
