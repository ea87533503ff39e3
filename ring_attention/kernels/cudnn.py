"""cuDNN's fused attention through PyTorch (aten): CUDA, half precision, [B, H, S, D] views."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.kernels.base import (
    AttentionKernel,
    KernelParams,
    KernelSpec,
    SavedTensors,
    expand_kv_heads,
    reduce_kv_heads,
)
from ring_attention.kernels.reference import ReferenceKernel

_REFERENCE = ReferenceKernel()


class CudnnKernel(AttentionKernel):
    name = "cudnn"
    speed = "cuDNN SDPA: 611 TFLOP/s forward on an H100 at 32 heads x 128, FlashAttention-2 there 337"
    has_windows = is_deterministic = False

    def _refusal(self, spec: KernelSpec) -> str | None:
        if spec.capability is None or spec.capability < (9, 0):
            return "ranked only where it was measured: compute capability 9.0 or newer"
        if spec.head_dim > 128 or spec.head_dim % 8:
            return f"needs a head_dim that is a multiple of 8 up to 128, not {spec.head_dim}"
        return None

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        if q_BSHD.shape[1] == k_BTKD.shape[1] == 1:  # cuDNN refuses this one shape
            return _REFERENCE.forward(q_BSHD, k_BTKD, v_BTKE, params)
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKE))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BSHD.transpose(1, 2), k, v, None, True, 0.0, params.upper is not None, False, scale=params.scale
        )
        return out.transpose(1, 2), lse.view(out.shape[:3])  # cuDNN's lse has a trailing dim of 1

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = saved
        if q_BSHD.shape[1] == k_BTKD.shape[1] == 1:
            return _REFERENCE.backward(dout_BSHE, saved, params)
        q_BSHD, out_BSHE, dout_BSHE = _with_equal_strides(q_BSHD, out_BSHE, dout_BSHE)
        k, v = (expand_kv_heads(x, q_BSHD.shape[2]).transpose(1, 2) for x in (k_BTKD, v_BTKE))
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
            params.upper is not None,
            scale=params.scale,
        )
        dk, dv = (reduce_kv_heads(grad.transpose(1, 2), k_BTKD.shape[2]) for grad in (dk, dv))
        return dq.transpose(1, 2), dk, dv


def _with_equal_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, which have one shape, as they are if their strides agree, else all contiguous.

    PyTorch 2.11 caches cuDNN's graphs by the shapes and strides of q, k and v alone. It runs a cached graph on an out
    and a dout with other strides as if they had the strides of the graph's first call.
    """
    first, *others = ([n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in tensors)
    return tensors if all(strides == first for strides in others) else tuple(x.contiguous() for x in tensors)
