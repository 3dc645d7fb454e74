"""Law: what a fetch delivers is a run of the blob from its offset on, whatever the registry does."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from layercache.errors import LayerCacheError
from layercache.registry import _flow
from layercache.registry._effects import LostError, Send
from layercache.registry._flow import fetch
from tests.registry_script import REPOSITORY, SITE, Reply, Script, asked_range, blob

DATA = bytes(range(251)) * 5
BLOB = blob(DATA)
SIZE = len(DATA)


@dataclass(frozen=True)
class Turn:
    """How the registry answers one request: ``ranges`` it knows, where it breaks off, and how it lies."""

    ranges: bool
    cut: int | None
    lie: str
    pieces: int


TURN = st.builds(
    Turn,
    ranges=st.booleans(),
    cut=st.none() | st.integers(0, SIZE),
    lie=st.sampled_from(
        ["", "", "", "later", "total", "missing", "416", "404", "500", "short", "long", "lost", "coded", "less"]
    ),
    pieces=st.sampled_from([1, 7, 100, SIZE]),
)


def answer(turn: Turn, send: Send) -> Reply | LostError:
    asked = asked_range(send)
    assert asked is None or 0 <= asked[0] <= asked[1] < SIZE
    if turn.lie == "lost":
        return LostError("nothing")
    if turn.lie in ("404", "500", "416"):
        return Reply(int(turn.lie))
    headers = {"Content-Encoding": "gzip"} if turn.lie == "coded" else {}
    if asked is None or not turn.ranges:
        body, status = DATA, 200
        if turn.lie == "short":
            body = DATA[:-1]
        elif turn.lie == "long":
            body = DATA + b"x"
    else:
        first, last = asked
        status = 206
        if turn.lie == "later":
            first += 1
        if turn.lie == "less":
            last = (first + last) // 2
        total = SIZE + 1 if turn.lie == "total" else SIZE
        if turn.lie != "missing":
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        body = DATA[first : last + 1] + (b"x" if turn.lie == "long" else b"")
    pieces: list[bytes | LostError] = [body[n : n + turn.pieces] for n in range(0, len(body), turn.pieces)]
    if turn.cut is not None:
        pieces = [body[: turn.cut], LostError("cut")]
    return Reply(status, headers, pieces)


@given(
    st.lists(TURN, min_size=1, max_size=12),
    st.integers(0, SIZE),
    st.none() | st.integers(0, SIZE),
    st.sampled_from([1, 64, 1000, 1 << 20]),
)
def test_a_fetch_delivers_a_run_of_the_blob(turns: list[Turn], offset: int, length: int | None, piece: int) -> None:
    """In order, without a gap, without a byte too many; all of it unless there was an error."""
    end = SIZE if length is None else min(SIZE, offset + length)
    left = iter(turns)
    script = Script(lambda send: answer(next(left, turns[-1]), send), repeat=True, patience=30)
    usual, _flow.PIECE = _flow.PIECE, piece  # type: ignore[attr-defined]
    try:
        script.run(fetch(SITE, REPOSITORY, BLOB, offset=offset, length=length))
    except LayerCacheError:
        assert DATA[offset:end].startswith(script.data)
    else:
        assert script.data == DATA[offset:end]
    finally:
        _flow.PIECE = usual  # type: ignore[attr-defined]
    assert all(len(data) <= piece for data in script.delivered)
    assert len(script.sent) <= 60 * (SIZE // piece + 2)  # progress by a piece starts the count anew
