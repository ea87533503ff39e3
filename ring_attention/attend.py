"""Attention of some tiles, forward and backward: kernel calls, for `ring` and `gather`.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from ring_attention.accumulators import OnlineSoftmaxAccumulator
from ring_attention.kernels import AttentionKernel, KernelParams, SavedTensors, Scores
from ring_attention.kv import KeysValues
from ring_attention.layout import Span, slice_within
from ring_attention.masked_block import MaskedBlock
from ring_attention.tiles import AttentionTile
from ring_attention.trace import profiler_range

ALL_ROWS = slice(None)


class BackwardInputs(NamedTuple):
    """What a backward pass needs of the local queries. out and lse are over all keys: each tile's softmax is global."""

    dout_BSHE: Tensor
    q_BSHD: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor


class TileGradients(NamedTuple):
    """The gradients of one kernel call; `keys` of the source's tokens, `is_last` of its `attend_backward`."""

    rows: slice
    queries: slice
    keys: Span
    is_last: bool
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attend_forward(
    accumulator: OnlineSoftmaxAccumulator,
    kernel: AttentionKernel,
    scores: Scores,
    tiles: Iterable[AttentionTile],
    q_BSHD: Tensor,
    kv: KeysValues,
    is_last: bool,
) -> None:
    """Add the attention of `tiles` to `accumulator`; `is_last` if no more tiles follow."""
    for rows, block, is_last_call in _kernel_calls(kernel, tiles, ALL_ROWS):
        queries, keys = slice(block.q_start, block.q_stop), slice_within(kv.spans, block.k_start, block.k_stop)
        q, k, v = q_BSHD[rows, queries], kv.k_BTKD[rows, keys], kv.v_BTKE[rows, keys]
        with profiler_range("attention kernel"):
            out, lse = kernel.forward(q, k, v, KernelParams(block.lower, block.upper, *scores))
        with profiler_range("merge"):
            accumulator.add(rows, queries, out, lse, is_last and is_last_call)


def attend_backward(
    kernel: AttentionKernel,
    scores: Scores,
    tiles: Iterable[AttentionTile],
    inputs: BackwardInputs,
    kv: KeysValues,
    rows: slice = ALL_ROWS,
) -> Iterator[TileGradients]:
    """The gradients of each kernel call in turn. Drop them before the next call, or both are in memory.

    Args:
        rows: of the tiles that are not of one row.
    """
    dout_BSHE, q_BSHD, out_BSHE, lse_BHS = inputs
    for tile_rows, block, is_last in _kernel_calls(kernel, tiles, rows):
        queries, keys = slice(block.q_start, block.q_stop), slice_within(kv.spans, block.k_start, block.k_stop)
        q, k, v = q_BSHD[tile_rows, queries], kv.k_BTKD[tile_rows, keys], kv.v_BTKE[tile_rows, keys]
        saved = SavedTensors(q, k, v, out_BSHE[tile_rows, queries], lse_BHS[tile_rows, :, queries])
        with profiler_range("attention kernel"):
            params = KernelParams(block.lower, block.upper, *scores)
            gradients = kernel.backward(dout_BSHE[tile_rows, queries], saved, params)
        yield TileGradients(tile_rows, queries, (block.k_start, block.k_stop), is_last, *gradients)
        del gradients


def _kernel_calls(
    kernel: AttentionKernel, tiles: Iterable[AttentionTile], rows: slice
) -> list[tuple[slice, MaskedBlock, bool]]:
    """For each kernel call the rows of the batch, the block, and whether it is the last call."""
    calls = [
        (rows if tile.row is None else slice(tile.row, tile.row + 1), block)
        for tile in tiles
        for block in kernel.split(tile.block)
    ]
    return [(*call, number == len(calls)) for number, call in enumerate(calls, 1)]
