"""The attention tiles of some queries and some keys of a sequence, as few as possible. Pure integers."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ring_attention.layout import Run, Span, union
from ring_attention.mask import Mask
from ring_attention.masked_block import MaskedBlock


@dataclass(frozen=True, slots=True)
class AttentionTile:
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
            for start, stop in spans[first:last]:
                blocks = [
                    block
                    for queries in _clip(query_runs, start, stop)
                    for keys in _clip(key_runs, start, stop)
                    if (block := _masked_block(queries, keys, mask)) is not None
                ]
                tiles += [AttentionTile(row if len(documents) > 1 else None, block) for block in _join(blocks)]
    return tuple(tiles)


def _shared_documents(query_runs: Sequence[Run], key_runs: Sequence[Run], spans: list[Span]) -> list[Span]:
    """Index ranges, sorted and disjoint, of the documents that have both queries and keys in these runs."""

    def touched(runs: Sequence[Run]) -> list[Span]:
        return [
            (
                bisect.bisect_right(spans, run.position, key=_start) - 1,
                bisect.bisect_left(spans, run.position + run.length, key=_start),
            )
            for run in runs
        ]

    shared = [
        (max(first, other_first), min(last, other_last))
        for first, last in touched(query_runs)
        for other_first, other_last in touched(key_runs)
    ]
    return list(union((first, last) for first, last in shared if first < last))


_start = operator.itemgetter(0)


def _clip(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The parts of `runs` at positions [start, stop)."""
    clipped = []
    for run in runs:
        first, last = max(run.position, start), min(run.position + run.length, stop)
        if first < last:
            clipped.append(Run(run.local_start + first - run.position, first, last - first))
    return clipped


def _masked_block(queries: Run, keys: Run, mask: Mask) -> MaskedBlock | None:
    shift = queries.position - keys.position
    return MaskedBlock(
        queries.local_start,
        queries.local_start + queries.length,
        keys.local_start,
        keys.local_start + keys.length,
        None if mask.left is None else shift - mask.left,
        None if mask.right is None else shift + mask.right,
    ).trimmed()


def _join(blocks: list[MaskedBlock]) -> list[MaskedBlock]:
    """Join pairs of blocks while that is possible: fewer blocks are fewer kernel calls."""
    for index, block in enumerate(blocks):
        for other_index in range(index + 1, len(blocks)):
            if (joined := block.joined(blocks[other_index])) is not None:
                rest = [other for number, other in enumerate(blocks) if number not in (index, other_index)]
                return _join([joined, *rest])
    return blocks
