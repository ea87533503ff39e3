"""Attention of some block pairs, forward and backward: calls of a kernel, joined with the results so far.

Between `ring` and `gather`, which say which pairs, and `blocks` and `running`.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ring_attention.accumulators import OnlineSoftmaxAccumulator
from ring_attention.kernels import AttentionKernel, KernelParams, SavedTensors
from ring_attention.kv import KeysValues, offset
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import AttentionTile, Spans
from ring_attention.trace import profiler_range

ALL_ROWS = slice(None)


@dataclass
class TileGradients:
    """Of one block of some rows of the batch; `is_last` of those that were asked for."""

    row: slice
    part: MaskedBlock
    is_last: bool
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attend_forward(
    running: OnlineSoftmaxAccumulator,
    block: AttentionKernel,
    scale: float,
    pairs: Iterable[AttentionTile],
    q_BSHD: Tensor,
    here: KeysValues,
    keys: Spans,
    is_last: bool,
) -> None:
    """Merge in the attention of `pairs`, whose keys are `here`; after the last ones nothing more comes."""
    tiles = list(_tiles(block, pairs))
    for number, (row, part) in enumerate(tiles, 1):
        queries = slice(part.q_start, part.q_stop)
        k_BTKD, v_BTKE = _keys_of(row, part, here, keys)
        with profiler_range("attention block"):
            out, lse = block.forward(q_BSHD[row, queries], k_BTKD, v_BTKE, KernelParams(part.lower, part.upper, scale))
        with profiler_range("merge"):
            running.add(row, queries, out, lse, is_last and number == len(tiles))


def attend_backward(
    block: AttentionKernel,
    scale: float,
    pairs: Iterable[AttentionTile],
    keys: Spans,
    dout_BSHE: Tensor,
    q_BSHD: Tensor,
    here: KeysValues,
    out_BSHE: Tensor,
    lse_BHS: Tensor,
    rows: slice = ALL_ROWS,
) -> Iterable[TileGradients]:
    """Those of each block in turn; the caller lets go of one before it asks for the next.

    Args:
        rows: to which `pairs` that do not name a row are limited.
    """
    tiles = list(_tiles(block, pairs, rows))
    for number, (row, part) in enumerate(tiles, 1):
        queries = slice(part.q_start, part.q_stop)
        k_BTKD, v_BTKE = _keys_of(row, part, here, keys)
        with profiler_range("attention block"):
            saved = SavedTensors(q_BSHD[row, queries], k_BTKD, v_BTKE, out_BSHE[row, queries], lse_BHS[row, :, queries])
            params = KernelParams(part.lower, part.upper, scale)
            gradients = block.backward(dout_BSHE[row, queries], saved, params)
        yield TileGradients(row, part, number == len(tiles), *gradients)
        del gradients


def _tiles(
    block: AttentionKernel, pairs: Iterable[AttentionTile], rows: slice = ALL_ROWS
) -> Iterable[tuple[slice, MaskedBlock]]:
    """Rows of the batch and rectangles, cut into what the kernel computes in one call."""
    for pair in pairs:
        row = rows if pair.row is None else slice(pair.row, pair.row + 1)
        for part in block.split(pair.rectangle):
            yield row, part


def _keys_of(row: slice, part: MaskedBlock, here: KeysValues, keys: Spans) -> tuple[Tensor, Tensor]:
    start = offset(keys, part.k_start)
    tokens = slice(start, start + part.num_keys)
    return here.k_BTKD[row, tokens], here.v_BTKE[row, tokens]
