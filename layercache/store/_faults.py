"""What a failing system call means to the store's callers. ``OSError`` ends here."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from layercache.errors import LayerCacheError, NoSpaceError, ReadOnlyError, StoreClosedError, StoreError

__all__ = ["guarding", "store_error"]


def store_error(error: OSError, what: str) -> StoreError:
    """Return the typed error for ``error``; ``what`` says what could not be done, without a name of a tenant."""
    text = f"cannot {what}: {error.strerror or type(error).__name__}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpaceError(text, hint="free space on the disk, or lower the budget")
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return ReadOnlyError(text, hint="check the mount and the owner of the root")
        case errno.EBADF:
            return StoreClosedError(
                text, hint="the cache was closed, or belongs to the process that forked; open it again"
            )
        case _:
            return StoreError(text, hint="check the disk under the root")


@contextmanager
def guarding(what: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into the typed error, chained."""
    try:
        yield
    except LayerCacheError:
        raise  # a deadline is an OSError, too
    except OSError as error:
        raise store_error(error, what) from error
