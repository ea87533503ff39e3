"""The kernel calls of attention tiles: one for all documents that lie one after the other. Pure integers.

Packed documents are many small causal squares on the diagonal, and many small full blocks where they are spread over
ranks. A kernel with variable lengths (varlen) computes each kind in one launch; others get them in one call, and loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ring_attention.kernels.base import AttentionKernel, Segments
from ring_attention.layout import Span, Spans, num_tokens, slice_within
from ring_attention.masked_block import MaskedBlock
from ring_attention.tiles import AttentionTile


class KernelCall(NamedTuple):
    """Queries and keys of some rows of the batch.

    Args:
        block: their tokens and their band; with segments the band counts from the last query and key of each. Keys are
            counted among those that are here.
        segments: cut the rows' tokens, row after row; None: the rows are one block each.
        gradients: the keys, counted among those whose gradients are computed.
    """

    rows: slice
    block: MaskedBlock
    segments: Segments | None
    gradients: slice


class _Part(NamedTuple):
    """A block, its keys counted among those that are here, and their place among the gradients."""

    block: MaskedBlock
    gradient_start: int

    @property
    def end(self) -> tuple[int, int, int]:
        """Where the next part of a run begins."""
        return self.block.q_stop, self.block.k_stop, self.gradient_start + self.block.num_keys

    @property
    def start(self) -> tuple[int, int, int]:
        return self.block.q_start, self.block.k_start, self.gradient_start

    @property
    def window(self) -> int | None:
        """How many keys before its own a query of a causal block sees; None: all."""
        block = self.block
        return None if block.lower is None else block.num_keys - block.num_queries - block.lower


class _Run(NamedTuple):
    """Parts of which each begins where the one before it ends, and the band of all of them in a call with segments."""

    parts: list[_Part]
    lower: int | None = None
    upper: int | None = None

    @property
    def lengths(self) -> list[Span]:
        return [(part.block.num_queries, part.block.num_keys) for part in self.parts]

    @property
    def whole(self) -> MaskedBlock:
        first, last = self.parts[0].block, self.parts[-1].block
        return MaskedBlock(first.q_start, last.q_stop, first.k_start, last.k_stop, self.lower, self.upper)

    def call(self, rows: slice, lengths: list[Span]) -> KernelCall:
        start, whole = self.parts[0].gradient_start, self.whole
        return KernelCall(rows, whole, Segments(lengths), slice(start, start + whole.num_keys))


def plan_calls(
    kernel: AttentionKernel,
    tiles: Sequence[AttentionTile],
    rows: Span,
    num_queries: int,
    keys: Spans,
    gradients: Spans | None = None,
) -> tuple[KernelCall, ...]:
    """The calls that compute these tiles, as few as possible.

    Args:
        rows: of the batch, for tiles that are not of one row.
        num_queries: of a row.
        keys: which of the source's tokens are here.
        gradients: the tokens whose gradients are computed; None is `keys`.
    """
    gradients = keys if gradients is None else gradients
    by_row: dict[int | None, list[_Part]] = {}
    for row, block in tiles:
        span = block.k_start, block.k_stop
        first = slice_within(keys, *span).start
        of_gradients = first if gradients is keys else slice_within(gradients, *span).start
        here = block if first == block.k_start else block.with_keys_moved(first - block.k_start)
        by_row.setdefault(row, []).append(_Part(here, of_gradients))
    runs = {row: _runs(kernel, parts) for row, parts in by_row.items()}
    if (together := _all_rows(runs, rows, num_queries, num_tokens(keys))) is not None:
        return (together,)
    calls = []
    for row, of_row in runs.items():
        of_rows = slice(*rows) if row is None else slice(row, row + 1)
        for run in of_row:
            if len(run.parts) > 1 and of_rows.stop - of_rows.start == 1:
                calls.append(run.call(of_rows, run.lengths))
            else:
                calls += [call for part in run.parts for call in _single_calls(kernel, of_rows, part)]
    return tuple(calls)


def _single_calls(kernel: AttentionKernel, rows: slice, part: _Part) -> list[KernelCall]:
    shift = part.gradient_start - part.block.k_start
    return [
        KernelCall(rows, block, None, slice(block.k_start + shift, block.k_stop + shift))
        for block in kernel.split(part.block)
    ]


def _all_rows(runs: dict[int | None, list[_Run]], rows: Span, num_queries: int, num_keys: int) -> KernelCall | None:
    """One call for all rows, if each is one causal run of all its tokens, and documents or rows are several."""
    every = [run for of_row in runs.values() for run in of_row]
    expected = [None] if None in runs else [*range(*rows)]
    if [*runs] != expected or len(every) != len(runs) or sum(len(run.parts) for run in every) == 1:
        return None
    bands = {(run.lower, run.upper) for run in every}
    sizes = {(run.whole.num_queries, run.whole.num_keys) for run in every}
    if len(bands) > 1 or every[0].upper != 0 or sizes != {(num_queries, num_keys)}:
        return None
    lengths = [length for run in every for length in run.lengths]
    repeated = lengths * ((rows[1] - rows[0]) // len(every))  # rows that share their documents
    return every[0].call(slice(*rows), repeated)


def _runs(kernel: AttentionKernel, parts: list[_Part]) -> list[_Run]:
    """The parts as runs: causal ones, which may cover all queries, then full ones, then the others by themselves."""
    causal, full, others = [], [], []
    for part in sorted(parts, key=lambda part: part.start):
        block, diagonal = part.block, part.block.num_keys - part.block.num_queries
        if not kernel.has_varlen and len(kernel.split(block)) > 1:
            others.append(part)
        elif block.upper == diagonal or block.num_queries == block.num_keys == 1:
            causal.append(part)
        else:
            (full if block.is_full else others).append(part)
    return [
        *_causal_runs(causal),
        *(_Run(run) for run in _chains(full)),
        *(_Run([part]) for part in others),
    ]


def _chains(parts: list[_Part]) -> list[list[_Part]]:
    """Each part followed by the one that begins where it ends."""
    by_start = {part.start: part for part in parts}
    followers = {part.end for part in parts}
    chains = []
    for part in parts:
        if part.start not in followers:
            chain = [part]
            while (following := by_start.get(chain[-1].end)) is not None:
                chain.append(following)
            chains.append(chain)
    return chains


def _causal_runs(parts: list[_Part]) -> list[_Run]:
    """Runs with one window. A part without one goes with any window that excludes none of its keys."""
    runs = []
    for chain in _chains(parts):
        windows = {part.window for part in chain if part.window is not None}
        widest = max((part.block.num_keys for part in chain if part.window is None), default=0)
        window = min(windows, default=None)
        if len(windows) < 2 and (window is None or window >= widest - 1):
            runs.append(_Run(chain, None if window is None else -window, 0))
        else:
            runs += [_Run([part], None if part.window is None else -part.window, 0) for part in chain]
    return runs
