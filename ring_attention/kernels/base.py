"""The interface of attention kernels, and what several of them need.

A kernel computes one masked block. It returns the output with the log-sum-exp of the scores (lse), and its backward
pass takes an output and a lse that cover more keys than the block has. The ring needs both.

Shapes: q [B, S, H, D]; k [B, T, K, D] and v [B, T, K, E] with H a multiple of K; out [B, S, H, E]; lse [B, H, S] in
    fp32 (fp64 for fp64 input). E is D for most kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ring_attention.masked_block import MaskedBlock


@dataclass(frozen=True)
class KernelSpec:
    """What a call needs of a kernel.

    Args:
        capability: the CUDA compute capability; None on the CPU.
        value_head_dim: None if it is head_dim.
        windowed: whether the mask has a left bound (`Mask.left`).
        softcap: whether scores are capped (`Scores.softcap`).
        deterministic: whether equal inputs must give equal bits.
        is_elsewhere: whether the call is on another machine, which has every package.
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    windowed: bool = False
    softcap: bool = False
    deterministic: bool = False
    is_elsewhere: bool = False

    @classmethod
    def of(
        cls, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, windowed: bool = False, softcap: bool = False
    ) -> KernelSpec:
        return cls(
            q_BSHD.device.type,
            torch.cuda.get_device_capability(q_BSHD.device) if q_BSHD.is_cuda else None,
            q_BSHD.dtype,
            q_BSHD.shape[2],
            k_BTKD.shape[2],
            q_BSHD.shape[3],
            None if v_BTKE.shape[3] == q_BSHD.shape[3] else v_BTKE.shape[3],
            windowed,
            softcap,
            torch.are_deterministic_algorithms_enabled(),
        )


class Scores(NamedTuple):
    """The score of a query and a key: scale * q.k, and with a softcap softcap * tanh(scale * q.k / softcap)."""

    scale: float
    softcap: float | None = None


class KernelParams(NamedTuple):
    """Which pairs attend, query i and key j with lower <= j - i <= upper (None is no bound), and their `Scores`."""

    lower: int | None
    upper: int | None
    scale: float
    softcap: float | None = None


class Segments:
    """Queries and keys of documents one after the other: (number of queries, number of keys) of each.

    Compared by identity: they are as many as documents.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]]) -> None:
        self.lengths = lengths
        self.max_queries, self.max_keys = (max(sizes) for sizes in zip(*lengths, strict=True))
        self._cumulative: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.launches: dict[Hashable, Any] = {}  # for kernels: what they prepared for their calls with these segments

    def cumulative(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cumulative numbers of queries and of keys, int32 [documents + 1]: one copy to the device for all layers."""
        if device not in self._cumulative:
            ends = [[0, *itertools.accumulate(sizes)] for sizes in zip(*self.lengths, strict=True)]
            cu_q, cu_k = torch.tensor(ends, dtype=torch.int32).to(device)
            self._cumulative[device] = cu_q, cu_k
        return self._cumulative[device]

    def blocks(self, params: KernelParams) -> Iterator[MaskedBlock]:
        """The block of each document. The band counts from the last query and key."""
        q_start = k_start = 0
        for num_queries, num_keys in self.lengths:
            diagonal = num_keys - num_queries
            lower, upper = (None if bound is None else diagonal + bound for bound in (params.lower, params.upper))
            block = MaskedBlock(q_start, q_start + num_queries, k_start, k_start + num_keys, lower, upper).trimmed()
            assert block is not None, "a document without queries or keys"
            yield block
            q_start, k_start = q_start + num_queries, k_start + num_keys


class SavedTensors(NamedTuple):
    """What `backward` needs beside dout. `out` and `lse` are over ALL keys of the sequence, not only the block's."""

    q_BSHD: Tensor
    k_BTKD: Tensor
    v_BTKE: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor


GradientTargets = tuple[Tensor | None, Tensor | None, Tensor | None]  # where dq, dk and dv are written; None: anywhere
ANYWHERE: GradientTargets = (None, None, None)


class DqSum(ABC):
    """dq of the local queries, to which a kernel's calls add by themselves. What they add is rounded once.

    A kernel with a `key_sum_tile` does the same for dk and dv, in sums [2, B, K, N * D] for N keys, in fp32 (fp64 for
    fp64 input). Its order of numbers within a tile of keys is its own, but the same on all ranks: sums can be added.
    """

    @abstractmethod
    def takes(self, block: MaskedBlock) -> bool:
        """Whether a call on these queries can add to the sum."""

    @abstractmethod
    def add(
        self,
        rows: slice,
        block: MaskedBlock,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        params: KernelParams,
        key_sums_2BKN: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add the dq of one call, of these rows of the batch.

        Returns its (dk, dv); with sums of these rows and keys it adds them there and returns None for both.
        """

    @abstractmethod
    def result(self, scale: float) -> Tensor:
        """dq [B, S, H, D] in the input's dtype. To be called once, after the last `add`; `scale` as in its params."""

    def round_keys(self, key_sums_2BKN: Tensor, k_BTKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(dk, dv) of sums, in the shape and dtype of k; `scale` as in the params of `add`."""
        raise AssertionError("a kernel without key_sum_tile")


_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class AttentionKernel(ABC):
    """One attention kernel. Equal inputs give equal results, up to the kernel's own order of summation."""

    name: str
    speed: str  # why it ranks where it does, for the banner
    device_type: str | None = "cuda"  # None for any
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)  # () for any
    has_windows = True  # masks with a lower bound
    has_value_head_dim = False  # values with a head size of their own
    has_softcap = False
    has_varlen = False  # `forward_segments` and `backward_segments` are one launch
    can_be_captured = False  # in CUDA graphs; set where it was measured
    sums_keys = False  # with grouped heads its `DqSum` takes sums of dk and dv (`key_sum_tile`)
    is_deterministic = True
    head_dims: range | None = None  # None for any
    min_capability = (0, 0)

    def refusal(self, spec: KernelSpec) -> str | None:
        """None if the kernel can do `spec`, else the reason why not."""
        if self.device_type not in (None, spec.device_type):
            return f"needs a {self.device_type} device, not {spec.device_type}"
        if spec.deterministic and not self.is_deterministic:
            return "its backward pass is not deterministic"
        if self.dtypes and spec.dtype not in self.dtypes:
            return f"needs {' or '.join(_DTYPE_NAMES[dtype] for dtype in self.dtypes)}, not {spec.dtype}"
        if spec.windowed and not self.has_windows:
            return "has no sliding window"
        if spec.softcap and not self.has_softcap:
            return "has no softcap"
        if spec.value_head_dim is not None and not self.has_value_head_dim:
            return f"needs values of head size {spec.head_dim}, not {spec.value_head_dim}"
        if (dims := self.head_dims) and spec.head_dim not in dims:
            multiple = f"multiple of {dims.step} from {dims[0]} to {dims[-1]}"
            return f"needs a head_dim that is a {multiple}, not {spec.head_dim}"
        if spec.device_type == "cuda" and (spec.capability or (0, 0)) < self.min_capability:
            return f"needs compute capability {'.'.join(map(str, self.min_capability))} or newer"
        return self._refusal(spec)

    def _refusal(self, spec: KernelSpec) -> str | None:
        """The same for what the attributes do not say, such as packages."""
        return None

    def split(self, block: MaskedBlock) -> list[MaskedBlock]:
        """Split a trimmed block into trimmed blocks that one call computes each."""
        return [block] if self.has_windows else split_causal(block)

    @abstractmethod
    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        """Returns (out [B, S, H, E], lse [B, H, S]) of one block from `split`."""

    @abstractmethod
    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv) of one block from `split`."""

    def dq_sum(self, dout_BSHE: Tensor, q_BSHD: Tensor, out_BSHE: Tensor, lse_BHS: Tensor) -> DqSum | None:
        """A sum for all calls of a backward pass, with out and lse over all keys; None if each returns its own dq."""
        return None

    def key_sum_tile(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor) -> int | None:
        """For kernels with `sums_keys`: calls on multiples of so many queries and keys can add; None if none can."""
        raise AssertionError("a kernel without sums_keys")

    def forward_segments(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        """Returns (out [B, S, H, E], lse [B, H, S]). Segments cut the rows' tokens, row after row.

        The band of `params` counts from each segment's last query and key.
        """
        out = lse = None
        q_THD, k_UKD, v_UKE = (x.flatten(0, 1) for x in (q_BSHD, k_BTKD, v_BTKE))
        for block in segments.blocks(params):
            queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
            tensors = (q_THD[None, queries], k_UKD[None, keys], v_UKE[None, keys])
            part, part_lse = self.forward(*tensors, params._replace(lower=block.lower, upper=block.upper))
            if out is None or lse is None:
                out = part.new_empty(len(q_THD), *part.shape[2:])
                lse = part_lse.new_empty(part.shape[2], len(q_THD))
            out[queries], lse[:, queries] = part[0], part_lse[0]
        assert out is not None
        assert lse is not None
        return out.unflatten(0, q_BSHD.shape[:2]), lse.unflatten(1, q_BSHD.shape[:2]).transpose(0, 1)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv) of `forward_segments`."""
        gradients: list[Tensor] = []
        q_THD, k_UKD, v_UKE, out_THE, dout_THE = (x.flatten(0, 1) for x in (*saved[:4], dout_BSHE))
        lse_HT = saved.lse_BHS.transpose(0, 1).flatten(1)
        for block in segments.blocks(params):
            queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
            cut = SavedTensors(
                q_THD[None, queries],
                k_UKD[None, keys],
                v_UKE[None, keys],
                out_THE[None, queries],
                lse_HT[None, :, queries],
            )
            band = params._replace(lower=block.lower, upper=block.upper)
            parts = self.backward(dout_THE[None, queries], cut, band)
            if not gradients:
                shapes = zip(parts, saved[:3], strict=True)
                gradients = [part.new_empty(like.shape[:2].numel(), *part.shape[2:]) for part, like in shapes]
            for whole, part, tokens in zip(gradients, parts, (queries, keys, keys), strict=True):
                whole[tokens] = part[0]
        dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(gradients, saved[:3], strict=True))
        return dq, dk, dv

    def forward_to(
        self,
        target_BSHE: Tensor | None,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, or as `forward_segments` if there are some. If there is a target, out is written there.

        This copies. A kernel that can write to a given tensor does that.
        """
        tensors = q_BSHD, k_BTKD, v_BTKE
        if segments is None:
            out, lse = self.forward(*tensors, params)
        else:
            out, lse = self.forward_segments(*tensors, segments, params)
        return out if target_BSHE is None else target_BSHE.copy_(out), lse

    def backward_to(
        self,
        targets: GradientTargets,
        dout_BSHE: Tensor,
        saved: SavedTensors,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Likewise as `backward` or `backward_segments`. Each gradient that has a target is written there."""
        if segments is None:
            gradients = self.backward(dout_BSHE, saved, params)
        else:
            gradients = self.backward_segments(dout_BSHE, saved, segments, params)
        parts = zip(gradients, targets, strict=True)
        dq, dk, dv = (part if target is None else target.copy_(part) for part, target in parts)
        return dq, dk, dv


class EqualHeadsKernel(AttentionKernel):
    """A kernel without GQA: keys and values are repeated for each query head, and their gradients summed."""

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        num_heads = q_BSHD.shape[2]
        return self._forward(q_BSHD, _expand_heads(k_BTKD, num_heads), _expand_heads(v_BTKE, num_heads), params)

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, num_kv_heads = saved.q_BSHD.shape[2], saved.k_BTKD.shape[2]
        k_BTHD, v_BTHE = (_expand_heads(x, num_heads) for x in (saved.k_BTKD, saved.v_BTKE))
        dq, dk, dv = self._backward(dout_BSHE, saved._replace(k_BTKD=k_BTHD, v_BTKE=v_BTHE), params)
        return dq, _reduce_heads(dk, num_kv_heads), _reduce_heads(dv, num_kv_heads)

    @abstractmethod
    def _forward(self, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        """`forward` with H key-value heads."""

    @abstractmethod
    def _backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        """`backward` with H key-value heads."""


def _expand_heads(kv_BTKD: Tensor, num_heads: int) -> Tensor:
    """[B, T, K, D] -> [B, T, H, D]: query head h uses key-value head h // (H // K)."""
    return kv_BTKD.repeat_interleave(num_heads // kv_BTKD.shape[2], dim=2)


def _reduce_heads(grad_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """The adjoint of `_expand_heads`, summed in fp32 at least."""
    if grad_BTHD.shape[2] == num_kv_heads:
        return grad_BTHD
    sum_dtype = torch.promote_types(grad_BTHD.dtype, torch.float32)
    return grad_BTHD.unflatten(2, (num_kv_heads, -1)).sum(3, dtype=sum_dtype)


def split_causal(block: MaskedBlock) -> list[MaskedBlock]:
    """Split a block without a lower bound into full blocks and one causal square: at most three."""
    if block.is_full or block.is_causal_square:
        return [block]
    assert block.lower is None, "there is a lower bound"
    assert block.upper is not None
    q_start, q_stop, k_start, k_stop = block.q_start, block.q_stop, block.k_start, block.k_stop
    # Queries before q_split see all keys before k_split, and a triangle of the others. Queries from q_split on see all.
    k_split = k_start + block.upper
    q_split = q_start + k_stop - k_split
    early, late = (q_start, q_split), (q_split, q_stop)
    return parts_of(block, [(*early, k_split, k_stop), (*early, k_start, k_split), (*late, k_start, k_stop)])


def parts_of(block: MaskedBlock, bounds: Iterable[tuple[int, int, int, int]]) -> list[MaskedBlock]:
    """The parts of a block with these queries and keys [start, stop), without empty ones."""
    return [part for each in bounds if (part := block.part(*each)) is not None]


def band_mask(num_queries: int, num_keys: int, lower: int | None, upper: int | None, device: torch.device) -> Tensor:
    """[S, T] bool: which pairs attend."""
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    allowed = allowed if lower is None else allowed.triu(lower)
    return allowed if upper is None else allowed.tril(upper)


def flash_window(num_queries: int, num_keys: int, params: KernelParams, unbounded: int | None) -> dict[str, Any]:
    """The band as FlashAttention counts it: from the diagonal that ends at the last query and the last key.

    In a trimmed block both bounds include that diagonal, so neither size is negative. `unbounded` stands for no bound.
    """
    diagonal = num_keys - num_queries
    return {
        "window_size_left": unbounded if params.lower is None else diagonal - params.lower,
        "window_size_right": unbounded if params.upper is None else params.upper - diagonal,
    }


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module can be imported. Does not import it: kernel packages take seconds."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # find_spec imports the parent package
        return False


def refuse_missing_package(spec: KernelSpec, package: str, module: str) -> str | None:
    """The refusal of kernels from an optional package."""
    if spec.is_elsewhere or is_installed(module):
        return None
    return f"the package {package} is not installed: pip install -e '.[kernels]'"
