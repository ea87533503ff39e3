"""Attention modules that stand where `deepspeed.sequence.layer.DistributedAttention` stands.

Same constructor order (local attention, sequence process group), same call (query, key, value, batch_dim_idx), same
shapes: each rank passes its own tokens, all heads, and gets the attention of its own queries. The one difference in
meaning: DistributedAttention's local attention sees whole sequences and some heads; a ring's sees block pairs and must
return a log-sum-exp, so it is a block kernel (`ring_attention.blocks`) or its name.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ring_attention.blocks import Block, BlockSpec, choose_block
from ring_attention.exchange import TRANSPORTS
from ring_attention.layout import Layout
from ring_attention.ring import Ring, RingFunction
from ring_attention.schedule import BlockPair, Stage, causal_schedule


class RingAttention(nn.Module):
    """Exact causal attention over a sequence cut across `sequence_process_group`.

    Args:
        local_attention: a block kernel, its name, or "auto" for the fastest that supports the tensors of a call.
        sequence_process_group: the ranks that share a sequence, in ring order.
        layout: "zigzag" or "contiguous": how the caller cut the sequence (`Layout.shard`).
        transport: how K,V travel, a key of `ring_attention.exchange.TRANSPORTS`.

    Raises:
        ValueError: for an unknown layout, transport or kernel, or a kernel that cannot do what a call needs.
    """

    def __init__(
        self,
        local_attention: Block | str,
        sequence_process_group: Any,
        *,
        layout: str = "zigzag",
        transport: str = "p2p",
    ) -> None:
        super().__init__()
        if transport not in TRANSPORTS:
            raise ValueError(f"attention.transport={transport} is unknown: use one of {', '.join(TRANSPORTS)}")
        self._local_attention = local_attention
        self._layout_name = layout
        self._exchange = TRANSPORTS[transport](sequence_process_group)
        Layout(layout, self._exchange.ring_degree, 1)  # refuses an unknown name here rather than in the first step

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int) -> Tensor:
        """Attention of this rank's queries over the whole ring. Every rank of the group must call it.

        Args:
            query: [B, S, H, D] for batch_dim_idx 0, [S, B, H, D] for 1; S local tokens, even, the same on all ranks.
            key, value: the same with K heads, H a multiple of K.

        Returns:
            The output, shaped and typed as `query`.

        Raises:
            ValueError: for an odd S or a batch_dim_idx other than 0 and 1.
        """
        if batch_dim_idx not in (0, 1):
            raise ValueError(f"batch_dim_idx={batch_dim_idx} must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])")
        if batch_dim_idx == 1:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out_BSHD = RingFunction.apply(query, key, value, self._ring(query, key))
        return out_BSHD.transpose(0, 1) if batch_dim_idx == 1 else out_BSHD

    def _ring(self, q_BSHD: Tensor, k_BSKD: Tensor) -> Ring:
        block = _resolve_block(self._local_attention, q_BSHD, k_BSKD)
        local_length, ring_degree = q_BSHD.shape[1], self._exchange.ring_degree
        if local_length % 2:
            raise ValueError(
                f"{local_length} local tokens are not two equal chunks: cut the sequence with Layout.shard"
            )
        layout = Layout(self._layout_name, ring_degree, local_length * ring_degree)
        stages = causal_schedule(layout, self._exchange.ring_rank)
        return Ring(stages, self._exchange, block, 1 / math.sqrt(q_BSHD.shape[-1]))


class LocalAttention(nn.Module):
    """Causal attention among this rank's own tokens only: exact for one rank, a baseline without context for more.

    Same contract as `RingAttention`; takes and ignores the group.
    """

    def __init__(self, local_attention: Block | str, sequence_process_group: Any = None) -> None:
        super().__init__()
        self._local_attention = local_attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int) -> Tensor:
        """As `RingAttention.forward`, without communication."""
        if batch_dim_idx == 1:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        block = _resolve_block(self._local_attention, query, key)
        length = query.shape[1]
        stages = (Stage(0, BlockPair(0, length, 0, length, causal=True)),)
        ring = Ring(stages, None, block, 1 / math.sqrt(query.shape[-1]))
        out_BSHD = RingFunction.apply(query, key, value, ring)
        return out_BSHD.transpose(0, 1) if batch_dim_idx == 1 else out_BSHD


def _resolve_block(local_attention: Block | str, q_BSHD: Tensor, k_BSKD: Tensor) -> Block:
    if isinstance(local_attention, Block):
        return local_attention
    return choose_block(BlockSpec.of(q_BSHD, k_BSKD), local_attention)[0]
