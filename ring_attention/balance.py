"""Which tokens each rank of a ring holds so that packed documents give all ranks equal causal work. Pure integers.

All ranks have equally many tokens. Most documents are whole on one rank, and need no other rank's keys. There are two
ways to cut the others, over as few ranks as it takes: `placement` spreads them as zigzag does, and `line` cuts them
into one piece for each of their ranks. With pieces, ranks need fewer keys of others. But the rank with the first piece
sends it to all others of the document, and ring steps would have unequal work. So pieces are for passes with one
exchange (`direct`). In ring steps within a host, long documents are spread over all ranks, whose work is equal then in
each step. Between hosts that would be too many messages.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from bisect import bisect_right
from collections import defaultdict
from typing import NamedTuple

from ring_attention.line import dealt_spans
from ring_attention.placement import Document, RankSpans, pairs, placed_spans

ENOUGH = 1.05  # work of the busiest rank over the mean's
# Query-key pairs that take as long, with a backward pass of Llama 3.1 8B's heads on H200s (17 M take 1.8 ms), as to
# copy one key and sum its gradients (14,700 took 0.3 ms), and as to send one (4 KiB at 370 GB/s, once beside nothing)
COPY, SEND = 200, 100
HOST, BETWEEN = 8, 8  # more ranks than that are on several hosts, between which keys travel so many times as long
CUTS = COPY, 10**6  # of `dealt_spans`: what they cost, or as few as are possible. Either may be better.
MOST_DEALT = 256  # documents: of more, each rank mostly has whole ones, and to deal them out takes 5 ms and longer
# A rank needs fewer earlier keys for its runs than so many times its own tokens, and sends fewer: memory stays O(L/P).
# One document over all k ranks would need k - 0.5 times as many in zigzag. The limit is no more than k / 2, so it stays
# on the ring, which computes beside all messages.
MOST_SHARDS = 3


def most_shards(ring_degree: int) -> float:
    """How many times its own tokens a rank at most needs before its runs, or sends, in one exchange."""
    return min(MOST_SHARDS, ring_degree / 2)


@functools.lru_cache(maxsize=64)
def balanced_spans(
    ends: tuple[int, ...], length: int, ring_degree: int, ulysses_degree: int = 1, is_causal: bool = True
) -> RankSpans:
    """Each ring rank's positions in its local order, `length` / ring_degree of them.

    Args:
        ends: 0, then the end of each document; positions after the last are one more.
        length: a multiple of `ring_degree`.
        ulysses_degree: ranks that share a ring rank's tokens. They are neighbours, so a short ring may span hosts.
        is_causal: as in `Layout`. Of other masks work is equal where ranks have equally many tokens of a document.
    """
    if ring_degree == 1:
        return (((0, length),),)
    edges = itertools.pairwise((*ends, length))
    documents = [(start, stop, pairs(stop - start)) for start, stop in edges if start < stop]
    documents.sort(key=operator.itemgetter(2), reverse=True)  # the longest first, equal ones as they lie
    capacity, mean = length // ring_degree, sum(work for _, _, work in documents) / ring_degree
    most, limit = math.floor(ENOUGH * mean), most_shards(ring_degree) * capacity
    is_on_one_host = ring_degree * ulysses_degree <= HOST
    send = SEND if is_on_one_host else BETWEEN * SEND
    placed = placed_spans(documents, capacity, ring_degree, most)
    burden = burden_of(documents, placed, send)
    direct = [(burden.time, placed)] if burden.exchanged < limit else []
    if not is_causal or (direct and burden.time <= most):
        return placed
    for cut in CUTS if len(documents) <= MOST_DEALT else ():
        dealt = dealt_spans(documents, capacity, ring_degree, cut)
        burden = burden_of(documents, dealt, send)
        if burden.work <= most and burden.exchanged < limit:
            direct.append((burden.time, dealt))
    if direct:
        return min(direct, key=operator.itemgetter(0))[1]
    return placed_spans(documents, capacity, ring_degree, most, fewest=ring_degree) if is_on_one_host else placed


class Burden(NamedTuple):
    """The most of any rank.

    Args:
        work: query-key pairs.
        time: of work and copies of keys of any rank, and of the exchange, as query-key pairs.
        exchanged: tokens before its pieces, mostly of others, whose keys it needs for them; or those that it sends.
    """

    work: int
    time: int
    exchanged: int


def burden_of(documents: list[Document], spans: RankSpans, send: int = SEND) -> Burden:
    """Of a layout, in a pass with one exchange under a causal mask. To send a key takes as long as `send` pairs."""
    stop_of = {start: stop for start, stop, _ in documents}
    starts, pieces = sorted(stop_of), defaultdict(list)
    work, copied, needed, sent = ([0] * len(spans) for _ in range(4))
    for rank, of_rank in enumerate(spans):
        for start, stop in of_rank:
            if stop_of.get(start) == stop:
                work[rank] += pairs(stop - start)
                continue
            first = starts[bisect_right(starts, start) - 1]
            pieces[first].append((start - first, stop - first, rank))
            work[rank] += pairs(stop - start, start - first)
            copied[rank] += stop - first
            needed[rank] += start - first
    for of_document in pieces.values():
        later: set[int] = set()
        for start, stop, rank in sorted(of_document, reverse=True):
            sent[rank] += (stop - start) * len(later - {rank})
            later.add(rank)
    exchanged = max(*needed, *sent)
    time = max([of_rank + COPY * keys for of_rank, keys in zip(work, copied, strict=True)]) + send * exchanged
    return Burden(max(work), time, exchanged)
