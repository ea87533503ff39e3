"""The attention tiles of some queries and some keys of a sequence, as few as possible. Pure integers."""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from ring_attention.layout import Layout, Run, Span
from ring_attention.mask import Mask
from ring_attention.masked_block import MaskedBlock


class AttentionTile(NamedTuple):
    """Local queries against a source's local keys, in one row of the batch, or in all rows if `row` is None."""

    row: int | None
    block: MaskedBlock


class RingTiles:
    """The tiles of each pair of ring ranks, found once for a batch's documents."""

    def __init__(self, layout: Layout, mask: Mask) -> None:
        documents = mask.spans(layout.padded_length)
        runs = [layout.runs(rank) for rank in range(layout.ring_degree)]
        self._mask, self._is_one_row = mask, len(documents) == 1
        self._by_document = [[runs_by_document(of_rank, spans) for spans in documents] for of_rank in runs]
        self._found: dict[tuple[int, int], tuple[AttentionTile, ...]] = {}

    def __call__(self, ring_rank: int, source: int) -> tuple[AttentionTile, ...]:
        """The tiles of a rank's queries and a source's keys."""
        if (ring_rank, source) not in self._found:
            tiles = []
            pairs = zip(self._by_document[ring_rank], self._by_document[source], strict=True)
            for row, (queries, keys) in enumerate(pairs):
                tiles += shared_tiles(queries, keys, self._mask, None if self._is_one_row else row)
            self._found[ring_rank, source] = tuple(tiles)
        return self._found[ring_rank, source]


@functools.lru_cache(maxsize=16)  # a batch has a mask for each window of the model's layers
def ring_tiles(layout: Layout, mask: Mask) -> RingTiles:
    return RingTiles(layout, mask)


def find_tiles(
    query_runs: Sequence[Run], key_runs: Sequence[Run], mask: Mask, documents: list[list[Span]]
) -> tuple[AttentionTile, ...]:
    """The tiles of the queries and keys of these runs; `documents` is `mask.spans(length)`."""
    tiles = []
    for row, spans in enumerate(documents):
        queries = runs_by_document(query_runs, spans)
        keys = queries if key_runs == query_runs else runs_by_document(key_runs, spans)
        tiles += shared_tiles(queries, keys, mask, row if len(documents) > 1 else None)
    return tuple(tiles)


def shared_tiles(
    queries: dict[int, list[Run]], keys: dict[int, list[Run]], mask: Mask, row: int | None
) -> list[AttentionTile]:
    """The tiles of queries and keys by document."""
    tiles = []
    for document in sorted(queries.keys() & keys.keys()):
        blocks = [
            block
            for of_queries in queries[document]
            for of_keys in keys[document]
            if (block := _masked_block(of_queries, of_keys, mask)) is not None
        ]
        tiles += [AttentionTile(row, block) for block in _join(blocks)]
    return tiles


def runs_by_document(runs: Sequence[Run], spans: list[Span]) -> dict[int, list[Run]]:
    """The parts of `runs` in each document that they touch, by its index in `spans`."""
    parts: dict[int, list[Run]] = {}
    for run in runs:
        index = bisect_right(spans, run.start, key=itemgetter(0)) - 1
        while index < len(spans) and spans[index][0] < run.stop:
            start, stop = max(run.start, spans[index][0]), min(run.stop, spans[index][1])
            if start < stop:
                parts.setdefault(index, []).append(Run(run.local_start + start - run.start, start, stop))
            index += 1
    return parts


def _masked_block(queries: Run, keys: Run, mask: Mask) -> MaskedBlock | None:
    shift = queries.start - keys.start
    lower = None if mask.left is None else shift - mask.left
    upper = None if mask.right is None else shift + mask.right
    return MaskedBlock(*queries.local, *keys.local, lower, upper).trimmed()


def _join(blocks: list[MaskedBlock]) -> list[MaskedBlock]:
    """Join pairs of blocks while that is possible: fewer blocks are fewer kernel calls."""
    for pair in itertools.combinations(blocks, 2):
        if _touch(*pair) and (joined := pair[0].joined(pair[1])) is not None:
            return _join([joined, *(block for block in blocks if block not in pair)])
    return blocks


def _touch(one: MaskedBlock, other: MaskedBlock) -> bool:
    """Whether no query and no key lies between them: else no block has the pairs of both and no others."""
    return max(one.q_start, other.q_start) <= min(one.q_stop, other.q_stop) and max(one.k_start, other.k_start) <= min(
        one.k_stop, other.k_stop
    )
