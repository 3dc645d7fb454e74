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
