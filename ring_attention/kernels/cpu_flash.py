"""PyTorch's flash attention for the CPU (aten), which takes [B, H, S, D] views and equal head counts."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import EqualHeadsKernel, KernelParams, SavedTensors, band_mask, parts_of, split_causal
from ring_attention.masked_block import MaskedBlock

_MASKED_QUERIES = 128  # rows of a block whose mask is a tensor: few, so that little masked work is computed


class CpuFlashKernel(EqualHeadsKernel):
    name = "cpu_flash"
    speed = "the flash kernel that PyTorch has for the CPU"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def split(self, block: MaskedBlock) -> list[MaskedBlock]:
        if block.num_queries <= _MASKED_QUERIES:
            return [block]
        if block.lower is None:
            return split_causal(block)
        edges = [*range(block.q_start, block.q_stop, _MASKED_QUERIES), block.q_stop]
        return parts_of(block, [(*queries, block.k_start, block.k_stop) for queries in itertools.pairwise(edges)])

    def _forward(self, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTHD, v_BTHE))
        out, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, **_masking(q_BSHD, k_BTHD, params), scale=params.scale
        )
        return out.transpose(1, 2), lse_BHS

    def _backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (x.transpose(1, 2) for x in (dout_BSHE, *saved[:4]))
        masking = _masking(saved.q_BSHD, saved.k_BTKD, params)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, saved.lse_BHS, 0.0, **masking, scale=params.scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _masking(q_BSHD: Tensor, k_BTKD: Tensor, params: KernelParams) -> dict[str, Any]:
    """The band as the kernel takes it: a flag for a causal square, a tensor of 0 and -inf for any other mask."""
    num_queries, num_keys, lower, upper = q_BSHD.shape[1], k_BTKD.shape[1], params.lower, params.upper
    if lower is None and (upper is None or (upper == 0 and num_queries == num_keys)):
        return {"is_causal": upper == 0, "attn_mask": None}
    allowed = band_mask(num_queries, num_keys, lower, upper, q_BSHD.device)
    mask = torch.zeros(num_queries, num_keys, dtype=q_BSHD.dtype).masked_fill(~allowed, float("-inf"))
    return {"is_causal": False, "attn_mask": mask}
