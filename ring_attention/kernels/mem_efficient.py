"""PyTorch's memory-efficient attention (CUTLASS, aten): CUDA, any head sizes, fp32 too; takes equal head counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attention.kernels.base import EqualHeadsKernel, KernelParams, KernelSpec, SavedTensors

_LSE_MULTIPLE = 32  # the kernel pads the rows of its log-sum-exp to a multiple of this
_NO_MASK, _CAUSAL = 0, 1


class MemEfficientKernel(EqualHeadsKernel):
    name = "mem_efficient"
    speed = "memory-efficient SDPA: 109 TFLOP/s forward on an H100 at 16 heads x 512, where FlashAttention refuses"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    has_windows = is_deterministic = False
    has_value_head_dim = True

    def _refusal(self, spec: KernelSpec) -> str | None:
        multiple = 4 if spec.dtype == torch.float32 else 8
        for head_dim in (spec.head_dim, spec.value_head_dim or spec.head_dim):
            if head_dim % multiple:
                return f"needs head sizes that are multiples of {multiple}, not {head_dim}"
        return None

    def _forward(self, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        num_queries, num_keys = q_BSHD.shape[1], k_BTHD.shape[1]
        mask = _NO_MASK if params.upper is None else _CAUSAL
        out, lse_BHS, *_ = torch.ops.aten._efficient_attention_forward(
            q_BSHD, k_BTHD, v_BTHE, None, None, None, num_queries, num_keys, 0.0, mask, True, scale=params.scale
        )
        return out, lse_BHS[:, :, :num_queries]

    def _backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        num_queries, num_keys = saved.q_BSHD.shape[1], saved.k_BTKD.shape[1]
        tensors = (dout_BSHE, *saved[:3])
        out = saved.out_BSHE.contiguous()  # the kernel assumes rows of heads x head size, whatever the strides say
        lse = F.pad(saved.lse_BHS, (0, -num_queries % _LSE_MULTIPLE), value=float("inf"))
        no_dropout = (0.0, *[torch.empty((), dtype=torch.int64)] * 2)  # seed and offset
        mask = _NO_MASK if params.upper is None else _CAUSAL
        return torch.ops.aten._efficient_attention_backward(
            *tensors, None, out, None, None, num_queries, num_keys, lse, *no_dropout, mask, False, scale=params.scale
        )[:3]
