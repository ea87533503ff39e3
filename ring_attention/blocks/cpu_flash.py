"""PyTorch's flash attention for the CPU (aten), which takes [B, H, S, D] views and equal head counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.blocks.base import Block, BlockSpec, expand_kv_heads, reduce_kv_heads

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CpuFlashBlock(Block):
    name = "cpu_flash"
    device_type = "cpu"
    speed = "the flash kernel that PyTorch has for the CPU"

    def supports(self, spec: BlockSpec) -> str | None:
        return None if spec.dtype in _DTYPES else f"no {spec.dtype}"

    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKD))
        out, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BSHD.transpose(1, 2), k, v, 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse_BHS

    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, num_kv_heads = q_BSHD.shape[2], k_BTKD.shape[2]
        k, v = (expand_kv_heads(x, num_heads).transpose(1, 2) for x in (k_BTKD, v_BTKD))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BSHD.transpose(1, 2),
            q_BSHD.transpose(1, 2),
            k,
            v,
            out_BSHD.transpose(1, 2),
            lse_BHS,
            0.0,
            causal,
            scale=scale,
        )
        dk, dv = (reduce_kv_heads(grad.transpose(1, 2), num_kv_heads) for grad in (dk, dv))
        return dq.transpose(1, 2), dk, dv
