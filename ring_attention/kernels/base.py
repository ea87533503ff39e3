"""What a block kernel is: attention of one rectangle of query-key pairs, with its log-sum-exp out and a given one in.

Shapes: q [B, S, H, D]; k [B, T, K, D] and v [B, T, K, E] with H a multiple of K; out [B, S, H, E]; lse [B, H, S] in
    fp32 (fp64 for fp64 input). E is D for most kernels.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_attention.masked_block import MaskedBlock


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel is asked to do.

    Args:
        capability: the CUDA compute capability, None on the CPU.
        value_head_dim: None if it is head_dim.
        windowed: whether keys before a query may be cut off (`Mask.left`).
        deterministic: the same bits every time.
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    windowed: bool = False
    deterministic: bool = False

    @classmethod
    def of(cls, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, windowed: bool = False) -> KernelSpec:
        return cls(
            q_BSHD.device.type,
            torch.cuda.get_device_capability(q_BSHD.device) if q_BSHD.is_cuda else None,
            q_BSHD.dtype,
            q_BSHD.shape[2],
            k_BTKD.shape[2],
            q_BSHD.shape[3],
            None if v_BTKE.shape[3] == q_BSHD.shape[3] else v_BTKE.shape[3],
            windowed,
            torch.are_deterministic_algorithms_enabled(),
        )


class AttentionKernel(ABC):
    """One attention kernel. Deterministic for equal inputs up to the kernel's own order of summation."""

    name: str
    device_type: str | None  # "cuda", "cpu", or None for any
    speed: str  # why it ranks where it does, for the banner

    @abstractmethod
    def supports(self, spec: KernelSpec) -> str | None:
        """None if it can, else the reason why not; asked only for its own device type."""

    @abstractmethod
    def tiles(self, rectangle: MaskedBlock) -> list[MaskedBlock]:
        """A trimmed rectangle, cut into trimmed ones that one call computes."""

    @abstractmethod
    def forward(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns (out [B, S, H, E], lse [B, H, S]) over pairs with lower <= j - i <= upper: one of `tiles`'
        results.
        """

    @abstractmethod
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
        """Returns (dq, dk, dv) of these pairs, where out and lse are those over ALL keys of the sequence."""


def causal_tiles(rectangle: MaskedBlock) -> list[MaskedBlock]:
    """A rectangle without a lower bound as full rectangles and one causal square: at most three."""
    if rectangle.is_full or rectangle.is_causal_square:
        return [rectangle]
    assert rectangle.lower is None, "there is a lower bound"
    assert rectangle.upper is not None
    q_start, q_stop, k_start, k_stop = rectangle.q_start, rectangle.q_stop, rectangle.k_start, rectangle.k_stop
    # queries before q_split see all keys before k_split and a triangle of the others; from q_split on, all
    k_split = k_start + rectangle.upper
    q_split = q_start + k_stop - k_split
    parts = [
        (q_start, q_split, k_split, k_stop),
        (q_start, q_split, k_start, k_split),
        (q_split, q_stop, k_start, k_stop),
    ]
    return [
        part
        for bounds in parts
        if bounds[0] < bounds[1] and bounds[2] < bounds[3] and (part := rectangle.part(*bounds)) is not None
    ]


def band_mask(num_queries: int, num_keys: int, lower: int | None, upper: int | None, device: torch.device) -> Tensor:
    """[S, T] bool: which pairs attend."""
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    allowed = allowed if lower is None else allowed.triu(lower)
    return allowed if upper is None else allowed.tril(upper)


def refuse_value_head_dim(spec: KernelSpec) -> str | None:
    """The refusal of kernels for which keys and values have one head size."""
    return (
        None if spec.value_head_dim is None else f"needs values of head size {spec.head_dim}, not {spec.value_head_dim}"
    )


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module is there, found without importing it: those of kernels take seconds."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # find_spec imports what the module lies in
        return False


def refuse_missing_package(package: str, module: str) -> str | None:
    """The refusal of kernels that come in a package of their own, which is no dependency of this one."""
    return None if is_installed(module) else f"the package {package} is not installed: pip install -e '.[kernels]'"


def expand_kv_heads(kv_BTKD: Tensor, num_heads: int) -> Tensor:
    """[B, T, K, D] -> [B, T, H, D]: query head h uses key-value head h // (H // K). For kernels without GQA."""
    return kv_BTKD.repeat_interleave(num_heads // kv_BTKD.shape[2], dim=2)


def reduce_kv_heads(grad_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint of `expand_kv_heads`, summed in fp32 at least: [B, T, H, D] -> [B, T, K, D]."""
    if grad_BTHD.shape[2] == num_kv_heads:
        return grad_BTHD
    sum_dtype = torch.promote_types(grad_BTHD.dtype, torch.float32)
    return grad_BTHD.unflatten(2, (num_kv_heads, -1)).sum(3, dtype=sum_dtype)
