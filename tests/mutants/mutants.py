"""Seeded bugs of the store's protocol: each is a small change of one module's source, and must be caught.

A mutant whose text is not in the source any more is an error, not a pass: whoever changes that line moves the mutant along.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType

__all__ = ["MUTANTS", "Mutant", "install"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug: ``before``, which is in the source of ``layercache.store.<module>`` exactly once, becomes ``after``."""

    name: str
    module: str
    before: str
    after: str
    also: tuple[tuple[str, str], ...] = ()
    """Further changes, where one alone is made good by another guard."""
    where: str = ""
    """The scenario that is known to catch it (its kind and how its name begins), tried first."""
    test: str = ""
    """The test that catches it, where chance seldom does: it is played on the real disk instead."""

    def apply(self, source: str) -> str:
        """Return the mutated source."""
        for before, after in ((self.before, self.after), *self.also):
            if (count := source.count(before)) != 1:
                raise AssertionError(f"mutant {self.name!r}: its text is {count} times in {self.module}; move it along")
            source = source.replace(before, after)
        return source


_KEPT = "tests/simulation/test_kept.py"
_ROOM = "tests/simulation/test_room.py"

MUTANTS = (
    # -- publish
    Mutant(
        "data not flushed",
        "_ingest",
        "                disk.sync(self._file)\n                record =",
        "                record =",
    ),
    Mutant(
        "record not flushed",
        "_files",
        "        disk.write(file, raw, 0)\n        disk.sync(file)\n        yield name",
        "        disk.write(file, raw, 0)\n        yield name",
    ),
    Mutant(
        "record's directory not flushed",
        "_ingest",
        "                        placed = True\n                        disk.sync(metas)\n",
        "                        placed = True\n",
    ),
    Mutant(
        "blob's directory not flushed",
        "_ingest",
        "                        self._named = False\n                        disk.sync(blobs)\n",
        "                        self._named = False\n",
    ),
    Mutant(
        "blob named before its record",
        "_ingest",
        "                        disk.rename(generation.incoming, new, metas, name, replace=True)\n"
        "                        placed = True\n"
        "                        disk.sync(metas)\n"
        "                        disk.rename(generation.incoming, self._partial.data, blobs, name, replace=False)\n"
        "                        self._named = False\n"
        "                        disk.sync(blobs)\n",
        "                        disk.rename(generation.incoming, self._partial.data, blobs, name, replace=False)\n"
        "                        self._named = False\n"
        "                        disk.sync(blobs)\n"
        "                        disk.rename(generation.incoming, new, metas, name, replace=True)\n"
        "                        placed = True\n"
        "                        disk.sync(metas)\n",
    ),
    Mutant(
        "failed flush tried again",
        "_ingest",
        "                disk.sync(self._file)\n                record =",
        "                try:\n"
        "                    disk.sync(self._file)\n"
        "                except OSError:\n"
        "                    disk.sync(self._file)\n"
        "                record =",
        where="faults of put two chunks: EIO",
    ),
    Mutant(
        "failed flush of the directory leaves the blob",
        "_ingest",
        "                        self._retract(blobs, metas, meta_too=placed)\n",
        "                        pass\n",
        where="faults of put: EIO",
    ),
    Mutant(
        "published blob taken back from others",
        "_ingest",
        "                        published = disk.open(blobs, name)\n",
        "                        blob = generation.lease(disk.open(blobs, name), name, meta, writer=self._file)\n",
        also=(("                    blob = generation.lease(published, name, meta, writer=self._file)\n", ""),),
        test="tests/test_store.py::test_what_others_may_have_is_not_taken_back",
    ),
    Mutant(
        "failed write not noticed",
        "_ingest",
        "            self._disk.write(self._file, part, offset)\n",
        "            with suppress(OSError):\n                self._disk.write(self._file, part, offset)\n",
        where="faults of put: EIO",
    ),
    Mutant(
        "digest not compared",
        "_ingest",
        "            self._verifier.finish()\n            with generation.",
        "            with generation.",
    ),
    Mutant(
        "published without the lock",
        "_ingest",
        "with temporary(disk, generation.incoming, record) as new, generation.lock(name):",
        "with temporary(disk, generation.incoming, record) as new:",
        where="orders of put | remove",
    ),
    Mutant(
        "published into a purged generation",
        "_ingest",
        "                        disk.sync(blobs)\n                        generation.check_slot()\n",
        "                        disk.sync(blobs)\n",
    ),
    Mutant(
        "names of another writer not flushed",
        "_generation",
        "                    if folder is not None:\n                        self.disk.sync(folder)\n",
        "                    pass\n",
        where="kills of killed, then put",
    ),
    Mutant(
        "shard of another writer not flushed",
        "_shards",
        "                disk.make_dir(self.at, folder)\n"
        "        # Also when another made it: it may have died before its fsync, and our blob must not hang from a lost name.\n"
        "        disk.sync(self.at)\n",
        "                disk.make_dir(self.at, folder)\n                disk.sync(self.at)\n",
        where="kills of killed, then put",
    ),
    # -- the right to write
    Mutant(
        "two writers of one partial",
        "_ingest",
        "            if not disk.lock(file, exclusive=True):\n                return None\n            # The last",
        "            # The last",
    ),
    Mutant(
        "partial taken over after it was published",
        "_ingest",
        "            if named is None or named.inode != status.inode:\n",
        "            if named is None:\n",
        where="orders of put, remove, put | put",
    ),
    Mutant(
        "names dropped after the lock",
        "_ingest",
        "        names = [self._partial.sums] if self._sums_file is not None else []\n",
        "        self._close()\n        names = [self._partial.sums] if self._sums_file is not None else []\n",
        where="orders of put | lying put",
    ),
    Mutant(
        "reservation kept",
        "_ingest",
        "        if ingest is not None:\n            ingest.abort()\n        elif ours:",
        "        if ingest is not None:\n            ingest._close()\n        elif ours:",
    ),
    Mutant(
        "lock file unlinked",
        "_generation",
        "                waited += 0.001\n            yield\n        finally:\n",
        "                waited += 0.001\n            yield\n        finally:\n"
        "            disk.remove(self._locks, lock_name(name))\n",
    ),
    # -- read, lease, remove
    Mutant(
        "reader takes no lease",
        "_generation",
        "                while not disk.lock(file, exclusive=False):\n                    if waited >= _READER_PATIENCE:",
        "                while False:\n                    if waited >= _READER_PATIENCE:",
    ),
    Mutant(
        "reader does not look at the name again",
        "_generation",
        "if named is None or named.inode != file.inode:",
        "if False:",
        where="orders of get | remove",
    ),
    Mutant(
        "bytes given out unchecked",
        "_form",
        "            if chunk_sum(into[begin - start : end - start]) != sums[index * SUM_SIZE : (index + 1) * SUM_SIZE]:",
        "            if False:",
        where="cuts of damage",
    ),
    Mutant(
        "no look at the fence after a read",
        "_read",
        "        # After the read: a byte read before the fence must not be given out after it.\n        self._check_live()",
        "        # After the read: a byte read before the fence must not be given out after it.",
    ),
    Mutant(
        "removed while open",
        "_removal",
        "                if not disk.lock(file, exclusive=True):\n                    holders",
        "                if False:\n                    holders",
    ),
    Mutant(
        "removal not flushed",
        "_removal",
        "                disk.remove(blobs, name)\n                disk.sync(blobs)\n",
        "                disk.remove(blobs, name)\n",
        where="orders of get | remove",
    ),
    Mutant(
        "removed without the lock",
        "_removal",
        'with generation.guarding(f"remove {what}"), generation.lock(name):',
        'with generation.guarding(f"remove {what}"):',
        where="orders of put | remove",
    ),
    Mutant(
        "another blob moved aside than the damaged one",
        "_generation",
        "if blobs is None or status is None or (inode is not None and status.inode != inode):",
        "if blobs is None or status is None:",
        where="cuts of damage",
    ),
    Mutant(
        "reference not flushed",
        "_generation",
        "self._refs, name, replace=True)\n            self.disk.sync(self._refs)\n",
        "self._refs, name, replace=True)\n",
    ),
    # -- room
    Mutant(
        "room taken without the lock",
        "_space",
        "            lock_within(self._disk, lock)\n",
        "            pass\n",
        test=_ROOM,
    ),
    Mutant(
        "room given back that a walk has seen go",
        "_space",
        "if count is not None and count.walk == walk:",
        "if count is not None:",
        test=_ROOM,
    ),
    Mutant(
        "asked for the walk after the blob went",
        "_removal",
        "                walk = generation.space.walk()  # before the first block goes\n",
        "",
        also=(("    return status.size -", "    walk = generation.space.walk()\n    return status.size -"),),
        test="tests/test_space.py::test_a_walk_during_a_removal_is_not_subtracted_from",
    ),
    Mutant(
        "partial counted as what it takes now",
        "_space",
        "                promised += max(0, footprint(int(begun[1])) - status.allocated)\n",
        "                pass\n",
        test="tests/test_space.py::test_what_is_reserved_counts_where_blocks_cannot_be_taken_beforehand",
    ),
    Mutant(
        "walk against the way that names go",
        "_space",
        "enumerate((IN, META, BLOBS, DATA, TRASH))",
        "enumerate((TRASH, DATA, BLOBS, META, IN))",
        test=_ROOM,
    ),
    Mutant(
        "partial made without its room",
        "_ingest",
        "            if begun and not (status.size or status.allocated):\n",
        "            if False:\n",
        test="tests/test_space.py::test_a_partial_that_goes_while_it_is_taken_over_is_not_made_anew_without_room",
    ),
    Mutant(
        "count of another boot believed",
        "_space",
        "if magic != _MAGIC or boot.rstrip",
        "if magic != _MAGIC or not boot.rstrip",
        also=((" != self._disk.boot.encode()[:16]:", ":"),),
        test="tests/test_space.py::test_a_count_of_another_boot_is_not_believed",
    ),
    Mutant(
        "pinned while it was chosen, evicted all the same",
        "_removal",
        "                if not may_go():\n",
        "                if False:\n",
        test="tests/test_pins.py::test_a_pin_that_comes_after_the_choice_holds",
    ),
    Mutant(
        "hold not taken while pinning",
        "_pins",
        "            held.enter_context(hold(digest))\n",
        "            hold(digest).close()\n",
        test="tests/test_pins.py::test_nothing_goes_while_it_is_being_pinned",
    ),
    Mutant(
        "grant not flushed",
        "_grants",
        "replace=True)\n            disk.sync(at)\n",
        "replace=True)\n",
        test=_KEPT,
    ),
    Mutant(
        "place of grants not flushed",
        "_grants",
        "        disk.sync(generation.folder)\n        ",
        "        ",
        test=_KEPT,
    ),
    Mutant(
        "revoked grant comes back",
        "_grants",
        "disk.remove(at, name)\n            disk.sync(at)\n",
        "disk.remove(at, name)\n",
        test=_KEPT,
    ),
    Mutant(
        "pin not flushed",
        "_pins",
        "replace=True)\n            disk.sync(at)\n",
        "replace=True)\n",
        test=_KEPT,
    ),
    Mutant(
        "place of pins not flushed",
        "_pins",
        "        disk.sync(generation.folder)\n        ",
        "        ",
        test=_KEPT,
    ),
    Mutant(
        "pin comes back",
        "_pins",
        "disk.remove(at, file)\n            disk.sync(at)\n",
        "disk.remove(at, file)\n",
        test=_KEPT,
    ),
    Mutant(
        "pins of tenants do not keep what is public",
        "_grants",
        "    if held is None or generation.slot != public:\n",
        "    if True:\n",
        test="tests/test_public_namespace.py::test_a_pin_of_a_tenant_that_comes_after_the_choice_holds",
    ),
    Mutant(
        "a blob is lent beyond the purge of its borrower",
        "_grants",
        "    blob.lend(meta, check=own.check)\n",
        "    blob.lend(meta, check=lambda: None)\n",
        test="tests/test_public_namespace.py::test_a_tenant_that_is_purged_between_open_and_read_gets_no_byte",
    ),
    Mutant(
        "another's word for a blob believed",
        "_grants",
        "        blob.meta, media_type=found.media_type, diff_id=found.diff_id,",
        "        blob.meta,",
        test="tests/test_public_namespace.py::test_what_another_tenants_manifest_says_is_not_believed",
    ),
    # -- purge
    Mutant(
        "word not set",
        "_purge",
        "                self._place.ballast.spared(lambda: disk.write(file, _FENCED, 0))\n",
        "                pass\n",
    ),
    Mutant(
        "fence not flushed",
        "_purge",
        "disk.rename(slot_dir, live, slot_dir, purging, replace=False))\n        disk.sync(slot_dir)\n",
        "disk.rename(slot_dir, live, slot_dir, purging, replace=False))\n",
    ),
    Mutant(
        "unlinking not flushed",
        "_purge",
        "        self._disk.sync(self._place.trash)\n        self._last = Found()\n",
        "        self._last = Found()\n",
    ),
    Mutant(
        "open files unlinked and called gone",
        "_erase",
        "                if not self._nobody_has(file, status.inode):\n",
        "                if False:\n",
    ),
    Mutant(
        "dead before its receipt",
        "_errand",
        "        self._receipts[purge] = purge.record(purge.reached)\n        self._close(purge)\n",
        "        self._close(purge)\n        self._receipts[purge] = purge.record(purge.reached)\n",
    ),
    Mutant(
        "hidden before the fence",
        "_slots",
        "            purge.fence(slot_dir)\n            return purge\n",
        "            purge.hide()\n            purge.fence(slot_dir)\n            return purge\n",
    ),
    Mutant(
        "hiding not flushed where it goes",
        "_purge",
        "        disk.sync(place.trash)\n        disk.sync(place.data)\n",
        "        disk.sync(place.data)\n",
        where="cuts of purge under a reader",
    ),
    Mutant(
        "emptied by two at once",
        "_purge",
        "        self.busy = not disk.lock(self._guard, exclusive=True)\n",
        "        self.busy = False\n",
        test="tests/test_purge.py::test_two_purgers_empty_one_after_the_other",
    ),
    Mutant(
        "called gone without the directory's removal",
        "_purge",
        "            if disk.stat(place.trash, self._name) is None and not self._beginnings():\n",
        "            if not found.held:\n",
    ),
    Mutant(
        "a beginning that failed outlives its purge",
        "_purge",
        "if is_discarded(name, self._name)]",
        "if False]",
        test="tests/test_purge.py::test_a_beginning_that_failed_goes_with_its_namespace",
    ),
    Mutant(
        "unfinished writes forgotten",
        "_erase",
        "                with _noted(self.found):\n                    self._remove(",
        '                with _noted(self.found):\n                    child == "in" or self._remove(',
    ),
    Mutant(
        "purge that only lacks its receipt forgotten",
        "_slots",
        "                            begun[slot, purge.generation] = purge\n",
        "",
    ),
    Mutant(
        "purges in trash forgotten",
        "_slots",
        "            *(purge for purge in self._in_trash() if (purge.slot, purge.generation) not in begun),\n",
        "",
    ),
    Mutant(
        "receipt given a number that is taken",
        "_chain",
        "            placed = receipt.at(count + 1, previous=previous)\n",
        "            placed = receipt.at(max(1, count), previous=previous)\n",
    ),
    Mutant(
        "state never says dead",
        "_purge",
        "            self._place.ballast.spared(lambda: disk.rename(slot_dir, purging, slot_dir, dead, replace=False))\n",
        "            pass\n",
    ),
    Mutant(
        "receipt not flushed",
        "_chain",
        '                    self._disk.write(file, line.ljust(last.torn, b"\\0"), len(last.raw))\n                    self._disk.sync(file)\n',
        '                    self._disk.write(file, line.ljust(last.torn, b"\\0"), len(last.raw))\n',
    ),
    Mutant(
        "torn receipt followed by the next",
        "_chain",
        "        return _Segment(number, bytes(raw[:end]), torn,",
        "        end, torn = end + torn, 0\n        return _Segment(number, bytes(raw[:end]), torn,",
        test="tests/test_store.py::test_a_torn_receipt_does_not_follow_the_next",
    ),
    Mutant(
        "generation used again",
        "_layout",
        "    return 1 if state is None else state.generation + 1\n",
        "    return 1 if state is None else state.generation\n",
    ),
    Mutant(
        "namespace begun before its directory is durable",
        "_furnish",
        "        disk.close(at)\n    disk.sync(data)\n",
        "        disk.close(at)\n",
    ),
    Mutant(
        "purge and creation without the slot's lock",
        "_slots",
        "                lock_within(disk, lock, patience=patience)\n",
        "",
    ),
    # -- the root and recovery
    Mutant(
        "root of another process not flushed, its key made anew",
        "_store",
        "                disk.sync(disk.root)\n        except BaseException:",
        "                pass\n        except BaseException:",
        also=(("        if disk.stat(disk.root, ROOT_KEY) is None:\n", "        if True:\n"),),
        where="kills of killed making the root",
    ),
    Mutant(
        "sweep takes a partial that is being written",
        "_sweep",
        "            if not disk.lock(file, exclusive=True):\n                return\n",
        "",
    ),
    Mutant(
        "sweep takes a record on its way",
        "_sweep",
        "            if disk.lock(file, exclusive=True):  # nobody",
        "            if True:  # nobody",
    ),
    Mutant(
        "sweep takes the record of a blob published just now",
        "_sweep",
        "with self._leftovers.alone(place), self._generation.lock(name):\n"
        "                self._generation.check_slot()\n"
        "                if not self._generation.holds(name):",
        "with self._leftovers.alone(place):\n                if True:",
        test="tests/test_store.py::test_a_sweep_leaves_the_record_of_a_blob_that_is_being_published",
    ),
    Mutant(
        "sweep forgets partials of another boot",
        "_sweep",
        "                partial.boot == disk.boot\n                and ",
        "                True\n                and ",
        where="cuts of stop half way",
    ),
    Mutant(
        "one bad entry stops the sweep",
        "_leftovers",
        "        except (OSError, StoreError) as error:",
        "        except ZeroDivisionError as error:",
        where="cuts of things planted",
    ),
    Mutant(
        "sweep takes a namespace that is being made",
        "_slots",
        "                lock_within(disk, lock, patience=patience)\n",
        "                if patience != 0.1:\n                    lock_within(disk, lock, patience=patience)\n",
    ),
    Mutant(
        "damage not moved aside",
        "_generation",
        'report=lambda blob: self.quarantine(blob, "its content does not match"),',
        "report=lambda _: None,",
        where="cuts of damage",
    ),
    Mutant(
        "directory of a new shard not flushed",
        "_shards",
        "        disk.sync(self.at)\n        return disk.dir(self.at, folder)\n",
        "        return disk.dir(self.at, folder)\n",
    ),
    Mutant(
        "end of a generation recorded twice",
        "_chain",
        "if receipt.ends and (known := self._known(receipt)) is not None:",
        "if receipt.ends and (known := None) is not None:",
    ),
    Mutant(
        "a generation that never lived stays",
        "_slots",
        "        erase(disk, self._trash, name)\n        disk.sync(self._trash)\n\n",
        "\n",
        also=(
            (
                "                    erase(self._disk, self._trash, name, due=self._past(end))\n",
                "                    pass\n",
            ),
        ),
    ),
    Mutant(
        "waits for ever to make a root that is there",
        "_store",
        "            if disk.lock(life, exclusive=True):\n",
        "            lock_within(disk, life)\n            if True:\n",
        where="orders of root | root",
    ),
    # -- sealed namespaces
    Mutant(
        "nonce used twice",
        "_seal",
        'bytes(3) + index.to_bytes(8, "big") + bytes([last])',
        "bytes(11) + bytes([last])",
        test="tests/test_seal.py::test_chunks_cannot_change_places_nor_end_early",
    ),
    Mutant(
        "end of a sealed blob not marked",
        "_seal",
        'index.to_bytes(8, "big") + bytes([last])',
        'index.to_bytes(8, "big") + bytes(1)',
        also=(("_FIXED.pack(_BLOB_MAGIC, size, 0)", "_FIXED.pack(_BLOB_MAGIC, 0, 0)"),),
        test="tests/test_seal.py::test_chunks_cannot_change_places_nor_end_early",
    ),
    Mutant(
        "tag not checked",
        "_seal",
        "            except InvalidTag:\n                return index\n",
        "            except InvalidTag:\n                pass\n",
        test="tests/test_seal.py::test_one_bit_changed_is_never_served",
    ),
    Mutant(
        "salt not fresh",
        "_seal",
        "(self._index, self._form.fresh())]",
        "(self._index, bytes(SALT))]",
        test="tests/test_seal.py::test_a_write_that_is_gone_on_with_seals_under_another_key",
    ),
    Mutant(
        "salt of a record not fresh",
        "_seal",
        "head = _RECORD_MAGIC + self.fresh()",
        "head = _RECORD_MAGIC + bytes(SALT)",
        test="tests/test_seal.py::test_records_open_in_their_place_only",
    ),
    Mutant(
        "chunks written after an interruption under the old key",
        "_seal",
        "            self._runs = [*(run for run in self._runs if run[0] < self._index), (self._index, self._form.fresh())]\n",
        "            self._runs = self._runs or [(self._index, self._form.fresh())]\n",
        test="tests/test_seal.py::test_a_write_that_is_gone_on_with_seals_under_another_key",
    ),
    Mutant(
        "key stays in the memory of who purges",
        "_keys",
        "        _secret.forget(record.id)\n",
        "",
        test="tests/test_seal.py::test_a_purge_destroys_the_key_and_says_so",
    ),
    Mutant(
        "key stays in its file",
        "_keys",
        "                memory.write(file, bytes(_SIZE), len(head))\n                memory.truncate(file, len(head))\n",
        "",
        test="tests/test_seal.py::test_a_purge_takes_the_key_and_what_was_open_reads_no_more",
    ),
    Mutant(
        "erasure claimed while a process has the key",
        "_keys",
        "        return self._form(record, secret, generation, lambda: self._disk.close(holding))\n",
        "        self._disk.close(holding)\n        return self._form(record, secret, generation, lambda: None)\n",
        test="tests/test_seal.py::test_a_cache_that_nobody_closes_gives_the_key_back",
    ),
    Mutant(
        "erasure claimed after memory went to swap",
        "_keys",
        "return record.swapped >= 0 and self._swapped() == record.swapped",
        "return True",
        test="tests/test_seal.py::test_erasure_is_not_claimed_where_memory_may_have_gone_to_a_disk",
    ),
    Mutant(
        "erasure claimed for a key that is out of sight",
        "_keys",
        "            return None  # it may be where only others look\n",
        "            return lambda: None\n",
        test="tests/test_seal.py::test_erasure_is_not_claimed_for_a_key_that_is_out_of_sight",
    ),
    Mutant(
        "wiped key forgotten before the rest is gone",
        "_erase",
        "if top and child == KEY and disk.names(folder) != [KEY]:",
        "if False:",
        test="tests/test_seal.py::test_a_purge_takes_the_key_and_what_was_open_reads_no_more",
    ),
    Mutant(
        "key swept while its generation is made",
        "_keys",
        "or not memory.lock(file, exclusive=True):",
        "or not file:",
        test="tests/test_seal.py::test_recovery_sweeps_keys_that_lead_to_nothing_and_no_others",
    ),
    Mutant(
        "erasure claimed for a key that was on the disk",
        "_keys",
        '        if record.seal == "kms" or record.boot != ',
        '        if record.seal == "kms":\n            return lambda: None\n        if record.boot != ',
        test="tests/test_kms.py::test_its_purge_never_says_that_the_key_is_erased",
    ),
    Mutant(
        "wrapped key bound to nothing",
        "_keys",
        'return {"layercache-root": self._root.hex(), "layercache-generation": generation}',
        "return {}",
        test="tests/test_kms.py::test_the_key_is_bound_to_its_place_by_what_names_no_tenant",
    ),
    Mutant(
        "any key of the service unwraps",
        "_kms",
        "client.decrypt(CiphertextBlob=wrapped, KeyId=self._key, ",
        "client.decrypt(CiphertextBlob=wrapped, ",
        test="tests/test_kms.py::test_without_the_key_nothing_is_read_and_a_pull_goes_past_the_cache[another key]",
    ),
    Mutant(
        "key file that was never written to stays",
        "_keys",
        "if (raw and raw != start) or",
        "if raw != start or",
        test="tests/simulation/test_sealed.py",
    ),
    Mutant(
        "purge leaves the key",
        "_purge",
        "                self._erased = place.forget_key(self._name)\n",
        "                pass\n",
        test="tests/test_seal.py::test_a_purge_destroys_the_key_and_says_so",
    ),
)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, mutant: Mutant, name: str, path: str) -> None:
        super().__init__(name, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self._mutant.apply(self.get_data(self.path).decode())
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"layercache.store.{self._mutant.module}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(self._mutant, fullname, spec.origin)
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=loader)


def install(mutant: Mutant) -> None:
    """Let this process import the mutated module. The store must not have been imported yet."""
    assert not any(name.startswith("layercache.store") for name in sys.modules)
    sys.meta_path.insert(0, _Finder(mutant))
