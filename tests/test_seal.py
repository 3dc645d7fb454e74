"""Sealed namespaces: nothing in clear on disk, nothing readable without the key, nothing altered that is served."""

import gc
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache import LayerCache, Namespace
from layercache.errors import FormatError, NamespacePurgedError, SealError, SealMismatchError
from layercache.integrity import CHUNK, SUM_SIZE, chunk_count
from layercache.oci import OCTET_STREAM, Descriptor, Digest
from layercache.store._disk import PosixDisk
from layercache.store._memory import refuse_swap, swapped_out, usual_place
from layercache.store._seal import HEAD, SealedForm
from layercache.store._secret import Key

NAME = "acme/canary-tenant"
CANARY = b"CANARY-7f3a91c2-"


@pytest.fixture(autouse=True)
def keys(monkeypatch, tmp_path_factory):
    place = f"/dev/shm/layercache-test-{os.getpid()}-{os.urandom(4).hex()}"
    monkeypatch.setenv("LAYERCACHE_KEYS", place)
    yield Path(place)
    for file in Path(place).glob("*"):
        file.unlink()
    if Path(place).is_dir():
        Path(place).rmdir()


def form(raw: bytes = bytes(32)) -> SealedForm:
    key = Key("test", bytearray(raw), release=lambda: None)
    return SealedForm("ephemeral", key, "slot.1", fresh=lambda: os.urandom(32))


def sealed(content: bytes, one: SealedForm) -> tuple[bytearray, bytearray]:
    writer = one.writer("a" * 64, len(content))
    file = bytearray(HEAD + len(content))
    for offset, part in [*writer.feed(content), *writer.finish()]:
        file[offset : offset + len(part)] = part
    return file, writer.sums


def opened(
    one: SealedForm, file: bytes | bytearray, sums: bytes | bytearray, size: int, name: str = "a" * 64
) -> bytes | None:
    into = bytearray(size)
    reader = one.reader(name, size, bytes(file[:HEAD]))
    stored = memoryview(bytearray(file[HEAD:]).ljust(size + SUM_SIZE, b"\0"))
    return bytes(into) if reader.unpack(stored, memoryview(into), 0, sums) is None else None


@pytest.mark.parametrize("size", [1, 65536, 65537, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_what_was_sealed_opens(size):
    one, content = form(), os.urandom(size)
    file, sums = sealed(content, one)
    assert opened(one, file, sums, size) == content
    assert opened(form(b"x" * 32), file, sums, size) is None
    assert opened(one, file, sums, size, name="b" * 64) is None


@settings(deadline=None)  # a machine that is busy is no finding
@given(st.data())
def test_one_bit_changed_is_never_served(data):
    one, content = form(), CANARY * 8000
    file, sums = sealed(content, one)
    at = data.draw(st.integers(0, len(file) + len(sums) - 1))
    (file if at < len(file) else sums)[at if at < len(file) else at - len(file)] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(FormatError):
        assert opened(one, file, sums, len(content)) in (None, content)


def test_chunks_cannot_change_places_nor_end_early():
    one, content = form(), os.urandom(4 * CHUNK)
    file, sums = sealed(content, one)
    moved, moved_sums = bytearray(file), bytearray(sums)
    moved[HEAD + CHUNK : HEAD + 2 * CHUNK] = file[HEAD + 2 * CHUNK : HEAD + 3 * CHUNK]
    moved_sums[2 * SUM_SIZE : 3 * SUM_SIZE] = sums[3 * SUM_SIZE : 4 * SUM_SIZE]
    assert opened(one, moved, moved_sums, len(content)) is None
    size = 3 * CHUNK
    head = file[:8] + size.to_bytes(8, "big") + file[16:HEAD]
    assert opened(one, head + file[HEAD : HEAD + size], sums[: chunk_count(size) * SUM_SIZE], size) is None


def test_a_write_that_is_gone_on_with_seals_under_another_key():
    one, first, second = form(), os.urandom(4 * CHUNK), os.urandom(4 * CHUNK)
    file, sums = sealed(first, one)
    writer = one.writer("a" * 64, len(first), head=bytes(file[:HEAD]))
    for index in range(2):
        writer.keep(memoryview(b""), bytes(sums[index * SUM_SIZE : (index + 1) * SUM_SIZE]))
    anew = bytearray(file)
    for offset, part in [*writer.feed(second[CHUNK:]), *writer.finish()]:
        anew[offset : offset + len(part)] = part
    assert opened(one, anew, writer.sums, len(first)) == first[:CHUNK] + second[CHUNK:]
    both = bytes(a ^ b for a, b in zip(anew[HEAD + CHUNK :], file[HEAD + CHUNK :], strict=True))
    assert both != bytes(a ^ b for a, b in zip(second[CHUNK:], first[CHUNK:], strict=True))


def test_records_open_in_their_place_only():
    one = form()
    raw = one.pack("meta", "a" * 64, b"record")
    assert one.unpack("meta", "a" * 64, raw) == b"record"
    assert one.pack("meta", "a" * 64, b"record") != raw
    for kind, name, bytes_ in (("refs", "a" * 64, raw), ("meta", "b" * 64, raw), ("meta", "a" * 64, raw[:-1])):
        with pytest.raises(FormatError):
            one.unpack(kind, name, bytes_)


def everything(root: Path) -> bytes:
    return b"".join(str(p).encode() + (p.read_bytes() if p.is_file() else b"") for p in root.rglob("*"))


def test_no_name_digest_or_content_is_on_disk_and_it_reads_back(tmp_path):
    content = CANARY * (5 * CHUNK // len(CANARY))
    (tmp_path / "file").write_bytes(content)
    root = tmp_path / "root"
    with LayerCache(root, janitor=False) as cache:
        digest = cache.namespace(NAME, seal="ephemeral").put(tmp_path / "file").digest
        ingest = cache.namespace(NAME).binding.made().begin(Descriptor(OCTET_STREAM, Digest.of(b"other"), 5 * CHUNK))
        assert ingest is not None
        ingest.feed(content[: 3 * CHUNK])
        ingest.suspend()
        found = everything(root)
        for secret in (CANARY, NAME.encode(), digest.encoded.encode(), Digest.of(b"other").encoded.encode()):
            assert secret not in found
        assert cache.store().recover() == ()
        info = cache.namespaces()[0]
        assert (info.name, info.seal, info.blobs) == (NAME, "ephemeral", 1)
    with LayerCache(root, janitor=False) as cache:  # another handle follows what is on disk
        with cache.namespace(NAME).open(digest) as layer, layer.compressed() as file:
            assert file.read() == content
        again = cache.namespace(NAME).binding.made().begin(Descriptor(OCTET_STREAM, Digest.of(b"other"), 5 * CHUNK))
        assert again is not None
        assert again.offset == 3 * CHUNK
        again.abort()


def test_a_key_that_is_gone_begins_anew_and_is_no_error(tmp_path, keys):
    (tmp_path / "file").write_bytes(CANARY)
    root = tmp_path / "root"
    with LayerCache(root, janitor=False) as cache:
        digest = cache.namespace(NAME, seal="ephemeral").put(tmp_path / "file").digest
    for file in keys.iterdir():
        file.unlink()
    with LayerCache(root, janitor=False) as cache:
        assert cache.namespaces()[0].name is None
        assert not list(cache.namespace(NAME).blobs())
        assert not cache.namespace(NAME, seal="ephemeral").contains(digest)


def filled(cache: LayerCache, tmp_path: Path) -> tuple[Namespace, Digest]:
    (tmp_path / "file").write_bytes(CANARY)
    namespace = cache.namespace(NAME, seal="ephemeral")
    return namespace, namespace.put(tmp_path / "file").digest


def test_a_purge_destroys_the_key_and_says_so(tmp_path, keys):
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        receipt = filled(cache, tmp_path)[0].purge()
        assert (receipt.level, receipt.complete, receipt.ends) == ("crypto-erased", True, True)
        assert not list(keys.iterdir())
        assert [one.level for one in cache.receipts()] == ["crypto-erased"]
        assert not cache.verify_receipts().problems


def test_a_purge_takes_the_key_and_what_was_open_reads_no_more(tmp_path, keys):
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        namespace, digest = filled(cache, tmp_path)
        (file,) = keys.iterdir()
        secret = file.read_bytes()[-32:]
        blob = namespace._made().open(digest)
        receipt = namespace.purge(wait=2.0)  # time for a look at every file of it
        assert (receipt.level, receipt.complete) == ("fenced", False)
        assert secret not in b"".join(each.read_bytes() for each in keys.iterdir())
        with pytest.raises(NamespacePurgedError):
            blob.pread(0, 1)
    blob.close()
    with LayerCache(tmp_path / "root", janitor=False) as cache:  # whoever comes next goes on with it
        cache.resume_purges()
        assert [one.level for one in cache.receipts()] == ["fenced", "crypto-erased"]
        assert not list(keys.iterdir())


HOLDER = """
import sys
from layercache import LayerCache, Namespace
from layercache.errors import NamespacePurgedError
with LayerCache(sys.argv[1], janitor=False) as cache:
    namespace = cache.namespace(sys.argv[2])
    print(len(list(namespace.blobs())), flush=True)
    input()
    print(namespace.contains(sys.argv[3]), flush=True)
    input()
"""


def test_a_process_that_has_the_key_is_waited_for_and_named(tmp_path, keys):
    """It has no blob open, only the key in its memory; it wipes it at its next call, and the purge comes to its end."""
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        namespace, digest = filled(cache, tmp_path)
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "root"), NAME, str(digest)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            assert holder.stdout.readline() == "1\n"
            receipt = namespace.purge(wait=2.0)
            assert (receipt.level, receipt.pending, receipt.complete) == ("fenced", (holder.pid,), False)
            assert not list((tmp_path / "root").glob("**/blobs"))  # all else is gone
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "False\n"
            assert namespace.purge(wait=5.0).level == "crypto-erased"
            assert not list(keys.iterdir())
            holder.communicate("\n")


IDLE = """
import sys
import layercache.janitor
from layercache import LayerCache
layercache.janitor._OFTEN = 0.1
with LayerCache(sys.argv[1]) as cache:
    namespace = cache.namespace(sys.argv[2])
    print(len(list(namespace.blobs())), flush=True)
    input()
"""


def test_a_process_that_is_idle_wipes_the_key_by_itself(tmp_path, keys):
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        namespace, _ = filled(cache, tmp_path)
        with subprocess.Popen(
            [sys.executable, "-c", IDLE, str(tmp_path / "root"), NAME],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "1\n"
            assert namespace.purge(wait=20.0).level == "crypto-erased"
            assert not list(keys.iterdir())
            holder.communicate("\n")


PURGER = """
import sys
from layercache import LayerCache
with LayerCache(sys.argv[1], janitor=False) as cache:
    namespace = cache.namespace(sys.argv[2], seal="ephemeral")
    digest = namespace.put(sys.argv[3]).digest
    with namespace.open(digest) as layer, layer.compressed() as stream:
        stream.read()
    print("ready", flush=True)
    input()
    print(namespace.purge().level, flush=True)
    input()
"""


def test_after_a_purge_no_half_of_the_key_is_in_the_memory_of_who_had_it(tmp_path, keys):
    """As far as that can be promised: of the process that made it, read under it and destroyed it."""
    (tmp_path / "file").write_bytes(CANARY * 100_000)
    with subprocess.Popen(
        [sys.executable, "-c", PURGER, str(tmp_path / "root"), NAME, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (file,) = keys.iterdir()
        secret = file.read_bytes()[-32:]
        assert in_memory(process.pid, secret[:16])
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "crypto-erased\n"
        for text in (secret, secret.hex().encode()):
            assert not in_memory(process.pid, text[: len(text) // 2])
            assert not in_memory(process.pid, text[len(text) // 2 :])
        process.communicate("\n")


def in_memory(pid: int, needle: bytes) -> bool:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            with suppress(OSError, OverflowError):  # pages of the kernel's own
                memory.seek(start)
                if mode.startswith("r") and needle in memory.read(end - start):
                    return True
    return False


def test_a_cache_that_nobody_closes_gives_the_key_back(tmp_path):
    """Nor keeps a purge by another process waiting; one that goes on keeps the key of what it has in use."""
    cache = LayerCache(tmp_path / "root", janitor=False)
    filled(cache, tmp_path)
    assert key_is_held(tmp_path)
    del cache
    gc.collect()
    assert not key_is_held(tmp_path)


def key_is_held(tmp_path: Path) -> bool:
    (folder,) = tmp_path.glob("root/data/*")
    disk = PosixDisk(str(folder))
    try:
        file = disk.open(disk.root, "key")
        held = not disk.lease(file)
        disk.close(file)
    finally:
        disk.close(disk.root)
    return held


def test_erasure_is_not_claimed_where_memory_may_have_gone_to_a_disk(tmp_path, monkeypatch):
    for counts, level in (((7, 7), "crypto-erased"), ((7, 8), "unlinked"), ((-1, -1), "unlinked")):
        with LayerCache(tmp_path / "root", janitor=False) as cache:
            monkeypatch.setattr("layercache.store._keys.swapped_out", lambda count=counts[0]: count)
            namespace, _ = filled(cache, tmp_path)
            monkeypatch.setattr("layercache.store._keys.swapped_out", lambda count=counts[1]: count)
            assert namespace.purge().level == level


def test_erasure_is_not_claimed_for_a_key_that_is_out_of_sight(tmp_path, keys):
    """Another container may see another tmpfs under the same name: there the key is, whatever is missing here."""
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        namespace, _ = filled(cache, tmp_path)
        elsewhere = keys.rename(f"{keys}-elsewhere")
        try:
            assert namespace.purge().level == "unlinked"
        finally:
            for file in elsewhere.iterdir():
                file.unlink()
            elsewhere.rmdir()


def test_what_swap_took_is_counted(tmp_path):
    (tmp_path / "vmstat").write_text("pswpin 3\npswpout 4711\n")
    assert swapped_out(str(tmp_path / "vmstat")) == 4711
    assert swapped_out(str(tmp_path / "none")) == -1
    assert swapped_out() >= 0


def test_recovery_sweeps_keys_that_lead_to_nothing_and_no_others(tmp_path, keys):
    """Those of a creation or a purge that died; not those of what lives, of another root, or of what is being made."""
    with LayerCache(tmp_path / "other", janitor=False) as cache:
        filled(cache, tmp_path)
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        namespace, digest = filled(cache, tmp_path)
        store = cache.store()
        lives = set(keys.iterdir())
        _, form = store._keys.make("slot.1", "ephemeral")
        being_made = set(keys.iterdir()) - lives
        store.recover()
        assert set(keys.iterdir()) == lives | being_made
        form.close()
        store.recover()
        assert set(keys.iterdir()) == lives
        assert namespace.contains(digest)


def test_a_namespace_in_clear_is_not_taken_for_a_sealed_one(tmp_path):
    (tmp_path / "file").write_bytes(CANARY)
    with LayerCache(tmp_path / "root", janitor=False) as cache:
        cache.namespace(NAME).put(tmp_path / "file")
        with pytest.raises(SealMismatchError):
            cache.namespace(NAME, seal="ephemeral").put(tmp_path / "file")


def test_keys_are_not_kept_where_they_may_reach_a_disk(tmp_path, monkeypatch):
    (tmp_path / "swaps").write_text("Filename Type\n/dev/sda2 partition\n")
    with pytest.raises(SealError, match="swap is on"):
        refuse_swap(str(tmp_path / "swaps"))
    (tmp_path / "file").write_bytes(CANARY)
    monkeypatch.setenv("LAYERCACHE_KEYS", str(tmp_path / "keys"))
    with LayerCache(tmp_path / "root", janitor=False) as cache, pytest.raises(SealError, match="tmpfs"):
        cache.namespace(NAME, seal="ephemeral").put(tmp_path / "file")


def test_keys_go_where_memory_is_without_being_told(monkeypatch):
    """A runtime directory that is no tmpfs, as a container's, is passed over for /dev/shm."""
    monkeypatch.delenv("LAYERCACHE_KEYS")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    assert usual_place() == "/dev/shm/layercache-4242"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    assert usual_place() == "/dev/shm/layercache"
