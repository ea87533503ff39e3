"""Attention's memory where packed documents travel in one exchange: bytes counted on ranks, and predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.planning.exchange_memory import (
    ExchangedTokens,
    ExchangeMemory,
    most_exchanged,
    symmetric_buffer_shards,
)
from ring_attention import Mask
from ring_attention.direct_routing import goes_direct, local_runs, tokens_sent
from ring_attention.kernels import AttentionKernel, CpuFlashKernel, KernelParams, SavedTensors
from ring_attention.kernels.base import ANYWHERE, GradientTargets, Segments
from ring_attention.schedule import buffer_tokens
from tests.cases import Case, build, draw
from tests.pool import WorkerPool
from tests.tools.memory import StorageCount

LENGTH = 256  # per rank
DOCUMENTS = [  # of 2, 2, 3 and 4 ranks: short ones, and long ones of which ranks copy many keys
    (0, 256, 512),
    (0, 230, 300, 330, 430, 510, 512),
    (0, 40, 230, 260, 330, 380, 480, 570, 768),
    (0, 210, 470, 780, 950, 990, 1024),
]


class AllocatesLikeFlashAttention4(AttentionKernel):
    """All documents in one call, and a backward pass with fp32 sums beside its gradients. Values are zeros."""

    name, speed, device_type, has_varlen = "stand_in", "computes nothing", None, True

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        batch, length, num_heads, _ = q_BSHD.shape
        return torch.zeros_like(q_BSHD), torch.zeros(batch, num_heads, length)

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        return self.backward_to(ANYWHERE, dout_BSHE, saved, None, params)

    def backward_to(
        self,
        targets: GradientTargets,
        dout_BSHE: Tensor,
        saved: SavedTensors,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = saved.q_BSHD, saved.k_BTKD, saved.v_BTKE
        rows = [torch.zeros_like(saved.lse_BHS) for _ in range(2)]
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in inputs]
        given = zip(inputs, targets, strict=True)
        dq, dk, dv = (torch.zeros_like(x) if target is None else target.zero_() for x, target in given)
        del rows, sums
        return dq, dk, dv

    def forward_segments(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        return self.forward(q_BSHD, k_BTKD, v_BTKE, params)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.backward(dout_BSHE, saved, params)


def case(ends: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(
        "ring",
        ends[-1] // LENGTH,
        layout="balanced",
        mask=Mask().packed(ends),
        length=ends[-1],
        batch=1,
        num_heads=8,
        dtype=dtype,
    )


def count_backward(case: Case, has_varlen: bool) -> tuple[ExchangedTokens, int]:
    """On each rank: what it exchanges, and the most bytes beyond what the forward pass has saved, dout included."""
    import deepspeed.comm as dist

    kernel = AllocatesLikeFlashAttention4() if has_varlen else CpuFlashKernel()
    attention = build(replace(case, kernel=kernel), dist.get_world_group())  # pyright: ignore[reportArgumentType]
    layout, mask = case.global_layout, case.mask.within(case.length)
    rank: Any = attention.sequence_rank
    shards = [layout.shard(tensor, rank, dim=1) for tensor in draw(case)]
    q, k, v = (tensor.requires_grad_() for tensor in shards[:3])
    out = attention(q, k, v, 0)
    with StorageCount() as count:
        start = count.now
        out.backward(shards[3])
    assert goes_direct(layout, mask)
    runs = local_runs(layout, mask, rank)
    whole = runs.whole[1] - runs.whole[0]
    num_copies = sum(part.run.start - part.first_key for part in runs.of_rest)
    sent, received = tokens_sent(layout, mask)[rank]
    return ExchangedTokens(whole, LENGTH - whole, num_copies, received, sent), count.peak - start + shards[3].nbytes


def memory_of(case: Case, has_varlen: bool) -> ExchangeMemory:
    queries, keys = case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim
    return ExchangeMemory(case.num_heads, queries, keys, case.dtype.itemsize, has_varlen, receives=True)


@pytest.mark.parametrize("ends", DOCUMENTS, ids=lambda ends: f"{len(ends) - 1}-on-{ends[-1] // LENGTH}")
def test_the_counted_bytes_are_predicted(pool: WorkerPool, ends: tuple[int, ...]):
    packed = case(ends)
    memory = memory_of(packed, has_varlen=True)
    bound = max(map(memory.peak_bytes, most_exchanged(LENGTH, packed.num_ranks)))
    for tokens, counted in pool.run(count_backward, packed, True, num_ranks=packed.num_ranks):
        assert memory.peak_bytes(tokens) == pytest.approx(counted, rel=0.001)
        assert counted <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_kernel_that_calls_are_split_for_needs_less_than_predicted(pool: WorkerPool, dtype: torch.dtype):
    """Of the CPU's kernel the largest call is bounded, not known. Its masks, which are not predicted, are small."""
    for packed in (case(ends, dtype) for ends in DOCUMENTS):
        memory = memory_of(packed, has_varlen=False)
        for tokens, counted in pool.run(count_backward, packed, False, num_ranks=packed.num_ranks):
            assert 0.95 * counted < memory.peak_bytes(tokens) < 2 * counted


@pytest.mark.parametrize("ends", DOCUMENTS[1:])
def test_receive_buffers_are_no_larger_than_predicted(ends: tuple[int, ...]):
    packed = case(ends)
    masks = packed.mask.within(packed.length), Mask().packed((0, packed.length))  # the second one goes around the ring
    sizes = [buffer_tokens(replace(packed, mask=mask).global_layout, mask) for mask in masks]
    largest = {name: max(size.get(name, 0) for size in sizes) for name in {*sizes[0], *sizes[1]}}
    predicted = 2 * symmetric_buffer_shards(packed.num_ranks) * LENGTH
    assert sum(largest.values()) <= predicted
