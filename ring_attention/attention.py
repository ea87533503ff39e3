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

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from ring_attention.gather import AllGather, AllGatherFunction
from ring_attention.kernels import AttentionKernel
from ring_attention.mask import CAUSAL, Mask
from ring_attention.sequence_attention import SequenceAttention, batch_first
from ring_attention.topology import hybrid_split, ring_order
from ring_attention.transport import make_transport, rank_and_size, same_ranks, subgroup


class RingAttention(SequenceAttention):
    """Keys and values travel around a ring; every rank keeps its queries, all heads, O(L/P) memory.

    Args:
        local_attention: "auto" for the fastest block kernel, a kernel or its name; or what DistributedAttention was
            given, a module or function that sees whole sequences: it is run on made-up tokens, 32768 at most, to see
            that it is plain causal or full attention, which a block kernel then computes (`recognize`).
        sequence_process_group: the ranks that share a sequence.
        scatter_idx, gather_idx: DistributedAttention's: 2, for heads are dim 2, and 0 or 1; which of these is the
            tokens' dim follows from batch_dim_idx.
        sp_stream, num_kv_heads: DistributedAttention's; they have no meaning here.
        mask: which keys a query sees; causal if not given.
        layout: "contiguous" or "zigzag": how the caller cuts sequences (`Layout.shard`).
        transport: how K,V travel, a key of `ring_attention.transport.TRANSPORTS`; "auto" for the faster one here.
        hosts: the host of each rank of the group, where they are not in the order of hosts (`topology.ring_order`).

    Raises:
        ValueError: for an unknown layout, transport or kernel, or a kernel that cannot do what a call needs.
    """

    def __init__(
        self,
        local_attention: AttentionKernel | str | Callable,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
        transport: str = "auto",
        hosts: Sequence[Hashable] | None = None,
    ) -> None:
        order = None if hosts is None else ring_order(hosts)
        exchange = make_transport(transport, sequence_process_group, order)
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
        local_attention: AttentionKernel | str | Callable,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        ulysses_degree: int,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
        transport: str = "auto",
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
            exchange = make_transport(transport, subgroup(sequence_process_group, members), order)
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
        local_attention: AttentionKernel | str | Callable,
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
        local_attention: AttentionKernel | str | Callable,
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
        exchange = make_transport("p2p", sequence_process_group, order)
        super().__init__(local_attention, mask, layout, exchange, (scatter_idx, gather_idx))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, mask: Mask, scale: float
    ) -> Tensor:
        assert self._exchange is not None
        q_BSHD, k_BSKD, v_BSKE = batch_first((query, key, value), batch_dim_idx)
        layout = self._layout_of(q_BSHD.shape[1])
        mask = mask.within(layout.padded_length)
        block = self._block(q_BSHD, k_BSKD, v_BSKE, mask)
        gathering = AllGather(layout, mask, self._exchange, block, scale)
        (out,) = batch_first((AllGatherFunction.apply(q_BSHD, k_BSKD, v_BSKE, gathering),), batch_dim_idx)
        return out


class LocalAttention(SequenceAttention):
    """Attention among this rank's own tokens only: exact for one rank, a baseline without context for more.

    Args: as `RingAttention`; takes and ignores the group.
    """

    def __init__(
        self,
        local_attention: AttentionKernel | str | Callable,
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
