"""What all attention modules share: the call, its checks, the choice of the kernel, and the ring that they run.

`attention` above has the modules themselves; below are `ring`, which computes, and `recognize`, which looks at what a
user gave as local attention.

Shapes: B batch, S local tokens, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ring_attention.kernels import AttentionKernel, KernelSpec, choose_kernel
from ring_attention.layout import Layout
from ring_attention.mask import Mask
from ring_attention.recognize import Recognized
from ring_attention.ring import Ring, RingFunction, buffer_bytes
from ring_attention.transport import P2PTransport


class SequenceAttention(nn.Module):
    """What the modules share: checks, the choice of the kernel, and where this rank stands in its sequence.

    `sequence_rank` is what `Layout.shard` and `Layout.positions` take: which part of a sequence this rank holds.
    """

    def __init__(
        self,
        local_attention: AttentionKernel | str | Callable,
        mask: Mask,
        layout: str,
        exchange: P2PTransport | None,
        dims: tuple[int, int],
        ulysses_degree: int = 1,
        ulysses_rank: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(local_attention, (AttentionKernel, str)) and not callable(local_attention):
            raise ValueError(f'local_attention={local_attention!r} must be "auto", a kernel or its name, or a module')
        if dims not in ((2, 0), (2, 1)):
            raise ValueError(
                f"scatter_idx={dims[0]}, gather_idx={dims[1]}: heads must be dim 2 and tokens dim 0 or 1, as in "
                "[B, S, H, D] and [S, B, H, D], so use 2 and 0 or 1"
            )
        _check_mask(mask)
        self.local_attn = local_attention  # named as in DistributedAttention
        self._recognized = Recognized()
        self._mask, self._layout_name, self._exchange = mask, layout, exchange
        self.ring_degree, ring_rank = (exchange.ring_degree, exchange.ring_rank) if exchange else (1, 0)
        self.ulysses_degree = ulysses_degree
        self.sequence_rank = ring_rank * ulysses_degree + ulysses_rank
        Layout(layout, 1, 1)  # refuses an unknown name here rather than in the first step
        # compilers step around it: schedules are Python, and hops must keep their order on all ranks
        self._outside_compilers = _disable_compilers()

    def layout(self, length: int) -> Layout:
        """How sequences of `length` tokens must lie over the ranks."""
        return Layout(self._layout_name, self.ring_degree, length, self.ulysses_degree)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: None = None,
        *args: None,
        mask: Mask | None = None,
        softmax_scale: float | None = None,
        dropout_p: float = 0.0,
        **kwargs: None,
    ) -> Tensor:
        """Attention of this rank's queries over the whole sequence. Every rank must call it, all with one mask.

        Args:
            query: [B, S, H, D] for batch_dim_idx 0, [S, B, H, D] for 1; S local tokens, the same on all ranks.
            key: the same with K heads, H a multiple of K.
            value: as key; its head size may be its own where a kernel has that.
            mask: over the whole sequence, padding included; None is the constructor's, or what a module was recognised
                to compute.
            softmax_scale: None is 1 / sqrt(D).
            rotary_pos_emb, args, kwargs: what DistributedAttention would apply or hand on; only None is taken.

        Returns:
            The output, shaped as `query` but with the value's head size, in its dtype.

        Raises:
            ValueError: for tensors that do not fit each other or the layout, a kernel that cannot do what is asked, a
                local attention that is not recognised, an argument that nothing here applies, or dropout.
        """
        extra = {"rotary_pos_emb": rotary_pos_emb, **{f"argument {6 + n}": x for n, x in enumerate(args)}, **kwargs}
        return self._outside_compilers(self, query, key, value, batch_dim_idx, extra, mask, softmax_scale, dropout_p)

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        extra: dict[str, Any],
        mask: Mask | None,
        softmax_scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        for name, argument in extra.items():
            if argument is not None:
                raise ValueError(
                    f"{name} is {type(argument).__name__}, which nothing here applies: give what a query sees as "
                    "mask=Mask(...), and rotate query and key before, by the global positions of Layout.positions"
                )
        if dropout_p:
            raise ValueError(
                f"dropout_p={dropout_p}: attention dropout is not supported, since the backward pass would need the "
                "very elements that each kernel dropped at each stage on each rank: use 0, and dropout after the "
                "output projection"
            )
        _check_tensors(query, key, value, batch_dim_idx)
        # kernels read heads as runs of numbers; measured, the CPU's flash kernel gives wrong results otherwise
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        if mask is not None:
            _check_mask(mask)
        else:
            mask = self._mask
            if not isinstance(self.local_attn, (AttentionKernel, str)):
                num_ranks = self.ring_degree * self.ulysses_degree
                mask = self._recognized.mask_of(self.local_attn, query, key, value, batch_dim_idx, num_ranks)
        if softmax_scale is None:
            softmax_scale = 1 / math.sqrt(query.shape[-1])
        if not 0 < softmax_scale < math.inf:
            raise ValueError(f"softmax_scale={softmax_scale} must be above 0, and finite: kernels mask by -inf * scale")
        if mask.documents is not None and len(mask.documents) not in (1, query.shape[batch_dim_idx]):
            raise ValueError(
                f"the mask has documents for {len(mask.documents)} rows, the batch has {query.shape[batch_dim_idx]}: "
                "give one set of boundaries for all rows, or one per row"
            )
        with torch.autocast(query.device.type, enabled=False):  # what tensors are in is what is computed in
            return self._attend(query, key, value, batch_dim_idx, mask, softmax_scale)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, mask: Mask, scale: float
    ) -> Tensor:
        """Over the ring that this rank is on; one of one rank without an exchange."""
        q_BSHD, k_BSKD, v_BSKE = batch_first((query, key, value), batch_dim_idx)
        layout = self._layout_of(q_BSHD.shape[1])
        mask = mask.within(layout.padded_length)
        if self._exchange is not None:
            trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BSHD, k_BSKD, v_BSKE))
            self._exchange.connect(q_BSHD, buffer_bytes(layout, mask, k_BSKD, v_BSKE, trains))
        block = self._block(q_BSHD, k_BSKD, v_BSKE, mask)
        ring = Ring(layout, mask, self._exchange, block, scale)
        (out,) = batch_first((RingFunction.apply(q_BSHD, k_BSKD, v_BSKE, ring),), batch_dim_idx)
        return out

    def _block(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, mask: Mask) -> AttentionKernel:
        given = self.local_attn
        spec = KernelSpec.of(q_BSHD, k_BSKD, v_BSKE, mask.is_windowed)
        return choose_kernel(spec, given if isinstance(given, (AttentionKernel, str)) else "auto")[0]

    def _layout_of(self, ring_length: int) -> Layout:
        """The ring's layout, given how many tokens each of its ranks holds."""
        layout = Layout(self._layout_name, self.ring_degree, ring_length * self.ring_degree)
        if layout.ring_length != ring_length:
            raise ValueError(
                f"{ring_length} tokens are not {layout.chunks_per_ring_rank} equal chunks, which layout={layout.name} "
                "needs on each rank of the ring: cut sequences with the module's layout(length).shard"
            )
        return layout


@functools.cache
def _disable_compilers() -> Any:
    return torch.compiler.disable(SequenceAttention._forward)  # imports the compiler, which takes a second


def batch_first(tensors: tuple[Tensor, ...], batch_dim_idx: int) -> tuple[Tensor, ...]:
    """[B, S, ...] from what the caller has, and back."""
    return tuple(tensor.transpose(0, 1) for tensor in tensors) if batch_dim_idx == 1 else tensors


def _check_mask(mask: Mask) -> None:
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is {type(mask).__name__}, but must be a ring_attention.Mask, such as Mask(left=4095) or "
            "CAUSAL.packed(cu_seqlens): masks given as a tensor are not supported"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int) -> None:
    if batch_dim_idx not in (0, 1):
        raise ValueError(f"batch_dim_idx={batch_dim_idx} must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but four dims are needed: [B, S, heads, head size]"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but query is {query.dtype}: cast them to one dtype")
        if tensor.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, query {list(query.shape)}: the first two dims must be equal"
            )
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    if 0 in (num_kv_heads, query.shape[3], value.shape[3]):
        raise ValueError(f"key has shape {list(key.shape)}, value {list(value.shape)}: no head or size may be 0")
    if value.shape[2] != num_kv_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_kv_heads} key and {value.shape[2]} value heads: keys and "
            "values need as many, and queries a multiple of that"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key has head size {key.shape[3]}, query {query.shape[3]}: they must be equal")
