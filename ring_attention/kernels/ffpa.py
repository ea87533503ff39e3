"""FFPA (the package ffpa-attn, in CuTe DSL): head sizes that FlashAttention refuses, Hopper, half precision.

Written against 0.2.4, `ffpa_attn/cute/__init__.py`. Its operators are not public, so the `kernels` extra pins it.
The source also has a kernel for compute capability 10.0 (a head_dim of 512) and a plainer one for all others from 8.0
on; these are refused until somebody measures them. Each kind of call is compiled at its first use, for seconds.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import (
    AttentionKernel,
    KernelSpec,
    causal_tiles,
    refuse_missing_package,
    refuse_value_head_dim,
)
from ring_attention.masked_block import MaskedBlock

_GRADIENTS_AS_INPUTS = 0  # the dtype of dK and dV; others are for its kernel for older GPUs alone
_TILE_QUERIES = 64  # rows of a forward tile, which the query heads of one key-value head share
_COST = (
    "without it attention is about 4 times slower forward and 6 times backward (16 heads x 512 on an H100: 109 and 35 "
    "TFLOP/s against 465 and 215)"
)


class FfpaKernel(AttentionKernel):
    name = "ffpa"
    device_type = "cuda"
    speed = (
        "ffpa-attn: 465 TFLOP/s forward, 215 backward on an H100 at 16 heads x 512; memory-efficient SDPA 109 and 35"
    )

    def supports(self, spec: KernelSpec) -> str | None:
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bf16 or fp16, not {spec.dtype}"
        if not 320 <= spec.head_dim <= 512 or spec.head_dim % 8:
            return f"needs a head_dim that is a multiple of 8 from 320 to 512, not {spec.head_dim}"
        if spec.windowed:
            return "has no sliding window"
        if _TILE_QUERIES % (spec.num_heads // spec.num_kv_heads):
            return (
                f"needs a power of 2 up to {_TILE_QUERIES} as query heads per key-value head, not "
                f"{spec.num_heads // spec.num_kv_heads}"
            )
        if refusal := refuse_value_head_dim(spec):
            return refusal
        if spec.capability is None or spec.capability[0] != 9:
            return f"needs a Hopper GPU (compute capability 9.x), or a head_dim up to 256 for FlashAttention; {_COST}"
        refusal = refuse_missing_package("ffpa-attn", "ffpa_attn")
        return refusal and f"{refusal}; {_COST}"

    def tiles(self, rectangle: MaskedBlock) -> list[MaskedBlock]:
        return causal_tiles(rectangle)  # its forward pass has windows, its backward pass none

    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.contiguous() for x in (q_BSHD, k_BTKD, v_BTKE))
        if k.data_ptr() == v.data_ptr():  # it takes them for one tensor then, which its kernel refuses
            v = v.clone()
        return _operators()._fwd_cute(q, k, v, scale, int(upper is not None), True)

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
        tensors = (dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS)
        # contiguous here, not in there: it gives the gradients the strides of what it gets
        tensors = (tensor.contiguous() for tensor in tensors)
        return _operators()._bwd_cute(*tensors, scale, int(upper is not None), _GRADIENTS_AS_INPUTS)


@functools.cache
def _operators() -> Any:
    importlib.import_module("ffpa_attn.cute")  # registers them; takes seconds, so not before the first call
    return torch.ops.ffpa_attn
