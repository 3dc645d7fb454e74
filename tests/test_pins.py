"""Pins, and the operator's view of room: what is taken, what may go, what stays."""

import json
from pathlib import Path
from typing import Any

import pytest

from layercache import Digest, LayerCache
from layercache.cli import main
from layercache.errors import InvalidError, NoSpaceError, NotFoundError
from layercache.policy import Policy
from layercache.store import _files as files_room
from layercache.testing.images import build_image, layer_tar
from tests.test_space import MIB, admit, content, opened, taken


@pytest.fixture
def reference(scripted) -> str:
    """An image of three megabytes in a registry."""
    scripted.add(build_image([layer_tar({"weights": content(3 * MIB, 77)})]), "demo/serving", "1.0")
    return f"{scripted.host}/demo/serving:1.0"


def pulled(cache: LayerCache, reference: str, name: str = "a") -> tuple[Digest, ...]:
    with cache.namespace(name).pull(reference) as image:
        assert not any(layer.bypass for layer in image.layers)
        return tuple(blob.digest for blob in image.report.blobs)


def press(cache: LayerCache, *, rounds: int = 6, name: str = "b") -> None:
    """Store more than fits beside what is pinned."""
    for seed in range(rounds):
        admit(cache.namespace(name), content(4 * MIB, 1000 + seed))


def run(capsys, root: Path, *line: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["--root", str(root), *line, "--json"]) == code
    out = capsys.readouterr().out
    return json.loads(out) if out else {}


@pytest.mark.parametrize("seal", [None, "ephemeral"])
def test_a_pinned_image_outlives_every_eviction_and_a_restart(root, reference, seal):
    """Nothing of it goes before it is unpinned."""
    with opened(root, 20 * MIB) as cache:
        namespace = cache.namespace("a", seal=seal)
        with namespace.pull(reference) as image:
            digests = [blob.digest for blob in image.report.blobs]
        pin = namespace.pin("release", reference)
        assert set(pin.blobs) == set(digests)
        assert pin.missing == ()
        press(cache)
        assert all(map(namespace.contains, digests))
    with opened(root, 20 * MIB) as cache:
        namespace = cache.namespace("a")
        assert [found.name for found in namespace.pins()] == ["release"]
        press(cache)
        assert all(map(namespace.contains, digests))
        namespace.unpin("release")
        assert list(namespace.pins()) == []
        press(cache)
        assert not all(map(namespace.contains, digests))
        assert taken(root) <= 20 * MIB


def test_what_is_not_pinned_of_the_same_namespace_goes(root, reference):
    """A pin holds its image, not its namespace."""
    with opened(root, 20 * MIB, policy="lru") as cache:
        digests = pulled(cache, reference)
        other = admit(cache.namespace("a"), content(2 * MIB, 5))
        cache.namespace("a").pin("release", reference)
        press(cache)
        assert all(map(cache.namespace("a").contains, digests))
        assert not cache.namespace("a").contains(other)


def test_where_all_is_pinned_nothing_new_is_kept(root, reference):
    """The cache is passed by; no pinned blob goes for it."""
    with opened(root, 14 * MIB) as cache:
        digests = pulled(cache, reference)
        cache.namespace("a").pin("release", reference)
        with pytest.raises(NoSpaceError):
            admit(cache.namespace("b"), content(5 * MIB, 9))
        assert all(map(cache.namespace("a").contains, digests))


def test_housekeeping_takes_what_it_can_where_pins_are_over_the_budget(root, reference):
    """A budget that was lowered below what is pinned costs all that is not."""
    with opened(root, 64 * MIB) as cache:
        digests = pulled(cache, reference)
        cache.namespace("a").pin("release", reference)
        other = admit(cache.namespace("b"), content(2 * MIB, 5))
    with opened(root, 8 * MIB) as cache:
        evictor = cache.store().evictor
        assert evictor is not None
        assert evictor.tidy() >= 2 * MIB
        assert not cache.namespace("b").contains(other)
        assert all(map(cache.namespace("a").contains, digests))


def test_a_pull_without_room_gives_the_bytes_all_the_same(root, reference):
    """A start never fails for want of room."""
    with opened(root, 9 * MIB) as cache, cache.namespace("a").pull(reference) as image:
        assert image.report.blobs[-1].source == "bypass"
        assert "no room" in image.report.blobs[-1].reason
        (layer,) = image.layers
        with layer.uncompressed() as tar:
            assert content(3 * MIB, 77) in tar.read()
    with opened(root, 0) as cache, cache.namespace("b").pull(reference) as image:
        assert {blob.source for blob in image.report.blobs} == {"bypass"}


def test_a_pin_that_comes_after_the_choice_holds(root, reference, monkeypatch):
    """Who evicts looks at the pins once more when he has the blob to himself."""
    with opened(root, 64 * MIB) as cache:
        digests = pulled(cache, reference)
        real = Policy.victims

        def victims(self, *args, **options):
            chosen = real(self, *args, **options)
            if not list(cache.namespace("a").pins()):
                cache.namespace("a").pin("late", reference)
            return chosen

        monkeypatch.setattr(Policy, "victims", victims)
        assert cache.prune() == []
        assert all(map(cache.namespace("a").contains, digests))


def test_nothing_goes_while_it_is_being_pinned(root, reference, monkeypatch):
    """Its blobs are held from the first look until the pin is durable."""
    with opened(root, 64 * MIB) as cache:
        digests = pulled(cache, reference)
        real = files_room.temporary

        def late(*args):
            assert cache.prune() == []
            return real(*args)

        monkeypatch.setattr("layercache.store._pins.temporary", late)
        assert cache.namespace("a").pin("release", reference).missing == ()
        assert all(map(cache.namespace("a").contains, digests))


def test_a_purge_takes_pins_too(root, reference):
    """Pins block eviction, not purge."""
    with opened(root, 64 * MIB) as cache:
        pulled(cache, reference)
        cache.namespace("a").pin("release", reference)
        assert cache.namespace("a").purge(wait=5.0).complete
        assert list(cache.namespace("a").pins()) == []
        assert not list(root.glob("data/*/pins/*"))


def test_only_a_whole_image_that_is_here_can_be_pinned(root, reference):
    """Unknown references, images that lost a blob and names that are none are refused."""
    with opened(root, 64 * MIB) as cache:
        namespace = cache.namespace("a")
        digests = pulled(cache, reference)
        with pytest.raises(NotFoundError):
            namespace.pin("release", f"{reference}-other")
        with pytest.raises(InvalidError):
            namespace.pin("", reference)
        with pytest.raises(NotFoundError):
            namespace.unpin("release")
        namespace.remove(digests[-1])
        with pytest.raises(NotFoundError):
            namespace.pin("release", reference)
        assert list(namespace.pins()) == []


def test_a_damaged_pin_keeps_everything_of_its_namespace(root, reference):
    """What a pin holds that cannot be read is not known, so nothing goes."""
    with opened(root, 20 * MIB) as cache:
        digests = pulled(cache, reference)
        cache.namespace("a").pin("release", reference)
        (record,) = root.glob("data/*/pins/*")
        record.write_bytes(b"damaged")
        press(cache)
        assert all(map(cache.namespace("a").contains, digests))


def test_the_commands_pin_list_and_unpin(root, reference, capsys):
    """As the library does, with documented exit codes."""
    with opened(root, 64 * MIB) as cache:
        pulled(cache, reference)
    assert run(capsys, root, "pin", "release", reference, "-n", "a")["name"] == "release"
    (found,) = run(capsys, root, "pins")["pins"]
    assert (found["namespace"], found["name"], found["missing"]) == ("a", "release", [])
    assert run(capsys, root, "pins", "-n", "b") == {"pins": []}
    assert run(capsys, root, "unpin", "release", "other", "-n", "a", code=3) == {
        "removed": ["release"],
        "missing": ["other"],
    }
    assert run(capsys, root, "pins") == {"pins": []}


def test_df_tells_what_is_taken_and_what_could_go(root, reference, capsys):
    """Budget, use, and for each namespace what is open, pinned and neither."""
    with opened(root, 64 * MIB) as cache:
        pulled(cache, reference)
        cache.namespace("a").pin("release", reference)
        held = admit(cache.namespace("b"), content(2 * MIB, 1))
        admit(cache.namespace("b"), content(MIB, 2))
        with cache.namespace("b").open(held):
            found = run(capsys, root, "df")
    a, b = found["namespaces"]
    assert found["budget"] == 64 * MIB
    assert abs(found["bytes"] - taken(root)) < 128 * 1024
    assert found["bytes"] + found["reserved"] <= found["budget"]
    assert (a["name"], a["evictable"]) == ("a", 0)
    assert a["pinned"] >= 3 * MIB
    assert (b["leased"], b["evictable"], b["pinned"]) == (2 * MIB, MIB, 0)
    capsys.readouterr()
    assert main(["--root", str(root), "df"]) == 0
    assert "EVICTABLE" in capsys.readouterr().out


def test_prune_says_what_would_go_and_removes_it(root, reference, capsys):
    """A dry run prints the plan and why; with -y it is done; what is open or pinned stays."""
    with opened(root, 64 * MIB) as cache:
        digests = pulled(cache, reference)
        cache.namespace("a").pin("release", reference)
        held, gone = (admit(cache.namespace("b"), content(MIB, seed)) for seed in range(2))
        with cache.namespace("b").open(held):
            plan = run(capsys, root, "prune", "--dry-run")
            assert {one["name"] for one in plan["blobs"]} == {"b"}
            assert all(one["why"] == "value" and one["used"] for one in plan["blobs"])
            assert run(capsys, root, "prune", code=2) == {}
            done = run(capsys, root, "prune", "-y")
            assert [one["blob"] for one in done["blobs"]] == [gone.encoded]
        assert cache.namespace("b").contains(held)
        assert all(map(cache.namespace("a").contains, digests))


def test_prune_goes_as_far_as_it_is_told(root, capsys):
    """To a size, by age, in one namespace."""
    with opened(root, 64 * MIB, policy="lru") as cache:
        for name in "ab":
            for seed in range(3):
                admit(cache.namespace(name), content(2 * MIB, seed + ord(name)))
        assert run(capsys, root, "prune", "-y", "--older-than", "1h")["blobs"] == []
        assert len(run(capsys, root, "prune", "-y", "-n", "a")["blobs"]) == 3
        before = run(capsys, root, "df")["bytes"]
        done = run(capsys, root, "prune", "-y", "--to", str(before - 3 * MIB))
        assert len(done["blobs"]) == 2
        assert run(capsys, root, "prune", "-y", "--to", "100%")["blobs"] == []
        assert run(capsys, root, "prune", "-n", "none", "--dry-run", code=3) == {}
        assert run(capsys, root, "prune", "--to", "much", code=2) == {}
        assert run(capsys, root, "prune", "--older-than", "long", code=2) == {}
