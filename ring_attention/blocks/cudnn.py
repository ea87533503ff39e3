"""cuDNN's fused attention through PyTorch (aten): CUDA, half precision, [B, H, S, D] views."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.band import Rectangle
from ring_attention.blocks.base import (
    Block,
    BlockSpec,
    causal_tiles,
    expand_kv_heads,
    reduce_kv_heads,
    refuse_value_head_dim,
)
from ring_attention.blocks.reference import ReferenceBlock

_REFERENCE = ReferenceBlock()


class CudnnBlock(Block):
    name = "cudnn"
    device_type = "cuda"
    speed = "cuDNN SDPA: 611 TFLOP/s forward on an H100 at 32 heads x 128, FlashAttention-2 there 337"

    def supports(self, spec: BlockSpec) -> str | None:
        if spec.capability is None or spec.capability < (9, 0):
            return "ranked only where it was measured: compute capability 9.0 or newer"
        if spec.deterministic:
            return "its backward pass is not deterministic"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bf16 or fp16, not {spec.dtype}"
        if spec.head_dim > 128 or spec.head_dim % 8:
            return f"needs a head_dim that is a multiple of 8 up to 128, not {spec.head_dim}"
        if spec.windowed:
            return "has no sliding window"
        return refuse_value_head_dim(spec)

    def tiles(self, rectangle: Rectangle) -> list[Rectangle]:
        return causal_tiles(rectangle)

    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if q_BSHD.shape[1] == k_BTKD.shape[1] == 1:  # cuDNN refuses this one shape
            return _REFERENCE.forward(q_BSHD, k_BTKD, v_BTKE, lower, upper, scale)
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BSHD.transpose(1, 2), k, v, None, True, 0.0, upper is not None, False, scale=scale
        )
        return out.transpose(1, 2), lse.view(out.shape[:3])  # cuDNN's lse has a trailing dim of 1

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
        if q_BSHD.shape[1] == k_BTKD.shape[1] == 1:
            return _REFERENCE.backward(dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS, lower, upper, scale)
        dout_BSHE, out_BSHE = (_strided_like(q_BSHD, x) for x in (dout_BSHE, out_BSHE))
        num_heads, num_kv_heads = q_BSHD.shape[2], k_BTKD.shape[2]
        k, v = (expand_kv_heads(x, num_heads).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        no_dropout_state = torch.empty((), dtype=torch.int64, device=q_BSHD.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout_BSHE.transpose(1, 2),
            q_BSHD.transpose(1, 2),
            k,
            v,
            out_BSHE.transpose(1, 2),
            lse_BHS.unsqueeze(-1).contiguous(),
            no_dropout_state,
            no_dropout_state,
            None,
            None,
            None,
            q_BSHD.shape[1],
            k.shape[2],
            0.0,
            upper is not None,
            scale=scale,
        )
        dk, dv = (reduce_kv_heads(grad.transpose(1, 2), num_kv_heads) for grad in (dk, dv))
        return dq.transpose(1, 2), dk, dv


def _strided_like(q: Tensor, x: Tensor) -> Tensor:
    """`x`, of q's shape, with q's strides. PyTorch 2.11 keeps cuDNN's graphs by the shapes and strides of q, k, v
    alone, and computes on any other out and dout as if they had the strides of those that it built the graph for.
    """
    if all(size == 1 or stride == of_q for size, stride, of_q in zip(x.shape, x.stride(), q.stride(), strict=True)):
        return x
    return torch.empty_strided(q.shape, q.stride(), dtype=x.dtype, device=x.device).copy_(x)
