"""What a failing system call means to the store's callers. ``OSError`` ends here."""

from __future__ import annotations

import errno
from types import TracebackType

from layercache.errors import LayerCacheError, NoSpaceError, ReadOnlyError, StoreClosedError, StoreError

__all__ = ["Guarding", "guarding", "store_error"]


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


def guarding(what: str) -> Guarding:
    """Turn an ``OSError`` of the block into the typed error, chained."""
    return Guarding(what)


class Guarding:
    """What :func:`guarding` returns. Not made of a generator, which would cost every hit microseconds."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, LayerCacheError):  # a deadline is an OSError, too
            raise self.typed(error) from error

    def typed(self, error: OSError) -> LayerCacheError:
        """Return what is raised for an error."""
        return store_error(error, self.what)
