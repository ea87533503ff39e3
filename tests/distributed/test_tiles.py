"""Training with the loss tile by tile equals one process that has all logits: every ZeRO stage, a ring of two."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from recipes import head
from tests.distributed.parity import NUM_STEPS, Cell, Trained, run_cell, train_on_ranks
from tests.pool import WorkerPool

TILE = 12  # of 2 x 16 tokens on each of two ranks: the last tile has 8


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell("fp32", stage, 2, 1, 2, 29, tile_tokens=TILE) for stage in (0, 1, 2, 3)),
        *(Cell("fp32", stage, 2, 1, 1, 29, model="gpt", tile_tokens=TILE) for stage in (1, 3)),  # the tied head
        Cell("bf16", 3, 2, 1, 1, 29, tile_tokens=TILE),
        Cell("bf16", 0, 2, 1, 2, 29, model="gpt", tile_tokens=TILE),
    ],
    ids=str,
)
def test_training_tile_by_tile_equals_one_process_with_all_logits(pool: WorkerPool, cell: Cell):
    outcome = run_cell(pool, cell)
    assert outcome.passes, outcome


def tiles_of(cell: Cell) -> tuple[Trained, int]:
    """On each rank: what came out, and how many tiles were computed."""
    with patch.object(head, "_tile", wraps=head._tile) as tile:
        return train_on_ranks(cell), tile.call_count


def test_each_micro_batch_comes_in_tiles(pool: WorkerPool):
    cell = Cell("fp32", 3, 2, 1, 2, 29, tile_tokens=TILE)
    for _, num_tiles in pool.run(tiles_of, cell, num_ranks=cell.num_ranks):
        assert num_tiles == NUM_STEPS * cell.accumulation_steps * 3
