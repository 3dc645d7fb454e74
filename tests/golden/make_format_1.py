"""Write the golden root of format 1: run once, by the version that defined the format. Kept to say what is in it.

    python tests/golden/make_format_1.py tests/golden/format-1.tar.gz

The root has a namespace in its second generation, after a purge with a receipt, with blobs of every shape of chunk
table, a reference, and an unfinished write of another boot.
"""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

from layercache.oci import OCTET_STREAM, Descriptor, DiffID, Digest, Platform, Reference
from layercache.store import NamespaceName, Ref, Store

NAME = "acme/endpoint-7"
SIZES = (0, 5, 65_536, 65_537, 1 << 20, (3 << 20) + 7)
REFERENCE = "registry.example:5000/demo/serving:1.0"


def content(size: int) -> bytes:
    """Return bytes that compress well and differ at every chunk."""
    return b"".join(index.to_bytes(8, "big") * 512 for index in range(size // 4096 + 1))[:size]


def main(target: Path) -> None:
    """Make the root and pack it."""
    with tempfile.TemporaryDirectory() as home:
        root = Path(home) / "root"
        store = Store(root)
        for generations in range(2):
            generation = store.generation(NamespaceName(NAME), create=True)
            assert generation is not None
            for size in SIZES:
                data = content(size)
                descriptor = Descriptor(OCTET_STREAM, Digest.of(data), size)
                ingest = generation.begin(descriptor)
                assert ingest is not None
                ingest.feed(data)
                diff_id = DiffID(Digest.of(b"tar", algorithm="sha512"))
                ingest.commit(media_type=OCTET_STREAM, diff_id=diff_id, origin="registry.example:5000/demo").close()
            platform = Platform.parse("linux/arm64/v8")
            generation.set_ref(Ref(Reference.parse(REFERENCE), descriptor, descriptor.digest, platform, 12.5))
            if generations == 0:
                store.purge(NamespaceName(NAME))
            else:
                started = generation.begin(Descriptor(OCTET_STREAM, Digest.of(b"never"), 8 << 20))
                assert started is not None
                started.feed(content(5 << 20))
                started.suspend()
            generation.close()
        store.close()
        with tarfile.open(target, "w:gz", compresslevel=9, format=tarfile.PAX_FORMAT) as archive:
            for path in (root, *sorted(root.rglob("*"))):
                member = archive.gettarinfo(path, str(path.relative_to(home)))
                # The boot is made to be another one than of whoever reads it.
                member.name = member.name.replace(started_boot(root), "0" * 12)
                member.uid = member.gid = 0
                member.uname = member.gname = ""
                archive.addfile(member, io.BytesIO(path.read_bytes()) if path.is_file() else None)


def started_boot(root: Path) -> str:
    """Return the boot in the name of the unfinished write."""
    return next(root.glob("data/*/in/*.part")).name.split(".")[2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
