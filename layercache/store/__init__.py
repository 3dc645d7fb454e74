"""Blobs of namespaces on one local filesystem: ingest, open, list, remove, purge.

Outside code imports from here only. The store never fetches: it is fed. docs/format.md says what it writes.
"""

from layercache.store._arriving import Arriving, arrived
from layercache.store._generation import Generation
from layercache.store._grants import Grant, as_granted, grant, granted, grants, lend, revoke
from layercache.store._ingest import Ingest
from layercache.store._kms import KmsKey
from layercache.store._layout import PUBLIC, Meta, NamespaceName, Ref
from layercache.store._leftovers import Leftover
from layercache.store._limits import Amount, Budget
from layercache.store._pins import Pin, check_pin_name, pin, pins, unpin
from layercache.store._quota import set_quota
from layercache.store._read import Blob
from layercache.store._receipts import Receipt
from layercache.store._seal import Seal
from layercache.store._store import Store, Tenancy

__all__ = [
    "PUBLIC",
    "Amount",
    "Arriving",
    "Blob",
    "Budget",
    "Generation",
    "Grant",
    "Ingest",
    "KmsKey",
    "Leftover",
    "Meta",
    "NamespaceName",
    "Pin",
    "Receipt",
    "Ref",
    "Seal",
    "Store",
    "Tenancy",
    "arrived",
    "as_granted",
    "check_pin_name",
    "grant",
    "granted",
    "grants",
    "lend",
    "pin",
    "pins",
    "revoke",
    "set_quota",
    "unpin",
]
