"""Training with tiled loss and tiled MLPs on a ring of two equals one process without tiles, on every ZeRO stage."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from recipes.model import head, mlp
from tests.distributed.parity import NUM_STEPS, Cell, run_cell, train_on_ranks
from tests.pool import WorkerPool

NUM_LAYERS = 2  # in parity's models
TILE = 12  # each of two ranks has 2 x 16 tokens, so the last tile has 8


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell("fp32", stage, 2, 1, 2, 29, tile_tokens=TILE) for stage in (0, 1, 2, 3)),
        *(Cell("fp32", stage, 2, 1, 1, 29, model="gpt", tile_tokens=TILE) for stage in (1, 3)),  # the tied head
        Cell("bf16", 3, 2, 1, 1, 29, tile_tokens=TILE),
        Cell("bf16", 0, 2, 1, 2, 29, model="gpt", tile_tokens=TILE),
        Cell("fp32", 3, 2, 1, 2, 29, tile_tokens=TILE, recompute="selective"),
        Cell("bf16", 1, 2, 1, 1, 29, tile_tokens=TILE, recompute="full"),
    ],
    ids=str,
)
def test_tiled_training_equals_one_process(pool: WorkerPool, cell: Cell):
    outcome = run_cell(pool, cell)
    assert outcome.passes, outcome


def count_calls(cell: Cell) -> tuple[int, int, int]:
    """On each rank: the numbers of loss tiles and MLP tiles computed, and of modules whose weights ZeRO-3 gathered."""
    with (
        patch.object(head, "_tile", wraps=head._tile) as tile,
        patch.object(mlp, "_tile_backward", wraps=mlp._tile_backward) as mlp_tile,
        patch.object(PartitionedParameterCoordinator, "fetch_sub_module", autospec=True,
                     side_effect=PartitionedParameterCoordinator.fetch_sub_module) as fetch,
    ):  # fmt: skip
        train_on_ranks(cell)
    return tile.call_count, mlp_tile.call_count, fetch.call_count


def test_each_micro_batch_is_tiled_and_zero_3_gathers_once_for_all_tiles(pool: WorkerPool):
    few, many = (Cell("fp32", 3, 2, 1, 2, 29, tile_tokens=tokens) for tokens in (TILE, TILE // 3))
    (few_counts, other_rank), (many_counts, _) = (pool.run(count_calls, cell, num_ranks=2) for cell in (few, many))
    assert few_counts == other_rank
    micro_batches = NUM_STEPS * few.accumulation_steps
    assert few_counts[:2] == (micro_batches * 3, micro_batches * NUM_LAYERS * 3)
    assert many_counts == (micro_batches * 8, micro_batches * NUM_LAYERS * 8, few_counts[2])
