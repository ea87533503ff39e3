"""Documents to packs, each of at most L tokens: pure integers, the same on every rank.

- ``concatenate``: documents one after the other, cut every L tokens. Only the last pack is padded.
- ``best_fit``: a document of more than L tokens gives full packs and a remainder; remainders and shorter documents are
  packed whole, longest first, each where it leaves the least space (best-fit decreasing).
- ``none``: a document a pack, one of more than L tokens several.

best_fit and none work on windows of documents, so that packs are known before the whole epoch is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from conf.schema import DataConfig
from data.documents import Documents, generator

PACKS_AT_ONCE = 64  # of concatenate


class Piece(NamedTuple):
    """Tokens [start, stop) of a source's tokens: a document, or a part of one."""

    source: int
    start: int
    stop: int
    has_next: bool  # the document goes on, so that the last token has a label


PiecePack = tuple[Piece, ...]


def window_packs(documents: Documents, config: DataConfig, key: tuple[int, ...], skip: int = 0) -> Iterator[PiecePack]:
    """The packs of documents in their order, without the first `skip`, window by window.

    Args:
        key: of the order of packs within a window; concatenate keeps the documents' order.
    """
    length = config.sequence_length
    if config.packing == "concatenate":
        ends = np.cumsum(documents.lengths)
        num_packs = -(-int(ends[-1]) // length) if len(ends) else 0
        for first in range(skip, num_packs, PACKS_AT_ONCE):
            yield from _concatenated(documents, ends, length, first, min(first + PACKS_AT_ONCE, num_packs))
        return
    for window, first in enumerate(range(0, documents.num_documents, config.shuffle_window)):
        packs = pack_documents(documents.take(slice(first, first + config.shuffle_window)), length, config.packing)
        if skip >= len(packs):
            skip -= len(packs)
            continue
        for number in generator(*key, window).permutation(len(packs))[skip:].tolist():
            yield packs[number]
        skip = 0


def pack_documents(documents: Documents, length: int, packing: str) -> list[PiecePack]:
    """All packs of the documents; those of best_fit are not in the order of documents."""
    if packing == "concatenate":
        ends = np.cumsum(documents.lengths)
        return _concatenated(documents, ends, length, 0, -(-int(ends[-1]) // length)) if len(ends) else []
    lengths = documents.lengths
    counts = -(-lengths // length)
    of = np.repeat(np.arange(documents.num_documents), counts)  # each piece's document
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)  # and its number in that document
    starts = documents.starts[of] + number * length
    stops = np.minimum(starts + length, documents.stops[of])
    pieces = _pieces(documents.sources[of], starts, stops, stops < documents.stops[of])
    if packing == "none":
        return [(piece,) for piece in pieces]
    return [tuple(pieces[index] for index in sorted(pack)) for pack in best_fit(stops - starts, length)]


def best_fit(lengths: np.ndarray, length: int) -> list[list[int]]:
    """Best-fit decreasing: packs of indices of `lengths`, which are 1 to `length`; a pack's sum is at most `length`."""
    packs: list[list[int]] = []
    spaces: list[int] = []  # sorted, the free tokens of packs that are not full
    with_space: dict[int, list[list[int]]] = {}  # the packs with so many free tokens
    order = np.argsort(-lengths, kind="stable")
    for index, needed in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(spaces, needed)
        if at == len(spaces):
            pack, space = [index], length
            packs.append(pack)
        else:
            space = spaces[at]
            pack = with_space[space].pop()
            pack.append(index)
            if not with_space[space]:
                del spaces[at]
        if space := space - needed:
            if not with_space.get(space):
                insort(spaces, space)
            with_space.setdefault(space, []).append(pack)
    return packs


def _concatenated(documents: Documents, ends: np.ndarray, length: int, first: int, last: int) -> list[PiecePack]:
    """Packs first..last-1 of documents that are joined and cut every `length` tokens; ends: of documents, joined."""
    start, stop = first * length, min(last * length, int(ends[-1]))
    within = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
    cuts = np.unique(np.concatenate([[start, stop], within, np.arange(start, stop, length)]))
    of = np.searchsorted(ends, cuts[:-1], "right")  # each piece's document
    shift = documents.stops[of] - ends[of]  # from joined tokens to the source's
    pieces = _pieces(documents.sources[of], cuts[:-1] + shift, cuts[1:] + shift, cuts[1:] < ends[of])
    bounds = np.searchsorted(cuts[:-1], np.arange(first, last + 1) * length).tolist()
    return [tuple(pieces[i:j]) for i, j in itertools.pairwise(bounds)]


def _pieces(sources: np.ndarray, starts: np.ndarray, stops: np.ndarray, has_next: np.ndarray) -> list[Piece]:
    return list(map(Piece, sources.tolist(), starts.tolist(), stops.tolist(), has_next.tolist()))
