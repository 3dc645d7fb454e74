"""One exception tree, by what the caller does next.

    LayerCacheError
      InvalidError            the input is wrong: fix it (also a ValueError)
        InvalidDigestError, InvalidReferenceError, InvalidPlatformError, InvalidNamespaceError,
        InvalidManifestError, InvalidDescriptorError, InvalidPatternError, SealMismatchError
      UnsupportedError        valid, but not something this version reads
      NotFoundError           absent: the only thing that is a miss
      IntegrityError          the bytes are not what their digest says
        CorruptStreamError    a compressed stream is damaged, cut or followed by garbage
      LimitError              a bound was reached (bomb, oversized body, window)
      CancelledError          the caller's cancel was set
      DeadlineError           the caller's timeout passed
      NamespacePurgedError    the namespace was purged: get a new handle
      InUseError              somebody holds it: try later
      StoreError              the store cannot do it; the cache goes on without
        NoSpaceError, ReadOnlyError, UnsafeRootError, FormatError, StoreClosedError, SealError,
        KeyGoneError, KmsError
      RegistryError           the registry said no, or nothing
        UnauthorizedError, DeniedError, RateLimitedError, UnreachableError, PolicyError

Messages name the object and what to do. They hold no secret, no query string of a URL and no namespace name.
"""

from __future__ import annotations

__all__ = [
    "CancelledError",
    "CorruptStreamError",
    "DeadlineError",
    "DeniedError",
    "FormatError",
    "InUseError",
    "IntegrityError",
    "InvalidDescriptorError",
    "InvalidDigestError",
    "InvalidError",
    "InvalidManifestError",
    "InvalidNamespaceError",
    "InvalidPatternError",
    "InvalidPlatformError",
    "InvalidReferenceError",
    "KeyGoneError",
    "KmsError",
    "LayerCacheError",
    "LimitError",
    "NamespacePurgedError",
    "NoSpaceError",
    "NotFoundError",
    "PolicyError",
    "RateLimitedError",
    "ReadOnlyError",
    "RegistryError",
    "SealError",
    "SealMismatchError",
    "StoreClosedError",
    "StoreError",
    "UnauthorizedError",
    "UnreachableError",
    "UnsafeRootError",
    "UnsupportedError",
]


class LayerCacheError(Exception):
    """Root of every error this library raises.

    ``hint`` says what to do, when there is something to do; it is part of ``str()``.
    ``retryable`` is true where the same call may succeed later without a change by the caller.
    """

    retryable = False

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(f"{what}; {hint}" if hint else what)
        self.what = what
        self.hint = hint


class InvalidError(LayerCacheError, ValueError):
    """Wrong input. ``value`` is the offending text, shortened; nothing was read, sent or stored."""

    def __init__(self, what: str, *, value: object = None, hint: str = "") -> None:
        self.value = _shorten(value)
        super().__init__(f"{what}: {self.value}" if value is not None else what, hint=hint)


class InvalidDigestError(InvalidError):
    """Not a digest of the OCI grammar, or wrong length or case for its algorithm."""


class InvalidReferenceError(InvalidError):
    """Not a registry, repository, tag or digest of the distribution grammar."""


class InvalidPlatformError(InvalidError):
    """Not ``os/architecture[/variant]``."""


class InvalidNamespaceError(InvalidError):
    """Not a non-empty text of at most 255 bytes. The name is not repeated here: it may be a tenant's."""


class InvalidDescriptorError(InvalidError):
    """Not a descriptor of the image specification."""


class InvalidManifestError(InvalidError):
    """Not a manifest, index or config of the image specification (or of Docker schema 2)."""


class InvalidPatternError(InvalidError):
    """Not a pattern of repositories, or one that would match hosts of strangers."""


class SealMismatchError(InvalidError):
    """The namespace holds content that is not sealed as was asked for. Purge it to begin anew, sealed."""


class UnsupportedError(LayerCacheError):
    """Well formed, but not something this version handles (algorithm, schema 1, compression)."""


class NotFoundError(LayerCacheError):
    """Absent. Only this is a miss; every other error is an error."""


class IntegrityError(LayerCacheError):
    """Bytes differ from what they should be. No wrong byte was handed out.

    ``digest`` names the blob. ``offset`` and ``length`` give the range of the bad chunk where one is known.
    ``expected`` and ``actual`` are texts (a digest or a size) where they are known.
    """

    def __init__(
        self,
        what: str,
        *,
        digest: object = None,
        expected: object = None,
        actual: object = None,
        offset: int | None = None,
        length: int | None = None,
        hint: str = "",
    ) -> None:
        self.digest = None if digest is None else str(digest)
        self.expected = None if expected is None else str(expected)
        self.actual = None if actual is None else str(actual)
        self.offset = offset
        self.length = length
        text = what if digest is None else f"{what} in {digest}"
        if offset is not None:
            text += f" at bytes {offset}-{offset + (length or 1) - 1}"
        if expected is not None:
            text += f": expected {expected}, got {actual}"
        super().__init__(text, hint=hint)


class CorruptStreamError(IntegrityError):
    """A compressed stream is damaged, cut short, or followed by bytes that are not part of it."""


class LimitError(LayerCacheError):
    """A bound was reached before the end: a decompression bomb, a body over its cap, a window too large."""


class CancelledError(LayerCacheError):
    """The caller's ``cancel`` event was set. Nothing half done is visible."""


class DeadlineError(LayerCacheError, TimeoutError):
    """The caller's ``timeout`` passed. Nothing half done is visible."""

    retryable = True


class NamespacePurgedError(LayerCacheError):
    """The generation this handle belongs to was purged. A new handle starts a new, empty generation."""


class InUseError(LayerCacheError):
    """Somebody holds the object (an open reader or a writer). ``holders`` are process ids, where known."""

    retryable = True

    def __init__(self, what: str, *, holders: tuple[int, ...] = (), hint: str = "") -> None:
        self.holders = holders
        super().__init__(what, hint=hint)


class StoreError(LayerCacheError):
    """The store cannot do it. ``reason`` is one stable word (``full``, ``read-only``, ``failing``, ...)."""

    reason = "failing"


class NoSpaceError(StoreError):
    """No room on the disk or in the budget."""

    retryable = True
    reason = "full"


class ReadOnlyError(StoreError):
    """The root cannot be written."""

    reason = "read-only"


class UnsafeRootError(StoreError):
    """The root is not safe to use: its owner, mode, kind or filesystem is wrong."""

    reason = "unsafe"


class FormatError(StoreError):
    """The root, or an entry in it, is of a format this version does not read."""

    reason = "format"


class StoreClosedError(StoreError):
    """The handle was closed, or belongs to the parent of a forked process."""

    reason = "closed"


class SealError(StoreError):
    """A namespace cannot be sealed, or its key cannot be had: the extra is missing, swap is on, there is no tmpfs."""

    reason = "seal"


class KeyGoneError(SealError):
    """The key of a sealed namespace is gone, by a reboot as a rule: its content is erased, the next use begins anew."""


class KmsError(SealError):
    """The key service does not give the key of a sealed namespace. ``code`` is the service's own word for it.

    ``retryable`` where it is away or asks to wait; else the key is disabled, gone, another one, or not for us.
    """

    reason = "kms"

    def __init__(self, what: str, *, code: str = "", retryable: bool = False, hint: str = "") -> None:
        self.code = code
        self.retryable = retryable
        super().__init__(what, hint=hint)


class RegistryError(LayerCacheError):
    """The registry answered with an error. ``status`` is the HTTP status, ``code`` the OCI error code, if any."""

    def __init__(self, what: str, *, host: str = "", status: int | None = None, code: str = "", hint: str = "") -> None:
        self.host = host
        self.status = status
        self.code = code
        super().__init__(what, hint=hint)

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """True for answers that a later try may change (5xx, 408, 429, no answer)."""
        return self.status is None or self.status in (408, 429) or self.status >= 500


class UnauthorizedError(RegistryError):
    """No credentials, or wrong ones (401)."""


class DeniedError(RegistryError):
    """The credentials are known but not allowed to do this (403)."""


class RateLimitedError(RegistryError):
    """Too many requests (429). ``retry_after`` is in seconds where the registry named it."""

    def __init__(
        self, what: str, *, host: str = "", status: int | None = 429, code: str = "", retry_after: float | None = None
    ) -> None:
        self.retry_after = retry_after
        super().__init__(what, host=host, status=status, code=code, hint="try later")


class UnreachableError(RegistryError):
    """No usable answer: name not resolved, connection refused or lost, TLS failed, nothing arrived in time."""


class PolicyError(RegistryError):
    """Refused by us: the registry pointed somewhere it must not (a redirect, a token realm)."""

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """Never: the same answer will be refused again."""
        return False


def _shorten(value: object, limit: int = 120) -> str:
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
