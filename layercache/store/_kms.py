"""Keys of sealed namespaces that are wrapped by a key of AWS KMS. The only module that asks KMS.

boto3 is imported when it is asked for the first time: it takes a third of a second and some 30 MiB.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from layercache.control import Control
from layercache.errors import KmsError

__all__ = ["KmsKey"]

_PATIENCE = 4.0
"""Seconds that a question to KMS takes at most, with the search for credentials and for the address."""

_LOOK = 0.05

_QUIET = 30.0
"""Seconds in which a question that failed is not asked again: a miss must not wait for a service that is away."""

_LATER = frozenset(
    (
        *("ThrottlingException", "Throttling", "LimitExceededException", "RequestLimitExceeded"),
        *("KMSInternalException", "DependencyTimeoutException", "KeyUnavailableException", "ServiceUnavailable"),
    )
)


# A forked child has its locks anew: another thread of the parent may have held one.
_forked: weakref.WeakSet[KmsKey] = weakref.WeakSet()


def _after_fork() -> None:
    for key in list(_forked):
        key._lock = threading.Lock()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)


class KmsKey:
    """A symmetric key of AWS KMS, under which the keys of namespaces with ``seal="kms"`` are wrapped.

    :param key: id, ARN or alias. Default: ``LAYERCACHE_KMS_KEY``. What another key has wrapped is not opened, so an
        alias that is moved to another key makes what was sealed before unreadable.
    :param session: a ``boto3.Session`` with credentials for it; else ``profile``, else boto3's default chain.
    :param region: of the key. Default: the ARN's, else the session's.
    :param endpoint: URL of the KMS API where it is not the region's own.
    """

    def __init__(
        self, key: str = "", *, session: Any = None, profile: str = "", region: str = "", endpoint: str = ""
    ) -> None:
        if session is not None and profile:
            raise ValueError("give a session or a profile, not both")
        self._key = key or os.environ.get("LAYERCACHE_KMS_KEY", "")
        self._session = session
        self._profile = profile
        parts = self._key.split(":")
        self._region = region or (parts[3] if self._key.startswith("arn:") and len(parts) > 5 else "")
        self._endpoint = endpoint
        self._lock = threading.Lock()
        _forked.add(self)
        self._failed: dict[bytes | None, tuple[float, KmsError]] = {}

    def generate(self, context: Mapping[str, str], control: Control | None = None) -> tuple[bytearray, bytes]:
        """Return a new key of 32 bytes, in clear and wrapped.

        Blocks for four seconds at most, and for half of what is left of the caller's time: the other half is for a pull
        that goes past the cache.

        :raises KmsError: when KMS does not give one.
        """
        answer = self._ask(
            b"",
            lambda client: client.generate_data_key(
                KeyId=self._key, KeySpec="AES_256", EncryptionContext=dict(context)
            ),
            control or Control(),
        )
        return bytearray(answer["Plaintext"]), bytes(answer["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, context: Mapping[str, str], control: Control | None = None) -> bytearray:
        """Return a key in clear. Blocks as :meth:`generate` does.

        :raises KmsError: when KMS does not give it.
        """
        answer = self._ask(
            wrapped,
            lambda client: client.decrypt(CiphertextBlob=wrapped, KeyId=self._key, EncryptionContext=dict(context)),
            control or Control(),
        )
        return bytearray(answer["Plaintext"])

    def __repr__(self) -> str:
        return "KmsKey()"

    def _ask(self, about: bytes, question: Callable[[Any], Any], control: Control) -> Any:
        if not self._key:
            raise KmsError("no KMS key is named", hint="LayerCache(kms=KmsKey(...)), or LAYERCACHE_KMS_KEY")
        now = time.monotonic()
        with self._lock:
            self._failed = {what: kept for what, kept in self._failed.items() if now < kept[0]}
            known = self._failed.get(None) or self._failed.get(about)
        if known is not None:
            error = known[1]
            raise KmsError(error.what, code=error.code, retryable=error.retryable, hint=error.hint)
        patience = min(_PATIENCE, control.remaining(2 * _PATIENCE) / 2)
        try:
            return self._aside(question, patience, control)
        except KmsError as error:
            # That it did not answer somebody who is in a hurry says nothing to others.
            if error.code != "timeout" or patience >= _PATIENCE:
                with self._lock:
                    # What fails for a while fails for every key.
                    self._failed[None if error.retryable else about] = (time.monotonic() + _QUIET, error)
            raise

    def _aside(self, question: Callable[[Any], Any], patience: float, control: Control) -> Any:
        """Ask in a thread of its own: boto3's own limits leave out the address and the credentials."""
        done: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                with contextlib.closing(self._client()) as client:
                    done.put((question(client), None))
            except Exception as error:  # noqa: BLE001 - whatever boto3 and its chain of credentials raise
                done.put((None, error))

        threading.Thread(target=run, name="layercache-kms", daemon=True).start()
        end = time.monotonic() + patience
        while True:
            control.checkpoint()
            try:
                answer, error = done.get(timeout=max(0.0, min(_LOOK, end - time.monotonic())))
                break
            except queue.Empty:
                if time.monotonic() >= end:
                    raise KmsError("KMS does not answer", code="timeout", retryable=True) from None
        if error is not None:
            raise _refusal(error) from None
        return answer

    def _client(self) -> Any:
        import boto3  # noqa: PLC0415 - see the top
        from botocore.config import Config  # noqa: PLC0415

        config = Config(connect_timeout=2, read_timeout=3, retries={"total_max_attempts": 2, "mode": "standard"})
        with self._lock:  # sessions of boto3 make one client at a time
            if self._session is None:
                self._session = boto3.Session(profile_name=self._profile or None)
            # AWS's other tools read AWS_REGION, boto3 does not.
            region = self._region or self._session.region_name or os.environ.get("AWS_REGION")
            return self._session.client("kms", region_name=region, endpoint_url=self._endpoint or None, config=config)


def _refusal(error: Exception) -> KmsError:
    """Say what boto3 said, without what AWS wrote into it: names of accounts and keys."""
    from botocore.exceptions import ClientError, HTTPClientError  # noqa: PLC0415 - see the top
    from botocore.exceptions import ConnectionError as Unreachable  # noqa: PLC0415

    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", "")) or "unknown"
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return KmsError(
            f"KMS refused: {code}",
            code=code,
            retryable=code in _LATER or status >= 500,
            hint=_HINTS.get(code, ""),
        )
    away = isinstance(error, HTTPClientError | Unreachable)
    hint = "" if away else "give the process credentials and a region for KMS"
    return KmsError(f"KMS cannot be asked: {type(error).__name__}", code="unreachable", retryable=away, hint=hint)


_HINTS = {
    "AccessDeniedException": "allow kms:GenerateDataKey and kms:Decrypt",
    "DisabledException": "enable the key, or purge the namespace to begin anew",
    "IncorrectKeyException": "name the key that wrapped it, or purge the namespace to begin anew",
    "InvalidCiphertextException": "the record of the key is damaged or of another root; purge the namespace",
    "KMSInvalidStateException": "the key is to be deleted; purge the namespace to begin anew under another",
    "NotFoundException": "name a key that is there",
}
