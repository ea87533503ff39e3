"""Other libraries' attention of packed documents, which `bench_attention` times beside ours if there are documents.

Documents are given as their ends: 0, then the end of each. All rows of a batch have the same ones.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import ConfigError
from recipes.benchmark.baselines import Attend, ShardedAttention, torch_flex_context_parallel, ulysses_around
from ring_attention import CAUSAL, LocalAttention
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KERNELS, KernelSpec
from ring_attention.layout import Layout

Ends = tuple[int, ...]


def varlen(ends: Ends, spec: KernelSpec) -> ShardedAttention:
    """One varlen call on one device: flash-attn-4's, or that of PyTorch's FlashAttention 2.

    Raises:
        ConfigError: for what neither supports, such as a CPU.
    """
    attend, library = _varlen_call(ends, spec)
    return ShardedAttention(Layout("contiguous", 1, ends[-1]), 0, attend, f"full sequences, {library}")


def _varlen_call(ends: Ends, spec: KernelSpec) -> tuple[Attend, str]:
    refusals = {name: KERNELS[name].refusal(spec) for name in ("flash_attn_4", "aten_flash")}
    if not refusals["flash_attn_4"]:
        return _flash_attn_4(ends), "flash-attn-4"
    if not refusals["aten_flash"]:
        local, mask = LocalAttention("aten_flash"), CAUSAL.packed(ends)
        return (lambda q, k, v: local(q, k, v, 0, mask=mask)), "FlashAttention 2"
    raise ConfigError("no varlen kernel: " + "; ".join(f"{name} {refusal}" for name, refusal in refusals.items()))


def _flash_attn_4(ends: Ends) -> Attend:
    """The library's own function, with its own backward pass."""
    from flash_attn.cute.interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    longest = max(stop - start for start, stop in itertools.pairwise(ends))

    @functools.cache
    def cumulative(batch: int) -> Tensor:
        of_rows = [row * ends[-1] + end for row in range(batch) for end in ends[1:]]
        return torch.tensor([0, *of_rows], dtype=torch.int32, device="cuda")

    def attend(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
        starts = cumulative(len(q_BLHD))
        sizes = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q_BLHD, k_BLKD, v_BLKD)), causal=True, **sizes)
        out_THD = out[0] if isinstance(out, tuple) else out
        return out_THD.unflatten(0, q_BLHD.shape[:2])

    return attend


def deepspeed_ulysses(groups: ParallelGroups, ends: Ends, spec: KernelSpec) -> ShardedAttention:
    """deepspeed.sequence.layer.DistributedAttention around a varlen call; on the CPU around a call per document.

    Raises:
        ConfigError: if the ranks do not divide the length or the key-value heads, or the GPU has no varlen kernel.
    """
    local = _call_per_document(ends) if spec.device_type == "cpu" else _varlen_call(ends, spec)[0]
    return ulysses_around(local, groups, ends[-1], spec)


def _call_per_document(ends: Ends) -> Attend:
    def attend(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
        outs = []
        for start, stop in itertools.pairwise(ends):
            q, k, v = (x[:, start:stop].transpose(1, 2) for x in (q_BLHD, k_BLKD, v_BLKD))
            outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return torch.cat(outs, 2).transpose(1, 2)

    return attend


PACKED_BASELINES = {"torch context_parallel, flex": torch_flex_context_parallel, "DeepSpeed Ulysses": deepspeed_ulysses}
