"""Attention of some tiles, forward and backward: kernel calls, for `ring`, `direct` and `gather`.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ring_attention.accumulators import OnlineSoftmaxAccumulator
from ring_attention.kernel_calls import KernelCall
from ring_attention.kernels import (
    ANYWHERE,
    AttentionKernel,
    DqSum,
    GradientTargets,
    KernelParams,
    SavedTensors,
    Scores,
)
from ring_attention.kv import KeysValues
from ring_attention.trace import profiler_range


class BackwardInputs(NamedTuple):
    """What a backward pass needs of the local queries. out and lse are over all keys: each tile's softmax is global."""

    dout_BSHE: Tensor
    q_BSHD: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor


class TileGradients(NamedTuple):
    """The gradients of one kernel call; `keys` as in `KernelCall.gradients`, `is_last` of its `attend_backward`.

    dq, and dk and dv, are None if the kernel has added them to the sums that it was given.
    """

    rows: slice
    queries: slice
    keys: slice
    is_last: bool
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


def attend_forward(
    accumulator: OnlineSoftmaxAccumulator,
    kernel: AttentionKernel,
    scores: Scores,
    calls: Sequence[KernelCall],
    q_BSHD: Tensor,
    kv: KeysValues,
    is_last: bool,
    target_BSHE: Tensor | None = None,
) -> None:
    """Add the attention of `calls` to `accumulator`; `is_last` if no more follow.

    Args:
        target_BSHE: a call that computes all queries by itself writes its out there.
    """
    target = target_BSHE if len(calls) == 1 else None
    for call in calls:
        rows, block, segments, _ = call
        queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        q, k, v = _part(q_BSHD, rows, queries), _part(kv.k_BTKD, rows, keys), _part(kv.v_BTKE, rows, keys)
        params = KernelParams(block.lower, block.upper, *scores)
        with profiler_range("attention kernel"):
            out, lse = kernel.forward_to(target, q, k, v, segments, params)
        with profiler_range("merge"):
            accumulator.add(rows, queries, out, lse, is_last and call is calls[-1])


def attend_backward(
    kernel: AttentionKernel,
    scores: Scores,
    calls: Sequence[KernelCall],
    inputs: BackwardInputs,
    kv: KeysValues,
    dq_sum: DqSum | None = None,
    key_sums_2BKN: Tensor | None = None,
    targets: GradientTargets = ANYWHERE,
) -> Iterator[TileGradients]:
    """The gradients of each kernel call in turn. Drop them before the next call, or both are in memory.

    Args:
        dq_sum: of these inputs and this kernel; calls that can add their dq to it do so.
        key_sums_2BKN: of the keys whose gradients are computed, if all calls can add to `dq_sum` and to these.
        targets: a call that computes all gradients by itself writes them there, unless it adds them to sums.
    """
    targets = targets if len(calls) == 1 else ANYWHERE
    dout_BSHE, q_BSHD, out_BSHE, lse_BHS = inputs
    for call in calls:
        rows, block, segments, _ = call
        queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        k, v = _part(kv.k_BTKD, rows, keys), _part(kv.v_BTKE, rows, keys)
        params = KernelParams(block.lower, block.upper, *scores)
        with profiler_range("attention kernel"):
            if dq_sum is not None and can_add(dq_sum, call):
                sums = None if key_sums_2BKN is None else _part_of_sums(key_sums_2BKN, rows, call.gradients, k.shape[3])
                gradients = (None, *dq_sum.add(rows, block, k, v, params, sums))
            else:
                q, dout, out = (_part(x, rows, queries) for x in (q_BSHD, dout_BSHE, out_BSHE))
                saved = SavedTensors(q, k, v, out, lse_BHS[rows, :, queries])
                gradients = kernel.backward_to(targets, dout, saved, segments, params)
        yield TileGradients(rows, queries, call.gradients, call is calls[-1], *gradients)
        del gradients


def shared_dq_sum(
    kernel: AttentionKernel, inputs: BackwardInputs, steps: Sequence[Sequence[KernelCall]]
) -> DqSum | None:
    """The kernel's sum of dq for the calls of these steps; None if it has none or no call can add to it."""
    dq_sum = kernel.dq_sum(*inputs)
    if dq_sum is None or not any(can_add(dq_sum, call) for calls in steps for call in calls):
        return None
    return dq_sum


def can_add(dq_sum: DqSum, call: KernelCall) -> bool:
    return call.segments is None and dq_sum.takes(call.block)


def _part(x_BSHD: Tensor, rows: slice, tokens: slice) -> Tensor:
    """Some rows and tokens. All of them are the tensor itself: a slice costs the host 3 us."""
    if tokens.stop - tokens.start == x_BSHD.shape[1] and rows.stop - rows.start == x_BSHD.shape[0]:
        return x_BSHD
    return x_BSHD[rows, tokens]


def _part_of_sums(sums_2BKN: Tensor, rows: slice, tokens: slice, head_dim: int) -> Tensor:
    numbers = slice(tokens.start * head_dim, tokens.stop * head_dim)
    if numbers.stop - numbers.start == sums_2BKN.shape[3] and rows.stop - rows.start == sums_2BKN.shape[1]:
        return sums_2BKN
    return sums_2BKN[:, rows, :, numbers]
