"""Values of the OCI specifications: parsed once, valid for good, and the same value for the same text.

Every parser takes text or bytes from anywhere, does no I/O, and raises errors of :mod:`layercache.errors` only.
"""

from layercache.oci._descriptor import MAX_SIZE, Annotations, Descriptor
from layercache.oci._digest import DiffID, Digest, Hasher
from layercache.oci._ijson import MAX_BYTES, MAX_DEPTH
from layercache.oci._manifest import MAX_DESCRIPTORS, Config, Index, Manifest, parse_document
from layercache.oci._media import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    EMPTY_JSON,
    MANIFEST_TYPES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    OCTET_STREAM,
    Compression,
    MediaType,
)
from layercache.oci._platform import Platform
from layercache.oci._reference import Reference, Repository, Tag, parse_tag
from layercache.oci._select import MAX_INDEXES, descend, select

__all__ = [
    "DOCKER_CONFIG",
    "DOCKER_LAYER",
    "DOCKER_LAYER_GZIP",
    "DOCKER_LAYER_ZSTD",
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "EMPTY_JSON",
    "MANIFEST_TYPES",
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_DESCRIPTORS",
    "MAX_INDEXES",
    "MAX_SIZE",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_LAYER_GZIP",
    "OCI_LAYER_ZSTD",
    "OCI_MANIFEST",
    "OCTET_STREAM",
    "Annotations",
    "Compression",
    "Config",
    "Descriptor",
    "DiffID",
    "Digest",
    "Hasher",
    "Index",
    "Manifest",
    "MediaType",
    "Platform",
    "Reference",
    "Repository",
    "Tag",
    "descend",
    "parse_document",
    "parse_tag",
    "select",
]
