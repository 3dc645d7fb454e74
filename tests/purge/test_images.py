"""What a purge leaves on the device."""

from __future__ import annotations

import pytest

from tests.crash import loopfs, sweeps


@pytest.mark.parametrize("filesystem", sorted(loopfs.FILESYSTEMS))
@pytest.mark.timeout(1800 if sweeps.SOAK else 120)
def test_a_receipt_says_no_more_than_the_device_shows(filesystem, record_property):
    """Nothing in the tree, in open files and maps; nothing on the device once that is trimmed."""
    if why := loopfs.unavailable(filesystem):
        pytest.skip(why)
    rounds = "100" if sweeps.SOAK else "3"
    sweeps.finish([sweeps.start("tests.purge.images", filesystem, "--rounds", rounds)], record_property)


@pytest.mark.parametrize("filesystem", sorted(loopfs.FILESYSTEMS))
@pytest.mark.timeout(7200 if sweeps.SOAK else 120)
def test_a_dump_from_before_the_purge_of_a_sealed_namespace_cannot_be_read_after_it(filesystem, record_property):
    """It could before, with the key; then neither the library nor what is left of the key opens a record of it."""
    if why := loopfs.unavailable(filesystem):
        pytest.skip(why)
    rounds = "500" if sweeps.SOAK else "2"
    sweeps.finish([sweeps.start("tests.purge.dumps", filesystem, "--rounds", rounds)], record_property)
