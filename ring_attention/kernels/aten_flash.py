"""FlashAttention-2 as PyTorch ships it (aten): CUDA, half precision, [B, S, H, D] and GQA without copies."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.kernels.base import AttentionKernel, KernelParams, SavedTensors, Segments, flash_window, parts_of
from ring_attention.masked_block import MaskedBlock


class AtenFlashKernel(AttentionKernel):
    name = "aten_flash"
    speed = "FlashAttention-2: 337 TFLOP/s forward on an H100 at 32 heads x 128"
    has_varlen = True
    head_dims = range(8, 257, 8)
    min_capability = (8, 0)

    def split(self, block: MaskedBlock) -> list[MaskedBlock]:
        """Split blocks with more queries than keys until FlashAttention-2's shortcuts make no difference.

        It takes a right bound of at least the number of keys for no bound, and no right bound for that number. Both
        give wrong results where there are more queries than keys (measured).
        """
        right = None if block.upper is None else block.upper - (block.num_keys - block.num_queries)
        is_bounded = right is not None and right < block.num_keys
        if block.is_full or is_bounded or block.num_queries <= block.num_keys:
            return [block]
        middle = block.q_start + block.num_keys
        rows = ((block.q_start, middle), (middle, block.q_stop))
        parts = parts_of(block, [(*queries, block.k_start, block.k_stop) for queries in rows])
        return [piece for part in parts for piece in self.split(part)]

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        num_queries, num_keys = q_BSHD.shape[1], k_BTKD.shape[1]
        window = flash_window(num_queries, num_keys, params, -1)
        return torch.ops.aten._flash_attention_forward(
            q_BSHD, k_BTKD, v_BTKE, None, None, num_queries, num_keys, 0.0, False, False, scale=params.scale, **window
        )[:2]

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        num_queries, num_keys = saved.q_BSHD.shape[1], saved.k_BTKD.shape[1]
        window = flash_window(num_queries, num_keys, params, -1)
        tensors = (dout_BSHE.contiguous(), *saved[:4], saved.lse_BHS.contiguous())
        no_dropout = [torch.empty(0, dtype=torch.uint64, device=dout_BSHE.device)] * 2  # two random states
        return torch.ops.aten._flash_attention_backward(
            *tensors, None, None, num_queries, num_keys, 0.0, False, *no_dropout, scale=params.scale, **window
        )

    def forward_segments(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        tensors = (x.flatten(0, 1) for x in (q_BSHD, k_BTKD, v_BTKE))
        cumulative, sizes = segments.cumulative(q_BSHD.device), (segments.max_queries, segments.max_keys)
        out_THE, lse_HT = torch.ops.aten._flash_attention_forward(
            *tensors,
            *cumulative,
            *sizes,
            0.0,
            _is_causal(params),
            False,
            scale=params.scale,
            **_segment_window(params),
        )[:2]
        shape = q_BSHD.shape[:2]
        return out_THE.unflatten(0, shape), lse_HT.unflatten(1, shape).transpose(0, 1)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [x.flatten(0, 1) for x in (dout_BSHE, *saved[:4])]
        tensors += [saved.lse_BHS.transpose(0, 1).flatten(1).contiguous()]
        cumulative, sizes = segments.cumulative(dout_BSHE.device), (segments.max_queries, segments.max_keys)
        no_dropout = [torch.empty(0, dtype=torch.uint64, device=dout_BSHE.device)] * 2  # two random states
        options = {"scale": params.scale, **_segment_window(params)}
        gradients = torch.ops.aten._flash_attention_backward(
            *tensors, *cumulative, *sizes, 0.0, _is_causal(params), *no_dropout, **options
        )
        dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(gradients, saved[:3], strict=True))
        return dq, dk, dv


def _is_causal(params: KernelParams) -> bool:
    return params.lower is None and params.upper == 0


def _segment_window(params: KernelParams) -> dict[str, int]:
    return {} if params.lower is None else {"window_size_left": -params.lower, "window_size_right": 0}
