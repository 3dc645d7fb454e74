"""Every command and every exit code, end to end, against a real HTTP registry.

Each command, and each way it can end, runs once as a process of its own; what else is asked of it, in the tests' own
process, which saves its start.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layercache.cache import LayerCache
from layercache.cli import main
from layercache.oci import DOCKER_MANIFEST, Digest
from layercache.testing.images import BuiltImage, build_image, layer_tar
from layercache.testing.registry import BasicAuth, ScriptedRegistry, Status, WrongBytes

NS = "acme/endpoint-7"
LIBRARY = Path(json.__file__).parent
ABSENT = f"sha256:{'0' * 64}"


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        """Standard output as text."""
        return self.raw.decode()

    @property
    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.raw)


Run = Callable[..., Done]


@pytest.fixture
def run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Run one command, whose exit code must be ``code``: in a process of its own with ``process``, else in this one."""
    monkeypatch.setenv("LAYERCACHE_ROOT", str(root))
    monkeypatch.chdir(tmp_path)

    def command(*args: object, code: int = 0, process: bool = False, limit: int | None = None) -> Done:
        line = [str(arg) for arg in args]
        if process or limit is not None:
            done = subprocess.run(
                [sys.executable, "-m", "layercache", *line],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60,
                check=False,
                preexec_fn=None if limit is None else lambda: limit_files(limit),
            )
            result = Done(done.returncode, done.stdout, done.stderr.decode())
        else:
            capfdbinary.readouterr()
            found = main(line)
            out, err = capfdbinary.readouterr()
            result = Done(found, out, err.decode())
        assert result.code == code, result
        assert all(line.startswith("layercache: ") for line in result.err.splitlines()), result.err
        assert "\x1b" not in result.err
        return result

    return command


def limit_files(size: int) -> None:
    """Let this process write no file larger than ``size`` bytes: the store then fails as on a bad disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def image() -> BuiltImage:
    """An image of three layers: one large, one small, one of random bytes."""
    return build_image(
        [
            layer_tar([LIBRARY], under="usr/lib/python3"),
            layer_tar({"etc/motd": b"hello\n"}),
            layer_tar({"weights": bytes(Digest.of(b"").encoded, "ascii") * 16384}),
        ],
        platform="linux/amd64",
        compression="none",
    )


@pytest.fixture
def reference(scripted: ScriptedRegistry, image: BuiltImage) -> str:
    """A reference to the image on a running registry."""
    scripted.add(image, "demo/serving", "1.0")
    return f"{scripted.host}/demo/serving:1.0"


def named(image: BuiltImage) -> set[str]:
    """Digests of everything of an image."""
    return {str(image.digest), *map(str, image.blobs)}


def test_a_pull_misses_then_hits(run: Run, reference: str, image: BuiltImage) -> None:
    """First line the image's digest, then a line a blob; the second time all of them are hits."""
    for source, requests in (("miss", True), ("hit", False)):
        done = run("pull", reference, "-n", NS, "--platform", "linux/amd64", "--jobs", 2, process=True)

        first, *lines = done.out.splitlines()
        assert first == str(image.digest)
        assert {line.split()[0] for line in lines} == named(image)
        assert {line.split()[3] for line in lines} == {source}
        assert len({line.index(source) for line in lines}) == 1
        assert done.err.count("\n") == 1
        assert ("fetched 0 B" in done.err) is not requests


def test_the_document_of_a_pull_has_the_members_of_the_contract(
    run: Run, reference: str, scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """Names and types that scripts rely on; bytes and requests are those the registry saw."""
    document = run("--json", "pull", reference, "-n", NS, "--platform", "linux/amd64", process=True).json

    assert document["reference"] == reference
    assert document["digest"] == str(image.digest)
    assert document["stale"] is False
    assert {blob["digest"] for blob in document["blobs"]} == named(image)
    sizes = {str(layer.digest): layer.size for layer in image.layers}
    for blob in document["blobs"]:
        assert set(blob) >= {"digest", "media_type", "size", "source"}
        assert blob["source"] == "miss"
        assert blob["size"] == sizes.get(blob["digest"], blob["size"])
    assert document["requests"] == len(scripted.requests)
    assert document["bytes_fetched"] >= sum(sizes.values())
    assert isinstance(document["seconds"], float)


def test_quiet_says_the_digest_only(run: Run, reference: str, image: BuiltImage) -> None:
    """For scripts that want the digest; nothing on standard error."""
    done = run("pull", "-q", reference, "-n", NS)

    assert (done.out, done.err) == (f"{image.digest}\n", "")


def test_verbose_in_a_pipe_tells_of_each_blob(run: Run, reference: str, image: BuiltImage) -> None:
    """A line when a blob begins to move, without escape sequences."""
    err = run("-v", "pull", reference, "-n", NS).err

    for layer in image.layers:
        assert f"fetching sha256:{layer.digest.encoded[:12]}" in err


def test_without_the_registry_a_digest_is_a_hit_and_a_tag_is_stale(
    run: Run, reference: str, scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """No request for a digest; the tag's last digest with a warning, and an error where fresh is wanted."""
    run("pull", reference, "-n", NS)
    scripted.stop()

    pinned = reference.replace(":1.0", f"@{image.digest}")
    assert run("--json", "pull", pinned, "-n", NS).json["requests"] == 0
    stale = run("pull", "--json", reference, "-n", NS)
    assert stale.json["stale"] is True
    assert "did not answer" in stale.err
    assert run("pull", "--json", "--fresh", reference, "-n", NS, code=1).raw == b""


def test_what_the_registry_does_not_have_is_not_found(run: Run, reference: str) -> None:
    """Exit 3 for an absent tag, and for a platform the image is not for."""
    run("pull", reference.replace("1.0", "2.0"), "-n", NS, code=3, process=True)
    run("pull", reference, "-n", NS, "--platform", "linux/s390x", code=3)


def test_damaged_bytes_are_an_integrity_error_and_nothing_of_them_is_kept(
    run: Run, reference: str, scripted: ScriptedRegistry, image: BuiltImage
) -> None:
    """Exit 4, nothing on standard output, and the blob is not visible."""
    bad = image.layers[0].digest
    scripted.fault(f"blobs/{bad}", WrongBytes(at=5), times=None)
    done = run("pull", "--json", reference, "-n", NS, code=4, process=True)

    assert done.raw == b""
    assert str(bad) in done.err
    assert str(bad) not in run("ls", "-q", "-n", NS).out


def test_a_registry_that_refuses_or_is_not_there_is_a_failure(
    run: Run, reference: str, scripted: ScriptedRegistry
) -> None:
    """Exit 1 with advice; a timeout, too."""
    scripted.fault("*", Status(401), times=None)
    assert "log in" in run("pull", reference, "-n", NS, code=1, process=True).err
    scripted.stop()
    run("pull", reference, "-n", NS, "--timeout", 3, code=1)
    assert "longer" in run("pull", reference, "-n", NS, "--timeout", 0, code=1).err


@pytest.mark.parametrize(
    "args",
    [
        ("pull", "Upper/Case:1.0", "-n", NS),
        ("pull", "host.example/a@sha256:../../x", "-n", NS),
        ("pull", "", "-n", NS),
        ("pull", "host.example/a:1", "-n", NS, "--platform", "linux"),
        ("inspect", "sha256:../../x", "-n", NS),
        ("inspect", f"sha256:{'A' * 64}", "-n", NS),
        ("cat", f"sha256:{'0' * 63}", "-n", NS),
        ("cat", f"blake3:{'0' * 64}", "-n", NS),
        ("export", "sha256:abc", "-n", NS, "out"),
        ("verify", "latest", "-n", NS),
        ("rm", "sha256:abc", "-n", NS),
        ("rm", "a b", "-n", NS),
        ("put", "/dev/null", "-n", NS, "--media-type", "nonsense"),
        ("put", "/dev/null", "-n", ""),
        ("put", "/dev/null", "-n", "x" * 256),
        ("ls", "-n", ""),
        ("purge", ""),
        ("ls", "--root", ""),
        ("ls", "--frob"),
    ],
)
def test_malformed_input_is_wrong_usage(
    args: tuple[str, ...], root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 2 and one line on standard error, whatever is malformed; no namespace comes of it."""
    monkeypatch.setenv("LAYERCACHE_ROOT", str(root))

    assert main([*args, "--json"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("layercache: ")
    assert err.count("\n") == 1
    assert "x" * 256 not in err
    assert not list(root.glob("data/*"))


def test_a_layer_that_cannot_be_kept_is_a_bypass(run: Run, reference: str, image: BuiltImage) -> None:
    """Some of the layers bypassed is done with a warning; all of them is partly done. Both print their report."""
    run("put", "/dev/null", "-n", NS)  # makes root and namespace, before files are limited to a size
    large = [layer for layer in image.layers if layer.size > 100_000]
    assert 0 < len(large) < len(image.layers)
    some = run("pull", "--json", reference, "-n", NS, limit=100_000)

    sources = {blob["digest"]: blob["source"] for blob in some.json["blobs"]}
    assert {digest for digest, source in sources.items() if source == "bypass"} == {str(one.digest) for one in large}
    assert "could not be kept" in some.err
    run("put", "/dev/null", "-n", "other")
    lines = run("pull", reference, "-n", "other", limit=10_000, code=5).out.splitlines()
    assert lines[0] == str(image.digest)
    for layer in image.layers:
        assert [line.split()[3] for line in lines if line.startswith(str(layer.digest))] == ["bypass"]


def test_ls_lists_namespaces_images_and_other_blobs(run: Run, reference: str, image: BuiltImage, root: Path) -> None:
    """Images first, then what belongs to none; the document has all blobs; quiet has names only."""
    assert run("ls").out == ""
    assert run("ls", "--json").json == {"namespaces": []}
    assert run("ls", "-n", NS).out == ""
    run("pull", reference, "-n", NS)
    other = run("put", "-q", "/etc/passwd", "-n", NS).out.strip()

    header, line = run("ls", process=True).out.splitlines()
    assert header.split() == ["NAMESPACE", "STATE", "BLOBS", "SIZE"]
    assert line.split()[:3] == [NS, "live", str(len(named(image)) + 1)]
    (namespace,) = run("ls", "--json").json["namespaces"]
    assert (namespace["name"], namespace["blobs"]) == (NS, len(named(image)) + 1)
    assert run("ls", "-q").out == f"{NS}\n"

    images, blobs = (part.splitlines() for part in run("list", "-n", NS).out.split("\n\n"))
    assert images[1].split()[:2] == [reference, str(image.digest)]
    assert images[1].endswith("complete")
    assert [line.split()[0] for line in blobs[1:]] == [other]
    document = run("ls", "-n", NS, "--json", process=True).json
    assert {blob["digest"] for blob in document["blobs"]} == {*named(image), other}
    (entry,) = document["images"]
    assert entry["complete"] is True
    assert entry["resolved"].endswith("Z")
    assert set(run("ls", "-n", NS, "-q").out.split()) == {*named(image), other}


def test_commands_that_only_look_do_not_make_a_root(run: Run, tmp_path: Path) -> None:
    """A mistyped root is empty or not found, and is still not there afterwards."""
    absent = tmp_path / "typo"
    run("ls", "--root", absent)
    assert str(absent) in run("inspect", ABSENT, "-n", NS, "--root", absent, code=3).err
    run("purge", NS, "--root", absent, code=3)

    assert not absent.exists()


def test_the_option_outranks_the_variable(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--root wins over LAYERCACHE_ROOT."""
    run("put", "/etc/passwd", "-n", NS, "--root", tmp_path / "other")

    assert run("ls", "-q").out == ""
    monkeypatch.setenv("LAYERCACHE_ROOT", str(tmp_path / "other"))
    assert run("ls", "-q").out == f"{NS}\n"


def test_a_root_that_must_not_be_used_is_a_failure(run: Run, tmp_path: Path) -> None:
    """A directory that holds something else is left alone."""
    (tmp_path / "foreign").mkdir(mode=0o700)
    (tmp_path / "foreign" / "file").write_text("mine")
    run("put", "/etc/passwd", "-n", NS, "--root", tmp_path / "foreign", code=1)

    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["file"]


def test_inspect_shows_one_blob(run: Run, reference: str, image: BuiltImage) -> None:
    """Size, media type, DiffID, origin and times, for people and for programs."""
    run("pull", reference, "-n", NS)
    layer, diff_id = image.layers[0], image.diff_ids[0]
    document = run("inspect", layer.digest, "-n", NS, "--json", process=True).json

    assert document["digest"] == str(layer.digest)
    assert document["size"] == layer.size
    assert document["media_type"] == str(layer.media_type)
    assert document["diff_id"] == str(diff_id)
    assert document["origin"] == reference.rpartition(":")[0]
    assert document["created"].endswith("Z")
    assert document["verified"].endswith("Z")
    shown = run("inspect", layer.digest, "-n", NS).out
    assert f"size:        {layer.size} (" in shown
    assert str(diff_id) in shown
    run("inspect", ABSENT, "-n", NS, code=3, process=True)
    run("inspect", layer.digest, "-n", "other", code=3)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_cat_writes_the_bytes_or_what_is_in_them(run: Run, scripted: ScriptedRegistry, compression: str) -> None:
    """Exactly the bytes of the blob; with --uncompressed the tar; in a document the same as base64."""
    tar = layer_tar([LIBRARY])
    image = build_image([tar], platform="linux/amd64", compression=compression)  # type: ignore[arg-type]
    scripted.add(image, "demo", "1")
    run("pull", f"{scripted.host}/demo:1", "-n", NS)
    digest = image.layers[0].digest
    content = image.blobs[digest]
    assert isinstance(content, bytes)

    assert run("cat", digest, "-n", NS, process=True).raw == content
    assert run("cat", digest, "-n", NS, "--uncompressed").raw == tar
    document = run("cat", digest, "-n", NS, "--uncompressed", "--json").json
    assert base64.b64decode(document.pop("data"), validate=True) == tar
    assert document == {"digest": str(digest), "encoding": "base64", "size": len(tar)}
    run("cat", ABSENT, "-n", NS, code=3)


def test_cat_of_something_that_is_no_compressed_layer_is_an_integrity_error(run: Run, tmp_path: Path) -> None:
    """A blob that says it is gzip and is not: exit 4, nothing written."""
    (tmp_path / "file").write_bytes(b"not gzip at all")
    media_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    digest = run("put", tmp_path / "file", "-n", NS, "--media-type", media_type).out.strip()

    assert run("cat", digest, "-n", NS, "--uncompressed", code=4).raw == b""


def test_put_prints_the_digest(run: Run, tmp_path: Path) -> None:
    """A local file becomes a blob; twice is once; what is not there is not found."""
    (tmp_path / "file").write_bytes(b"content")
    digest = str(Digest.of(b"content"))
    assert run("put", tmp_path / "file", "-n", NS, process=True).out == f"{digest}\n"
    document = run("put", "file", "-n", NS, "--json").json

    assert (document["digest"], document["size"], document["media_type"]) == (digest, 7, "application/octet-stream")
    assert run("put", "file", "-n", "typed", "--media-type", "text/plain", "--json").json["media_type"] == "text/plain"
    assert "absent" in run("put", "absent", "-n", NS, code=3).err
    run("put", tmp_path, "-n", NS, code=1)


def damage(root: Path, digest: Digest) -> None:
    """Flip one bit in the middle of a blob on disk."""
    (path,) = [path for path in root.glob("data/*/blobs/*/*") if digest.encoded in path.name]
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_verify_finds_rot(run: Run, reference: str, image: BuiltImage, root: Path) -> None:
    """Nothing to say of sound blobs; a line a finding and exit 4 for a damaged one; absent is not found."""
    run("pull", reference, "-n", NS)
    assert run("verify", "-n", NS, process=True).out == ""
    assert run("verify", image.layers[1].digest, "-n", NS, "--json").json == {"findings": []}
    run("verify", ABSENT, "-n", NS, code=3)
    bad = image.layers[2].digest
    damage(root, bad)

    run("verify", image.layers[1].digest, "-n", NS)
    (line,) = run("verify", "-n", NS, code=4, process=True).out.splitlines()
    assert line.split()[:2] == ["content", str(bad)]
    assert "incomplete" in run("ls", "-n", NS).out
    run("pull", reference, "-n", NS)
    damage(root, bad)
    (finding,) = run("verify", bad, "-n", NS, "--json", code=4).json["findings"]
    assert finding["digest"] == str(bad)


def test_cat_of_rot_stops_before_the_damage(run: Run, reference: str, image: BuiltImage, root: Path) -> None:
    """Exit 4; what was written is right and cut, and a document is cut, too."""
    run("pull", reference, "-n", NS)
    layer = image.layers[2]
    damage(root, layer.digest)
    done = run("cat", layer.digest, "-n", NS, code=4, process=True)

    content = image.blobs[layer.digest]
    assert isinstance(content, bytes)
    assert len(done.raw) < layer.size
    assert content.startswith(done.raw)
    run("pull", reference, "-n", NS)
    damage(root, layer.digest)
    with pytest.raises(json.JSONDecodeError):
        _ = run("cat", layer.digest, "-n", NS, "--json", code=4).json


def test_rm_drops_blobs(run: Run, reference: str, image: BuiltImage) -> None:
    """By digest; absent is 3 unless it is to be ignored, and the rest is dropped all the same."""
    run("pull", reference, "-n", NS)
    first, second, third = (str(layer.digest) for layer in image.layers)
    assert run("rm", first, "-n", NS).out == f"{first}\n"
    done = run("rm", first, second, "-n", NS, "--json", code=3, process=True)

    assert done.json == {"removed": [second], "missing": [first], "in_use": []}
    assert first in done.err
    run("rm", first, third, "-n", NS, "--ignore-missing")
    held = run("ls", "-n", NS, "-q").out.split()
    assert not {first, second, third} & set(held)
    assert "incomplete (3 missing)" in run("ls", "-n", NS).out


def test_rm_of_an_image_keeps_what_others_need(run: Run, reference: str, scripted: ScriptedRegistry) -> None:
    """The reference goes with the blobs that only it needs; an absent reference is 3."""
    tars = [layer_tar({name: name.encode()}) for name in ("shared", "one", "two")]
    images = [build_image([tars[0], tar], platform="linux/amd64") for tar in tars[1:]]
    for name, image in zip("ab", images, strict=True):
        scripted.add(image, name, "1")
        run("pull", f"{scripted.host}/{name}:1", "-n", NS)
    run("rm", f"{scripted.host}/a:1", "-n", NS, process=True)

    assert set(run("ls", "-n", NS, "-q").out.split()) == named(images[1])
    assert reference not in run("ls", "-n", NS).out
    run("rm", f"{scripted.host}/a:1", "-n", NS, code=3)
    run("rm", f"{scripted.host}/a:1", "-n", NS, "--ignore-missing")


def test_rm_of_what_is_open_is_refused(run: Run, root: Path, tmp_path: Path) -> None:
    """In use: failed if nothing was dropped, partly done if something was."""
    digests = []
    for name in "ab":
        (tmp_path / name).write_text(name)
        digests.append(run("put", name, "-n", NS).out.strip())
    with LayerCache(root) as cache, cache.namespace(NS).open(digests[0]):
        assert run("rm", digests[0], "-n", NS, "--json", code=1, process=True).json["in_use"] == [digests[0]]
        run("rm", *digests, "-n", NS, code=5, process=True)

    assert run("ls", "-n", NS, "-q").out.split() == digests[:1]


def test_export_writes_a_layout(
    run: Run, reference: str, image: BuiltImage, tmp_path: Path, skopeo: Callable[..., bytes]
) -> None:
    """Skopeo finds the image by its tag and copies it; a second export is added to the first."""
    run("pull", reference, "-n", NS)
    assert run("export", reference, "-n", NS, "out", process=True).out == f"{image.digest}\n"
    document = run("export", image.digest, "-n", NS, "out", "--json").json

    assert document == {"digest": str(image.digest), "directory": "out", "reference": None}
    assert json.loads(skopeo("inspect", f"oci:{tmp_path}/out:1.0"))["Digest"] == str(image.digest)
    skopeo("copy", "--quiet", f"oci:{tmp_path}/out:1.0", f"dir:{tmp_path}/copy")
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == image.manifest


def test_a_docker_image_is_exported_for_tools_of_oci(
    run: Run, scripted: ScriptedRegistry, tmp_path: Path, skopeo: Callable[..., bytes]
) -> None:
    """Schema 2 opens as well, though its manifest has an OCI form there."""
    image = build_image([layer_tar({"a": b"a"})], style="docker", platform="linux/amd64")
    assert image.media_type == DOCKER_MANIFEST
    scripted.add(image, "demo", "1")
    run("pull", f"{scripted.host}/demo:1", "-n", NS)
    run("export", f"{scripted.host}/demo:1", "-n", NS, tmp_path / "out")

    skopeo("inspect", f"oci:{tmp_path}/out:1")
    skopeo("copy", "--quiet", f"oci:{tmp_path}/out:1", f"dir:{tmp_path}/copy")
    assert (tmp_path / "copy" / image.layers[0].digest.encoded).read_bytes() == image.blobs[image.layers[0].digest]


def test_export_refuses_what_it_would_spoil(run: Run, reference: str, image: BuiltImage, tmp_path: Path) -> None:
    """A directory of something else is wrong usage; an image that is not here, or not whole, is not found."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    run("pull", reference, "-n", NS)
    run("export", reference, "-n", NS, "mine", code=2, process=True)
    run("export", reference.replace("1.0", "2.0"), "-n", NS, "out", code=3)
    run("rm", image.layers[0].digest, "-n", NS)
    run("export", reference, "-n", NS, "out", code=3)

    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    assert not (tmp_path / "out").exists()


def test_purge_prints_the_receipt(run: Run, reference: str, image: BuiltImage, root: Path) -> None:
    """All of it is gone, other namespaces stay, and purging nothing says so."""
    run("pull", reference, "-n", NS)
    run("put", "/etc/passwd", "-n", "other")
    receipt = run("purge", NS, "--json", process=True).json

    assert receipt["level"] == "unlinked"
    assert receipt["blobs"] == len(named(image))
    assert receipt["generation"] == 1
    assert receipt["pending"] == []
    assert receipt["started"] <= receipt["finished"]
    assert receipt["finished"].endswith("Z")
    assert NS not in json.dumps(receipt)
    assert run("ls", "-q").out == "other\n"
    assert run("ls", "-n", NS, "-q").out == ""
    assert run("purge", NS, "--json").json["generation"] == 0
    run("pull", reference, "-n", NS)
    assert "level:       unlinked\n" in run("purge", NS).out


def test_verify_repairs_what_it_can(run: Run, reference: str, image: BuiltImage, root: Path) -> None:
    """Exit 4 all the same, for there was rot; the blob is right again and the next time nothing is found."""
    run("pull", reference, "-n", NS)
    digest = image.layers[1].digest
    (path,) = root.glob(f"data/*/blobs/*/{digest.encoded}")
    path.write_bytes(b"?" + path.read_bytes()[1:])

    (finding,) = run("verify", "-n", NS, "--repair", "--json", code=4, process=True).json["findings"]

    assert finding["digest"] == str(digest)
    assert finding["repaired"] is True
    assert run("verify", "-n", NS, "--json").json == {"findings": []}


def test_purge_of_what_is_open_is_partly_done(run: Run, root: Path) -> None:
    """Exit 5 with the holders named; the next command on the root removes the rest."""
    digest = run("put", "/etc/passwd", "-n", NS).out.strip()
    with LayerCache(root) as cache, cache.namespace(NS).open(digest):
        done = run("purge", NS, "--wait", 0, "--json", code=5, process=True)
        if not done.json["pending"]:  # the call was over before the purge came to the open file
            done = run("purge", NS, "--wait", 3, "--json", code=5, process=True)
        assert done.json["level"] == "fenced"
        assert done.json["pending"] == [os.getpid()]
        run("cat", digest, "-n", NS, code=3)
    run("ls")

    assert not [path for path in root.rglob("*") if digest.removeprefix("sha256:") in path.name]


def test_the_traceback_comes_with_verbose_only(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """-v puts it before the line that says what happened."""
    assert main(["-v", "inspect", ABSENT, "-n", NS, "--root", str(root)]) == 3
    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("layercache: ")


def test_names_cannot_take_over_the_terminal(run: Run) -> None:
    """A namespace of control characters is listed as escapes, and as itself in the document."""
    name = "a\x1b[2Jb\nc"
    run("put", "/etc/passwd", "-n", name)

    assert run("ls", "-q").out == "a\\x1b[2Jb\\nc\n"
    assert run("ls", "--json").json["namespaces"][0]["name"] == name


def test_pull_asks_a_mirror_first(run: Run, reference: str, scripted: ScriptedRegistry) -> None:
    """Whatever the registry of the reference is: here one that nobody listens at."""
    name = reference.partition("/")[2]

    done = run("pull", f"127.0.0.1:9/{name}", "-n", NS, "--mirror", f"http://{scripted.host}", "--json")

    assert set(done.json["bytes_by_source"]) == {scripted.host}
    assert all(request.query == "ns=127.0.0.1%3A9" for request in scripted.requests)


def test_pull_takes_credentials_from_the_given_file(
    run: Run, reference: str, scripted: ScriptedRegistry, tmp_path: Path
) -> None:
    """And from no other; one that cannot be read is in the error."""
    scripted._gate.auth = BasicAuth("user", "canary")
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {scripted.host: {"username": "user", "password": "canary"}}}))

    run("pull", reference, "-n", NS, code=1)
    run("pull", reference, "-n", NS, "--auth-file", file)
    assert "absent.json" in run("pull", reference, "-n", NS, "--auth-file", tmp_path / "absent.json", code=1).err


def test_pull_says_which_certificate_cannot_be_used(run: Run, reference: str, tmp_path: Path) -> None:
    """Wrong usage, before anything is sent."""
    assert "absent.pem" in run("pull", reference, "-n", NS, "--ca", tmp_path / "absent.pem", code=2).err


def test_purges_by_pattern_and_their_receipts(run):
    """One receipt each; the chain is listed, and examined with exit 4 where it was changed."""
    for name in ("acme/1", "acme/2", "other"):
        run("put", "/etc/passwd", "-n", name)
    done = run("purge", "--match", "acme/*", "--json").json
    assert [(one["namespace"], one["level"]) for one in done["receipts"]] == [
        ("acme/1", "unlinked"),
        ("acme/2", "unlinked"),
    ]
    assert run("purge", "--resume", "--json").json == {"receipts": []}
    assert [one["number"] for one in run("receipts", "--json").json["receipts"]] == [1, 2]
    report = run("receipts", "verify", "--json").json
    assert (report["count"], report["problems"]) == (2, [])
    assert run("receipts", "verify", "--after", report["last"]).out.endswith(f"{report['last']}\n")
    assert run("receipts", "verify", "--after", "0" * 64, "--json", code=4).json["problems"]


@pytest.mark.parametrize(
    "wrong", [(), ("a", "--resume"), ("--match", "*", "--resume"), ("a", "--match", "*"), ("--resume", "--trim")]
)
def test_purge_takes_exactly_one_of_three(run, wrong):
    """A namespace, a pattern or what is left: anything else is wrong usage, and so is a trim of what may be gone."""
    run("put", "/etc/passwd", "-n", "a")
    run("purge", *wrong, code=2)


def test_a_namespace_is_sealed_where_it_is_begun(run: Run, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pull and put; it stays so, ls says so, its purge says that the key is gone. One in clear is not sealed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as keys:
        monkeypatch.setenv("LAYERCACHE_KEYS", keys)
        run("pull", reference, "-n", NS, "--seal", "ephemeral")
        run("put", __file__, "-n", NS)
        run("put", __file__, "-n", "clear")
        assert [one["seal"] for one in run("ls", "--json").json["namespaces"]] == ["ephemeral", None]
        assert "live, ephemeral" in run("ls").out
        assert "not sealed" in run("pull", reference, "-n", "clear", "--seal", "ephemeral", code=2).err
        assert run("purge", NS, "--json").json["level"] == "crypto-erased"
        assert run("purge", "clear", "--json").json["level"] == "unlinked"
        run("put", __file__, "-n", NS, "--seal", "mine", code=2)
