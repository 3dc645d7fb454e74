"""Large fills in worker processes: what they bring, and how every way to lose one ends."""

from __future__ import annotations

import errno
import gc
import inspect
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache import LayerCache, errors
from layercache.crowd import Crowd
from layercache.errors import (
    CancelledError,
    DeadlineError,
    DeniedError,
    IntegrityError,
    LayerCacheError,
    NamespacePurgedError,
    NoSpaceError,
    NotFoundError,
    UnauthorizedError,
)
from layercache.oci import OCTET_STREAM, Descriptor, DiffID, Digest, Repository, Tag
from layercache.registry import Mirror, Tls
from layercache.registry.auth import Anonymous, Password
from layercache.store import Budget
from layercache.testing.images import build_image
from layercache.testing.registry import BearerAuth, Drip, ScriptedRegistry, Stall, Status, WrongBytes
from layercache.worker import Config, _pool
from layercache.worker._messages import Job, pack, pack_error, unpack, unpack_error
from tests.crash import sweeps

T = TypeVar("T")
SIZE = 6 << 20
MIRROR = Mirror("https://mirror:1/x", headers=(("X-Key", "s3cret"),), tls=Tls(ca=("a.pem",), cert="c", verify=False))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Workers for blobs of a mebibyte, so that the tests need not move much, whether or not it is crowded."""
    monkeypatch.setattr(_pool, "LARGE", 1 << 20)
    monkeypatch.setattr(Crowd, "dense", lambda _: True)


@pytest.fixture
def spinning():
    """Return what starts a thread that holds the GIL all the time, until the test ends."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def spin():
        number = 0
        while not stop.is_set():
            for _ in range(10_000):
                number += 1

    def start():
        threads.append(threading.Thread(target=spin, daemon=True))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


@pytest.fixture
def image():
    return build_image([random.Random(3).randbytes(SIZE)], platform="linux/amd64", compression="none")


@pytest.fixture
def served(scripted: ScriptedRegistry, image) -> str:
    scripted.add(image, "demo/large", "1")
    return f"{scripted.host}/demo/large:1"


@pytest.fixture
def cache(root: Path) -> Iterator[LayerCache]:
    with LayerCache(root, platform="linux/amd64", janitor=False) as opened:
        yield opened


def until(look: Callable[[], T], seconds: float = 10.0) -> T:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)
    return found


def children(of: int | None = None) -> list[int]:
    """Return the worker processes of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"layercache.worker" in (entry / "cmdline").read_bytes():
                status = (entry / "status").read_text()
                if f"PPid:\t{of or os.getpid()}\n" in status and "State:\tZ" not in status:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def layer_of(pulled):
    return next(blob for blob in pulled.report.blobs if blob.size == SIZE)


# -- what it brings


def test_a_large_blob_is_fetched_by_a_worker_and_counted_as_ever(cache, served, image, scripted):
    seen: list[int] = []
    with cache.namespace("acme").pull(served, progress=lambda progress: seen.append(progress.done)) as pulled:
        report, blob = pulled.report, layer_of(pulled)
        assert (blob.source, blob.worker, blob.reason) == ("miss", True, "")
        assert blob.to_json()["worker"] is True
        assert [other.worker for other in report.blobs if other is not blob] == [False, False]
        assert report.bytes_by_source == {scripted.host: sum(other.size for other in report.blobs)}
        assert report.requests == len(scripted.requests)
        assert {"wire", "hash", "write", "flush"} & set(report.stages)
        assert max(seen) == SIZE
        with pulled.layers[0].compressed() as stream:
            assert stream.read() == image.blobs[image.layers[0].digest]
    workers = children()
    assert len(workers) == 1
    with cache.namespace("other").pull(served) as again:
        assert layer_of(again).worker  # by the same one: it is kept warm
        assert children() == workers
    with cache.namespace("acme").pull(served) as hit:
        assert (layer_of(hit).source, layer_of(hit).worker) == ("hit", False)


def test_a_host_that_has_time_does_it_on_threads(cache, served, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_pool, "LARGE", 1 << 20)
    with cache.namespace("acme").pull(served) as pulled:
        assert (layer_of(pulled).worker, layer_of(pulled).reason) == (False, "")
    assert children() == []


def test_a_busy_thread_is_told_from_an_idle_one(monkeypatch, spinning):
    monkeypatch.undo()
    until(lambda: not Crowd().dense())  # also on a machine that is busy otherwise
    spinning()
    until(lambda: Crowd().dense())


def test_a_busy_core_is_no_busy_thread(monkeypatch):
    """What waits for a core does not wait for the GIL."""
    monkeypatch.undo()
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        looks = [Crowd().dense() for _ in range(10)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert looks.count(True) <= 2


def test_a_host_that_gets_busy_hands_over_what_has_begun(cache, scripted, monkeypatch, spinning):
    monkeypatch.undo()
    monkeypatch.setattr(_pool, "LARGE", 1 << 20)
    data = random.Random(4).randbytes(16 << 20)
    scripted.add(build_image([data], platform="linux/amd64", compression="none"), "demo/larger", "1")
    digest = str(Digest.of(data))
    scripted.fault(f"blobs/{digest}", Drip(rate=16 << 20, size=1 << 18))
    begun: list[int] = []

    def note(progress):
        if progress.size == len(data) and progress.done >= 4 << 20 and not begun:
            begun.append(progress.done)
            spinning()

    with cache.namespace("acme").pull(f"{scripted.host}/demo/larger:1", progress=note) as pulled:
        (blob,) = (blob for blob in pulled.report.blobs if blob.size == len(data))
        assert (blob.source, blob.worker) == ("miss", True)
        with pulled.layers[0].compressed() as stream:
            assert stream.read() == data
    assert sum(request.status == 206 for request in scripted.requests if digest in request.path) >= 1


def test_there_are_no_more_than_asked_for_and_they_share_the_work(root, scripted):
    layers = [random.Random(number).randbytes(2 << 20) for number in range(6)]
    scripted.add(build_image(layers, platform="linux/amd64", compression="none"), "demo/many", "1")
    with LayerCache(root, platform="linux/amd64", janitor=False, jobs=6, workers=2) as cache:
        scripted.fault("blobs/*", Drip(rate=4 << 20, size=1 << 18), times=None)
        with cache.namespace("acme").pull(f"{scripted.host}/demo/many:1") as pulled:
            assert sum(blob.worker for blob in pulled.report.blobs) == 6
        assert len(children()) == 2
    assert children() == []


def test_none_is_started_where_none_is_wanted(root, served):
    with LayerCache(root, platform="linux/amd64", janitor=False, workers=0) as cache:
        with cache.namespace("acme").pull(served) as pulled:
            assert (layer_of(pulled).worker, layer_of(pulled).reason) == (False, "")
        assert children() == []
    with pytest.raises(ValueError, match="negative"):
        LayerCache(root, workers=-1)


def test_an_idle_one_ends_and_the_next_fill_has_another(root, served, monkeypatch):
    monkeypatch.setattr(_pool, "_IDLE", 0.2)
    with LayerCache(root, platform="linux/amd64", janitor=False) as cache:
        cache.namespace("acme").pull(served).close()
        until(lambda: not children())
        with cache.namespace("other").pull(served) as pulled:
            assert layer_of(pulled).worker


def test_credentials_are_asked_of_this_process(root, image):
    with ScriptedRegistry(auth=BearerAuth("me", "secret")) as registry:
        registry.add(image, "demo/large", "1")
        asked: list[str] = []

        class Noting(Password):
            def basic(self, host, **about):
                asked.append(threading.current_thread().name)
                return super().basic(host, **about)

        mine = Noting(registry.host, "me", "secret")
        with (
            LayerCache(root, platform="linux/amd64", janitor=False, credentials=mine) as cache,
            cache.namespace("acme").pull(f"{registry.host}/demo/large:1") as pulled,
        ):
            assert layer_of(pulled).worker
        assert "layercache-answer" in asked


def test_a_tenant_has_its_own_credentials_and_mirrors_there_too(root, image):
    with ScriptedRegistry(auth=BearerAuth("one", "secret")) as registry, ScriptedRegistry() as mirror:
        registry.add(image, "demo/large", "1")
        mirror.add(image, "demo/large", "1")
        reference = f"{registry.host}/demo/large:1"
        with LayerCache(root, platform="linux/amd64", janitor=False, credentials=Anonymous()) as cache:
            one = cache.namespace("one", credentials=Password(registry.host, "one", "secret"))
            with one.pull(reference) as pulled:
                assert layer_of(pulled).worker
            with pytest.raises(UnauthorizedError):
                cache.namespace("two").pull(reference)
            assert mirror.count("*blobs*") == 0
            with cache.namespace("three", mirrors={registry.host: [mirror.host]}).pull(reference) as pulled:
                assert layer_of(pulled).worker
            assert mirror.count("*blobs*") > 0
            assert len(children()) == 1


def test_a_sealed_one_is_filled_and_its_purge_needs_no_end_of_the_worker(cache, served, image, root):
    namespace = cache.namespace("acme", seal="ephemeral")
    with namespace.pull(served) as pulled:
        assert layer_of(pulled).worker
        with pulled.layers[0].compressed() as stream:
            assert stream.read() == image.blobs[image.layers[0].digest]
    assert children()
    assert namespace.purge(wait=5).level == "crypto-erased"
    assert not list(root.glob("data/*"))


def test_a_public_blob_comes_by_a_worker_too(root, served, scripted):
    with (
        LayerCache(root, platform="linux/amd64", janitor=False, public=[f"{scripted.host}/demo/*"]) as cache,
        cache.namespace("acme").pull(served) as pulled,
    ):
        assert (layer_of(pulled).worker, layer_of(pulled).public) == (True, True)


# -- errors are those of a fill here


def test_wrong_bytes_are_an_integrity_error_and_leave_nothing(cache, served, image, scripted, root):
    digest = image.layers[0].digest
    scripted.fault(f"blobs/{digest}", WrongBytes(at=SIZE - 5), times=None)

    with pytest.raises(IntegrityError) as caught:
        cache.namespace("acme").pull(served)

    assert (caught.value.digest, caught.value.expected) == (str(digest), str(digest))
    assert digest.encoded not in {path.name for path in root.glob("data/*/*/*/*")}
    assert not list(root.glob("data/*/in/*"))
    assert len(children()) == 1


@pytest.mark.parametrize(("status", "kind"), [(404, NotFoundError), (403, DeniedError), (401, UnauthorizedError)])
def test_what_the_registry_refuses_has_its_type(cache, served, image, scripted, status, kind):  # noqa: PLR0917
    scripted.fault(f"blobs/{image.layers[0].digest}", Status(status), times=None)
    with pytest.raises(kind) as caught:
        cache.namespace("acme").pull(served)
    if status != 404:
        assert (caught.value.status, caught.value.host) == (status, scripted.host)


def test_a_full_budget_passes_it_through(root, served, image):
    with (
        LayerCache(root, platform="linux/amd64", janitor=False, budget=4 << 20, keep_free=0) as cache,
        cache.namespace("acme").pull(served) as pulled,
    ):
        assert layer_of(pulled).source == "bypass"
        assert layer_of(pulled).reason.startswith(NoSpaceError.reason)
        with pulled.layers[0].compressed() as stream:
            assert stream.read() == image.blobs[image.layers[0].digest]


def test_a_purge_ends_it(cache, served, image, scripted):
    scripted.fault(f"blobs/{image.layers[0].digest}", Stall(at=SIZE // 2, seconds=20))
    namespace = cache.namespace("acme")
    began = threading.Event()

    def purge():
        began.wait(10)
        namespace.purge(wait=0)

    purger = threading.Thread(target=purge)
    purger.start()

    def note(progress):
        if progress.stage == "fetching" and progress.size == SIZE:
            began.set()

    with pytest.raises((NamespacePurgedError, DeadlineError)) as caught:
        namespace.pull(served, progress=note, timeout=8)
    purger.join()
    assert isinstance(caught.value, NamespacePurgedError) or began.is_set()


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_cancel_ends_it_at_once_and_the_worker_goes_on_to_the_next(cache, served, image, scripted, how):
    scripted.fault(f"blobs/{image.layers[0].digest}", Stall(at=3 << 20, seconds=30))
    cancel = threading.Event()
    told = 0.0

    def note(progress):
        nonlocal told
        if progress.stage == "fetching" and progress.size == SIZE and not told:
            told = time.monotonic()
            cancel.set()

    wanted = {"cancel": cancel} if how == "cancel" else {"timeout": 3.0}
    with pytest.raises(CancelledError if how == "cancel" else DeadlineError):
        cache.namespace("acme").pull(served, progress=note, **wanted)
    assert time.monotonic() - told < (1.0 if how == "cancel" else 4.0)
    workers = children()
    with cache.namespace("acme").pull(served) as pulled:
        assert layer_of(pulled).worker
    assert children() == workers


def test_a_progress_callback_that_raises_ends_it(cache, served):
    def note(progress):
        if progress.stage == "fetching" and progress.size == SIZE:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        cache.namespace("acme").pull(served, progress=note)


def test_credentials_that_fail_do_not_hang_it(root, image):
    class Broken(Password):
        def basic(self, host, **about):
            if threading.current_thread().name == "layercache-answer":
                raise ZeroDivisionError
            return super().basic(host, **about)

    with ScriptedRegistry(auth=BearerAuth("me", "secret")) as registry:
        registry.add(image, "demo/large", "1")
        credentials = Broken(registry.host, "me", "secret")
        with (
            LayerCache(root, platform="linux/amd64", janitor=False, credentials=credentials) as cache,
            pytest.raises(UnauthorizedError),
        ):
            cache.namespace("acme").pull(f"{registry.host}/demo/large:1")


# -- a worker that is lost


def test_a_killed_worker_is_followed_by_this_process_from_where_it_was(cache, served, image, scripted):
    digest = image.layers[0].digest
    scripted.fault(f"blobs/{digest}", Stall(at=5 << 20, seconds=30))

    def note(progress):
        if progress.stage == "fetching" and progress.size == SIZE and progress.done < SIZE:
            time.sleep(0.5)  # it comes to where it stalls
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    with cache.namespace("acme").pull(served, progress=note) as pulled:
        blob = layer_of(pulled)
        assert (blob.source, blob.worker) == ("miss", False)
        assert blob.reason == "the worker process ended with -9"
        with pulled.layers[0].compressed() as stream:
            assert stream.read() == image.blobs[digest]
    ranges = [request.headers.get("range") for request in scripted.requests if str(digest) in request.path]
    assert len(ranges) == 2
    assert ranges[1] is not None
    assert ranges[1] != "bytes=0-"


@pytest.mark.parametrize("program", ["", "/nonexistent/python", "/bin/false"])
def test_a_host_that_lets_none_be_started_gets_its_blob_all_the_same(cache, served, monkeypatch, program, caplog):
    monkeypatch.setattr(sys, "executable", program)
    with cache.namespace("acme").pull(served) as pulled:
        blob = layer_of(pulled)
        assert (blob.source, blob.worker) == ("miss", False)
        assert "worker process" in blob.reason
    with cache.namespace("other").pull(served) as pulled:  # and is not asked again for a while
        assert "worker process" in layer_of(pulled).reason
    assert len([record for record in caplog.records if "on threads" in record.getMessage()]) == 1


def test_one_that_says_nothing_is_not_waited_for_long(cache, served, monkeypatch, tmp_path):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(_pool, "_START", 0.3)
    with cache.namespace("acme").pull(served) as pulled:
        assert "said nothing" in layer_of(pulled).reason


def test_a_limit_of_processes_is_such_a_host(cache, served, monkeypatch):
    def refuse(*_args, **_options):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with cache.namespace("acme").pull(served) as pulled:
        assert os.strerror(errno.EAGAIN) in layer_of(pulled).reason


# -- nothing stays


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_cache_leaves_no_descriptor_to_the_collector(root, served, workers):
    """Serving runtimes turn it off: nothing of a pull may be in a cycle."""
    with LayerCache(root, platform="linux/amd64", janitor=False, workers=workers) as cache:
        cache.namespace("acme").pull(served).close()
    until(lambda: not [one for one in threading.enumerate() if one.name == "layercache-worker"])
    gc.collect()
    before = descriptors()
    gc.disable()
    try:
        for _ in range(3):
            with LayerCache(root, platform="linux/amd64", janitor=False, workers=workers) as cache:
                cache.namespace("acme").pull(served).close()
                cache.namespace("acme").purge()
        del cache
        until(lambda: descriptors() <= before)
    finally:
        gc.enable()


def test_a_closed_cache_leaves_no_process_descriptor_or_thread(root, served):
    with LayerCache(root, platform="linux/amd64", janitor=False) as cache:
        cache.namespace("acme").pull(served).close()
    before, threads = descriptors(), threading.active_count()
    for number in range(5 if not sweeps.SOAK else 50):
        with LayerCache(root, platform="linux/amd64", janitor=False) as cache:
            cache.namespace(f"acme/{number}").pull(served).close()
        assert children() == []
    until(lambda: threading.active_count() <= threads)
    until(lambda: descriptors() <= before)


_HOST = """
    import os, sys, time
    from layercache import LayerCache
    from layercache.crowd import Crowd
    from layercache.worker import _pool
    _pool.LARGE = 1 << 20
    Crowd.dense = lambda _: True
    root, reference, fork = sys.argv[1:]
    def note(progress):
        if progress.stage == "fetching" and progress.size == 6 << 20:
            if fork == "fork" and os.fork() == 0:
                print(os.getpid(), flush=True)
                time.sleep(60)
                os._exit(0)
            if fork == "fork":
                time.sleep(0.5)
            os.kill(os.getpid(), 9)
    LayerCache(root, platform="linux/amd64", janitor=False).namespace("acme").pull(reference, progress=note)
"""


@pytest.mark.parametrize("fork", ["alone", "fork"])
def test_it_dies_with_its_host_even_where_the_host_has_forked(root, served, image, scripted, tmp_path, fork):  # noqa: PLR0917
    scripted.fault(f"blobs/{image.layers[0].digest}", Stall(at=3 << 20, seconds=30))
    program = tmp_path / "host.py"
    program.write_text(textwrap.dedent(_HOST))
    host = subprocess.Popen(
        [sys.executable, str(program), str(root), served, fork], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    child = 0
    try:
        (worker,) = until(lambda: children(host.pid))
        if fork == "fork":
            assert host.stdout is not None
            child = int(host.stdout.readline())
        host.wait(20)
        assert host.returncode == -signal.SIGKILL
        until(lambda: not alive(worker))
        if child:
            assert alive(child)
    finally:
        host.kill()
        host.wait()
        if child:
            os.kill(child, signal.SIGKILL)
        if host.stdout is not None:
            host.stdout.close()
    with (
        LayerCache(root, platform="linux/amd64", janitor=False) as cache,
        cache.namespace("acme").pull(served) as pulled,  # and holds nobody up
    ):
        assert layer_of(pulled).source == "miss"


# -- what is said


def example(kind: type[LayerCacheError]) -> LayerCacheError:
    known: dict[str, Any] = {
        "host": "h:1",
        "status": 503,
        "code": "DENIED",
        "digest": "sha256:ab",
        "expected": "1",
        "actual": "2",
        "offset": 3,
        "length": 4,
        "holders": (7, 8),
        "retry_after": 2.5,
        "retryable": True,
        "value": "x",
        "hint": "do this",
    }
    wanted = inspect.signature(kind).parameters
    return kind("what", **{name: value for name, value in known.items() if name in wanted})


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_arrives_as_it_was(name):
    error = example(getattr(errors, name))
    found = unpack_error(unpack(pack({"is": "failed", "error": pack_error(error)}))["error"])
    assert type(found) is type(error)
    assert (str(found), vars(found), found.retryable) == (str(error), vars(error), error.retryable)


def test_an_error_of_another_name_is_still_ours():
    assert type(unpack_error({"type": "SystemExit", "text": "x", "fields": {}})) is LayerCacheError


@given(
    st.text(min_size=1, max_size=20).filter(lambda text: text.encode(errors="ignore").decode() == text),
    st.booleans(),
    st.integers(1, 9),
    st.binary(max_size=5),
    st.sampled_from([None, Tag("1.0"), Digest.of(b"parent")]),
    st.sampled_from([None, True, False]),
    st.sampled_from([math.inf, 12.5]),
)
def test_a_job_arrives_as_it_was(tenant, known, generation, data, parent, plain_http, timeout):  # noqa: PLR0917
    digest = Digest.of(data)
    job = Job(
        tenant,
        "slot",
        generation,
        Descriptor(OCTET_STREAM, digest, len(data)),
        DiffID(digest) if known else None,
        Repository("127.0.0.1:5000", "demo/one"),
        parent,
        plain_http,
        (MIRROR,),
        timeout,
    )
    assert Job.from_json(unpack(pack(job.to_json()))) == job
    assert "s3cret" not in repr(job)


def test_a_config_arrives_as_it_was():
    config = Config("/r", Budget("1GiB", 0, 0.9, 0.8, "lru"), "/etc/certs.d", Tls(ca=("b",)), 3.5)
    assert Config.from_json(unpack(pack(config.to_json()))) == config
