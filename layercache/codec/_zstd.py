"""zstd through the ``zstandard`` binding, which decodes and checks sums; the outline is walked here."""

from __future__ import annotations

from collections.abc import Iterator

from layercache.codec._frames import Frames
from layercache.codec._stage import PIECE, Limits, Stage

__all__ = ["Zstd"]

_LEAST_WINDOW = 1 << 10  # the binding refuses a limit below it; smaller ones are held by Frames alone
_SMALL = 64 << 10


class Zstd(Stage):
    """zstd frames, as many as there are.

    The binding fills one piece a call and stops, so no input can make a call expand to more than a piece, and no copy
    is made. ``zstandard.decompressobj`` would have to be fed block by block for that, and copies: 6 % slower.
    Frames decoded side by side (``multi_decompress_to_buffer``, two threads, batches of 8 to 32 MiB) took 0.19-0.24 s
    where this takes 0.22 s, on two cores: fresh memory for each batch costs what the second core gives.
    """

    def __init__(self, limits: Limits, digest: object) -> None:
        super().__init__(limits, digest)
        import zstandard  # noqa: PLC0415 - 15 ms that only a reader of zstd should pay

        self._error = zstandard.ZstdError
        self._frames = Frames(limits.window, digest)
        self._input = _Input()
        self._room = PIECE
        self._reader = zstandard.ZstdDecompressor(max_window_size=max(limits.window, _LEAST_WINDOW)).stream_reader(
            self._input,  # type: ignore[arg-type]  # the binding asks for read() only
            read_across_frames=True,
        )

    def _expand(self, view: memoryview) -> Iterator[bytes]:
        # First the walk: a window over the limit must be refused before the binding sees it, and allocates.
        self._frames.feed(view)
        if not view:
            return
        self._input.waiting = view
        while (piece := self._read()) is not None:
            yield piece

    def _read(self) -> bytes | None:
        """Next piece of at most :data:`PIECE` bytes; ``None`` when the binding has used up its input."""
        try:
            piece = self._reader.read1(self._room)
        except BlockingIOError:
            return None
        except self._error as error:
            if "Allocation error" in str(error):
                raise MemoryError("no memory for a zstd window") from error
            raise self._corrupt(f"zstd data does not decode ({error})") from error
        # A piece ends with its frame. Among many small frames, allocating all the room each time costs more than
        # decoding does.
        self._room = PIECE if len(piece) >= _SMALL else _SMALL
        return piece

    def _complete(self) -> bool:
        # The binding keeps back the last byte of a frame until all its output is out, so nothing is left in it here.
        return self._frames.whole


class _Input:
    """Where the binding reads from: the bytes of the running feed, once.

    An empty read would be the end for good. "Nothing now" is an error in the convention of non-blocking streams; it
    reaches us through the binding, which asks only when it has used up what it had and has put out nothing.
    """

    def __init__(self) -> None:
        self.waiting: memoryview | None = None

    def read(self, _size: int) -> memoryview:
        view, self.waiting = self.waiting, None
        if view is None:
            raise BlockingIOError
        return view
