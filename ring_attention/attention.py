"""Attention modules that replace `deepspeed.sequence.layer.DistributedAttention`.

The call is the same (query, key, value, batch_dim_idx), and so are the constructor's arguments, but for the first: a
kernel, not a module. Each rank passes its own tokens with all heads, and gets the attention of its own queries. By
default a rank's tokens are one contiguous part of the sequence, as Ulysses has them. layout="zigzag" balances causal
work; it needs sequences sharded by the module's `layout(length).shard`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_attention.gather import AllGatherFunction
from ring_attention.kernels import Scores
from ring_attention.mask import Mask
from ring_attention.ring import Ring
from ring_attention.sequence_attention import Hosts, SequenceAttention
from ring_attention.sinks import ulysses_heads
from ring_attention.topology import hybrid_split, ring_order
from ring_attention.transport import P2PTransport, make_transport
from ring_attention.transport.collectives import rank_and_size, same_ranks, subgroup


class LocalAttention(SequenceAttention):
    """Attention among this rank's own tokens: exact on one rank, a baseline without context on several."""


class RingAttention(SequenceAttention):
    """Keys and values travel around a ring. Every rank keeps its queries, all heads, of any number; O(L/P) memory."""

    options = ("transport", "hosts")

    def _join(self, group: Any, transport: str, hosts: Hosts, sp_stream: Any) -> tuple[P2PTransport | None, int]:
        self._group = group
        return make_transport(transport, group, None if hosts is None else ring_order(hosts)), 0


class AllGatherAttention(RingAttention):
    """Every rank gathers all keys and values: O(L) memory, nothing overlaps. The baseline to compare with."""

    options = ("hosts",)

    def _join(self, group: Any, transport: str, hosts: Hosts, sp_stream: Any) -> tuple[P2PTransport | None, int]:
        return super()._join(group, "p2p", hosts, sp_stream)

    def _compute(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, sinks_H: Tensor | None, ring: Ring) -> Tensor:
        return AllGatherFunction.apply(q_BSHD, k_BSKD, v_BSKE, sinks_H, ring)


class HybridAttention(SequenceAttention):
    """Ulysses among neighbours, a ring across them: for more ranks than heads, with fewer transfers than one long ring.

    Every rank of the group must construct it, because it builds the two groups that the rank is in. On NCCL every rank
    of the world must, each on its own group. Raises ValueError also without deepspeed.init_distributed(), and for a
    ulysses_degree that does not divide the ranks or, in a call, the key-value heads.
    """

    options = ("transport", "hosts", "ulysses_degree")

    def _join(self, group: Any, transport: str, hosts: Hosts, sp_stream: Any) -> tuple[P2PTransport | None, int]:
        # takes seconds, and a ring does without
        import deepspeed.comm
        from deepspeed.sequence.layer import DistributedAttention

        if not deepspeed.comm.is_initialized():  # torch's init_process_group alone is not enough
            raise ValueError(
                f"{type(self).__name__} uses DeepSpeed's collectives: call deepspeed.init_distributed() first"
            )
        self._group = group
        group_rank, num_ranks = rank_and_size(group)
        grid = hybrid_split([0] * num_ranks if hosts is None else hosts, self.ulysses_degree)
        row = next(row for row in grid if group_rank in row)
        ulysses_rank = row.index(group_rank)
        ring = None
        if len(grid) > 1:
            ranks = [other[ulysses_rank] for other in grid]
            members = sorted(ranks)
            ring = make_transport(transport, subgroup(group, members), [members.index(rank) for rank in ranks])
        ulysses_group = subgroup(group, row)
        self._distributed = DistributedAttention(super()._attend, ulysses_group, 2, 1, sp_stream)  # pyright: ignore[reportArgumentType]
        return ring, ulysses_rank

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        mask: Mask,
        scores: Scores,
        sinks: Tensor | None,
    ) -> Tensor:
        num_kv_heads, ulysses_rank = key.shape[2], self.sequence_rank % self.ulysses_degree
        self._check_heads(num_kv_heads)
        if sinks is not None:
            sinks = sinks[ulysses_heads(query.shape[2], num_kv_heads, ulysses_rank, self.ulysses_degree)]
        self._distributed.gather_idx = 1 - batch_dim_idx
        return self._distributed(query, key, value, batch_dim_idx, None, batch_dim_idx, mask, scores, sinks)

    def _shared(self) -> list[Any]:
        streams = [value for value in vars(self._distributed).values() if isinstance(value, torch.Stream)]
        return [*super()._shared(), self._distributed.spg, *streams]

    def _check_heads(self, num_kv_heads: int) -> None:
        if num_kv_heads % self.ulysses_degree == 0:
            return
        legal = [degree for degree in range(1, num_kv_heads + 1) if num_kv_heads % degree == 0]
        remedy = f"use HybridAttention with a ulysses_degree of {legal}, or RingAttention"
        if num_kv_heads > self.ulysses_degree and self.ring_degree == 1:
            from deepspeed.utils import groups

            # DeepSpeed asks its one mpu for this rank's number, and without an mpu takes every rank for number 0
            if groups.mpu is not None and same_ranks(groups.mpu.get_sequence_parallel_group(), self._distributed.spg):
                return
            remedy += ", or call deepspeed.initialize(mpu=...) with this group before"
        raise ValueError(
            f"num_kv_heads={num_kv_heads} is not a multiple of ulysses_degree={self.ulysses_degree}: {remedy}"
        )


class UlyssesAttention(HybridAttention):
    """DeepSpeed's DistributedAttention around an attention kernel: each rank gets whole sequences of some heads.

    The number of key-value heads must be at least the number of ranks, or a call raises ValueError. If it is not a
    multiple of them, DeepSpeed must know its mpu, so `deepspeed.initialize(mpu=...)` must come first.
    """

    options = ()

    def _join(self, group: Any, transport: str, hosts: Hosts, sp_stream: Any) -> tuple[P2PTransport | None, int]:
        self.ulysses_degree = rank_and_size(group)[1]
        return super()._join(group, transport, hosts, sp_stream)
