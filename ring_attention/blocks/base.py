"""What a block kernel is: attention of one block pair, with its log-sum-exp out and a given one in.

Shapes: q [B, S, H, D]; k, v [B, T, K, D] with H a multiple of K; out as q; lse [B, H, S] in fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSpec:
    """What a kernel is asked to do. `capability` is the CUDA compute capability, None on the CPU; `deterministic` asks
    for the same bits every time.
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    deterministic: bool = False

    @classmethod
    def of(cls, q_BSHD: Tensor, k_BTKD: Tensor) -> BlockSpec:
        return cls(
            q_BSHD.device.type,
            torch.cuda.get_device_capability(q_BSHD.device) if q_BSHD.is_cuda else None,
            q_BSHD.dtype,
            q_BSHD.shape[2],
            k_BTKD.shape[2],
            q_BSHD.shape[3],
            torch.are_deterministic_algorithms_enabled(),
        )


class Block(ABC):
    """One attention kernel. Deterministic for equal inputs up to the kernel's own order of summation."""

    name: str
    device_type: str | None  # "cuda", "cpu", or None for any
    speed: str  # why it ranks where it does, for the banner

    @abstractmethod
    def supports(self, spec: BlockSpec) -> str | None:
        """None if it can, else the reason why not; asked only for its own device type."""

    @abstractmethod
    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns (out [B, S, H, D], lse [B, H, S]). `causal` implies S == T."""

    @abstractmethod
    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv) of this pair, where out and lse are those over ALL keys of the sequence."""


def expand_kv_heads(kv_BTKD: Tensor, num_heads: int) -> Tensor:
    """[B, T, K, D] -> [B, T, H, D]: query head h uses key-value head h // (H // K). For kernels without GQA."""
    return kv_BTKD.repeat_interleave(num_heads // kv_BTKD.shape[2], dim=2)


def reduce_kv_heads(grad_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint of `expand_kv_heads`, summed in fp32 at least: [B, T, H, D] -> [B, T, K, D]."""
    if grad_BTHD.shape[2] == num_kv_heads:
        return grad_BTHD
    sum_dtype = torch.promote_types(grad_BTHD.dtype, torch.float32)
    return grad_BTHD.unflatten(2, (num_kv_heads, -1)).sum(3, dtype=sum_dtype)
