"""Streams as users hold them: a file object over verified pieces, and the checks that end a stream with an error.

Whoever sees the end of a stream made here has read all of it, and it was right: what is wrong raises instead.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from layercache.codec import Buffer, Limits, decoder
from layercache.errors import IntegrityError, LayerCacheError
from layercache.integrity import Verifier
from layercache.oci import Compression, Descriptor, DiffID, Hasher

__all__ = ["ByteStream", "uncompressed", "verified"]

_NOTHING = memoryview(b"")

_ALONE = 4 << 20
"""Bytes hashed in the reader's own thread before a second one is started: a small layer is done by then."""


def _no_call() -> None:
    pass


class ByteStream(io.RawIOBase):
    """A readable, not seekable, binary file over an iterator of buffers. For one thread at a time.

    Use it like any file: in ``with``, under :class:`io.BufferedReader`, in ``tarfile.open(fileobj=..., mode="r|")`` or
    :func:`shutil.copyfileobj`. Reads block until they have all that was asked for, and are shorter only at the end.
    An error of the source is raised by every later read: after an error there is no end of file.

    ``on_close`` is called once, by the first :meth:`close`, after the source was closed.
    """

    def __init__(self, chunks: Iterator[Buffer], *, on_close: Callable[[], object] = _no_call) -> None:
        super().__init__()
        self._source = iter(chunks)
        self._on_close = on_close
        self._rest = _NOTHING  # of the current chunk
        self._ended = False
        self._failure: Exception | None = None
        self._asking = False

    def readable(self) -> bool:
        """True, as long as the stream is open."""
        self._check_open()
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Next ``size`` bytes, fewer only at the end, none past it; all that is left without ``size`` or below 0."""
        self._check_open()
        if size is None or size < 0:
            return self.readall()
        if size and self._more() and size <= len(self._rest):
            whole = self._rest.obj
            if type(whole) is bytes and len(whole) == size:
                self._rest = _NOTHING
                return whole
            data = bytes(self._rest[:size])
            self._rest = self._rest[size:]
            return data
        return b"".join(self._gather(size))

    def readall(self) -> bytes:
        """All that is left, in memory at once. :meth:`chunks` reads layers of any size."""
        self._check_open()
        return b"".join(self._gather(None))

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` and return the number of bytes in it, less than its size only at the end."""
        self._check_open()
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._more():
            step = min(len(target) - done, len(self._rest))
            target[done : done + step] = self._rest[:step]
            self._rest = self._rest[step:]
            done += step
        return done

    def chunks(self) -> Iterator[Buffer]:
        """Yield what is left, uncopied, as it comes. A chunk that is not ``bytes`` is valid until the next one."""
        self._check_open()
        while self._more():
            rest, self._rest = self._rest, _NOTHING
            yield rest.obj if type(rest.obj) is bytes and len(rest.obj) == len(rest) else rest
            self._check_open()

    def close(self) -> None:
        """Let go of the source, read to its end or not. Closing twice is nothing."""
        if self.closed:
            return
        self._rest = _NOTHING
        self._failure = None
        try:
            _close(self._source)
        finally:
            super().close()
            self._on_close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed stream")

    def _more(self) -> bool:
        """Whether there is a byte in ``_rest``, having asked the source for more if there was none."""
        if self._rest:
            return True
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return False
        if self._asking:
            # A generator that Ctrl-C ended says "no more" ever after, which must not pass for the end.
            raise LayerCacheError("the stream was interrupted", hint="open it again")
        self._asking = True
        try:
            chunk = next(self._source, None)
            while chunk is not None and not len(chunk):
                chunk = next(self._source, None)
        except Exception as error:
            self._failure = error
            raise
        if chunk is None:
            self._ended = True
        else:
            self._rest = memoryview(chunk).cast("B")
        self._asking = False
        return not self._ended

    def _gather(self, size: int | None) -> Iterator[Buffer]:
        while (size is None or size > 0) and self._more():
            part = self._rest if size is None else self._rest[:size]
            self._rest = self._rest[len(part) :]
            size = None if size is None else size - len(part)
            yield _lasting(part)


def uncompressed(
    chunks: Iterator[Buffer],
    compression: Compression,
    diff_id: DiffID | None,
    *,
    limits: Limits | None = None,
    digest: object = None,
) -> Iterator[Buffer]:
    """Yield the content of a compressed layer, in pieces of at most 1 MiB.

    The last piece is held back until the whole was found to be right, so that a reader who needs no more than that (a
    tar ends before its padding does) has the same promise as one who waits for the end. A writable chunk may be
    overwritten once the next one is asked for; the same holds for the pieces of an uncompressed layer.

    Past a few mebibytes the DiffID is hashed on a thread of its own, beside the decoding; it ends with the iterator.

    :param diff_id: digest of the content (image-spec config.md); ``None`` checks the compressed stream only.
    :param digest: names the blob in errors.
    :raises IntegrityError: if the content is not what ``diff_id`` says.
    :raises CorruptStreamError: if the compressed stream is cut, damaged or followed by garbage.
    :raises LimitError: if it is over ``limits``.
    """
    stage = decoder(compression, limits=limits, digest=digest)
    check = None if diff_id is None else _SideHash(diff_id.hasher())
    held: Buffer | None = None
    try:
        for chunk in chunks:
            for piece in stage.feed(chunk):
                if check is not None:
                    check.update(piece)
                if held is not None:
                    yield held
                held = piece
            if held is not None and not memoryview(held).readonly:
                # What is held outlives the chunk, whose owner may put the next one into the same memory.
                if check is not None:
                    check.settle()
                held = bytes(held)
        stage.finish()
        if diff_id is not None and check is not None:
            encoded = check.hexdigest()
            if encoded != diff_id.encoded:
                raise IntegrityError(
                    "wrong DiffID: the content",
                    digest=digest,
                    expected=diff_id,
                    actual=f"{diff_id.algorithm}:{encoded}",
                )
        if held is not None:
            yield held
    finally:
        if check is not None:
            check.close()
        _close(chunks)


def verified(chunks: Iterator[Buffer], descriptor: Descriptor) -> Iterator[Buffer]:
    """Yield the chunks of a blob as they come; the last one only once size and digest are right.

    :raises IntegrityError: instead of the last chunk; at once on the first byte too many.
    """
    verifier = Verifier(descriptor.digest, descriptor.size)
    held: Buffer | None = None
    try:
        for chunk in chunks:
            if not len(chunk):
                continue
            verifier.feed(chunk)
            if held is not None:
                yield held
            held = _lasting(chunk)
        verifier.finish()
        if held is not None:
            yield held
    finally:
        _close(chunks)


class _SideHash:
    """A hash fed piece by piece, on a second thread once that pays. One piece is under way at most.

    Both decoding and hashing drop the GIL, so on two cores the slower of the two is what a read costs.
    """

    def __init__(self, state: Hasher) -> None:
        self._state = state
        self._taken = 0
        self._thread: threading.Thread | None = None
        self._alone = False
        self._busy = False
        self._todo: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def update(self, piece: Buffer) -> None:
        """Add the next bytes, which must not change before :meth:`settle` or the next :meth:`update` returns."""
        self.settle()
        self._taken += len(piece)
        if self._taken > _ALONE and self._running():
            self._busy = True
            self._todo.put(piece)
        else:
            self._state.update(piece)

    def settle(self) -> None:
        """Wait until every byte so far is hashed."""
        while self._busy:
            try:
                self._done.get(timeout=1.0)
            except queue.Empty:
                if not (self._thread and self._thread.is_alive()):
                    raise LayerCacheError("the stream was forked while it was read", hint="open it again") from None
            else:
                self._busy = False

    def hexdigest(self) -> str:
        """Hash of all bytes so far."""
        self.settle()
        return self._state.hexdigest()

    def close(self) -> None:
        """End the thread and wait for it: it hashes one piece at most."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()

    def _running(self) -> bool:
        if self._thread is None and not self._alone:
            # Daemon, and without a reference to this object: a stream that nobody closed must not keep a process up.
            thread = threading.Thread(
                target=_hash_all, args=(self._state, self._todo, self._done), name="layercache-diffid", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads here, or the interpreter is ending
                self._alone = True
            else:
                self._thread = thread
        # In a forked child there is no thread behind the object, which knows.
        return self._thread is not None and self._thread.is_alive()


def _hash_all(state: Hasher, todo: queue.SimpleQueue[Buffer | None], done: queue.SimpleQueue[None]) -> None:
    while (piece := todo.get()) is not None:
        state.update(piece)
        del piece  # or it would be kept until the next one comes
        done.put(None)


def _lasting(buffer: Buffer) -> Buffer:
    """The buffer itself if it cannot change, else a copy: its owner may reuse it once it is asked for the next."""
    return buffer if memoryview(buffer).readonly else bytes(buffer)


def _close(source: object) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()
