"""The worker process: it fetches what it is told to into the root, and ends when its pipe does, or has been idle."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

from layercache.clients import Clients
from layercache.control import Control, Progress
from layercache.errors import LayerCacheError, NamespacePurgedError
from layercache.fill import fill
from layercache.metrics import Ledger, Meter
from layercache.registry import Credential, Mirror, Registry
from layercache.store import PUBLIC, NamespaceName, Store
from layercache.worker._messages import DIALECT, Config, Job, Message, pack, pack_error, unpack, unpack_error

_TELL = 0.1
"""Seconds between two words about the progress of a job: each makes a thread of the host wait for the GIL."""

_ANSWER = 60.0


class _Pipe:
    """The two ends that lead to the process we work for. Where it is gone, so are we."""

    def __init__(self) -> None:
        self._in, self._out = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):  # what others print must not get among our words
            os.dup2(nothing, fd)
        os.close(nothing)
        self._lock = threading.Lock()
        self._asks = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[Message]] = {}
        self.desk: _Desk | None = None

    def say(self, message: Message) -> None:
        line = memoryview(pack(message))
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._out, line) :]
            except OSError:
                os._exit(0)

    def messages(self) -> Iterator[Message]:
        """Yield what is said to us, until there is nobody, or nothing to do for long."""
        left = b""
        while True:
            idle = 60.0 if self.desk is None else self.desk.config.idle
            if not select.select([self._in], [], [], idle)[0]:
                if self.desk is None or not self.desk.busy:
                    return
                continue
            data = os.read(self._in, 1 << 16)
            if not data:
                return
            *lines, left = (left + data).split(b"\n")
            yield from map(unpack, lines)

    def ask(self, what: str, control: Control, **about: object) -> Message:
        """Ask the other side something and return its answer."""
        number = next(self._asks)
        answer = self._answers[number] = queue.SimpleQueue[Message]()
        try:
            self.say({"is": "ask", "ask": number, "what": what, **about})
            while True:
                control.checkpoint()
                with suppress(queue.Empty):
                    found = answer.get(timeout=0.05)
                    if "error" in found:
                        raise unpack_error(found["error"])
                    return found
        finally:
            del self._answers[number]

    def take(self, answer: Message) -> None:
        """Hand an answer to who asked."""
        waiting = self._answers.get(answer["ask"])
        if waiting is not None:
            waiting.put(answer)


class _Asked:
    """Credentials that the process we work for has for a tenant."""

    def __init__(self, pipe: _Pipe, tenant: str) -> None:
        self._pipe, self._tenant = pipe, tenant
        self._eager: dict[str, bool] = {}

    def basic(self, host: str, *, repository: str = "", control: Control) -> Credential | None:
        timeout = control.remaining(_ANSWER)
        found = self._ask("basic", control, host, repository=repository, timeout=timeout)["credential"]
        return None if found is None else Credential(**found)

    def eager(self, host: str) -> bool:
        if host not in self._eager:
            self._eager[host] = self._ask("eager", Control(timeout=_ANSWER), host)["eager"]
        return self._eager[host]

    def refused(self, host: str, credential: Credential) -> None:
        self._ask("refused", Control(timeout=_ANSWER), host, fingerprint=credential.fingerprint)

    def _ask(self, what: str, control: Control, host: str, **about: object) -> Message:
        return self._pipe.ask(what, control, tenant=self._tenant, host=host, **about)


class _Told(logging.Handler):
    """Log records go where the host's go."""

    def __init__(self, pipe: _Pipe) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.say({"is": "log", "name": record.name, "level": record.levelno, "text": record.getMessage()})


class _Desk:
    """What the worker has, and the jobs it is at."""

    def __init__(self, pipe: _Pipe, config: Config) -> None:
        self._pipe = pipe
        self.config = config
        self._clients = Clients(hosts_dir=config.hosts_dir, tls=config.tls)
        self._supplies: dict[str, tuple[_Asked, dict[str, tuple[Mirror, ...]]]] = {}  # by tenant
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._jobs: dict[int, threading.Event] = {}

    @property
    def busy(self) -> bool:
        """True while there are jobs."""
        return bool(self._jobs)

    def begin(self, number: int, job: Job) -> None:
        """Start a job."""
        ended = self._jobs[number] = threading.Event()
        threading.Thread(target=self._run, args=(number, job, ended), daemon=True).start()

    def end(self, number: int) -> None:
        """End a job: what it has open is open elsewhere, or nobody wants it."""
        ended = self._jobs.get(number)
        if ended is not None:
            ended.set()

    def _run(self, number: int, job: Job, ended: threading.Event) -> None:
        try:
            self._fill(number, job, ended)
        except LayerCacheError as error:
            self._pipe.say({"is": "failed", "job": number, "error": pack_error(error)})
        except Exception:  # noqa: BLE001 - then it is done in the host, where the error shows
            self._pipe.say({"is": "lost", "job": number, "why": f"a worker failed: {sys.exc_info()[1]!r}"})
        finally:
            self._jobs.pop(number, None)

    def _fill(self, number: int, job: Job, ended: threading.Event) -> None:
        told = 0.0

        def tell(progress: Progress) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= _TELL or progress.done == progress.size:
                told = now
                self._pipe.say({"is": "progress", "job": number, "stage": progress.stage, "done": progress.done})

        timeout = None if job.timeout == float("inf") else job.timeout
        control = Control(timeout=timeout, cancel=ended, progress=tell)
        ledger, meter = Ledger(), Meter()
        store = self._open()
        name = PUBLIC if job.slot == store.public else NamespaceName(job.tenant)
        generation = store.generation(name, create=False, control=control)
        if generation is None:
            raise NamespacePurgedError("the namespace was purged", hint="get a new handle")
        with closing(generation):
            if (generation.slot, generation.generation) != (job.slot, job.generation):
                raise NamespacePurgedError("the namespace was purged", hint="get a new handle")
            client = self._client(job)
            blob, fetched = fill(
                generation,
                job.descriptor,
                lambda offset: meter.over(
                    client.fetch(
                        job.repository, job.descriptor, offset=offset, parent=job.parent, control=control, ledger=ledger
                    )
                ),
                diff_id=job.diff_id,
                origin=str(job.repository),
                control=control,
                ledger=ledger,
            )
        with closing(blob):
            self._pipe.say(
                {
                    "is": "done",
                    "job": number,
                    "fetched": fetched,
                    "requests": ledger.requests,
                    "bytes": dict(ledger.bytes_by_source),
                    "seconds": dict(ledger.seconds_by_stage),
                    "meter": [meter.size, meter.wait, meter.seconds],
                }
            )
            ended.wait()  # so that it is not evicted before it is open on the other side

    def _client(self, job: Job) -> Registry:
        with self._lock:
            asked, mirrors = self._supplies.setdefault(job.tenant, (_Asked(self._pipe, job.tenant), {}))
            mirrors[job.repository.host] = job.mirrors
            self._clients.supply(job.tenant, asked, mirrors)
            return self._clients.client(job.repository, job.plain_http, tenant=job.tenant)

    def _open(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = Store(self.config.root, budget=self.config.budget)
            return self._store


def main() -> None:
    """Work until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = _Pipe()
    log = logging.getLogger("layercache")
    log.addHandler(_Told(pipe))
    log.propagate = False
    messages = pipe.messages()
    first = next(messages, None)
    if first is None or first.pop("is") != "config" or first.pop("dialect") != DIALECT:
        return
    desk = pipe.desk = _Desk(pipe, Config.from_json(first))
    pipe.say({"is": "ready"})
    for message in messages:
        match message.pop("is"):
            case "job":
                desk.begin(message.pop("job"), Job.from_json(message))
            case "end":
                desk.end(message["job"])
            case "answer":
                pipe.take(message)
    # At once, whatever threads are at: what they had is a partial file that the next attempt goes on with.
    os._exit(0)


if __name__ == "__main__":
    main()
