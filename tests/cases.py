"""A case of sequence attention, that is a method, layout, mask and shape: on ranks, and in an fp64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ring_attention import (
    CAUSAL,
    AllGatherAttention,
    HybridAttention,
    Layout,
    LocalAttention,
    Mask,
    RingAttention,
    UlyssesAttention,
)
from tests.tools.measure import Expected, assert_equal_attention, dense_attention

METHODS = ("ring", "ulysses", "hybrid", "all_gather", "local")


@dataclass(frozen=True)
class Case:
    """A method on num_ranks = ring_degree x ulysses_degree ranks."""

    method: str = "ring"
    num_ranks: int = 2
    ulysses_degree: int = 1
    layout: str = "zigzag"
    mask: Mask = CAUSAL
    length: int = 32
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    value_head_dim: int | None = None
    dtype: torch.dtype = torch.float32
    kernel: str = "auto"
    batch_dim_idx: int = 0
    contiguous: bool = True
    transport: str = "p2p"
    softcap: float | None = None
    sinks: bool = False

    @property
    def global_layout(self) -> Layout:
        documents = self.mask.documents[0] if self.layout == "balanced" and self.mask.documents else None
        is_causal = self.layout != "balanced" or (self.mask.left, self.mask.right) == (None, 0)
        degrees = self.num_ranks // self.ulysses_degree, self.length, self.ulysses_degree
        return Layout(self.layout, *degrees, documents, is_causal)


def draw(case: Case) -> list[Tensor]:
    """q, k, v and dout of the whole sequence, [B, L, heads, head size]."""
    generator = torch.Generator().manual_seed(case.length)
    value_dim = case.value_head_dim or case.head_dim
    sizes = [
        (case.num_heads, case.head_dim),
        (case.num_kv_heads, case.head_dim),
        (case.num_kv_heads, value_dim),
        (case.num_heads, value_dim),
    ]
    return [torch.randn(case.batch, case.length, *size, generator=generator).to(case.dtype) for size in sizes]


def draw_sinks(case: Case) -> Tensor | None:
    """[H], of the size of the scores."""
    return (
        torch.randn(case.num_heads, generator=torch.Generator().manual_seed(1)).to(case.dtype) if case.sinks else None
    )


def build(case: Case, group: object) -> nn.Module:
    options: dict = {"mask": case.mask, "layout": case.layout}
    if case.method in ("ring", "hybrid"):
        options["transport"] = case.transport
    if case.method == "hybrid":
        return HybridAttention(case.kernel, group, ulysses_degree=case.ulysses_degree, **options)
    kinds = {
        "ring": RingAttention,
        "ulysses": UlyssesAttention,
        "all_gather": AllGatherAttention,
        "local": LocalAttention,
    }
    return kinds[case.method](case.kernel, group, **options)


def on_rank(case: Case, device: str = "cpu") -> list[Tensor]:
    """On each rank: its shards of out, dq, dk, dv, as [B, S, heads, head size], and its part of dsinks, if any."""
    return attend(case, build(case, world()), [tensor.to(device) for tensor in draw(case)])


def many_on_rank(cases: list[Case], device: str = "cpu") -> list[list[Tensor]]:
    return [on_rank(case, device) for case in cases]


def world() -> object:
    import deepspeed.comm as dist

    return dist.get_world_group()


def attend(case: Case, attention: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """This rank's shards of out, dq, dk, dv, and its part of dsinks, given q, k, v, dout of the whole sequence."""
    layout = case.global_layout
    local = [layout.shard(tensor, attention.sequence_rank, dim=1) for tensor in inputs]  # pyright: ignore[reportArgumentType]
    if case.batch_dim_idx == 1:
        local = [tensor.transpose(0, 1).contiguous() for tensor in local]
    if not case.contiguous:  # every second element of a tensor twice as wide
        local = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in local]
    leaves = [tensor.detach().requires_grad_() for tensor in local[:3]]
    sinks = draw_sinks(case)
    if sinks is not None:
        sinks = sinks.to(inputs[0].device).requires_grad_()
    out = attention(*leaves, case.batch_dim_idx, softcap=case.softcap, sinks=sinks)
    out.backward(local[3] if case.contiguous else torch.stack((local[3], local[3]), -1)[..., 0])
    results = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    results = [(tensor.transpose(0, 1) if case.batch_dim_idx == 1 else tensor).cpu() for tensor in results]
    return results if sinks is None or sinks.grad is None else [*results, sinks.grad.cpu()]


def oracle(case: Case) -> Expected:
    positions = torch.arange(case.length)
    allowed = torch.stack([case.mask.allows(positions, positions, row) for row in range(case.batch)])
    q, k, v, dout = draw(case)
    scale = 1 / math.sqrt(case.head_dim)
    return dense_attention(q, k, v, dout, allowed, scale, case.softcap, draw_sinks(case))


def check(case: Case, shards: list[list[Tensor]]) -> None:
    """Compare the shards that each rank returned, and the sum of their dsinks, with the oracle."""
    for parts in zip(*shards, strict=True):
        assert all(part.dtype == case.dtype for part in parts)
        assert all(part.isfinite().all() for part in parts), f"not finite, padding included: {case}"
    whole = [case.global_layout.unshard(parts, dim=1) for parts in zip(*(rank[:4] for rank in shards), strict=True)]
    if case.sinks:
        whole.append(torch.stack([rank[4] for rank in shards]).double().sum(0))
    assert_equal_attention(whole, oracle(case), case.dtype, case)
