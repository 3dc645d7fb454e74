"""What all decoders share: the order of calls, the limits, and pieces large enough to hand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from layercache.errors import CorruptStreamError, LayerCacheError, LimitError

__all__ = ["PIECE", "RATIO_FLOOR", "Buffer", "Identity", "Limits", "Stage", "corrupt", "named"]

Buffer = bytes | bytearray | memoryview

PIECE = 512 << 10
"""Most bytes that one call of a binding puts out. Large, because each call drops the GIL and beside a busy thread waits
up to 5 ms to get it back; no larger, because it is held twice (here and by the consumer) on top of the window."""

RATIO_FLOOR = 256 << 20
"""Bytes of output from which on :attr:`Limits.ratio` counts: a small file of zeros harms nobody."""

_ENOUGH = PIECE // 2
_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stream may cost.

    ``output``: bytes it may expand to. ``ratio``: bytes out for each byte in, once :data:`RATIO_FLOOR` bytes are out;
    the default lets all of gzip pass, which cannot exceed 1032. ``window``: bytes of history a zstd frame may ask
    for; they are memory.
    """

    output: int = 1 << 40
    ratio: int = 2048
    window: int = 128 << 20


def corrupt(what: str, digest: object, *, offset: int | None = None) -> CorruptStreamError:
    """Error for a stream that is not what it says, ready to be raised."""
    return CorruptStreamError(
        what, digest=digest, offset=offset, hint="if its digest is right, it has to be made and pushed again"
    )


def named(digest: object) -> str:
    """Where something is, to end a sentence with; nothing where no digest is known."""
    return "" if digest is None else f" in {digest}"


class Stage(ABC):
    """A decoder but for the format: subclasses say how bytes expand and whether the stream may end here."""

    def __init__(self, limits: Limits, digest: object) -> None:
        self._limits = limits
        self._digest = digest
        self._taken = 0
        self._made = 0
        # Set while a feed runs, so that whatever ends it early (an error, a generator closed, Ctrl-C) leaves it set:
        # bytes were lost then, and no later call may look as if they were not.
        self._failure: LayerCacheError | None = None

    def feed(self, data: Buffer) -> Iterator[bytes | memoryview]:
        """Output for the next bytes of the stream; see :class:`layercache.codec.Decoder`."""
        self._enter()
        return self._pieces(memoryview(data).cast("B"))

    def finish(self) -> None:
        """Raise unless the stream may end here; see :class:`layercache.codec.Decoder`."""
        self._enter()
        if not self._complete():
            self._failure = self._corrupt("the stream is cut" if self._taken else "the stream is empty")
            raise self._failure
        self._failure = None

    @abstractmethod
    def _expand(self, view: memoryview) -> Iterator[bytes | memoryview]:
        """Yield the output for ``view``, each piece at most :data:`PIECE` long, and keep no reference to it."""

    @abstractmethod
    def _complete(self) -> bool:
        """Whether everything fed so far is a whole stream."""

    def _corrupt(self, what: str) -> CorruptStreamError:
        return corrupt(what, self._digest)

    def _enter(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._failure = self._corrupt("decoding was given up half way")

    def _pieces(self, view: memoryview) -> Iterator[bytes | memoryview]:
        self._taken += len(view)
        small: list[bytes | memoryview] = []
        held = 0
        try:
            for piece in self._expand(view):
                self._made += len(piece)
                self._check()
                # Thousands of small frames or members must not become thousands of small pieces.
                small.append(piece)
                held += len(piece)
                if held >= _ENOUGH:
                    yield small[0] if len(small) == 1 else b"".join(small)
                    small.clear()
                    held = 0
            if held:
                yield small[0] if len(small) == 1 else b"".join(small)
        except LayerCacheError as error:
            self._failure = error
            raise
        self._failure = None

    def _check(self) -> None:
        if self._made > self._limits.output:
            raise LimitError(
                f"more than {self._limits.output} bytes{named(self._digest)}", hint="raise Limits.output to read it"
            )
        if self._made > RATIO_FLOOR and self._made > self._limits.ratio * self._taken:
            raise LimitError(
                f"more than {self._limits.ratio} bytes for each compressed one{named(self._digest)}",
                hint="raise Limits.ratio to read it",
            )


class Identity(Stage):
    """No compression: what is fed is the content."""

    def _expand(self, view: memoryview) -> Iterator[bytes | memoryview]:
        for start in range(0, len(view), _MOST):
            yield view[start : start + _MOST]

    def _complete(self) -> bool:
        return True
