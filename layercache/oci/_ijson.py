"""JSON from a stranger, read as I-JSON (RFC 7493; image-spec considerations.md) within bounds.

The bounds are checked on the raw bytes, before a parser sees them.
"""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from layercache.errors import InvalidError, InvalidManifestError, LimitError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "loads", "members", "sequence", "text"]

MAX_BYTES = 4 << 20
"""Bytes of a manifest, index or config: what registries themselves allow (ECR: 4,194,304)."""

MAX_DEPTH = 64
"""Levels of nested objects and arrays."""

_MAX_NODES = 1 << 16  # objects and arrays; each costs a hundred times its two bytes
_MAX_INTEGER = 20  # digits of the largest 64-bit integer
_MAX_NUMBER = 64  # characters of any other number

# A string to its end, or to the end of the text if it has none. Possessive, so that no input makes it try again.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_SQUARE = bytes.maketrans(b"{}", b"[]")
_OTHER = bytes(set(range(256)) - set(b"[]{}"))


def loads(raw: bytes, what: str) -> object:
    """Value of one JSON document. ``what`` names it in errors.

    :raises LimitError: over 4 MiB, 64 levels or 65,536 objects and arrays.
    :raises InvalidManifestError: if it is not I-JSON: syntax, invalid UTF-8, a repeated name, a lone surrogate, NaN or
        Infinity, a number beyond 64 bits or a double.
    """
    if not isinstance(raw, bytes):
        raise InvalidManifestError(f"the {what} is not given as bytes", value=type(raw).__name__)
    if len(raw) > MAX_BYTES:
        raise LimitError(f"the {what} is longer than {MAX_BYTES} bytes")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _bound(raw, what)
    try:
        value: object = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        # Only an escape can bring in half a surrogate pair; encoding finds it wherever it is.
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InvalidManifestError(f"the {what} is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InvalidManifestError(f"the {what} holds half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise InvalidManifestError(f"the {what} is not JSON at character {error.pos}: {error.msg}") from error
    except InvalidManifestError as error:
        raise InvalidManifestError(f"the {what} is refused: {error}") from None
    return value


def _bound(raw: bytes, what: str) -> None:
    # Which kind closes which is the parser's question; here both kinds are one.
    brackets = _STRING.sub(b"", raw).translate(_SQUARE, _OTHER)
    if brackets.count(b"[") > _MAX_NODES:
        raise LimitError(f"the {what} has more than {_MAX_NODES} objects and arrays")
    for _ in range(MAX_DEPTH):  # each round takes away exactly one level, the innermost
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise InvalidManifestError(f"the {what} is nested deeper than {MAX_DEPTH} levels, or is cut short")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidManifestError("a name occurs twice in one object", value=name)
            seen.add(name)
    return found


def _integer(literal: str) -> int:
    # Before int(): the time it takes grows with the square of the length.
    value = int(literal) if len(literal) <= _MAX_INTEGER else None
    if value is None or not -(1 << 63) <= value < 1 << 64:
        raise InvalidManifestError("an integer beyond 64 bits", value=literal[:_MAX_NUMBER])
    return value


def _number(literal: str) -> float:
    value = float(literal) if len(literal) <= _MAX_NUMBER else math.inf
    if math.isinf(value):
        raise InvalidManifestError("a number beyond a double", value=literal[:_MAX_NUMBER])
    return value


def _constant(literal: str) -> NoReturn:
    raise InvalidManifestError("not a JSON number", value=literal)


def members(value: object, where: str, error: type[InvalidError]) -> dict[str, object]:
    """Members of a JSON object; ``where`` names it in the error."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise error(f"{where} is not an object")
    return value


def sequence(value: object, where: str, error: type[InvalidError]) -> list[object]:
    """Elements of a JSON array; absent and null are empty, which is how Go writes an empty list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise error(f"{where} is not an array")
    return value


def text(value: object, where: str, error: type[InvalidError]) -> str:
    """Text of a JSON string; absent and null are empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise error(f"{where} is not a string")
    return value
