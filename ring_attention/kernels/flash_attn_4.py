"""FlashAttention-4 (package flash-attn-4, in CuTe DSL): Hopper, half precision, [B, S, H, D] and GQA without copies.

Written against 4.0.0b36, `flash_attn/cute/interface.py`. Its functions are not public, so the `kernels` extra pins it.
Its kernels for Blackwell (a head_dim up to 128, or 256) are refused because nobody has measured them. The first call of
each kind compiles for seconds.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import (
    AttentionKernel,
    KernelParams,
    KernelSpec,
    SavedTensors,
    Segments,
    flash_window,
    refuse_missing_package,
)


class FlashAttention4Kernel(AttentionKernel):
    name = "flash_attn_4"
    speed = "flash-attn-4: 681 TFLOP/s forward, 620 backward on an H100 at 32 heads x 128; cuDNN SDPA 611 and 546"
    head_dims = range(64, 257, 8)
    has_softcap = has_varlen = True

    def _refusal(self, spec: KernelSpec) -> str | None:
        if spec.capability is None or spec.capability[0] != 9:
            return "ranked only where it was measured: compute capability 9.x (Hopper)"
        # last, so that it is said only where installing it helps
        return refuse_missing_package("flash-attn-4", "flash_attn.cute")

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        # the kernel calls no left bound with a right bound of 0 causal
        window = flash_window(q_BSHD.shape[1], k_BTKD.shape[1], params, None)
        return _interface()._flash_attn_fwd(
            q_BSHD, k_BTKD, v_BTKE, softmax_scale=params.scale, return_lse=True, **window, **_softcap(params)
        )[:2]

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = saved
        options = flash_window(q_BSHD.shape[1], k_BTKD.shape[1], params, None) | _softcap(params)
        deterministic = torch.are_deterministic_algorithms_enabled()  # what PyTorch's own kernels go by
        tensors = (q_BSHD, k_BTKD, v_BTKE, out_BSHE, dout_BSHE, lse_BHS)
        return _interface()._flash_attn_bwd(
            *tensors, softmax_scale=params.scale, deterministic=deterministic, **options
        )

    def forward_segments(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        tensors = (x.flatten(0, 1) for x in (q_BSHD, k_BTKD, v_BTKE))
        out_THE, lse_HT = _interface()._flash_attn_fwd(
            *tensors, softmax_scale=params.scale, return_lse=True, **_varlen(segments, q_BSHD, params)
        )[:2]
        shape = q_BSHD.shape[:2]
        return out_THE.unflatten(0, shape), lse_HT.unflatten(1, shape).transpose(0, 1)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, dout = (x.flatten(0, 1) for x in (*saved[:4], dout_BSHE))
        lse_HT = saved.lse_BHS.transpose(0, 1).flatten(1)
        deterministic = torch.are_deterministic_algorithms_enabled()
        options = _varlen(segments, saved.q_BSHD, params)
        gradients = _interface()._flash_attn_bwd(
            q, k, v, out, dout, lse_HT, softmax_scale=params.scale, deterministic=deterministic, **options
        )
        dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(gradients, saved[:3], strict=True))
        return dq, dk, dv


def _varlen(segments: Segments, q_BSHD: Tensor, params: KernelParams) -> dict[str, Any]:
    cu_q, cu_k = segments.cumulative(q_BSHD.device)
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": segments.max_queries,
        "max_seqlen_k": segments.max_keys,
        "window_size_left": None if params.lower is None else -params.lower,
        "window_size_right": params.upper,
        **_softcap(params),
    }


def _softcap(params: KernelParams) -> dict[str, float]:
    """Beside any band and head size. Left out where there is none: the backward pass takes no None."""
    return {} if params.softcap is None else {"softcap": params.softcap}


@functools.cache
def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")  # takes seconds, so not before the first call
