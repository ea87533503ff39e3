"""FlashAttention-4 (the package flash-attn-4, in CuTe DSL): Hopper, half precision, [B, S, H, D] and GQA as they come.

Written against 4.0.0b36, `flash_attn/cute/interface.py`. Its functions are not public, so the `kernels` extra pins it.
The source has forward and backward for Blackwell too (compute capability 10.x: a head_dim up to 128, or 256); that
is refused until somebody measures it. Each kind of call is compiled at its first use, for seconds.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import AttentionKernel, KernelSpec, refuse_missing_package, refuse_value_head_dim
from ring_attention.masked_block import MaskedBlock


class FlashAttention4Kernel(AttentionKernel):
    name = "flash_attn_4"
    device_type = "cuda"
    speed = "flash-attn-4: 681 TFLOP/s forward, 620 backward on an H100 at 32 heads x 128; cuDNN SDPA 611 and 546"

    def supports(self, spec: KernelSpec) -> str | None:
        if spec.capability is None or spec.capability[0] != 9:
            return "ranked only where it was measured: compute capability 9.x (Hopper)"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bf16 or fp16, not {spec.dtype}"
        if not 64 <= spec.head_dim <= 256 or spec.head_dim % 8:
            return f"taken for a head_dim that is a multiple of 8 from 64 to 256, not {spec.head_dim}"
        # last, so that it is said only where installing it helps
        return refuse_value_head_dim(spec) or refuse_missing_package("flash-attn-4", "flash_attn.cute")

    def tiles(self, rectangle: MaskedBlock) -> list[MaskedBlock]:
        return [rectangle]

    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse_BHS, *_ = _interface()._flash_attn_fwd(
            q_BSHD,
            k_BTKD,
            v_BTKE,
            softmax_scale=scale,
            return_lse=True,
            **_window(q_BSHD.shape[1], k_BTKD.shape[1], lower, upper),
        )
        return out, lse_BHS

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
        return _interface()._flash_attn_bwd(
            q_BSHD,
            k_BTKD,
            v_BTKE,
            out_BSHE,
            dout_BSHE,
            lse_BHS,
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # what PyTorch's own kernels look at
            **_window(q_BSHD.shape[1], k_BTKD.shape[1], lower, upper),
        )


@functools.cache
def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")  # takes seconds, so not before the first call


def _window(num_queries: int, num_keys: int, lower: int | None, upper: int | None) -> dict[str, int | None]:
    """The band as the kernel counts it, from the diagonal that ends in the last query and key; None is no bound.

    In a trimmed rectangle both bounds include that diagonal, so they are never negative. No left bound beside a right
    one of 0 is what the kernel calls causal.
    """
    diagonal = num_keys - num_queries
    return {
        "window_size_left": None if lower is None else diagonal - lower,
        "window_size_right": None if upper is None else upper - diagonal,
    }
