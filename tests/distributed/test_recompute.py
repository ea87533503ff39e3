"""Layers recomputed in the backward pass: bit-equal to layers that are saved, and without attention's messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from recipes.model.activation_offload import ActivationOffload
from ring_attention import gather, ring
from tests.distributed.parity import NUM_STEPS, Cell, Trained, train_on_ranks
from tests.pool import WorkerPool

NUM_LAYERS = 2  # of parity's models


def trained_with_every_policy(cell: Cell) -> tuple[list[Trained], list[int]]:
    """On each rank, for "none", "selective" and "full": the results, and how often attention was computed."""
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
    for (saved, *others), counts in pool.run(trained_with_every_policy, cell, num_ranks=cell.num_ranks):
        for other in others:
            assert (other.losses, other.grad_norms) == (saved.losses, saved.grad_norms)
            for name, gradient in saved.gradients.items():
                assert torch.equal(other.gradients[name], gradient), name
            for name, parameter in saved.parameters.items():
                assert torch.equal(other.parameters[name], parameter), name
        once = NUM_STEPS * cell.accumulation_steps * NUM_LAYERS
        assert counts == [once, once, 2 * once]


def trained_with_and_without_offload(cell: Cell) -> tuple[list[Trained], int]:
    """On each rank: the results, and the number of tensors that returned from the host."""
    copy, numbers = ActivationOffload._copy, []

    def counted_copy(self: ActivationOffload, layer: Any, targets: list[torch.Tensor], sources: Any) -> None:
        numbers.append(len(targets))  # not a mock, which would hold its arguments
        copy(self, layer, targets, sources)

    with patch.object(ActivationOffload, "_copy", counted_copy):
        results = [train_on_ranks(replace(cell, offload_activations=offload)) for offload in (False, True)]
    return results, sum(number for number in numbers if number > 1)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_tensors_return_from_the_host_unchanged(pool: WorkerPool, zero_stage: int):
    cell = Cell("fp32", zero_stage, 2, 1, 2, 29, model="deep", recompute="selective")
    for (saved, offloaded), num_back in pool.run(trained_with_and_without_offload, cell, num_ranks=cell.num_ranks):
        assert (offloaded.losses, offloaded.grad_norms) == (saved.losses, saved.grad_norms)
        for name, gradient in saved.gradients.items():
            assert torch.equal(offloaded.gradients[name], gradient), name
        for name, parameter in saved.parameters.items():
            assert torch.equal(offloaded.parameters[name], parameter), name
        # from all layers but the last two: the input, and attention's out and lse
        assert num_back == NUM_STEPS * cell.accumulation_steps * (5 - 2) * 3
