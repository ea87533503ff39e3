"""Training with tiled loss and tiled MLPs on a ring of two equals one process without tiles, on every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.parity import MODELS, NUM_STEPS, Cell, run_cell, train_on_ranks
from tests.pool import WorkerPool

pytestmark = pytest.mark.slow

MODEL = MODELS["llama"]
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


class Work(TorchDispatchMode):
    """Counts the tiles of logits and of MLP activations that matrix products compute, and collectives that gather."""

    num_logits = num_activations = num_gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.num_logits += output.shape[-1] == MODEL.vocab_size
            self.num_activations += output.shape[-1] == 2 * MODEL.mlp_size
        self.num_gathers += func.overloadpacket == torch.ops.c10d._allgather_base_  # ZeRO-3's, of parameters
        return output


def work_of(cell: Cell) -> tuple[int, int, int]:
    """On each rank."""
    with Work() as work:
        train_on_ranks(cell)
    return work.num_logits, work.num_activations, work.num_gathers


def test_each_micro_batch_is_tiled_and_zero_3_gathers_once_for_all_tiles(pool: WorkerPool):
    """A rank's 32 tokens of a micro-batch are 3 or 8 tiles, and the loss halves the last one.

    The backward pass computes an MLP's activations again.
    """
    few, many = (Cell("fp32", 3, 2, 1, 2, 29, tile_tokens=tokens) for tokens in (TILE, TILE // 3))
    (few_work, other_rank), (many_work, _) = (pool.run(work_of, cell, num_ranks=2) for cell in (few, many))
    assert few_work == other_rank
    micro_batches = NUM_STEPS * few.accumulation_steps
    assert few_work[:2] == (micro_batches * (3 + 1), micro_batches * MODEL.num_layers * 3 * 2)
    assert many_work[:2] == (micro_batches * (8 + 1), micro_batches * MODEL.num_layers * 8 * 2)
    assert few_work[2] == many_work[2] > 0
