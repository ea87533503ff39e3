"""The teaching ring of the docs against plain attention in one process, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from docs.teaching_ring import TeachingRing, positions_of
from tests.pool import WorkerPool

LENGTH = 24  # a multiple of twice the ranks


def draw() -> list[Tensor]:
    """q, k, v and dout of the global sequence, [B, H, L, D]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, LENGTH, 8, dtype=torch.float64, generator=generator) for _ in range(4)]


def attention_on_rank(zigzag: bool) -> list[Tensor]:
    """On each rank: its positions, and out, dq, dk and dv of its tokens."""
    positions = positions_of(dist.get_rank(), dist.get_world_size(), LENGTH, zigzag)
    q, k, v, dout = (tensor[:, :, positions] for tensor in draw())
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = TeachingRing.apply(*leaves, positions)
    gradients = torch.autograd.grad(out, leaves, dout)
    return [positions, out.detach(), *gradients]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("zigzag", [True, False])
def test_the_teaching_ring_equals_plain_attention(pool: WorkerPool, num_ranks: int, zigzag: bool):
    *leaves, dout = draw()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    expected = [out, *torch.autograd.grad(out, leaves, dout)]
    ranks = pool.run(attention_on_rank, zigzag, num_ranks=num_ranks)
    order = torch.cat([positions for positions, *_ in ranks]).argsort()
    for index, tensor in enumerate(expected, 1):
        got = torch.cat([rank[index] for rank in ranks], dim=2)[:, :, order]
        torch.testing.assert_close(got, tensor, rtol=1e-12, atol=1e-12)
