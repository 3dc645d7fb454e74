"""Descriptors: the arrows between OCI documents (image-spec descriptor.md)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from layercache.errors import IntegrityError, InvalidDescriptorError, InvalidError, LimitError
from layercache.oci import _ijson
from layercache.oci._digest import Digest
from layercache.oci._media import MediaType
from layercache.oci._platform import Platform

__all__ = ["MAX_SIZE", "Annotations", "Descriptor"]

MAX_SIZE = (1 << 63) - 1
"""Largest size a descriptor can state."""


class Annotations(Mapping[str, str]):
    """Texts by name. Unlike a ``dict`` it does not change, has a hash and can be sent to another process."""

    __slots__ = ("_texts",)

    def __init__(self, texts: Mapping[str, str] | None = None) -> None:
        self._texts = dict(texts or {})

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __hash__(self) -> int:
        return hash(frozenset(self._texts.items()))

    def __repr__(self) -> str:
        return f"Annotations({self._texts!r})"

    @classmethod
    def parse(cls, value: object, where: str, error: type[InvalidError]) -> Annotations:
        """Annotations of a JSON object whose values are all texts; absent and null are empty."""
        if value is None:
            return _NONE
        texts = _ijson.members(value, where, error)
        if not all(isinstance(text, str) for text in texts.values()):
            raise error(f"{where} holds a value that is not a string")
        return cls({name: str(text) for name, text in texts.items()})


_NONE = Annotations()


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a blob is, what its bytes hash to, and how many there are.

    ``size`` is a promise to check, not a number to allocate. ``data`` holds the blob itself where the descriptor
    embeds it (already verified). ``urls`` are other places that may have it; nothing here fetches from them.
    """

    media_type: MediaType
    digest: Digest
    size: int
    platform: Platform | None = field(default=None, kw_only=True)
    annotations: Mapping[str, str] = field(default=_NONE, kw_only=True)
    urls: tuple[str, ...] = field(default=(), kw_only=True)
    data: bytes | None = field(default=None, kw_only=True, repr=False)
    artifact_type: MediaType | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 0 <= self.size <= MAX_SIZE:
            raise InvalidDescriptorError("size is not an integer from 0 to 2^63-1", value=self.size)
        if not isinstance(self.annotations, Annotations):
            object.__setattr__(self, "annotations", Annotations(self.annotations))

    @classmethod
    def parse(cls, value: object, *, where: str = "descriptor") -> Descriptor:
        """Descriptor of a JSON object, parsed. Members it does not know are ignored. ``where`` names it in errors.

        :raises InvalidDescriptorError: if a member is missing or wrong.
        :raises UnsupportedError: if the digest is of another algorithm than sha256 and sha512.
        :raises IntegrityError: if the embedded ``data`` is not what size and digest say.
        :raises LimitError: if the embedded ``data`` is longer than 4 MiB.
        """
        error = InvalidDescriptorError
        fields = _ijson.members(value, where, error)
        urls = _ijson.sequence(fields.get("urls"), f"urls of {where}", error)
        platform = fields.get("platform")
        try:
            found = cls(
                MediaType.parse(_ijson.text(fields.get("mediaType"), f"mediaType of {where}", error)),
                Digest.parse(_ijson.text(fields.get("digest"), f"digest of {where}", error)),
                fields.get("size"),  # type: ignore[arg-type]  # the constructor decides
                platform=None if platform is None else Platform.of(platform),
                annotations=Annotations.parse(fields.get("annotations"), f"annotations of {where}", error),
                urls=tuple(_ijson.text(url, f"urls of {where}", error) for url in urls),
                artifact_type=media_type(fields.get("artifactType"), f"artifactType of {where}", error),
            )
        except InvalidError as reason:
            raise error(f"{where} is not a descriptor: {reason}") from reason
        data = _ijson.text(fields.get("data"), f"data of {where}", error)
        return found if fields.get("data") is None else found._with(data, where)

    def to_json(self) -> dict[str, object]:
        """Object of the image-spec, without the members that are empty."""
        found: dict[str, object] = {
            "mediaType": str(self.media_type),
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.urls:
            found["urls"] = list(self.urls)
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.data is not None:
            found["data"] = base64.b64encode(self.data).decode()
        if self.artifact_type is not None:
            found["artifactType"] = str(self.artifact_type)
        if self.platform is not None:
            found["platform"] = self.platform.to_json()
        return found

    def _with(self, encoded: str, where: str) -> Descriptor:
        if len(encoded) > -(-_ijson.MAX_BYTES // 3) * 4:
            raise LimitError(f"data of {where} is longer than {_ijson.MAX_BYTES} bytes")
        try:
            data = base64.b64decode(encoded.encode(), validate=True)
        except (ValueError, binascii.Error) as reason:
            raise InvalidDescriptorError(f"data of {where} is not base64") from reason
        if len(data) != self.size:
            raise IntegrityError("wrong size of data", digest=self.digest, expected=self.size, actual=len(data))
        actual = Digest.of(data, algorithm=self.digest.algorithm)
        if actual != self.digest:
            raise IntegrityError("wrong data", digest=self.digest, expected=self.digest, actual=actual)
        return Descriptor(
            self.media_type,
            self.digest,
            self.size,
            platform=self.platform,
            annotations=self.annotations,
            urls=self.urls,
            data=data,
            artifact_type=self.artifact_type,
        )


def media_type(value: object, where: str, error: type[InvalidError]) -> MediaType | None:
    """Media type of an optional member; absent, null and empty are ``None``, which is how Go leaves it out."""
    text = _ijson.text(value, where, error)
    try:
        return MediaType.parse(text) if text else None
    except InvalidError as reason:
        raise error(f"{where} is refused: {reason}") from reason
