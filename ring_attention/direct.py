"""Attention over packed documents in one exchange and two parts, as an autograd function. `direct_routing` says when.

The whole documents are computed while keys and values travel. Then each other run of queries meets a copy of all its
keys, so every query is in one kernel call and nothing is merged. In the backward pass keys travel again, the rest comes
first, and its gradients return to their owners beside the whole documents.

Shapes: B batch, S local tokens, T keys of a call, H query heads, K key-value heads, D head size, E value head size;
N entries (`direct_indices`), F = K*D + K*E numbers of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator
from ring_attention.attend import BackwardInputs, attend_backward, attend_forward
from ring_attention.checkpointing import saved_or_computed
from ring_attention.derivative import once_differentiable
from ring_attention.direct_exchange import Entries
from ring_attention.direct_indices import Sums
from ring_attention.direct_plan import DirectPlan, direct_plan
from ring_attention.kernel_calls import KernelCall
from ring_attention.kv import KeysValues
from ring_attention.ring import Ring, RingFunction
from ring_attention.schedule import gradient_buffer, keys_buffer
from ring_attention.sinks import sinks_gradient
from ring_attention.trace import profiler_range


def attend_over_ring(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, sinks_H: Tensor | None, ring: Ring) -> Tensor:
    """Attention of the local queries over all keys of the ring: in one exchange, or in ring steps. Every rank calls it.

    Returns [B, S, H, E] in the input's dtype.
    """
    plan = direct_plan(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel)
    if plan is None:
        return RingFunction.apply(q_BSHD, k_BSKD, v_BSKE, sinks_H, ring)
    return DirectFunction.apply(q_BSHD, k_BSKD, v_BSKE, sinks_H, ring, plan)


def direct_forward(
    ring: Ring, plan: DirectPlan, q_BSHD: Tensor, kv: KeysValues, sinks_H: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `ring_forward`."""
    if not plan.rest_calls:  # then no rank needs this one's keys either
        return _attend(ring, plan.whole_calls, q_BSHD, kv, sinks_H)
    (whole_q, rest_q), (whole_kv, rest_kv) = plan.cut(q_BSHD), _cut(plan, kv)
    pool = _post_keys(ring, plan, rest_kv, "forward")
    parts = []
    if plan.whole_calls:
        parts.append(_attend(ring, plan.whole_calls, whole_q, whole_kv, sinks_H))
    copies = _copies(plan, pool.arrived(), rest_kv)
    del pool
    parts.append(_attend(ring, plan.rest_calls, rest_q, copies, sinks_H))
    outs, lses = zip(*parts, strict=True)
    with profiler_range("merge"):
        return plan.join(outs), plan.join(lses, dim=2)


def direct_backward(
    ring: Ring, plan: DirectPlan, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ring_backward`: dK,dV travel in the input's dtype, and their owner sums them in fp32."""
    inputs = BackwardInputs(dout_BSHE, q_BSHD, out_BSHE, lse_BHS)
    if not plan.rest_calls:
        return _gradients(ring, plan.whole_calls, inputs, kv)
    cut = (*(plan.cut(x) for x in inputs[:3]), plan.cut(lse_BHS, dim=2))
    whole_inputs, rest_inputs = (BackwardInputs(*part) for part in zip(*cut, strict=True))
    whole_kv, rest_kv = _cut(plan, kv)
    copies = _copies(plan, _post_keys(ring, plan, rest_kv, "backward").arrived(), rest_kv)
    dq, dk, dv = _gradients(ring, plan.rest_calls, rest_inputs, copies)
    del copies
    addends = _post_gradients(ring, plan, dk, dv)
    del dk, dv
    parts = []
    if plan.whole_calls:
        parts.append(_gradients(ring, plan.whole_calls, whole_inputs, whole_kv))
    addends_NF = addends.arrived()
    with profiler_range("merge"):
        dk, dv = _tokens(_sum(addends_NF, plan.indices(q_BSHD.device).own), rest_kv)
        parts.append((dq, dk, dv))
        dq, dk, dv = (plan.join(of_parts) for of_parts in zip(*parts, strict=True))
        return dq, dk, dv


def _attend(
    ring: Ring, calls: Sequence[KernelCall], q_BSHD: Tensor, kv: KeysValues, sinks_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and lse of one part."""
    accumulator = OnlineSoftmaxAccumulator(q_BSHD, kv.v_BTKE, sinks_H)
    attend_forward(accumulator, ring.kernel, ring.scores, calls, q_BSHD, kv, is_last=True)
    return accumulator.result()


def _gradients(
    ring: Ring, calls: Sequence[KernelCall], inputs: BackwardInputs, kv: KeysValues
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of one part, in the input's dtype."""
    dq, dk, dv = (GradientAccumulator(x.shape, x.dtype) for x in (inputs.q_BSHD, kv.k_BTKD, kv.v_BTKE))
    for tile in attend_backward(ring.kernel, ring.scores, calls, inputs, kv):
        assert tile.dq is not None, "no sums were given"
        assert tile.dk is not None
        assert tile.dv is not None
        ends = 0 if tile.is_last else None
        with profiler_range("merge"):
            dq.add(tile.rows, tile.queries, tile.dq, ends)
            dk.add(tile.rows, tile.keys, tile.dk, ends)
            dv.add(tile.rows, tile.keys, tile.dv, ends)
        del tile
    return dq.result(), dk.result(), dv.result()


def _cut(plan: DirectPlan, kv: KeysValues) -> tuple[KeysValues, KeysValues]:
    (whole_k, rest_k), (whole_v, rest_v) = plan.cut(kv.k_BTKD), plan.cut(kv.v_BTKE)
    return KeysValues.of_parts(whole_k, whole_v), KeysValues.of_parts(rest_k, rest_v)


def _copies(plan: DirectPlan, pool_NF: Tensor, like: KeysValues) -> KeysValues:
    """The keys of each run of the rest, one run after the other; each contiguous, as kernels like them."""
    keys = plan.indices(pool_NF.device).keys
    with profiler_range("merge"):
        k, v = (part.index_select(0, keys) for part in pool_NF.split(_sizes(like), 1))
        k_shape, v_shape = ((plan.batch, plan.num_keys, *x.shape[2:]) for x in (like.k_BTKD, like.v_BTKE))
        return KeysValues.of_parts(k.view(k_shape), v.view(v_shape))


def _tokens(entries_NF: Tensor, like: KeysValues) -> tuple[Tensor, Tensor]:
    """Views of entries as tensors like k and v."""
    k, v = entries_NF.split(_sizes(like), 1)
    return k.view(like.k_BTKD.shape), v.view(like.v_BTKE.shape)


def _sizes(kv: KeysValues) -> list[int]:
    return [x.shape[2:].numel() for x in (kv.k_BTKD, kv.v_BTKE)]


def _sum(addends_NF: Tensor, sums: Sums) -> Tensor:
    """In fp32 (fp64) and in the order of the addends, rounded once to their dtype."""
    return embedding_bag(sums.addends, addends_NF, sums.starts, mode="sum")


def _post_keys(ring: Ring, plan: DirectPlan, rest_kv: KeysValues, direction: str) -> Entries:
    """Start to exchange keys and values. The pool is complete once it has `arrived`."""
    with profiler_range("merge"):
        pool = Entries(rest_kv.k_BTKD, rest_kv.v_BTKE, plan.received_parcels)
        sent_NF = pool.own_NF.index_select(0, plan.indices(pool.own_NF.device).sent)
    pool.exchange(ring.transport, f"{direction} K,V", keys_buffer(0), sent_NF, plan.own_parcels)
    return pool


def _post_gradients(ring: Ring, plan: DirectPlan, dk_BTKD: Tensor, dv_BTKE: Tensor) -> Entries:
    """Start to return the gradients of entries that were received. All addends are there once they have `arrived`."""
    with profiler_range("merge"):
        addends = Entries(dk_BTKD, dv_BTKE, plan.own_parcels)
        sent_NF = addends.own_NF[:0]
        if plan.received_parcels:
            sent_NF = _sum(addends.own_NF, plan.indices(sent_NF.device).returned)
    addends.exchange(ring.transport, "backward dK,dV", gradient_buffer(1), sent_NF, plan.received_parcels)
    return addends


class DirectFunction(torch.autograd.Function):
    """`direct_forward`, with `direct_backward` as its derivative. Saves the local q, k, v, out and lse: O(L/P)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHD: Tensor,
        k_BSKD: Tensor,
        v_BSKE: Tensor,
        sinks_H: Tensor | None,
        ring: Ring,
        plan: DirectPlan,
    ) -> Tensor:
        kv = KeysValues.of_parts(k_BSKD, v_BSKE)
        out_BSHE, lse_BHS = saved_or_computed(lambda: direct_forward(ring, plan, q_BSHD, kv, sinks_H))
        ctx.ring, ctx.plan = ring, plan
        ctx.save_for_backward(q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS, sinks_H)
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: tuple[Tensor, ...], *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q_BSHD, k_BSKD, v_BSKE, out_BSHE, lse_BHS, sinks_H = saved
        dout_BSHE, kv = grad_outputs[0].contiguous(), KeysValues.of_parts(k_BSKD, v_BSKE)
        dsinks = sinks_gradient(dout_BSHE, out_BSHE, lse_BHS, sinks_H) if ctx.needs_input_grad[3] else None
        gradients = direct_backward(ctx.ring, ctx.plan, dout_BSHE, q_BSHD, kv, out_BSHE, lse_BHS)
        return *gradients, dsinks, None, None
