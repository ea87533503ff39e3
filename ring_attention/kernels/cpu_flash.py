"""PyTorch's flash attention for the CPU (aten), which takes [B, H, S, D] views and equal head counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import (
    AttentionKernel,
    KernelSpec,
    band_mask,
    causal_tiles,
    expand_kv_heads,
    reduce_kv_heads,
    refuse_value_head_dim,
)
from ring_attention.masked_block import MaskedBlock

_MASKED_QUERIES = 128  # rows of a tile whose mask is a tensor: few, so that little of what is computed is masked
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CpuFlashKernel(AttentionKernel):
    name = "cpu_flash"
    device_type = "cpu"
    speed = "the flash kernel that PyTorch has for the CPU"

    def supports(self, spec: KernelSpec) -> str | None:
        return refuse_value_head_dim(spec) if spec.dtype in _DTYPES else f"no {spec.dtype}"

    def tiles(self, rectangle: MaskedBlock) -> list[MaskedBlock]:
        if rectangle.num_queries <= _MASKED_QUERIES:
            return [rectangle]
        if rectangle.lower is None:
            return causal_tiles(rectangle)
        starts = range(rectangle.q_start, rectangle.q_stop, _MASKED_QUERIES)
        rows = [(start, min(start + _MASKED_QUERIES, rectangle.q_stop)) for start in starts]
        tiles = [rectangle.part(start, stop, rectangle.k_start, rectangle.k_stop) for start, stop in rows]
        return [tile for tile in tiles if tile is not None]

    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        out, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BSHD.transpose(1, 2), k, v, 0.0, **_masking(q_BSHD, k_BTKD, lower, upper), scale=scale
        )
        return out.transpose(1, 2), lse_BHS

    def backward(
        self,
        dout_BSHE: Tensor,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        out_BSHE: Tensor,
        lse_BHS: Tensor,
        lower: int | None,
        upper: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, num_kv_heads = q_BSHD.shape[2], k_BTKD.shape[2]
        k, v = (expand_kv_heads(x, num_heads).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BSHE.transpose(1, 2),
            q_BSHD.transpose(1, 2),
            k,
            v,
            out_BSHE.transpose(1, 2),
            lse_BHS,
            0.0,
            **_masking(q_BSHD, k_BTKD, lower, upper),
            scale=scale,
        )
        dk, dv = (reduce_kv_heads(grad.transpose(1, 2), num_kv_heads) for grad in (dk, dv))
        return dq.transpose(1, 2), dk, dv


def _masking(q_BSHD: Tensor, k_BTKD: Tensor, lower: int | None, upper: int | None) -> dict[str, Any]:
    """The band as the kernel takes it: a flag for a causal square, a tensor of 0 and -inf for what else is masked."""
    num_queries, num_keys = q_BSHD.shape[1], k_BTKD.shape[1]
    if lower is None and (upper is None or (upper == 0 and num_queries == num_keys)):
        return {"is_causal": upper == 0, "attn_mask": None}
    allowed = band_mask(num_queries, num_keys, lower, upper, q_BSHD.device)
    mask = torch.zeros(num_queries, num_keys, dtype=q_BSHD.dtype).masked_fill(~allowed, float("-inf"))
    return {"is_causal": False, "attn_mask": mask}
