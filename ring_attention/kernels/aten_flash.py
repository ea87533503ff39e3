"""FlashAttention-2 as PyTorch ships it (aten): CUDA, half precision, [B, S, H, D] and GQA as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.kernels.base import AttentionKernel, KernelSpec, refuse_value_head_dim
from ring_attention.masked_block import MaskedBlock


class AtenFlashKernel(AttentionKernel):
    name = "aten_flash"
    device_type = "cuda"
    speed = "FlashAttention-2: 337 TFLOP/s forward on an H100 at 32 heads x 128"

    def supports(self, spec: KernelSpec) -> str | None:
        if spec.capability is None or spec.capability < (8, 0):
            return "needs compute capability 8.0 or newer"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bf16 or fp16, not {spec.dtype}"
        if spec.head_dim > 256 or spec.head_dim % 8:
            return f"needs a head_dim that is a multiple of 8 up to 256, not {spec.head_dim}"
        return refuse_value_head_dim(spec)

    def tiles(self, rectangle: MaskedBlock) -> list[MaskedBlock]:
        """FlashAttention-2 takes a right bound of at least the number of keys for none, or none for that number.

        Both are wrong where there are more queries than keys, measured; rows are cut until it makes no difference.
        """
        right = None if rectangle.upper is None else rectangle.upper - (rectangle.num_keys - rectangle.num_queries)
        is_bounded = right is not None and right < rectangle.num_keys
        if rectangle.is_full or is_bounded or rectangle.num_queries <= rectangle.num_keys:
            return [rectangle]
        middle = rectangle.q_start + rectangle.num_keys
        parts = [
            rectangle.part(*queries, rectangle.k_start, rectangle.k_stop)
            for queries in ((rectangle.q_start, middle), (middle, rectangle.q_stop))
        ]
        return [tile for part in parts if part is not None for tile in self.tiles(part)]

    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse_BHS, *_ = torch.ops.aten._flash_attention_forward(
            q_BSHD,
            k_BTKD,
            v_BTKE,
            None,
            None,
            q_BSHD.shape[1],
            k_BTKD.shape[1],
            0.0,
            False,
            False,
            scale=scale,
            **window(q_BSHD.shape[1], k_BTKD.shape[1], lower, upper),
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
        no_dropout_state = torch.empty(0, dtype=torch.uint64, device=q_BSHD.device)
        return torch.ops.aten._flash_attention_backward(
            dout_BSHE.contiguous(),
            q_BSHD,
            k_BTKD,
            v_BTKE,
            out_BSHE,
            lse_BHS.contiguous(),
            None,
            None,
            q_BSHD.shape[1],
            k_BTKD.shape[1],
            0.0,
            False,
            no_dropout_state,
            no_dropout_state,
            scale=scale,
            **window(q_BSHD.shape[1], k_BTKD.shape[1], lower, upper),
        )


def window(num_queries: int, num_keys: int, lower: int | None, upper: int | None) -> dict[str, int]:
    """The band as FlashAttention counts it, from the diagonal that ends in the last query and key; -1 is no bound.

    In a trimmed rectangle both bounds include that diagonal, so they are never negative.
    """
    diagonal = num_keys - num_queries
    return {
        "window_size_left": -1 if lower is None else diagonal - lower,
        "window_size_right": -1 if upper is None else upper - diagonal,
    }
