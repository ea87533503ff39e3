"""The kernel calls of attention tiles: one for all documents that lie one after the other. Pure integers.

Packed documents are many small causal squares on the diagonal. A kernel with variable lengths (varlen) computes them
in one launch; others get them in one call, too, and loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ring_attention.kernels.base import AttentionKernel, Segments
from ring_attention.masked_block import MaskedBlock
from ring_attention.tiles import AttentionTile


class KernelCall(NamedTuple):
    """Queries and keys of some rows of the batch.

    Args:
        block: their tokens and their band; with segments the band counts from the last query and key of each.
        segments: cut the rows' tokens, row after row; None: the rows are one block each.
    """

    rows: slice
    block: MaskedBlock
    segments: Segments | None = None


class _Run(NamedTuple):
    """Causal blocks of which each begins where the one before it ends; or any one block, then `is_causal` is false."""

    blocks: list[MaskedBlock]
    is_causal: bool
    window: int | None  # the keys that a query sees before its own

    @property
    def lengths(self) -> list[tuple[int, int]]:
        return [(block.num_queries, block.num_keys) for block in self.blocks]

    @property
    def whole(self) -> MaskedBlock:
        first, last = self.blocks[0], self.blocks[-1]
        lower = None if self.window is None else -self.window
        return MaskedBlock(first.q_start, last.q_stop, first.k_start, last.k_stop, lower, 0)


def plan_calls(
    kernel: AttentionKernel, tiles: Sequence[AttentionTile], rows: tuple[int, int], num_queries: int, num_keys: int
) -> tuple[KernelCall, ...]:
    """The calls that compute these tiles, as few as possible.

    Args:
        rows: of the batch, [start, stop), for tiles that are not of one row.
        num_queries, num_keys: of a row.
    """
    by_row = {row: _runs(kernel, [tile.block for tile in of_row]) for row, of_row in _by_row(tiles)}
    if (together := _all_rows(by_row, rows, num_queries, num_keys)) is not None:
        return (together,)
    calls = []
    for row, runs in by_row.items():
        of_rows = slice(*rows) if row is None else slice(row, row + 1)
        for run in runs:
            if len(run.blocks) > 1 and of_rows.stop - of_rows.start == 1:
                calls.append(KernelCall(of_rows, run.whole, Segments(run.lengths)))
            else:
                calls += [KernelCall(of_rows, part) for block in run.blocks for part in kernel.split(block)]
    return tuple(calls)


def _by_row(tiles: Sequence[AttentionTile]) -> itertools.groupby[int | None, AttentionTile]:
    return itertools.groupby(tiles, key=lambda tile: tile.row)


def _all_rows(
    by_row: dict[int | None, list[_Run]], rows: tuple[int, int], num_queries: int, num_keys: int
) -> KernelCall | None:
    """One call for all rows, if each is one run of all its tokens, and documents or rows are several."""
    runs = [run for of_row in by_row.values() for run in of_row]
    expected = [None] if None in by_row else [*range(*rows)]
    if [*by_row] != expected or len(runs) != len(by_row) or sum(len(run.blocks) for run in runs) == 1:
        return None
    windows = {run.window for run in runs}
    sizes = {(run.whole.num_queries, run.whole.num_keys) for run in runs}
    if not all(run.is_causal for run in runs) or len(windows) > 1 or sizes != {(num_queries, num_keys)}:
        return None
    lengths = [length for run in runs for length in run.lengths]
    repeated = lengths * ((rows[1] - rows[0]) // len(runs))  # rows that share their documents
    return KernelCall(slice(*rows), runs[0].whole, Segments(repeated))


def _runs(kernel: AttentionKernel, blocks: list[MaskedBlock]) -> list[_Run]:
    runs: list[_Run] = []
    widest = 0  # keys of a block in the last run whose queries all see the first
    for block in sorted(blocks, key=lambda block: (block.q_start, block.k_start)):
        diagonal = block.num_keys - block.num_queries
        # a single query of a trimmed block sees all keys
        is_causal = block.upper == diagonal or (block.upper is None and block.num_queries == 1)
        is_causal &= kernel.has_varlen or len(kernel.split(block)) == 1
        window = None if block.lower is None else diagonal - block.lower
        reach = block.num_keys if window is None else 0
        if runs and is_causal and runs[-1].is_causal and _follows(runs[-1].blocks[-1], block):
            windows = {run_window for run_window in (runs[-1].window, window) if run_window is not None}
            common = min(windows, default=None)
            if len(windows) < 2 and (common is None or common >= max(widest, reach) - 1):
                runs[-1].blocks.append(block)
                runs[-1] = runs[-1]._replace(window=common)
                widest = max(widest, reach)
                continue
        runs.append(_Run([block], is_causal, window))
        widest = reach
    return runs


def _follows(block: MaskedBlock, other: MaskedBlock) -> bool:
    return (block.q_stop, block.k_stop) == (other.q_start, other.k_start)
