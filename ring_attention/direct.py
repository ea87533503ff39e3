"""Attention over packed documents in one exchange and two parts, as an autograd function. `direct_routing` says when.

The whole documents are computed while keys and values travel. Then each other run of queries meets a copy of all its
keys, so every query is in one kernel call and nothing is merged. In the backward pass keys travel again, also beside
the whole documents, and gradients return to their owners. On a GPU the rest of a short pass has a stream of its own
(`streams`): it goes first once its keys are there, and the whole documents fill what it leaves idle.

Shapes: B batch, S local tokens, T keys of a call, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator
from ring_attention.attend import BackwardInputs, TileGradients, attend_backward, attend_forward
from ring_attention.checkpointing import saved_or_computed
from ring_attention.derivative import once_differentiable
from ring_attention.direct_exchange import Entries
from ring_attention.direct_plan import DirectPlan, direct_plan
from ring_attention.kernel_calls import KernelCall
from ring_attention.kernels import ANYWHERE, GradientTargets
from ring_attention.kv import KeysValues
from ring_attention.ring import Ring, RingFunction
from ring_attention.schedule import gradient_buffer, keys_buffer
from ring_attention.sinks import sinks_gradient
from ring_attention.streams import SideStream, has_side_stream
from ring_attention.trace import profiler_range, ring_steps_are_visible


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
    batch, tokens, heads, _ = q_BSHD.shape
    out_BSHE = q_BSHD.new_empty((batch, tokens, heads, kv.v_BTKE.shape[3]))
    lse_BHS = q_BSHD.new_empty((batch, heads, tokens), dtype=torch.promote_types(q_BSHD.dtype, torch.float32))
    whole, rest = zip(plan.cut(out_BSHE), plan.cut(lse_BHS, dim=2), strict=True)
    with _side_stream(plan, q_BSHD) as side:
        with side.work():
            entries = _post_keys(ring, plan, rest_kv, "forward")
        if plan.whole_calls:
            _attend(ring, plan.whole_calls, whole_q, whole_kv, sinks_H, whole)
        with side.work():
            copies = _copies(plan, entries, rest_kv)
            del entries
            _attend(ring, plan.rest_calls, rest_q, copies, sinks_H, rest)
            del copies
    return out_BSHE, lse_BHS


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
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_BSHD, kv.k_BTKD, kv.v_BTKE))
    (whole_dq, rest_dq), (whole, rest) = plan.cut(dq), _cut(plan, _keys_values(dk, dv))
    with _side_stream(plan, q_BSHD) as side:
        with side.work():
            entries = _post_keys(ring, plan, rest_kv, "backward")
        if plan.whole_calls:
            targets = whole_dq, whole.k_BTKD, whole.v_BTKE
            _gradients(ring, plan.whole_calls, whole_inputs, whole_kv, targets)
        with side.work():
            copies = _copies(plan, entries, rest_kv)
            del entries
            _, *copied = _gradients(ring, plan.rest_calls, rest_inputs, copies, (rest_dq, None, None))
            del copies
            addends = _post_gradients(ring, plan, *copied)
            del copied
            addends.wait()
            addends.write(rest.k_BTKD, rest.v_BTKE, *plan.indices(q_BSHD.device).own)
            del addends
    return dq, dk, dv


def _side_stream(plan: DirectPlan, q_BSHD: Tensor) -> SideStream:
    """Not while ring steps are visible: what waits for keys beside whole documents is not what a pass waits for."""
    is_used = bool(plan.whole_calls) and not ring_steps_are_visible()
    return SideStream(q_BSHD.device, is_used and has_side_stream(q_BSHD.is_cuda, q_BSHD.shape[:3].numel()))


def _attend(
    ring: Ring,
    calls: Sequence[KernelCall],
    q_BSHD: Tensor,
    kv: KeysValues,
    sinks_H: Tensor | None,
    targets: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """out and lse of one part; each is written to its target if there is one."""
    accumulator = OnlineSoftmaxAccumulator(q_BSHD, kv.v_BTKE, sinks_H)
    attend_forward(accumulator, ring.kernel, ring.scores, calls, q_BSHD, kv, is_last=True, target_BSHE=targets[0])
    out, lse = (_written(result, target) for result, target in zip(accumulator.result(), targets, strict=True))
    return out, lse


def _gradients(
    ring: Ring,
    calls: Sequence[KernelCall],
    inputs: BackwardInputs,
    kv: KeysValues,
    targets: GradientTargets = ANYWHERE,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of one part, in the input's dtype; each is written to its target if there is one."""
    tiles = attend_backward(ring.kernel, ring.scores, calls, inputs, kv, targets=targets)
    if len(calls) == 1:  # as of a kernel with varlen: nothing is summed
        (tile,) = tiles
        gradients = _computed(tile)
    else:
        gradients = _summed(tiles, inputs, kv)
    parts = zip(gradients, (inputs.q_BSHD, *kv[:2]), targets, strict=True)
    dq, dk, dv = (_written(gradient.to(like.dtype), target) for gradient, like, target in parts)
    return dq, dk, dv


def _computed(tile: TileGradients) -> tuple[Tensor, Tensor, Tensor]:
    assert tile.dq is not None, "no sums were given"
    assert tile.dk is not None
    assert tile.dv is not None
    return tile.dq, tile.dk, tile.dv


def _summed(tiles: Iterator[TileGradients], inputs: BackwardInputs, kv: KeysValues) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (GradientAccumulator(x.shape, x.dtype) for x in (inputs.q_BSHD, kv.k_BTKD, kv.v_BTKE))
    for tile in tiles:
        ends = 0 if tile.is_last else None
        with profiler_range("merge"):
            of_queries, of_keys, of_values = _computed(tile)
            dq.add(tile.rows, tile.queries, of_queries, ends)
            dk.add(tile.rows, tile.keys, of_keys, ends)
            dv.add(tile.rows, tile.keys, of_values, ends)
        del tile, of_queries, of_keys, of_values
    return dq.result(), dk.result(), dv.result()


def _written(result: Tensor, target: Tensor | None) -> Tensor:
    """The result in its target. A kernel may have written it there already."""
    if target is None or result is target:
        return result
    with profiler_range("merge"):
        return target.copy_(result)


def _keys_values(k_BTKD: Tensor, v_BTKE: Tensor) -> KeysValues:
    """Without spans: messages are of entries here (`direct_exchange`)."""
    return KeysValues(k_BTKD, v_BTKE, ())


def _cut(plan: DirectPlan, kv: KeysValues) -> tuple[KeysValues, KeysValues]:
    (whole_k, rest_k), (whole_v, rest_v) = plan.cut(kv.k_BTKD), plan.cut(kv.v_BTKE)
    return _keys_values(whole_k, whole_v), _keys_values(rest_k, rest_v)


def _copies(plan: DirectPlan, entries: Entries, like: KeysValues) -> KeysValues:
    """The keys of each run of the rest, one run after the other; each contiguous, as kernels like them."""
    k, v = (x.new_empty((plan.batch, plan.num_keys, *x.shape[2:])) for x in like[:2])
    entries.wait()
    entries.write(k, v, plan.indices(k.device).keys)
    return _keys_values(k, v)


def _post_keys(ring: Ring, plan: DirectPlan, rest_kv: KeysValues, direction: str) -> Entries:
    """Start to exchange keys and values."""
    entries = Entries(rest_kv.k_BTKD, rest_kv.v_BTKE, plan.received_parcels)
    sent = plan.indices(rest_kv.k_BTKD.device).sent
    entries.exchange(ring.transport, f"{direction} K,V", keys_buffer(0), plan.own_parcels, sent)
    return entries


def _post_gradients(ring: Ring, plan: DirectPlan, copied_dk_BTKD: Tensor, copied_dv_BTKE: Tensor) -> Entries:
    """Start to return the gradients of entries that were received, given those of all copies."""
    addends = Entries(copied_dk_BTKD, copied_dv_BTKE, plan.own_parcels)
    returned = plan.indices(copied_dk_BTKD.device).returned
    addends.exchange(ring.transport, "backward dK,dV", gradient_buffer(1), plan.received_parcels, *returned)
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
        kv = _keys_values(k_BSKD, v_BSKE)
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
        dout_BSHE, kv = grad_outputs[0].contiguous(), _keys_values(k_BSKD, v_BSKE)
        dsinks = sinks_gradient(dout_BSHE, out_BSHE, lse_BHS, sinks_H) if ctx.needs_input_grad[3] else None
        gradients = direct_backward(ctx.ring, ctx.plan, dout_BSHE, q_BSHD, kv, out_BSHE, lse_BHS)
        return *gradients, dsinks, None, None
