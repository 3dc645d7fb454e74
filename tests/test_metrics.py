"""The ledger of an operation."""

from concurrent.futures import ThreadPoolExecutor

from layercache.metrics import Ledger


def test_ledger_counts_requests_and_bytes_by_source():
    """Counts are right from several threads."""
    ledger = Ledger()

    def work(host: str) -> None:
        for _ in range(500):
            ledger.request()
            ledger.received(host, 3)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, ["a", "b", "a", "b"]))

    assert ledger.requests == 2000
    assert ledger.bytes_fetched == 6000
    assert ledger.bytes_by_source == {"a": 3000, "b": 3000}


def test_ledger_adds_the_time_of_a_span_even_when_it_fails():
    """A stage that raised took its time too."""
    ledger = Ledger()
    try:
        with ledger.span("wire"):
            raise KeyError
    except KeyError:
        pass
    ledger.add("wire", 1.0)

    assert 1.0 <= ledger.seconds_by_stage["wire"] < 2.0
    assert ledger.seconds >= 0
