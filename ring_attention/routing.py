"""Which keys travel from which rank to which: only tokens that some rank attends to are sent. Pure integers.

Keys move from rank to rank around the ring. Each rank passes on what it or a rank behind it needs. Where a stretch of
ranks needs none of a source's keys, the source sends them directly to the first rank after that stretch.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

from ring_attention.layout import Layout, Run, Span, Spans, union
from ring_attention.mask import Mask


class CutDocument(NamedTuple):
    """A document that is not one run of one rank.

    Args:
        pieces: (ring rank, run) of all its tokens, by position.
    """

    span: Span
    pieces: tuple[tuple[int, Run], ...]


@functools.lru_cache(maxsize=16)  # a batch has a mask for each window of the model's layers
def cut_documents(layout: Layout, mask: Mask) -> tuple[tuple[CutDocument, ...], ...]:
    """Of each row of the mask's documents, the only ones of which keys travel."""
    runs = sorted(
        (run.start, run.stop, run.local_start, rank) for rank in range(layout.ring_degree) for run in layout.runs(rank)
    )
    return tuple(tuple(_cut(documents, runs)) for documents in mask.spans(layout.padded_length))


def _cut(documents: list[Span], runs: list[tuple[int, int, int, int]]) -> list[CutDocument]:
    """One sweep over documents and (start, stop, local start, rank), both sorted."""
    found, number = [], 0
    for start, stop in documents:
        while runs[number][1] <= start:
            number += 1
        if runs[number][1] >= stop:
            continue
        pieces, index = [], number
        while index < len(runs) and runs[index][0] < stop:
            run_start, run_stop, local_start, rank = runs[index]
            first, last = max(run_start, start), min(run_stop, stop)
            pieces.append((rank, Run(local_start + first - run_start, first, last)))
            index += 1
        found.append(CutDocument((start, stop), tuple(pieces)))
    return found


@functools.lru_cache(maxsize=8)
def required_keys(layout: Layout, mask: Mask) -> list[list[Spans]]:
    """``required[source][distance]``: the source's tokens that the rank `distance` further on attends to.

    () at distance 0: a rank has its own keys.
    """
    degree = layout.ring_degree
    found: defaultdict[tuple[int, int], list[Span]] = defaultdict(list)
    for document in (document for row in cut_documents(layout, mask) for document in row):
        pieces = [(source, run.start, run.stop, run.local_start - run.start) for source, run in document.pieces]
        for rank, seen in _seen_keys(document, mask).items():
            for first, last in seen:
                for source, start, stop, shift in pieces:
                    if start >= last:
                        break
                    if stop > first and source != rank:
                        span = max(start, first) + shift, min(stop, last) + shift
                        found[source, rank].append(span)
    required: list[list[Spans]] = [[()] * degree for _ in range(degree)]
    for (source, rank), spans in found.items():
        required[source][(rank - source) % degree] = union(spans)
    return required


def _seen_keys(document: CutDocument, mask: Mask) -> dict[int, Spans]:
    """The positions that each rank's queries of a document see."""
    seen: dict[int, list[Span]] = {}
    for rank, run in document.pieces:
        start = document.span[0] if mask.left is None else max(document.span[0], run.start - mask.left)
        stop = document.span[1] if mask.right is None else min(document.span[1], run.stop + mask.right)
        seen.setdefault(rank, []).append((start, stop))
    return {rank: union(spans) for rank, spans in seen.items()}


@functools.lru_cache(maxsize=8)
def key_routes(layout: Layout, mask: Mask) -> list[list[Spans]]:
    """``routes[source][distance]``: the source's tokens that travel to the rank `distance` further on.

    A rank that needs some of them also gets what the ranks right behind it need, up to the first that needs none.
    """
    routes = []
    for required in required_keys(layout, mask):
        route: list[Spans] = [*required, ()]  # nothing travels further than to the rank before the source
        for distance in reversed(range(1, len(required))):
            if required[distance]:
                route[distance] = union([*required[distance], *route[distance + 1]])
        routes.append(route)
    return routes
