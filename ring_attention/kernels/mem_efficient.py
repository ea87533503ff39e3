"""PyTorch's memory-efficient attention (CUTLASS, aten): CUDA, any head sizes, fp32 too; takes equal head counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attention.kernels.base import (
    AttentionKernel,
    KernelParams,
    KernelSpec,
    SavedTensors,
    expand_kv_heads,
    reduce_kv_heads,
)

_LSE_MULTIPLE = 32  # the kernel pads the rows of its log-sum-exp to a multiple of this
_NO_MASK, _CAUSAL = 0, 1


class MemEfficientKernel(AttentionKernel):
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

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        num_queries, num_heads = q_BSHD.shape[1:3]
        k, v = (expand_kv_heads(x, num_heads) for x in (k_BTKD, v_BTKE))
        out, lse_BHS, *_ = torch.ops.aten._efficient_attention_forward(
            q_BSHD,
            k,
            v,
            None,
            None,
            None,
            num_queries,
            k.shape[1],
            0.0,
            _NO_MASK if params.upper is None else _CAUSAL,
            compute_log_sumexp=True,
            scale=params.scale,
        )
        return out, lse_BHS[:, :, :num_queries]

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = saved
        num_queries, num_heads = q_BSHD.shape[1:3]
        num_keys, num_kv_heads = k_BTKD.shape[1:3]
        k, v = (expand_kv_heads(x, num_heads) for x in (k_BTKD, v_BTKE))
        no_dropout_state = torch.empty((), dtype=torch.int64)
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout_BSHE,
            q_BSHD,
            k,
            v,
            None,
            out_BSHE.contiguous(),  # the kernel assumes rows that are heads x head size apart, whatever the strides say
            None,
            None,
            num_queries,
            num_keys,
            F.pad(lse_BHS, (0, -num_queries % _LSE_MULTIPLE), value=float("inf")),
            0.0,
            no_dropout_state,
            no_dropout_state,
            _NO_MASK if params.upper is None else _CAUSAL,
            False,
            scale=params.scale,
        )
        return dq, reduce_kv_heads(dk, num_kv_heads), reduce_kv_heads(dv, num_kv_heads)
