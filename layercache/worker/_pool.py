"""The side of the process that has work: workers are started when there is some, and told what to fetch."""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from layercache.clients import Clients
from layercache.control import Control, Progress
from layercache.crowd import Crowd, CrowdedError
from layercache.errors import LayerCacheError, NotFoundError, StoreError
from layercache.fill import Fetch, fill
from layercache.metrics import Ledger, Meter
from layercache.oci import Descriptor, DiffID, Digest, Repository, Tag
from layercache.store import Blob, Budget, Generation
from layercache.worker._messages import DIALECT, Config, Job, Message, pack, pack_error, unpack, unpack_error

if TYPE_CHECKING:
    from layercache.registry import Credential

__all__ = ["LARGE", "Filled", "WorkerLostError", "Workers"]

_log = logging.getLogger("layercache")

LARGE = 32 << 20
"""Bytes from which on a blob is worth a worker: one takes a third of a second to start."""

_IDLE = 60.0
"""Seconds without work after which one ends."""

_START = 20.0
"""Seconds in which a worker must say its first word."""

_REST = 60.0
"""Seconds for which none is started after one could not be."""

# A forked child has copies of the pipes: as long as it has them, the workers of its parent would not see its end.
_forked: weakref.WeakSet[Workers] = weakref.WeakSet()


def _after_fork() -> None:
    for workers in list(_forked):
        workers.forget()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, slots=True)
class Filled:
    """A blob, open and leased. ``fetched``: just now; by a ``worker``, or, for this ``reason``, not by one."""

    blob: Blob
    fetched: bool
    worker: bool = False
    reason: str = ""


class WorkerLostError(Exception):
    """No worker can be had, or the one that was at it is gone. What it has stored stays, so others can go on."""


class Workers:
    """The worker processes of one cache: none before there is work, then up to ``most``, gone a minute after it.

    :param clients: whose credentials and mirrors they use.
    """

    def __init__(self, most: int, *, root: Path, budget: Budget, clients: Clients) -> None:
        self._most = most
        self._root, self._budget, self._clients = root, budget, clients
        self._numbers = itertools.count(1)
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._trouble, self._until, self._closed = "", 0.0, False
        _forked.add(self)
        weakref.finalize(self, _end, self._workers)

    def fill(
        self,
        generation: Generation,
        descriptor: Descriptor,
        fetch: Fetch,
        *,
        tenant: str,
        remote: bool,
        repository: Repository,
        parent: Digest | Tag | None,
        plain_http: bool | None,
        diff_id: DiffID | None,
        control: Control,
        ledger: Ledger,
        meter: Meter,
    ) -> Filled:
        """Return a blob, open and leased, fetched into the generation where it is not there.

        On this thread, with ``fetch``, as long as the host's threads let it; by a worker once they do not, from where
        it is then. Only a large blob that a registry has (``remote``) is for a worker.

        ``meter`` is told how long its source took. Raises as :func:`layercache.fill.fill`.
        """
        large = remote and descriptor.size >= LARGE
        # A worker cannot have the key of a generation that KMS has sealed.
        watch = large and self._most > 0 and generation.form.seal != "kms"
        why = ""

        def here(*, watch: bool) -> Filled:
            blob, fetched = fill(
                generation,
                descriptor,
                lambda offset: meter.over(Crowd().over(fetch(offset)) if watch else fetch(offset)),
                diff_id=diff_id,
                origin=str(repository),
                control=control,
                ledger=ledger,
            )
            return Filled(blob, fetched, reason=why if fetched else "")

        try:
            if not (watch and Crowd().dense()):
                return here(watch=watch)
        except CrowdedError:
            pass
        job = Job(
            tenant,
            generation.slot,
            generation.generation,
            descriptor,
            diff_id,
            repository,
            parent,
            plain_http,
            self._clients.mirrors(tenant, repository.host),
            control.remaining(math.inf),
        )
        try:
            with self._done(job, control=control, ledger=ledger, meter=meter) as fetched:
                try:
                    return Filled(generation.open(descriptor.digest), fetched, worker=True)
                except NotFoundError:
                    why = "it was removed meanwhile"
        except WorkerLostError as error:
            why = str(error)
        _log.info("%s is fetched on a thread: %s", descriptor.digest, why)
        return here(watch=False)

    @contextmanager
    def _done(self, job: Job, *, control: Control, ledger: Ledger, meter: Meter) -> Iterator[bool]:
        """Have a job done; its blob is there, and is not evicted, within the block. Yields whether it was fetched.

        :raises WorkerLostError: where no worker can do it.
        """
        worker = self._take()
        number = next(self._numbers)
        inbox = worker.begin(number)
        try:
            worker.say({"is": "job", "job": number, **job.to_json()})
            while True:
                control.checkpoint()
                message = self._next(worker, inbox)
                match message["is"]:
                    case "nothing":
                        pass
                    case "progress":
                        stage, done = message["stage"], message["done"]
                        control.report(Progress(job.descriptor.digest, job.descriptor.size, done, stage))
                    case "failed":
                        raise unpack_error(message["error"])
                    case "done":
                        ledger.take(message["requests"], message["bytes"], message["seconds"])
                        meter.size, meter.wait, meter.seconds = message["meter"]
                        yield message["fetched"]
                        return
                    case _:
                        raise WorkerLostError(message.get("why", "the worker process is gone"))
        finally:
            worker.end(number)

    def close(self) -> None:
        """End them. What they were at fails there with :class:`WorkerLostError`."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
            self._workers.clear()
        _end(workers)

    def forget(self) -> None:
        """Give up the pipes, in a forked child: the workers are its parent's."""
        for worker in self._workers:
            worker.forget()
        self._workers.clear()
        self._lock = threading.Lock()

    def _next(self, worker: _Worker, inbox: queue.SimpleQueue[Message]) -> Message:
        try:
            return inbox.get(timeout=0.05)
        except queue.Empty:
            if worker.ready or time.monotonic() - worker.started < _START:
                return {"is": "nothing"}
        self._unusable(f"a worker process said nothing for {_START:.0f} s")
        worker.close()
        return {"is": "lost", "why": self._trouble}

    def _take(self) -> _Worker:
        """Return the worker with the least to do, a new one where all have something and there may be more."""
        with self._lock:
            if self._closed:
                raise WorkerLostError("the cache is closed")
            self._workers[:] = [worker for worker in self._workers if not worker.gone]
            best = min(self._workers, key=lambda worker: worker.busy, default=None)
            if best is not None and (not best.busy or len(self._workers) >= self._most):
                return best
            if time.monotonic() < self._until:
                if best is not None:
                    return best
                raise WorkerLostError(self._trouble)
            try:
                worker = _Worker(self._config(), self._clients, self._unusable)
            except OSError as error:
                self._unusable(f"no worker process can be started ({error.strerror})")
                if best is not None:
                    return best
                raise WorkerLostError(self._trouble) from error
            self._workers.append(worker)
            return worker

    def _config(self) -> Config:
        hosts_dir, tls = self._clients.hosts_dir, self._clients.tls
        return Config(
            str(self._root.absolute()),
            self._budget,
            None if hosts_dir is None else str(Path(hosts_dir).absolute()),
            tls,
            _IDLE,
        )

    def _unusable(self, why: str) -> None:
        if why != self._trouble:
            _log.warning("large blobs are fetched on threads: %s", why)
        self._trouble, self._until = why, time.monotonic() + _REST


class _Worker:
    """One worker process, with a thread of ours that listens to it."""

    def __init__(self, config: Config, clients: Clients, unusable: Callable[[str], None]) -> None:
        self.started = time.monotonic()
        self.ready = self.gone = False
        self._clients, self._unusable = clients, unusable
        self._given: dict[tuple[str, str, str], Credential] = {}
        self._jobs: dict[int, queue.SimpleQueue[Message]] = {}
        self._lock = threading.Lock()
        import subprocess  # noqa: PLC0415 - most hosts start none

        program = sys.executable
        if not program:
            raise OSError(0, "this interpreter does not know its own program")
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
            [program, "-m", "layercache.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # Out of reach of a terminal's signals: it ends when its pipe does.
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)},
        )
        try:
            self._say(pack({"is": "config", "dialect": DIALECT, **config.to_json()}))
        except OSError:
            self.close()
            self._pipe("stdout").close()
            raise
        threading.Thread(target=self._listen, name="layercache-worker", daemon=True).start()

    @property
    def busy(self) -> int:
        """How many jobs it has."""
        return len(self._jobs)

    def begin(self, number: int) -> queue.SimpleQueue[Message]:
        """Return where what it says of a job arrives."""
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._jobs[number] = inbox
        if self.gone:
            inbox.put({"is": "lost"})
        return inbox

    def end(self, number: int) -> None:
        """Let it forget a job: its blob is open here, or nobody wants it any more."""
        self._jobs.pop(number, None)
        with suppress(WorkerLostError):
            self.say({"is": "end", "job": number})

    def say(self, message: Message) -> None:
        """Tell it something.

        :raises WorkerLostError: when it is gone.
        """
        try:
            self._say(pack(message))
        except (OSError, ValueError):
            raise WorkerLostError("the worker process is gone") from None

    def close(self) -> None:
        """End it: it goes when its pipe does."""
        self.gone = True
        with suppress(OSError):
            self._pipe("stdin").close()
        import subprocess  # noqa: PLC0415

        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Close our copies of its pipes, in a forked child."""
        self.gone = True
        self._process.returncode = 0  # not ours to wait for
        for name in ("stdin", "stdout"):
            with suppress(OSError):
                self._pipe(name).close()

    def _pipe(self, name: str) -> IO[bytes]:
        pipe: IO[bytes] = getattr(self._process, name)
        return pipe

    def _say(self, line: bytes) -> None:
        with self._lock:
            view = memoryview(line)
            while view:
                view = view[self._pipe("stdin").write(view) :]

    def _listen(self) -> None:
        left = b""
        with suppress(OSError, ValueError):
            while data := os.read(self._pipe("stdout").fileno(), 1 << 16):
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    self._hear(unpack(line))
        self.gone = True
        with suppress(OSError):
            self._pipe("stdin").close()
        status = self._process.wait()
        self._pipe("stdout").close()
        if not self.ready:
            self._unusable(f"a worker process ended with {status} before it could do anything")
        for inbox in list(self._jobs.values()):
            inbox.put({"is": "lost", "why": f"the worker process ended with {status}"})

    def _hear(self, message: Message) -> None:
        match message["is"]:
            case "ready":
                self.ready = True
            case "log":
                logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])
            case "ask":
                # On a thread of its own: a credential helper may take its time, and others are waiting to be heard.
                threading.Thread(target=self._answer, args=(message,), name="layercache-answer", daemon=True).start()
            case _:
                inbox = self._jobs.get(message["job"])
                if inbox is not None:
                    inbox.put(message)

    def _answer(self, message: Message) -> None:
        answer: dict[str, Any] = {"is": "answer", "ask": message["ask"]}
        tenant, host = message["tenant"], message["host"]
        try:
            credentials = self._clients.credentials(tenant)
            match message["what"]:
                case "eager":
                    answer["eager"] = credentials.eager(host)
                case "refused":
                    found = self._given.pop((tenant, host, message["fingerprint"]), None)
                    if found is not None:
                        credentials.refused(host, found)
                case _:
                    control = Control(timeout=message["timeout"])
                    found = credentials.basic(host, repository=message["repository"], control=control)
                    answer["credential"] = None if found is None else asdict(found)
                    if found is not None:
                        self._given[tenant, host, found.fingerprint] = found
        except LayerCacheError as error:
            answer["error"] = pack_error(error)
        except Exception as error:  # noqa: BLE001 - a credentials object of the caller's
            answer["error"] = pack_error(StoreError(f"the credentials fail with {type(error).__name__}"))
        with suppress(WorkerLostError):
            self.say(answer)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()
