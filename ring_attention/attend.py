"""Attention of some tiles, forward and backward: kernel calls, for `ring` and `gather`.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ring_attention.accumulators import OnlineSoftmaxAccumulator
from ring_attention.kernel_calls import KernelCall
from ring_attention.kernels import AttentionKernel, KernelParams, SavedTensors, Scores
from ring_attention.kv import KeysValues
from ring_attention.trace import profiler_range


class BackwardInputs(NamedTuple):
    """What a backward pass needs of the local queries. out and lse are over all keys: each tile's softmax is global."""

    dout_BSHE: Tensor
    q_BSHD: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor


class TileGradients(NamedTuple):
    """The gradients of one kernel call; `keys` as in `KernelCall.gradients`, `is_last` of its `attend_backward`."""

    rows: slice
    queries: slice
    keys: slice
    is_last: bool
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attend_forward(
    accumulator: OnlineSoftmaxAccumulator,
    kernel: AttentionKernel,
    scores: Scores,
    calls: Sequence[KernelCall],
    q_BSHD: Tensor,
    kv: KeysValues,
    is_last: bool,
) -> None:
    """Add the attention of `calls` to `accumulator`; `is_last` if no more follow."""
    for call in calls:
        rows, block, segments, _ = call
        queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        q, k, v = q_BSHD[rows, queries], kv.k_BTKD[rows, keys], kv.v_BTKE[rows, keys]
        params = KernelParams(block.lower, block.upper, *scores)
        with profiler_range("attention kernel"):
            if segments is None:
                out, lse = kernel.forward(q, k, v, params)
            else:
                out, lse = kernel.forward_segments(q, k, v, segments, params)
        with profiler_range("merge"):
            accumulator.add(rows, queries, out, lse, is_last and call is calls[-1])


def attend_backward(
    kernel: AttentionKernel, scores: Scores, calls: Sequence[KernelCall], inputs: BackwardInputs, kv: KeysValues
) -> Iterator[TileGradients]:
    """The gradients of each kernel call in turn. Drop them before the next call, or both are in memory."""
    dout_BSHE, q_BSHD, out_BSHE, lse_BHS = inputs
    for call in calls:
        rows, block, segments, _ = call
        queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        q, k, v = q_BSHD[rows, queries], kv.k_BTKD[rows, keys], kv.v_BTKE[rows, keys]
        saved = SavedTensors(q, k, v, out_BSHE[rows, queries], lse_BHS[rows, :, queries])
        params = KernelParams(block.lower, block.upper, *scores)
        with profiler_range("attention kernel"):
            if segments is None:
                gradients = kernel.backward(dout_BSHE[rows, queries], saved, params)
            else:
                gradients = kernel.backward_segments(dout_BSHE[rows, queries], saved, segments, params)
        yield TileGradients(rows, queries, call.gradients, call is calls[-1], *gradients)
        del gradients
