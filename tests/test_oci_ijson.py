"""JSON from a stranger: what is refused, within which bounds, and in how much time."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc

import pytest

from layercache.errors import InvalidManifestError, LimitError
from layercache.oci import MAX_BYTES, MAX_DEPTH
from layercache.oci._ijson import loads


def read(raw: bytes) -> object:
    return loads(raw, "document")


@pytest.mark.parametrize(
    "value",
    [{}, [], {"a": [1, -2.5, True, None, "\u00e9\U0001f600"], "b": {"a": 1}}, 2**63 - 1, -(2**63), 2**64 - 1, "x"],
)
def test_reads_what_json_writes(value: object) -> None:
    """Ordinary documents, escaped or not, come back as they were."""
    assert read(json.dumps(value).encode()) == value
    assert read(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"}",
        b"nope",
        b"{} {}",
        b"{}\0",
        b"\xef\xbb\xbf{}",
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":01}',
        b'"\t"',
        b"{}".decode().encode("utf-16"),
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"[1e999]",
        b"[-1e999]",
        b"[18446744073709551616]",
        b"[-9223372036854775809]",
        b"[0." + b"1" * 100 + b"]",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'{"x":[{"y":{"a":1,"b":2,"a":3}}]}',
        b'"\xff"',
        b'"\xed\xa0\x80"',  # a surrogate, encoded
        b'"\xc0\xaf"',  # an overlong slash
        b'"\\ud800"',
        b'"\\uDfff"',
        b'{"\\udc00\\ud800":1}',
        b'[["\\ud83d","\\ude00"]]',
    ],
)
def test_refuses_what_is_not_ijson(raw: bytes) -> None:
    """Syntax, encodings, repeated names, halves of surrogate pairs and numbers nobody agrees on."""
    with pytest.raises(InvalidManifestError, match="document"):
        read(raw)


def test_whole_surrogate_pairs_are_text() -> None:
    """An escaped character beyond the basic plane is fine; so is text that only looks like an escape."""
    assert read(b'["\\ud83d\\ude00","\\\\ud800"]') == ["\U0001f600", "\\ud800"]


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
def test_nesting_is_bounded(opening: bytes, closing: bytes) -> None:
    """64 levels are read, more and many more are refused, and no recursion limit is met."""
    levels = len(closing)
    for times in (1, MAX_DEPTH // levels):
        read(opening * times + b"0" + closing * times)
    for times in (MAX_DEPTH // levels + 1, 1000, 30_000):
        with pytest.raises(InvalidManifestError, match="nested deeper"):
            read(opening * times + b"0" + closing * times)


@pytest.mark.parametrize("raw", [b"[" * 60_000, b"[" * 50 + b"}" * 50, b'{"a":[' * 30_000, b"]" * 100 + b"[" * 100])
def test_unbalanced_brackets_are_refused_before_parsing(raw: bytes) -> None:
    """Openings without an end do not reach the parser's stack."""
    with pytest.raises(InvalidManifestError):
        read(raw)


def test_brackets_inside_strings_do_not_count() -> None:
    """Text full of brackets, quotes and backslashes is text."""
    value = {"label": "[{" * 10_000, "quotes": '\\"[' * 1000, "end": "\\"}
    assert read(json.dumps(value).encode()) == value


def test_wide_documents_are_read_flat() -> None:
    """Many siblings are not many levels."""
    value: object = [[{}, [[]]]] * 1000
    assert read(json.dumps(value).encode()) == value


def test_one_byte_over_the_cap_is_refused() -> None:
    """4 MiB are read; a byte more is an error, not a truncation, and is not parsed."""
    raw = b'"' + b"a" * (MAX_BYTES - 2) + b'"'
    assert len(str(read(raw))) == MAX_BYTES - 2
    with pytest.raises(LimitError, match="longer than 4194304 bytes"):
        read(raw + b" ")


def test_tiny_objects_do_not_multiply_memory() -> None:
    """Four mebibytes of empty objects would take a hundred times that: refused before they are made."""
    raw = b"[" + b"{}," * 1_300_000 + b"{}]"
    tracemalloc.start()
    try:
        with pytest.raises(LimitError, match="objects and arrays"):
            read(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_BYTES


def test_a_million_digits_cost_no_time() -> None:
    """The length of an integer is checked before it is converted, whatever limit the host has set."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        start = time.process_time()
        for raw in (b"1" * 1_000_000, b"-" + b"9" * 1_000_000, b"0." + b"7" * 1_000_000, b"1e" + b"9" * 1_000_000):
            with pytest.raises(InvalidManifestError, match="beyond"):
                read(raw)
        assert time.process_time() - start < 1
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.mark.parametrize(
    "unit", [b'\\"', b'"', b"\\", b'"\\', b'"[', b"[]", b'{"a":', b'"\\ud800"', b"\xff", b'""[{'], ids=repr
)
def test_hostile_repetition_is_refused_in_linear_time(unit: bytes) -> None:
    """Nothing in the check of raw bytes tries again: 4 MiB of the worst patterns take well under two seconds."""
    raw = b'["' + unit * ((MAX_BYTES - 200) // len(unit)) + b"[" * 100
    start = time.process_time()
    with pytest.raises((InvalidManifestError, LimitError)):
        read(raw)
    assert time.process_time() - start < 4


def test_only_bytes_are_read() -> None:
    """Text has lost its encoding already: refused, not guessed."""
    with pytest.raises(InvalidManifestError, match="bytes"):
        read("{}")  # type: ignore[arg-type]
