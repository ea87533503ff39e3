"""A few of the random cases; `python -m tests.tools.fuzz` runs a thousand."""

import pytest

from tests.pool import WorkerPool
from tests.tools.fuzz import fuzz

pytestmark = pytest.mark.slow


def test_random_cases_equal_whole_attention(pool: WorkerPool):
    passed = []
    fuzz(pool, num_cases=60, most_ranks=4, seed=1, done=passed.append)
    assert len(passed) >= 60
