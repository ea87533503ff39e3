"""Attention modules that stand where `deepspeed.sequence.layer.DistributedAttention` stands.

Same constructor order, same call (query, key, value, batch_dim_idx), same shapes: each rank passes its own tokens, all
heads, and gets the attention of its own queries. By default a rank's tokens are one run of the sequence, as Ulysses
cuts it; layout="zigzag" balances causal work, for sequences cut with the module's `layout(length).shard`.

    RingAttention       keys and values travel from rank to rank; any number of heads
    UlyssesAttention    DeepSpeed's all-to-all: each rank gets whole sequences of some heads; ranks <= key-value heads
    HybridAttention     Ulysses among neighbours, a ring across them; ranks <= key-value heads within Ulysses only
    AllGatherAttention  every rank gathers all keys and values: the naive baseline
    LocalAttention      one rank
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ring_attention.blocks import Block, BlockSpec, choose_block
from ring_attention.exchange import P2PExchange, make_exchange, rank_and_size, same_ranks, subgroup
from ring_attention.gather import GatherFunction, Gathering
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask
from ring_attention.recognize import Recognized
from ring_attention.ring import Ring, RingFunction
from ring_attention.schedule import ring_schedule
from ring_attention.topology import hybrid_split, ring_order


class SequenceAttention(nn.Module):
    """What the modules share: checks, the choice of the kernel, and where this rank stands in its sequence.

    `sequence_rank` is what `Layout.shard` and `Layout.positions` take: which part of a sequence this rank holds.
    """

    def __init__(
        self,
        local_attention: Block | str | Callable,
        mask: Mask,
        layout: str,
        exchange: P2PExchange | None,
        dims: tuple[int, int],
        ulysses_degree: int = 1,
        ulysses_rank: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(local_attention, (Block, str)) and not callable(local_attention):
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
        """Attention of this rank's queries over the whole sequence. Every rank of the group must call it, with one
        mask.

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
                rotary_pos_emb, or dropout.
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
            if not isinstance(self.local_attn, (Block, str)):
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
        q_BSHD, k_BSKD, v_BSKE = _batch_first((query, key, value), batch_dim_idx)
        layout, ring_rank = self._layout_of(q_BSHD.shape[1]), 0
        mask = mask.within(layout.padded_length)
        if self._exchange is not None:
            self._exchange.connect(q_BSHD)
            ring_rank = self._exchange.ring_rank
        block = self._block(q_BSHD, k_BSKD, v_BSKE, mask)
        ring = Ring(ring_schedule(layout, mask, ring_rank), self._exchange, block, scale)
        (out,) = _batch_first((RingFunction.apply(q_BSHD, k_BSKD, v_BSKE, ring),), batch_dim_idx)
        return out

    def _block(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, mask: Mask) -> Block:
        given = self.local_attn
        spec = BlockSpec.of(q_BSHD, k_BSKD, v_BSKE, mask.is_windowed)
        return choose_block(spec, given if isinstance(given, (Block, str)) else "auto")[0]

    def _layout_of(self, ring_length: int) -> Layout:
        """The ring's layout, given how many tokens each of its ranks holds."""
        layout = Layout(self._layout_name, self.ring_degree, ring_length * self.ring_degree)
        if layout.ring_length != ring_length:
            raise ValueError(
                f"{ring_length} tokens are not {layout.chunks_per_ring_rank} equal chunks, which layout={layout.name} "
                "needs on each rank of the ring: cut sequences with the module's layout(length).shard"
            )
        return layout


class RingAttention(SequenceAttention):
    """Keys and values travel around a ring; every rank keeps its queries, all heads, O(L/P) memory.

    Args:
        local_attention: "auto" for the fastest block kernel, a kernel or its name; or what DistributedAttention was
            given, a module that sees whole sequences: it is run once on made-up tokens to see that it is plain causal
            or full attention, which a block kernel then computes.
        sequence_process_group: the ranks that share a sequence.
        scatter_idx, gather_idx: DistributedAttention's; 2, for heads are dim 2, and 0 or 1. Which one is the tokens'
        dim
            follows from batch_dim_idx.
        sp_stream, num_kv_heads: DistributedAttention's; they have no meaning here.
        mask: which keys a query sees; causal if not given.
        layout: "contiguous" or "zigzag": how the caller cuts sequences (`Layout.shard`).
        transport: how K,V travel, a key of `ring_attention.exchange.TRANSPORTS`.
        hosts: the host of each rank of the group, where they are not in the order of hosts (`topology.ring_order`).

    Raises:
        ValueError: for an unknown layout, transport or kernel, or a kernel that cannot do what a call needs.
    """

    def __init__(
        self,
        local_attention: Block | str | Callable,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
        transport: str = "p2p",
        hosts: Sequence[Hashable] | None = None,
    ) -> None:
        order = None if hosts is None else ring_order(hosts)
        exchange = make_exchange(transport, sequence_process_group, order)
        super().__init__(local_attention, mask, layout, exchange, (scatter_idx, gather_idx))


class HybridAttention(SequenceAttention):
    """Ulysses among neighbours, a ring across them: more ranks than heads, and fewer hops than a ring of all.

    Args: as `RingAttention`, and
        ulysses_degree: ranks within Ulysses; a divisor of the group's ranks and of the key-value heads.

    sp_stream and num_kv_heads go to DistributedAttention. Every rank of the group must construct it, for it builds
    the two groups that this rank is in; on NCCL every rank of the world, each on its own group.

    Raises:
        ValueError: as `RingAttention`, and for a degree that does not divide the ranks or, in forward, the heads.
    """

    def __init__(
        self,
        local_attention: Block | str | Callable,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        ulysses_degree: int,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
        transport: str = "p2p",
        hosts: Sequence[Hashable] | None = None,
    ) -> None:
        # takes seconds, and a ring alone does without
        from deepspeed.sequence.layer import DistributedAttention

        group_rank, num_ranks = rank_and_size(sequence_process_group)
        split = hybrid_split([0] * num_ranks if hosts is None else hosts, ulysses_degree)
        ring_rank, ulysses_rank = split.place(group_rank)
        exchange = None
        if len(split.grid) > 1:
            ranks = split.ring(ulysses_rank)
            members = tuple(sorted(ranks))
            order = [members.index(rank) for rank in ranks]
            exchange = make_exchange(transport, subgroup(sequence_process_group, members), order)
        dims = (scatter_idx, gather_idx)
        super().__init__(local_attention, mask, layout, exchange, dims, ulysses_degree, ulysses_rank)
        ulysses_group = subgroup(sequence_process_group, split.grid[ring_rank])
        self._distributed = DistributedAttention(super()._attend, ulysses_group, 2, 1, sp_stream, num_kv_heads)  # pyright: ignore[reportArgumentType]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, mask: Mask, scale: float
    ) -> Tensor:
        self._check_heads(query.shape[2], key.shape[2])
        self._distributed.gather_idx = 1 - batch_dim_idx
        return self._distributed(query, key, value, batch_dim_idx, None, batch_dim_idx, mask, scale)

    def _check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        if num_kv_heads % self.ulysses_degree == 0:
            return
        name = f"num_kv_heads={num_kv_heads}"
        legal = [degree for degree in range(1, num_kv_heads + 1) if num_kv_heads % degree == 0]
        if num_kv_heads < self.ulysses_degree:
            raise ValueError(
                f"{name} is less than ulysses_degree={self.ulysses_degree}, which leaves ranks without a key-value "
                f"head: use a ulysses_degree of {legal}, with a ring across (HybridAttention), or RingAttention"
            )
        if self.ring_degree > 1:
            raise ValueError(
                f"{name} is not a multiple of ulysses_degree={self.ulysses_degree}, which DeepSpeed takes without a "
                f"ring across only: use a ulysses_degree of {legal}"
            )
        from deepspeed.utils import groups

        # DeepSpeed asks its one mpu for this rank's number, and without one takes every rank for number 0
        if groups.mpu is None or not same_ranks(groups.mpu.get_sequence_parallel_group(), self._distributed.spg):
            raise ValueError(
                f"{name} is not a multiple of ulysses_degree={self.ulysses_degree}, for which DeepSpeed needs an mpu "
                f"with this group: call deepspeed.initialize(mpu=...) before, or use a ulysses_degree of {legal}"
            )


class UlyssesAttention(HybridAttention):
    """DeepSpeed's DistributedAttention with a block kernel inside: each rank gets whole sequences of some heads.

    Args: as `RingAttention`. The number of key-value heads is at least the group's ranks; if it is not a multiple of
        them, DeepSpeed must know its mpu, so `deepspeed.initialize(mpu=...)` comes first.

    Raises:
        ValueError: as `RingAttention`, and for too few key-value heads, in forward.
    """

    def __init__(
        self,
        local_attention: Block | str | Callable,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
    ) -> None:
        super().__init__(
            local_attention,
            sequence_process_group,
            scatter_idx,
            gather_idx,
            sp_stream,
            num_kv_heads,
            ulysses_degree=rank_and_size(sequence_process_group)[1],
            mask=mask,
            layout=layout,
        )


class AllGatherAttention(SequenceAttention):
    """Every rank gathers all keys and values: O(L) memory, nothing overlaps. The baseline to compare with.

    Args and errors as `RingAttention`.
    """

    def __init__(
        self,
        local_attention: Block | str | Callable,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
        hosts: Sequence[Hashable] | None = None,
    ) -> None:
        order = None if hosts is None else ring_order(hosts)
        exchange = make_exchange("p2p", sequence_process_group, order)
        super().__init__(local_attention, mask, layout, exchange, (scatter_idx, gather_idx))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, mask: Mask, scale: float
    ) -> Tensor:
        assert self._exchange is not None
        q_BSHD, k_BSKD, v_BSKE = _batch_first((query, key, value), batch_dim_idx)
        layout = self._layout_of(q_BSHD.shape[1])
        mask = mask.within(layout.padded_length)
        block = self._block(q_BSHD, k_BSKD, v_BSKE, mask)
        gathering = Gathering(layout, mask, self._exchange, block, scale)
        (out,) = _batch_first((GatherFunction.apply(q_BSHD, k_BSKD, v_BSKE, gathering),), batch_dim_idx)
        return out


class LocalAttention(SequenceAttention):
    """Attention among this rank's own tokens only: exact for one rank, a baseline without context for more.

    Args: as `RingAttention`; takes and ignores the group.
    """

    def __init__(
        self,
        local_attention: Block | str | Callable,
        sequence_process_group: Any = None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
    ) -> None:
        super().__init__(local_attention, mask, layout, None, (scatter_idx, gather_idx))


@functools.cache
def _disable_compilers() -> Any:
    return torch.compiler.disable(SequenceAttention._forward)  # imports the compiler, which takes a second


def _batch_first(tensors: tuple[Tensor, ...], batch_dim_idx: int) -> tuple[Tensor, ...]:
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
