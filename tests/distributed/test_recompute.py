"""Layers recomputed in the backward pass: bit-equal to layers that are saved, and without attention's messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as torch_dist

from ring_attention.kernels.cpu_flash import CpuFlashKernel
from tests.distributed.parity import NUM_STEPS, Cell, Trained, train_on_ranks
from tests.pool import WorkerPool
from tests.unit.test_recompute import HostCopies

pytestmark = pytest.mark.slow

NUM_LAYERS = 2  # of parity's models


def trained_with_every_policy(cell: Cell) -> tuple[list[Trained], list[int], list[int]]:
    """On each rank, for "none", "selective" and "full": the results, forward kernel calls, and messages of the ring."""
    results, kernel_calls, messages = [], [], []
    forward, exchange = CpuFlashKernel.forward, torch_dist.batch_isend_irecv

    def counting_forward(*arguments: Any) -> Any:
        kernel_calls[-1] += 1
        return forward(*arguments)

    def counting_exchange(operations: Any) -> Any:
        messages[-1] += len(operations)
        return exchange(operations)

    with (
        patch.object(CpuFlashKernel, "forward", counting_forward),
        patch.object(torch_dist, "batch_isend_irecv", counting_exchange),
    ):
        for recompute in ("none", "selective", "full"):
            kernel_calls.append(0)
            messages.append(0)
            results.append(train_on_ranks(replace(cell, recompute=recompute)))
    return results, kernel_calls, messages


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
    ranks = pool.run(trained_with_every_policy, cell, num_ranks=cell.num_ranks)
    for (saved, *others), (once, selective, full), messages in ranks:
        for other in others:
            assert (other.losses, other.grad_norms) == (saved.losses, saved.grad_norms)
            for name, gradient in saved.gradients.items():
                assert torch.equal(other.gradients[name], gradient), name
            for name, parameter in saved.parameters.items():
                assert torch.equal(other.parameters[name], parameter), name
        assert once >= NUM_STEPS * cell.accumulation_steps * NUM_LAYERS
        assert (selective, full) == (once, 2 * once)
        assert messages[0] == messages[1]
        assert (messages[2] > messages[1]) == (cell.ring_degree > 1 and cell.method != "all_gather")


def trained_with_and_without_offload(cell: Cell) -> tuple[list[Trained], int]:
    """On each rank: the results, and the number of tensors that returned from the host."""
    without = train_on_ranks(replace(cell, offload_activations=False))
    with HostCopies() as copies:
        results = [without, train_on_ranks(replace(cell, offload_activations=True))]
    return results, copies.num_back


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
