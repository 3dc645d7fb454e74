"""Each seeded bug of the protocol is caught: without this the other figures mean little."""

from __future__ import annotations

import pytest

from tests.crash import sweeps
from tests.mutants.mutants import MUTANTS

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_of_the_protocol_is_caught(mutant, record_property):
    """The simulation finds it; the line at the end of the run says by what."""
    hunt = sweeps.start("tests.mutants.hunt", mutant.name)
    out, err = hunt.communicate()

    record_property(
        "coverage", f"mutant: {mutant.name}: {out.strip().splitlines()[-1][:100] if out.strip() else err[-100:]}"
    )
    assert hunt.returncode == 0, f"python -m tests.mutants.hunt '{mutant.name}'\n{out}\n{err}"


def test_there_are_enough_bugs():
    """At least twenty, each with a name of its own."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
