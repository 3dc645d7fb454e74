"""Content-addressed, per-tenant cache of OCI image layers on a host's local disk, for model serving.

    with LayerCache("/var/lib/layercache") as cache:
        endpoint = cache.namespace("acme/endpoint-7")
        with endpoint.pull("registry.example/serving:1.0") as image:
            for layer in image.layers:
                with layer.uncompressed() as tar:
                    consume(tar)
        receipt = endpoint.purge(wait=5.0)

Errors are in :mod:`layercache.errors`, the values of the OCI specifications in :mod:`layercache.oci`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layercache.cache import LayerCache
    from layercache.contents import Contents
    from layercache.control import Progress
    from layercache.doctor import diagnose
    from layercache.errors import LayerCacheError
    from layercache.image import Image, Layer
    from layercache.namespace import Namespace
    from layercache.oci import Descriptor, DiffID, Digest, MediaType, Platform, Reference, Repository
    from layercache.reports import BlobInfo, BlobReport, Check, Finding, ImageInfo, NamespaceInfo, PullReport
    from layercache.store import KmsKey, Receipt
    from layercache.stream import ByteStream

__all__ = [
    "BlobInfo",
    "BlobReport",
    "ByteStream",
    "Check",
    "Contents",
    "Descriptor",
    "DiffID",
    "Digest",
    "Finding",
    "Image",
    "ImageInfo",
    "KmsKey",
    "Layer",
    "LayerCache",
    "LayerCacheError",
    "MediaType",
    "Namespace",
    "NamespaceInfo",
    "Platform",
    "Progress",
    "PullReport",
    "Receipt",
    "Reference",
    "Repository",
    "__version__",
    "diagnose",
]

__version__ = "0.1.0"

# Names come with the module they are from, when they are first asked for: who needs an error or a digest does not pay
# for a cache. The same names as above, which type checkers read.
_HOMES = {
    "cache": ("LayerCache",),
    "contents": ("Contents",),
    "control": ("Progress",),
    "doctor": ("diagnose",),
    "errors": ("LayerCacheError",),
    "image": ("Image", "Layer"),
    "namespace": ("Namespace",),
    "oci": ("Descriptor", "DiffID", "Digest", "MediaType", "Platform", "Reference", "Repository"),
    "reports": ("BlobInfo", "BlobReport", "Check", "Finding", "ImageInfo", "NamespaceInfo", "PullReport"),
    "store": ("KmsKey", "Receipt"),
    "stream": ("ByteStream",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    try:
        return import_module(f"{__name__}.{name}")  # layercache.errors, without a line that imports it
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
