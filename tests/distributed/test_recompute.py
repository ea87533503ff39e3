"""Layers computed again in the backward pass: bit-equal to layers that are kept, and without attention's messages."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from ring_attention import gather, ring
from tests.distributed.parity import NUM_STEPS, Cell, Trained, train_on_ranks
from tests.pool import WorkerPool

NUM_LAYERS = 2  # of parity's models


def trained_in_every_way(cell: Cell) -> tuple[list[Trained], list[int]]:
    """On each rank, with "none", "selective" and "full": what came out, and how often attention was computed."""
    results, counts = [], []
    for recompute in ("none", "selective", "full"):
        with (
            patch.object(ring, "ring_forward", wraps=ring.ring_forward) as over_ring,
            patch.object(gather, "attend_forward", wraps=gather.attend_forward) as gathered,
        ):
            results.append(train_on_ranks(replace(cell, recompute=recompute)))
        counts.append(over_ring.call_count + gathered.call_count)
    return results, counts


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell("fp32", stage, 2, 1, 2, 29) for stage in (0, 1, 2, 3)),
        Cell("bf16", 3, 2, 1, 1, 29),
        Cell("fp32", 3, 2, 1, 1, 29, model="gpt"),
        Cell("fp32", 1, 1, 1, 1, 29, method="ulysses", ulysses_degree=2),
        Cell("fp32", 1, 2, 1, 1, 29, method="hybrid", ulysses_degree=2),
        Cell("fp32", 2, 2, 1, 1, 29, method="all_gather"),
    ],
    ids=str,
)
def test_gradients_are_bit_equal_and_selective_computes_attention_once(pool: WorkerPool, cell: Cell):
    for (kept, *others), counts in pool.run(trained_in_every_way, cell, num_ranks=cell.num_ranks):
        for other in others:
            assert (other.losses, other.grad_norms) == (kept.losses, kept.grad_norms)
            for name, gradient in kept.gradients.items():
                assert torch.equal(other.gradients[name], gradient), name
            for name, parameter in kept.parameters.items():
                assert torch.equal(other.parameters[name], parameter), name
        once = NUM_STEPS * cell.accumulation_steps * NUM_LAYERS
        assert counts == [once, once, 2 * once]
