"""A run that goes on with other methods, layouts and degrees, on another number of ranks, with another ZeRO stage.

The parameters that it begins with are those that were saved, bit for bit; its losses are those of the run that
was never interrupted, up to rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import WorkerPool
from tests.tools.elastic import TRANSITIONS, Grid, go_on


@pytest.mark.parametrize(("before", "after", "dtype"), TRANSITIONS)
def test_another_grid_goes_on_where_the_other_was(
    pool: WorkerPool, tmp_path: Path, before: Grid, after: Grid, dtype: str
):
    go_on(pool, tmp_path, before, after, dtype)
