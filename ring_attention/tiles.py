"""The attention tiles of some queries and some keys of a sequence, as few as possible. Pure integers."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from ring_attention.layout import Run, Span, Spans, union
from ring_attention.mask import Mask
from ring_attention.masked_block import MaskedBlock


class AttentionTile(NamedTuple):
    """Local queries against a source's local keys, in one row of the batch, or in all rows if `row` is None."""

    row: int | None
    block: MaskedBlock


def find_tiles(
    query_runs: Sequence[Run], key_runs: Sequence[Run], mask: Mask, documents: list[list[Span]]
) -> tuple[AttentionTile, ...]:
    """The tiles of the queries and keys of these runs; `documents` is `mask.spans(length)`."""
    tiles = []
    for row, spans in enumerate(documents):
        for first, last in _shared_documents(query_runs, key_runs, spans):
            for document in spans[first:last]:
                blocks = [
                    block
                    for queries in _clip(query_runs, *document)
                    for keys in _clip(key_runs, *document)
                    if (block := _masked_block(queries, keys, mask)) is not None
                ]
                tiles += [AttentionTile(row if len(documents) > 1 else None, block) for block in _join(blocks)]
    return tuple(tiles)


def _shared_documents(query_runs: Sequence[Run], key_runs: Sequence[Run], spans: list[Span]) -> Spans:
    """Index ranges of the documents that have both queries and keys in these runs."""

    def touched(run: Run) -> Span:
        return bisect_right(spans, run.start, key=itemgetter(0)) - 1, bisect_left(spans, run.stop, key=itemgetter(0))

    shared = [
        (max(first, other_first), min(last, other_last))
        for first, last in map(touched, query_runs)
        for other_first, other_last in map(touched, key_runs)
    ]
    return union((first, last) for first, last in shared if first < last)


def _clip(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The parts of `runs` at positions [start, stop)."""
    return [
        Run(run.local_start + max(0, start - run.start), max(run.start, start), min(run.stop, stop))
        for run in runs
        if max(run.start, start) < min(run.stop, stop)
    ]


def _masked_block(queries: Run, keys: Run, mask: Mask) -> MaskedBlock | None:
    shift = queries.start - keys.start
    lower = None if mask.left is None else shift - mask.left
    upper = None if mask.right is None else shift + mask.right
    return MaskedBlock(*queries.local, *keys.local, lower, upper).trimmed()


def _join(blocks: list[MaskedBlock]) -> list[MaskedBlock]:
    """Join pairs of blocks while that is possible: fewer blocks are fewer kernel calls."""
    for pair in itertools.combinations(blocks, 2):
        if (joined := pair[0].joined(pair[1])) is not None:
            return _join([joined, *(block for block in blocks if block not in pair)])
    return blocks
