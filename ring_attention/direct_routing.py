"""Packed documents in one exchange: each rank sends its keys straight to the ranks that attend to them. Pure integers.

Most packed documents lie whole on one rank, and the others need few keys of other ranks. Then a ring step has little to
compute, and the host's cost of its kernel calls is all that is measured. So a pass has one exchange and two parts: the
whole documents, while the keys travel, and the rest, each run of queries against a copy of all its keys.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from ring_attention.balance import most_shards
from ring_attention.layout import Layout, Run, Span, num_tokens
from ring_attention.mask import Mask
from ring_attention.masked_block import MaskedBlock
from ring_attention.routing import cut_documents, required_keys
from ring_attention.tiles import AttentionTile


class DocumentRun(NamedTuple):
    """Queries of one document that lie one after the other on a rank. Positions are of the sequence.

    Args:
        first_key: the position of the first key that they attend to; the last is their own last position.
        is_whole: whether they are the whole document.
    """

    run: Run
    first_key: int
    is_whole: bool

    def block(self, query_start: int, key_start: int, mask: Mask) -> MaskedBlock:
        """The queries against their keys, where these lie in the tensors of a kernel call."""
        run, distance = self.run, self.run.start - self.first_key  # all runs have one upper bound
        num_queries, lower = run.stop - run.start, None if mask.left is None else distance - mask.left
        if lower is not None and lower <= 1 - num_queries:
            lower = None  # excludes nothing
        key_stop = key_start + distance + num_queries
        return MaskedBlock(query_start, query_start + num_queries, key_start, key_stop, lower, distance)


class LocalRuns(NamedTuple):
    """The runs of a rank in local order.

    Args:
        whole: the local tokens of whole documents, which are its first or its last ones.
        of_whole: the runs among them.
        of_rest: the other runs, which may be whole documents too.
    """

    whole: Span
    of_whole: tuple[DocumentRun, ...]
    of_rest: tuple[DocumentRun, ...]


@functools.lru_cache(maxsize=16)
def local_runs(layout: Layout, mask: Mask, ring_rank: int) -> LocalRuns:
    """Of a ring rank, under a causal mask with one row of documents."""
    (documents,) = mask.spans(layout.padded_length)
    starts, length, parts = [start for start, _ in documents], layout.ring_length, []
    stop_of = dict(documents)
    for run in layout.runs(ring_rank):
        if stop_of.get(run.start) == run.stop:  # most runs are one document
            parts.append(DocumentRun(run, run.start, is_whole=True))
            continue
        first = bisect_right(starts, run.start) - 1
        for start, stop in documents[first : bisect_left(starts, run.stop)]:
            first, last = max(run.start, start), min(run.stop, stop)
            part = Run(run.local_start + first - run.start, first, last)
            parts.append(DocumentRun(part, _first_key(part, start, mask), (first, last) == (start, stop)))
    cut = [number for number, part in enumerate(parts) if not part.is_whole]
    if not cut:
        return LocalRuns((0, length), tuple(parts), ())
    before, behind = parts[: cut[0]], parts[cut[-1] + 1 :]
    end, start = parts[cut[0]].run.local[0], parts[cut[-1]].run.local[1]
    if end >= length - start:
        return LocalRuns((0, end), tuple(before), tuple(parts[cut[0] :]))
    return LocalRuns((start, length), tuple(behind), tuple(parts[: cut[-1] + 1]))


def _first_key(run: Run, document_start: int, mask: Mask) -> int:
    return document_start if mask.left is None else max(document_start, run.start - mask.left)


def tiles(runs: tuple[DocumentRun, ...], mask: Mask) -> tuple[AttentionTile, ...]:
    """Queries one after the other against copies of their keys, one after the other."""
    found, query_start, key_start = [], 0, 0
    for part in runs:
        block = part.block(query_start, key_start, mask)
        found.append(AttentionTile(None, block))
        query_start, key_start = block.q_stop, block.k_stop
    return tuple(found)


class Parcel(NamedTuple):
    """Tokens that a ring rank exchanges with another: keys one way, their gradients the other way.

    Args:
        start, start_at_peer: how many tokens of other parcels lie before them, here and there.
    """

    peer: int
    num_tokens: int
    start: int
    start_at_peer: int


class Parcels(NamedTuple):
    """Of a ring rank: its own keys, to the next rank first, and other ranks' keys, from the rank before it first."""

    own: tuple[Parcel, ...]
    received: tuple[Parcel, ...]


@functools.lru_cache(maxsize=16)
def parcels(layout: Layout, mask: Mask, ring_rank: int) -> Parcels:
    """Of a ring rank."""
    sent, degree, own, received = _num_sent(layout, mask), layout.ring_degree, [], []
    own_start = received_start = 0
    for distance in range(1, degree):
        target, source = (ring_rank + distance) % degree, (ring_rank - distance) % degree
        if number := sent[ring_rank][distance]:
            start_there = sum(sent[(target - nearer) % degree][nearer] for nearer in range(1, distance))
            own.append(Parcel(target, number, own_start, start_there))
            own_start += number
        if number := sent[source][distance]:
            received.append(Parcel(source, number, received_start, sum(sent[source][:distance])))
            received_start += number
    return Parcels(tuple(own), tuple(received))


@functools.lru_cache(maxsize=16)
def _num_sent(layout: Layout, mask: Mask) -> list[list[int]]:
    """``sent[source][distance]``: tokens whose keys the rank `distance` further on needs."""
    return [[num_tokens(spans) if spans else 0 for spans in row] for row in required_keys(layout, mask)]


@functools.lru_cache(maxsize=16)
def goes_direct(layout: Layout, mask: Mask) -> bool:
    """Whether a pass is one exchange rather than a ring. Equal on all ranks."""
    if layout.ring_degree == 1 or mask.right != 0 or len(mask.documents or ()) != 1:
        return False
    most = most_shards(layout.ring_degree) * layout.ring_length
    return max(_num_copies(layout, mask)) < most and max(map(sum, _num_sent(layout, mask))) < most


def _num_copies(layout: Layout, mask: Mask) -> list[int]:
    """Keys before the own tokens of each ring rank's runs."""
    copies, (documents,) = [0] * layout.ring_degree, cut_documents(layout, mask)
    for document in documents:
        for rank, run in document.pieces:
            copies[rank] += run.start - _first_key(run, document.span[0], mask)
    return copies


def tokens_sent(layout: Layout, mask: Mask) -> list[tuple[int, int]]:
    """Of each rank: tokens whose K,V it sends in a pass, and tokens whose dK,dV it sends in a backward pass."""
    sent, degree = _num_sent(layout, mask), layout.ring_degree
    return [
        (sum(sent[rank]), sum(sent[(rank - distance) % degree][distance] for distance in range(1, degree)))
        for rank in range(degree)
    ]
