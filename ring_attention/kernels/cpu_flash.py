"""PyTorch's flash attention for the CPU (aten), which takes [B, H, S, D] views and equal head counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import (
    AttentionKernel,
    KernelParams,
    SavedTensors,
    band_mask,
    expand_kv_heads,
    reduce_kv_heads,
    split_causal,
)
from ring_attention.masked_block import MaskedBlock

_MASKED_QUERIES = 128  # rows of a block whose mask is a tensor: few, so that little masked work is computed


class CpuFlashKernel(AttentionKernel):
    name = "cpu_flash"
    speed = "the flash kernel that PyTorch has for the CPU"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def split(self, block: MaskedBlock) -> list[MaskedBlock]:
        if block.num_queries <= _MASKED_QUERIES:
            return [block]
        if block.lower is None:
            return split_causal(block)
        starts = range(block.q_start, block.q_stop, _MASKED_QUERIES)
        rows = [(start, min(start + _MASKED_QUERIES, block.q_stop)) for start in starts]
        parts = [block.part(start, stop, block.k_start, block.k_stop) for start, stop in rows]
        return [part for part in parts if part is not None]

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        out, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BSHD.transpose(1, 2), k, v, 0.0, **_masking(q_BSHD, k_BTKD, params), scale=params.scale
        )
        return out.transpose(1, 2), lse_BHS

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = saved
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BSHE.transpose(1, 2),
            q_BSHD.transpose(1, 2),
            k,
            v,
            out_BSHE.transpose(1, 2),
            lse_BHS,
            0.0,
            **_masking(q_BSHD, k_BTKD, params),
            scale=params.scale,
        )
        dk, dv = (reduce_kv_heads(grad.transpose(1, 2), k_BTKD.shape[2]) for grad in (dk, dv))
        return dq.transpose(1, 2), dk, dv


def _masking(q_BSHD: Tensor, k_BTKD: Tensor, params: KernelParams) -> dict[str, Any]:
    """The band as the kernel takes it: a flag for a causal square, a tensor of 0 and -inf for any other mask."""
    num_queries, num_keys, lower, upper = q_BSHD.shape[1], k_BTKD.shape[1], params.lower, params.upper
    if lower is None and (upper is None or (upper == 0 and num_queries == num_keys)):
        return {"is_causal": upper == 0, "attn_mask": None}
    allowed = band_mask(num_queries, num_keys, lower, upper, q_BSHD.device)
    mask = torch.zeros(num_queries, num_keys, dtype=q_BSHD.dtype).masked_fill(~allowed, float("-inf"))
    return {"is_causal": False, "attn_mask": mask}
