"""FFPA (package ffpa-attn, in CuTe DSL): head sizes beyond FlashAttention's, on Hopper, in half precision.

Written against 0.2.4, `ffpa_attn/cute/__init__.py`. Its operators are not public, so the `kernels` extra pins it. Its
kernels for other GPUs are refused because nobody has measured them. The first call of each kind compiles for seconds.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import AttentionKernel, KernelParams, KernelSpec, SavedTensors, refuse_missing_package

_GRADIENTS_AS_INPUTS = 0  # the dtype of dK and dV; its other values are for older GPUs
_TILE_QUERIES = 64  # rows of a forward tile, which the query heads of one key-value head share
_COST = (
    "without it attention is about 4 times slower forward and 6 times backward (16 heads x 512 on an H100: 109 and 35 "
    "TFLOP/s against 465 and 215)"
)


class FfpaKernel(AttentionKernel):
    name = "ffpa"
    speed = (
        "ffpa-attn: 465 TFLOP/s forward, 215 backward on an H100 at 16 heads x 512; memory-efficient SDPA 109 and 35"
    )
    has_windows = False  # the forward pass has them, the backward pass does not
    head_dims = range(320, 513, 8)

    def _refusal(self, spec: KernelSpec) -> str | None:
        if _TILE_QUERIES % (heads := spec.num_heads // spec.num_kv_heads):
            return f"needs a power of 2 up to {_TILE_QUERIES} as query heads per key-value head, not {heads}"
        if spec.capability is None or spec.capability[0] != 9:
            return f"needs a Hopper GPU (compute capability 9.x), or a head_dim up to 256 for FlashAttention; {_COST}"
        refusal = refuse_missing_package(spec, "ffpa-attn", "ffpa_attn")
        return refusal and f"{refusal}; {_COST}"

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        q, k, v = (x.contiguous() for x in (q_BSHD, k_BTKD, v_BTKE))
        if k.data_ptr() == v.data_ptr():  # it would treat them as one tensor, which its kernel refuses
            v = v.clone()
        return _operators()._fwd_cute(q, k, v, params.scale, int(params.upper is not None), True)

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        # contiguous here and not inside: the gradients get the strides of these tensors
        tensors = (tensor.contiguous() for tensor in (dout_BSHE, *saved))
        return _operators()._bwd_cute(*tensors, params.scale, int(params.upper is not None), _GRADIENTS_AS_INPUTS)


@functools.cache
def _operators() -> Any:
    importlib.import_module("ffpa_attn.cute")  # registers them; takes seconds, so not before the first call
    return torch.ops.ffpa_attn
