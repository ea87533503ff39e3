"""Attention alone: every rank's output and gradients against an fp64 oracle that sees the whole sequence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attention import Layout, LocalAttention, RingAttention
from tests.measure import relative_error
from tests.pool import WorkerPool, parallel_groups

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def draw(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient of a whole sequence, [2, L, 4 or 2, 16]."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]


def ring_result(
    length: int, layout_name: str, dtype: torch.dtype, block: str, batch_dim_idx: int, device: str = "cpu"
) -> list[Tensor]:
    """On one rank: its shards of out, dq, dk, dv, as [B, S, H, D]."""
    import deepspeed.comm as dist

    groups = parallel_groups(data_degree=1, ring_degree=dist.get_world_size())
    layout = Layout(layout_name, groups.ring_degree, length)
    attention = RingAttention(block, groups.get_sequence_parallel_group(), layout=layout_name)
    local = [layout.shard(tensor, groups.ring_rank, dim=1).to(device) for tensor in draw(length, dtype)]
    if batch_dim_idx == 1:
        local = [tensor.transpose(0, 1) for tensor in local]
    q, k, v, dout = local
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, batch_dim_idx)
    out.backward(dout)
    results = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return [(tensor.transpose(0, 1) if batch_dim_idx == 1 else tensor).cpu() for tensor in results]


def oracle(length: int, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, dout = (tensor.double().transpose(1, 2) for tensor in draw(length, dtype))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = F.scaled_dot_product_attention(
        leaves[0], leaves[1], leaves[2], is_causal=True, scale=1 / math.sqrt(16), enable_gqa=True
    )
    out.backward(dout)
    return [
        tensor.detach().transpose(1, 2) for tensor in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))
    ]


def check(shards: list[list[Tensor]], layout: Layout, dtype: torch.dtype) -> None:
    for name, parts, expected in zip(
        ("out", "dq", "dk", "dv"), zip(*shards, strict=True), oracle(layout.length, dtype), strict=True
    ):
        assert parts[0].dtype == dtype
        assert relative_error(layout.unshard(parts, dim=1), expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("layout_name", ["zigzag", "contiguous"])
@pytest.mark.parametrize("length", [32, 29, 3])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [(torch.float64, "reference"), (torch.float32, "auto"), (torch.bfloat16, "auto")],
    ids=["fp64", "fp32", "bf16"],
)
def test_the_ring_equals_whole_attention(pool: WorkerPool, num_ranks, layout_name, length, dtype, block):
    shards = pool.run(ring_result, length, layout_name, dtype, block, 0, num_ranks=num_ranks)
    check(shards, Layout(layout_name, num_ranks, length), dtype)


def test_sequence_first_tensors(pool: WorkerPool):
    shards = pool.run(ring_result, 24, "zigzag", torch.float64, "reference", 1, num_ranks=4)
    check(shards, Layout("zigzag", 4, 24), torch.float64)


def refusals() -> list[str]:
    import deepspeed.comm as dist

    messages = []
    attempts = [
        lambda: RingAttention("auto", dist.get_world_group(), transport="carrier_pigeon"),
        lambda: RingAttention("auto", dist.get_world_group(), layout="striped"),
        lambda: RingAttention("auto", dist.get_world_group())(*[torch.zeros(1, 3, 2, 8)] * 3, 0),
        lambda: RingAttention("auto", dist.get_world_group())(*[torch.zeros(1, 4, 2, 8)] * 3, 2),
        lambda: LocalAttention("auto")(*[torch.zeros(1, 4, 2, 8)] * 3, 2),
        lambda: RingAttention(torch.nn.Identity(), dist.get_world_group()),  # pyright: ignore[reportArgumentType]
    ]
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_mistakes_are_refused_by_name(pool: WorkerPool):
    assert pool.run(refusals, num_ranks=2)[0] == [
        "transport='carrier_pigeon' is unknown: use one of p2p",
        "layout='striped' is unknown: use one of zigzag, contiguous",
        "3 local tokens are not two equal chunks: cut sequences with Layout.shard",
        "batch_dim_idx=2 must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])",
        "batch_dim_idx=2 must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])",
        "local_attention=Identity is a module that sees whole sequences: a ring computes block pairs, so pass "
        '"auto" or a kernel of ring_attention.blocks',
    ]
