"""Resuming with other methods, layouts, degrees, numbers of ranks and ZeRO stages.

Parameters are loaded bit for bit. Losses equal those of an uninterrupted run up to rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import WorkerPool
from tests.tools.elastic import TRANSITIONS, Grid, resume_on

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("before", "after", "dtype"), TRANSITIONS)
def test_another_grid_resumes(pool: WorkerPool, tmp_path: Path, before: Grid, after: Grid, dtype: str):
    resume_on(pool, tmp_path, before, after, dtype)
