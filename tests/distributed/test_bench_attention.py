"""What calls take of the energy of GPUs, by a counter of the test's own."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import deepspeed.comm as dist
import pytest
import torch

from recipes.benchmark import bench_attention
from recipes.benchmark.candidates import Candidate
from tests.pool import WorkerPool

CALL_S, JOULES = 0.02, 5.0


def slower_by_rank() -> dict[str, Any]:
    """Of rank 1 a call takes twice the time and three times the energy of rank 0's."""
    spent, rank = [0.0], dist.get_rank()

    def call() -> None:
        time.sleep(CALL_S * (1 + rank))
        spent[0] += JOULES * (1 + 2 * rank)

    candidate = Candidate("sleep", "", call, call, 1.0)
    with patch.object(bench_attention, "AT_LENGTH_S", 10 * 2 * CALL_S):  # other tests have the same process
        return bench_attention._at_length(candidate, torch.device("cpu"), lambda: spent[0])


def test_energy_is_of_one_call_and_power_of_its_time(pool: WorkerPool):
    first, second = pool.run(slower_by_rank, num_ranks=2)
    assert first == second
    assert 5 <= first["calls"] <= 10  # the sleeps may be longer, never shorter
    assert first["ms"] >= 2e3 * CALL_S
    assert first["joules"] == pytest.approx((JOULES, 3 * JOULES))
    least, most = first["watts"]
    assert most == pytest.approx(3 * JOULES / (first["ms"] / 1e3))
    assert least <= JOULES / CALL_S
