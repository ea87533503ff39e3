"""The naive baseline: every rank gathers all keys and values, and attends with its own queries. O(L) memory.

Its neighbours are `attention` above and `exchange` and `attend` below. Keys are put into their
global order, so a rank's queries meet them in one or two rectangles.

Shapes: B batch, S local tokens, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator
from ring_attention.attend import attend_backward, attend_forward
from ring_attention.checkpointing import saved_or_computed
from ring_attention.kernels import AttentionKernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout, Run
from ring_attention.mask import Mask
from ring_attention.schedule import AttentionTile, find_tiles
from ring_attention.trace import profiler_range
from ring_attention.transport import P2PTransport, all_gather, reduce_scatter


@dataclass(frozen=True)
class Gathering:
    """What it takes beside its tensors."""

    layout: Layout
    mask: Mask
    exchange: P2PTransport
    block: AttentionKernel
    scale: float

    @property
    def pairs(self) -> tuple[AttentionTile, ...]:
        return gathered_tiles(self.layout, self.mask, self.exchange.ring_rank)

    def gathered(self, kv: KeysValues) -> KeysValues:
        """All ranks' keys and values in the order of their positions. Every rank must call it."""
        everything = ((0, self.layout.ring_length),)
        message = kv.take(everything, everything).message
        assert message is not None
        messages = all_gather(message, self.exchange.group)
        whole = kv.empty(self.layout.padded_length)
        for group_rank, rank_message in enumerate(messages):
            part = KeysValues.of_message(rank_message, kv.shapes)
            for here, there in self._runs(group_rank):
                whole.k_BTKD[:, there], whole.v_BTKE[:, there] = part.k_BTKD[:, here], part.v_BTKE[:, here]
        return whole

    def reduced(self, whole: KeysValues, kv: KeysValues) -> KeysValues:
        """This rank's part of the sum of all ranks' `whole`. Every rank must call it."""
        parts = [kv.empty(self.layout.ring_length, whole.k_BTKD.dtype) for _ in range(self.layout.ring_degree)]
        messages = []
        for group_rank, part in enumerate(parts):
            for here, there in self._runs(group_rank):
                part.k_BTKD[:, here], part.v_BTKE[:, here] = whole.k_BTKD[:, there], whole.v_BTKE[:, there]
            assert part.message is not None
            messages.append(part.message)
        return KeysValues.of_message(reduce_scatter(torch.stack(messages), self.exchange.group), kv.shapes)

    def _runs(self, group_rank: int) -> list[tuple[slice, slice]]:
        """(local tokens, positions) of a rank of the group."""
        return [
            (slice(run.local_start, run.local_start + run.length), slice(run.position, run.position + run.length))
            for run in self.layout.runs(self.exchange.order.index(group_rank))
        ]


@lru_cache(maxsize=16)
def gathered_tiles(layout: Layout, mask: Mask, ring_rank: int) -> tuple[AttentionTile, ...]:
    """A rank's queries against all keys in the order of their positions."""
    length = layout.padded_length
    return find_tiles(layout.runs(ring_rank), (Run(0, 0, length),), mask, mask.spans(length))


class GatherFunction(torch.autograd.Function):
    """Gathers in the backward pass again: what is kept is O(L/P)."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, gathering: Gathering) -> Tensor:
        def attend() -> tuple[Tensor, Tensor]:
            whole = gathering.gathered(KeysValues.of_parts(k_BSKD, v_BSKE))
            running = OnlineSoftmaxAccumulator(q_BSHD, v_BSKE)
            keys = ((0, gathering.layout.padded_length),)
            attend_forward(
                running, gathering.block, gathering.scale, gathering.pairs, q_BSHD, whole, keys, is_last=True
            )
            return running.result()

        out_BSHE, lse_BHS = saved_or_computed(attend)
        ctx.gathering = gathering
        ctx.save_for_backward(q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS)
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gathering: Gathering = ctx.gathering
        q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS = ctx.saved_tensors
        kv = KeysValues.of_parts(k_BSKD, v_BSKE)
        whole, keys = gathering.gathered(kv), ((0, gathering.layout.padded_length),)
        state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
        dq = GradientAccumulator(q_BSHD.shape, q_BSHD.dtype)
        gradients = KeysValues(*(torch.zeros_like(part, dtype=state_dtype) for part in (whole.k_BTKD, whole.v_BTKE)))
        sums = [GradientAccumulator(part.shape, state_dtype, part) for part in (gradients.k_BTKD, gradients.v_BTKE)]
        saved = (grad_outputs[0].contiguous(), q_BSHD, whole, out_BSHE, lse_BHS)
        blocks = attend_backward(gathering.block, gathering.scale, gathering.pairs, keys, *saved)
        for block in blocks:
            part = block.part
            with profiler_range("merge"):
                dq.add(block.row, slice(part.q_start, part.q_stop), block.dq, block.is_last)
                for total, gradient in zip(sums, (block.dk, block.dv), strict=True):
                    total.add(block.row, slice(part.k_start, part.k_stop), gradient, False)
            del block
        reduced = gathering.reduced(gradients, kv)
        return dq.result(), reduced.k_BTKD.to(k_BSKD.dtype), reduced.v_BTKE.to(v_BSKE.dtype), None
