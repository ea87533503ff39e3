"""A few of the faults of `python -m tests.tools.faults`, which injects all of them, more often."""

from __future__ import annotations

import os

import pytest

from tests.tools.faults import FAULTS, run_fault

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["stall", "loss", "disk", "shm", "port", "all_damaged"])
def test_a_fault_loses_nothing_and_gives_at_most_one_error(name: str):
    fault = FAULTS[name]
    if fault.needs_root and os.geteuid():
        pytest.skip("mounts little disks, which takes root")
    row = run_fault(name, seed=0, tries=1)
    assert row["survived"] == row["tried"] == fault.times, row["errors"]
