"""cuDNN's fused attention through PyTorch (aten): CUDA, half precision, [B, H, S, D] views."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.kernels.aten_flash import AtenFlashKernel
from ring_attention.kernels.base import EqualHeadsKernel, KernelParams, SavedTensors, Segments
from ring_attention.kernels.reference import ReferenceKernel

_REFERENCE = ReferenceKernel()
_VARLEN = AtenFlashKernel()  # PyTorch has no varlen call of cuDNN


class CudnnKernel(EqualHeadsKernel):
    name = "cudnn"
    speed = "cuDNN SDPA: 611 TFLOP/s forward on an H100 at 32 heads x 128, FlashAttention-2 there 337"
    has_windows = is_deterministic = False
    has_varlen = True
    head_dims = range(8, 129, 8)
    min_capability = (9, 0)  # ranked only where it was measured

    def _forward(self, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        if q_BSHD.shape[1] == k_BTHD.shape[1] == 1:  # cuDNN refuses this one shape
            return _REFERENCE.forward(q_BSHD, k_BTHD, v_BTHE, params)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTHD, v_BTHE))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, params.upper is not None, False, scale=params.scale
        )
        return out.transpose(1, 2), lse.view(out.shape[:3])  # cuDNN's lse has a trailing dim of 1

    def _backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, k_BTHD, v_BTHE, out_BSHE, lse_BHS = saved
        num_queries, num_keys, is_causal = q_BSHD.shape[1], k_BTHD.shape[1], params.upper is not None
        if num_queries == num_keys == 1:
            return _REFERENCE.backward(dout_BSHE, saved, params)
        q_BSHD, out_BSHE, dout_BSHE = _with_equal_strides(q_BSHD, out_BSHE, dout_BSHE)
        tensors = [x.transpose(1, 2) for x in (dout_BSHE, q_BSHD, k_BTHD, v_BTHE, out_BSHE)]
        tensors += [lse_BHS.unsqueeze(-1).contiguous()]
        no_dropout = [torch.empty((), dtype=torch.int64, device=q_BSHD.device)] * 2  # seed and offset
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, *no_dropout, None, None, None, num_queries, num_keys, 0.0, is_causal, scale=params.scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def forward_segments(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        return _VARLEN.forward_segments(q_BSHD, k_BTKD, v_BTKE, segments, params)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _VARLEN.backward_segments(dout_BSHE, saved, segments, params)


def _with_equal_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, which have one shape, as they are if their strides agree, else all contiguous.

    PyTorch 2.11 caches cuDNN's graphs by the shapes and strides of q, k and v alone. It runs a cached graph on an out
    and a dout with other strides as if they had the strides of the graph's first call.
    """
    first, *others = ([n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in tensors)
    return tensors if all(strides == first for strides in others) else tuple(x.contiguous() for x in tensors)
