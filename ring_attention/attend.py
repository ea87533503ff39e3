"""Attention of some tiles, forward and backward: kernel calls, for `ring` and `gather`.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from ring_attention.accumulators import OnlineSoftmaxAccumulator
from ring_attention.kernels import AttentionKernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Spans, offset
from ring_attention.masked_block import MaskedBlock
from ring_attention.tiles import AttentionTile
from ring_attention.trace import profiler_range

ALL_ROWS = slice(None)


class BackwardInputs(NamedTuple):
    """What a backward pass needs of the local queries. out and lse are over all keys, so each tile's softmax is global."""

    dout_BSHE: Tensor
    q_BSHD: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor


class TileGradients(NamedTuple):
    """Gradients of one kernel call; `is_last` of its `attend_backward`."""

    rows: slice
    block: MaskedBlock
    is_last: bool
    dq: Tensor
    dk: Tensor
    dv: Tensor

    @property
    def queries(self) -> slice:
        return slice(self.block.q_start, self.block.q_stop)

    def keys_within(self, keys: Spans) -> slice:
        return _keys_within(self.block, keys)


def attend_forward(
    accumulator: OnlineSoftmaxAccumulator,
    kernel: AttentionKernel,
    scale: float,
    tiles: Iterable[AttentionTile],
    q_BSHD: Tensor,
    kv: KeysValues,
    keys: Spans,
    is_last: bool,
) -> None:
    """Add the attention of `tiles` to `accumulator`; `keys` are the source's tokens in `kv`.

    Args:
        is_last: whether no more tiles follow.
    """
    calls = list(_kernel_calls(kernel, tiles, ALL_ROWS))
    for number, (rows, block) in enumerate(calls, 1):
        queries, tokens = slice(block.q_start, block.q_stop), _keys_within(block, keys)
        q, k, v = q_BSHD[rows, queries], kv.k_BTKD[rows, tokens], kv.v_BTKE[rows, tokens]
        with profiler_range("attention block"):
            out, lse = kernel.forward(q, k, v, block.lower, block.upper, scale)
        with profiler_range("merge"):
            accumulator.add(rows, queries, out, lse, is_last and number == len(calls))


def attend_backward(
    kernel: AttentionKernel,
    scale: float,
    tiles: Iterable[AttentionTile],
    inputs: BackwardInputs,
    kv: KeysValues,
    keys: Spans,
    rows: slice = ALL_ROWS,
) -> Iterator[TileGradients]:
    """The gradients of each kernel call in turn. Drop each before asking for the next: both would be in memory.

    Args:
        rows: of the tiles that are not of one row.
    """
    dout_BSHE, q_BSHD, out_BSHE, lse_BHS = inputs
    calls = list(_kernel_calls(kernel, tiles, rows))
    for number, (rows, block) in enumerate(calls, 1):
        queries, tokens = slice(block.q_start, block.q_stop), _keys_within(block, keys)
        dout, q, k, v = (
            dout_BSHE[rows, queries],
            q_BSHD[rows, queries],
            kv.k_BTKD[rows, tokens],
            kv.v_BTKE[rows, tokens],
        )
        out, lse = out_BSHE[rows, queries], lse_BHS[rows, :, queries]
        with profiler_range("attention block"):
            gradients = kernel.backward(dout, q, k, v, out, lse, block.lower, block.upper, scale)
        yield TileGradients(rows, block, number == len(calls), *gradients)
        del gradients


def _kernel_calls(
    kernel: AttentionKernel, tiles: Iterable[AttentionTile], rows: slice
) -> Iterator[tuple[slice, MaskedBlock]]:
    """Rows of the batch and blocks that the kernel computes in one call each."""
    for tile in tiles:
        tile_rows = rows if tile.row is None else slice(tile.row, tile.row + 1)
        for block in kernel.tiles(tile.block):
            yield tile_rows, block


def _keys_within(block: MaskedBlock, keys: Spans) -> slice:
    start = offset(keys, block.k_start)
    return slice(start, start + block.num_keys)
