"""Attention modules that stand where `deepspeed.sequence.layer.DistributedAttention` stands.

Same constructor order, same call (query, key, value, batch_dim_idx), same shapes: each rank passes its own tokens, all
heads, and gets the attention of its own queries. Two differences in meaning:

- `local_attention` of DistributedAttention sees whole sequences and some heads; a ring's sees block pairs and must
  return a log-sum-exp, so it is a block kernel (`ring_attention.blocks`) or its name.
- The default layout is zigzag, which balances causal work: cut sequences with `Layout.shard`. Shards as Ulysses users
  have them, one run of tokens per rank, are layout="contiguous".
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
        scatter_idx, gather_idx, sp_stream, num_kv_heads: DistributedAttention's; a ring scatters no heads, so they
            have no meaning here.
        layout: "zigzag" or "contiguous": how the caller cut the sequence (`Layout.shard`).
        transport: how K,V travel, a key of `ring_attention.exchange.TRANSPORTS`.

    Raises:
        ValueError: for an unknown layout, transport or kernel, or a kernel that cannot do what a call needs.
    """

    def __init__(
        self,
        local_attention: Block | str,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        layout: str = "zigzag",
        transport: str = "p2p",
    ) -> None:
        super().__init__()
        if transport not in TRANSPORTS:
            raise ValueError(f"transport={transport!r} is unknown: use one of {', '.join(TRANSPORTS)}")
        self._local_attention = _checked(local_attention)
        self._layout_name = layout
        self._exchange = TRANSPORTS[transport](sequence_process_group)
        Layout(layout, self._exchange.ring_degree, 1)  # refuses an unknown name here rather than in the first step

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, rotary_pos_emb: None = None
    ) -> Tensor:
        """Attention of this rank's queries over the whole ring. Every rank of the group must call it.

        Args:
            query: [B, S, H, D] for batch_dim_idx 0, [S, B, H, D] for 1; S local tokens, even, the same on all ranks.
            key, value: the same with K heads, H a multiple of K.

        Returns:
            The output, shaped and typed as `query`.

        Raises:
            ValueError: for an odd S, a batch_dim_idx other than 0 and 1, or a rotary_pos_emb.
        """
        if rotary_pos_emb is not None:
            raise ValueError(
                "rotary_pos_emb is not applied in here: rotate query and key before, by the global positions of "
                "Layout.positions"
            )
        return _attend(self._local_attention, query, key, value, batch_dim_idx, self._ring_of)

    def _ring_of(self, block: Block, local_length: int, scale: float) -> Ring:
        if local_length % 2:
            raise ValueError(f"{local_length} local tokens are not two equal chunks: cut sequences with Layout.shard")
        ring_degree = self._exchange.ring_degree
        layout = Layout(self._layout_name, ring_degree, local_length * ring_degree)
        return Ring(causal_schedule(layout, self._exchange.ring_rank), self._exchange, block, scale)


class LocalAttention(nn.Module):
    """Causal attention among this rank's own tokens only: exact for one rank, a baseline without context for more.

    Same contract as `RingAttention`; takes and ignores the group.
    """

    def __init__(self, local_attention: Block | str, sequence_process_group: Any = None) -> None:
        super().__init__()
        self._local_attention = _checked(local_attention)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int) -> Tensor:
        """As `RingAttention.forward`, without communication."""

        def ring_of(block: Block, length: int, scale: float) -> Ring:
            return Ring((Stage(0, BlockPair(0, length, 0, length, causal=True)),), None, block, scale)

        return _attend(self._local_attention, query, key, value, batch_dim_idx, ring_of)


def _checked(local_attention: Block | str) -> Block | str:
    if isinstance(local_attention, nn.Module):
        raise ValueError(
            f"local_attention={type(local_attention).__name__} is a module that sees whole sequences: a ring computes "
            'block pairs, so pass "auto" or a kernel of ring_attention.blocks'
        )
    return local_attention


def _attend(
    local_attention: Block | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch_dim_idx: int,
    ring_of: Callable[[Block, int, float], Ring],
) -> Tensor:
    if batch_dim_idx not in (0, 1):
        raise ValueError(f"batch_dim_idx={batch_dim_idx} must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])")
    if batch_dim_idx == 1:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    if isinstance(local_attention, str):
        local_attention = choose_block(BlockSpec.of(query, key), local_attention)[0]
    ring = ring_of(local_attention, query.shape[1], 1 / math.sqrt(query.shape[-1]))
    out_BSHD = RingFunction.apply(query, key, value, ring)
    return out_BSHD.transpose(0, 1) if batch_dim_idx == 1 else out_BSHD
