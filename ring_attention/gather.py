"""The naive baseline: every rank gathers all keys and values and attends with its own queries. O(L) memory.

Keys are put into the order of their positions, so that a rank's queries meet them in one or two blocks.

Shapes: B batch, S local tokens, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator
from ring_attention.attend import BackwardInputs, attend_backward, attend_forward, shared_dq_sum
from ring_attention.checkpointing import saved_or_computed
from ring_attention.derivative import once_differentiable
from ring_attention.kernel_calls import KernelCall, plan_calls
from ring_attention.kernels import AttentionKernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout, Run
from ring_attention.mask import Mask
from ring_attention.ring import Ring
from ring_attention.sinks import sinks_gradient
from ring_attention.tiles import find_tiles
from ring_attention.trace import profiler_range
from ring_attention.transport import P2PTransport
from ring_attention.transport.collectives import all_gather, reduce_scatter


def gather_keys(ring: Ring, kv: KeysValues) -> KeysValues:
    """All ranks' keys and values in the order of their positions. Every rank must call it."""
    assert ring.transport is not None
    (message,) = kv.take(kv.spans).parts
    gathered = kv.empty(((0, ring.layout.padded_length),))
    messages = all_gather(message, ring.transport.group)
    for part, tokens, positions in _runs(ring.transport, ring.layout, kv, messages):
        gathered.k_BTKD[:, positions] = part.k_BTKD[:, tokens]
        gathered.v_BTKE[:, positions] = part.v_BTKE[:, tokens]
    return gathered


def reduce_gradients(ring: Ring, gradients: KeysValues, kv: KeysValues) -> KeysValues:
    """The sum over ranks of `gradients` of all tokens, at this rank's own tokens. Every rank must call it."""
    assert ring.transport is not None
    messages = gradients.k_BTKD.new_empty(ring.layout.ring_degree, kv.numel(kv.spans))
    for part, tokens, positions in _runs(ring.transport, ring.layout, kv, messages):
        part.k_BTKD[:, tokens] = gradients.k_BTKD[:, positions]
        part.v_BTKE[:, tokens] = gradients.v_BTKE[:, positions]
    return kv.view(reduce_scatter(messages, ring.transport.group), kv.spans)


def _runs(
    transport: P2PTransport, layout: Layout, kv: KeysValues, messages: Tensor
) -> Iterator[tuple[KeysValues, slice, slice]]:
    """The message of each rank of the group with the local tokens and positions of each of its runs."""
    for ring_rank, group_rank in enumerate(transport.order):
        part = kv.view(messages[group_rank], kv.spans)
        for run in layout.runs(ring_rank):
            yield part, slice(*run.local), slice(run.start, run.stop)


@lru_cache(maxsize=16)
def gathered_calls(
    layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel
) -> tuple[KernelCall, ...]:
    """A rank's queries against all keys in the order of their positions."""
    length = layout.padded_length
    tiles = find_tiles(layout.runs(ring_rank), (Run(0, 0, length),), mask, mask.spans(length))
    return plan_calls(kernel, tiles, (0, batch), layout.ring_length, ((0, length),))


class AllGatherFunction(torch.autograd.Function):
    """Gathers again in the backward pass, so that what is saved is O(L/P)."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, sinks_H: Tensor | None, ring: Ring) -> Tensor:
        def attend() -> tuple[Tensor, Tensor]:
            kv = gather_keys(ring, KeysValues.of_parts(k_BSKD, v_BSKE))
            calls = gathered_calls(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel)
            accumulator = OnlineSoftmaxAccumulator(q_BSHD, v_BSKE, sinks_H)
            attend_forward(accumulator, ring.kernel, ring.scores, calls, q_BSHD, kv, is_last=True)
            return accumulator.result()

        out_BSHE, lse_BHS = saved_or_computed(attend)
        ctx.ring = ring
        ctx.save_for_backward(q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS, sinks_H)
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: tuple[Tensor, ...], *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        ring: Ring = ctx.ring
        q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS, sinks_H = saved
        local = KeysValues.of_parts(k_BSKD, v_BSKE)
        kv = gather_keys(ring, local)
        calls = gathered_calls(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel)
        inputs = BackwardInputs(grad_outputs[0].contiguous(), q_BSHD, out_BSHE, lse_BHS)
        dsinks = sinks_gradient(inputs.dout_BSHE, out_BSHE, lse_BHS, sinks_H) if ctx.needs_input_grad[3] else None
        state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
        dq_sum = shared_dq_sum(ring.kernel, inputs, [calls])
        dq = GradientAccumulator(q_BSHD.shape, q_BSHD.dtype)
        dk, dv = (torch.zeros_like(part, dtype=state_dtype) for part in (kv.k_BTKD, kv.v_BTKE))
        for tile in attend_backward(ring.kernel, ring.scores, calls, inputs, kv, dq_sum):
            assert tile.dk is not None
            assert tile.dv is not None
            with profiler_range("merge"):
                if tile.dq is not None:
                    dq.add(tile.rows, tile.queries, tile.dq, ends=0 if tile.is_last and dq_sum is None else None)
                dk[tile.rows, tile.keys].add_(tile.dk)
                dv[tile.rows, tile.keys].add_(tile.dv)
            del tile
        if dq_sum is not None:
            dq.add(slice(0, len(q_BSHD)), slice(0, q_BSHD.shape[1]), dq_sum.result(ring.scores.scale), ends=0)
        reduced = reduce_gradients(ring, KeysValues.of_parts(dk, dv), local)
        return dq.result(), reduced.k_BTKD.to(k_BSKD.dtype), reduced.v_BTKE.to(v_BSKE.dtype), dsinks, None
