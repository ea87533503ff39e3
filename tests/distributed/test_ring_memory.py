"""Working memory of a ring grows neither with layers nor with ranks. Only what autograd saves grows with layers."""

from __future__ import annotations

import pytest
import torch

from tests.pool import WorkerPool
from tests.tools.ring_memory import BATCH, HEAD_DIM, NUM_HEADS, measure_ring, peak_of_ranks

pytestmark = pytest.mark.slow

LENGTH = 512  # per rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_layers_add_what_autograd_saves_and_nothing_else(pool: WorkerPool, dtype: torch.dtype, num_ranks: int):
    one, two, four = (
        peak_of_ranks(pool.run(measure_ring, num_layers, LENGTH, dtype, num_ranks, num_ranks=num_ranks))
        for num_layers in (1, 2, 4)
    )
    queries = BATCH * LENGTH * NUM_HEADS * HEAD_DIM * dtype.itemsize
    layer = queries + one.block + BATCH * LENGTH * NUM_HEADS * 4  # out, which is the next one's q; K,V; lse in fp32
    for more, num_more in ((two, 1), (four, 3)):
        assert more.kept - one.kept == num_more * layer
        assert more.forward_peak - one.forward_peak == num_more * layer
        assert more.peak - one.peak == num_more * layer
        assert more.keys_received == one.keys_received


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_keys_and_values_of_at_most_two_ranks_are_alive(pool: WorkerPool, num_ranks: int):
    memory = peak_of_ranks(pool.run(measure_ring, 2, LENGTH, torch.bfloat16, num_ranks, num_ranks=num_ranks))
    assert 0 < memory.keys_received <= 2 * memory.block
