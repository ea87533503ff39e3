"""The naive baseline: every rank gathers all keys and values and attends with its own queries. O(L) memory.

Keys are put into the order of their positions, so that a rank's queries meet them in one or two blocks.

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
from ring_attention.attend import BackwardInputs, attend_backward, attend_forward
from ring_attention.checkpointing import saved_or_computed
from ring_attention.kernels import AttentionKernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout, Run
from ring_attention.mask import Mask
from ring_attention.tiles import AttentionTile, find_tiles
from ring_attention.trace import profiler_range
from ring_attention.transport import P2PTransport
from ring_attention.transport.collectives import all_gather, reduce_scatter


@dataclass(frozen=True)
class AllGather:
    """All that the baseline needs besides its tensors."""

    layout: Layout
    mask: Mask
    transport: P2PTransport
    kernel: AttentionKernel
    scale: float

    @property
    def tiles(self) -> tuple[AttentionTile, ...]:
        return gathered_tiles(self.layout, self.mask, self.transport.ring_rank)

    def gather(self, kv: KeysValues) -> KeysValues:
        """All ranks' keys and values in the order of their positions. Every rank must call it."""
        message = kv.take(kv.spans).message
        assert message is not None
        gathered = kv.empty(((0, self.layout.padded_length),))
        for group_rank, rank_message in enumerate(all_gather(message, self.transport.group)):
            part = kv.view(rank_message, kv.spans)
            for tokens, positions in self._runs(group_rank):
                gathered.k_BTKD[:, positions] = part.k_BTKD[:, tokens]
                gathered.v_BTKE[:, positions] = part.v_BTKE[:, tokens]
        return gathered

    def reduce(self, gradients: KeysValues, kv: KeysValues) -> KeysValues:
        """The sum over ranks of `gradients` of all tokens, at this rank's own tokens. Every rank must call it."""
        parts = [kv.empty(kv.spans, gradients.k_BTKD.dtype) for _ in range(self.layout.ring_degree)]
        messages = []
        for group_rank, part in enumerate(parts):
            for tokens, positions in self._runs(group_rank):
                part.k_BTKD[:, tokens] = gradients.k_BTKD[:, positions]
                part.v_BTKE[:, tokens] = gradients.v_BTKE[:, positions]
            assert part.message is not None
            messages.append(part.message)
        return kv.view(reduce_scatter(torch.stack(messages), self.transport.group), kv.spans)

    def _runs(self, group_rank: int) -> list[tuple[slice, slice]]:
        """Local tokens and positions of a rank of the group, run by run."""
        return [
            (slice(run.local_start, run.local_start + run.length), slice(run.position, run.position + run.length))
            for run in self.layout.runs(self.transport.order.index(group_rank))
        ]


@lru_cache(maxsize=16)
def gathered_tiles(layout: Layout, mask: Mask, ring_rank: int) -> tuple[AttentionTile, ...]:
    """A rank's queries against all keys in the order of their positions."""
    length = layout.padded_length
    return find_tiles(layout.runs(ring_rank), (Run(0, 0, length),), mask, mask.spans(length))


class AllGatherFunction(torch.autograd.Function):
    """Gathers again in the backward pass, so that what is saved is O(L/P)."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, gather: AllGather) -> Tensor:
        def attend() -> tuple[Tensor, Tensor]:
            kv = gather.gather(KeysValues.of_parts(k_BSKD, v_BSKE))
            accumulator = OnlineSoftmaxAccumulator(q_BSHD, v_BSKE)
            attend_forward(accumulator, gather.kernel, gather.scale, gather.tiles, q_BSHD, kv, is_last=True)
            return accumulator.result()

        out_BSHE, lse_BHS = saved_or_computed(attend)
        ctx.gather = gather
        ctx.save_for_backward(q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS)
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gather: AllGather = ctx.gather
        q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS = ctx.saved_tensors
        local = KeysValues.of_parts(k_BSKD, v_BSKE)
        kv = gather.gather(local)
        inputs = BackwardInputs(grad_outputs[0].contiguous(), q_BSHD, out_BSHE, lse_BHS)
        state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
        dq = GradientAccumulator(q_BSHD.shape, q_BSHD.dtype)
        dk, dv = (torch.zeros_like(part, dtype=state_dtype) for part in (kv.k_BTKD, kv.v_BTKE))
        for tile in attend_backward(gather.kernel, gather.scale, gather.tiles, inputs, kv):
            keys = tile.keys_within(kv.spans)
            with profiler_range("merge"):
                dq.add(tile.rows, tile.queries, tile.dq, ends=0 if tile.is_last else None)
                dk[tile.rows, keys].add_(tile.dk)
                dv[tile.rows, keys].add_(tile.dv)
            del tile
        reduced = gather.reduce(KeysValues.of_parts(dk, dv), local)
        return dq.result(), reduced.k_BTKD.to(k_BSKD.dtype), reduced.v_BTKE.to(v_BSKE.dtype), None
