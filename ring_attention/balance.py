"""Which tokens each rank of a ring holds so that packed documents give all ranks equal work. Pure integers.

A long document is spread over all ranks as zigzag does: 2R chunks, of which rank r holds chunks r and 2R-1-r. A short
one lies whole on one rank, which needs no message for it. The longest are placed first, each on the rank with the least
work; the shortest fill up to equally many tokens, and those that fit nowhere are cut. How long a long document is
depends on the others: only as many are spread as it takes.

A rank's local order is short documents, the early chunks of long ones, then their late chunks, so that the attention of
a ring step is a few varlen calls, however many documents there are.
"""

from __future__ import annotations

import functools
import heapq
import itertools

Span = tuple[int, int]  # [start, stop)

ENOUGH = 1.05  # work of the busiest rank over the mean's: no more documents are spread
SMALLEST_SHARE = 1 / 256  # of a rank's mean work: a document below it is never spread


@functools.lru_cache(maxsize=64)
def balanced_spans(ends: tuple[int, ...], length: int, ring_degree: int) -> tuple[tuple[Span, ...], ...]:
    """Each ring rank's positions in its local order, `length` / ring_degree of them.

    Args:
        ends: 0, then the end of each document; positions after the last are one more.
        length: a multiple of `ring_degree`.
    """
    documents = [span for span in itertools.pairwise((*ends, length)) if span[0] < span[1]]
    if ring_degree == 1:
        return (((0, length),),)
    documents.sort(key=lambda span: (span[0] - span[1], span[0]))  # the longest first
    mean = sum(_work(stop - start) for start, stop in documents) / ring_degree
    best, share = None, 1.0
    while share >= SMALLEST_SHARE:
        num_long = sum(_work(stop - start) > share * mean for start, stop in documents)
        if best is None or num_long > best[1]:
            work, spans = _placed(documents[:num_long], documents[num_long:], length // ring_degree, ring_degree)
            if best is None or max(work) < best[0]:
                best = max(work), num_long, spans
            if max(work) <= ENOUGH * mean:
                break
        share /= 2
    assert best is not None
    return best[2]


def _work(num_tokens: int, num_before: int = 0) -> int:
    """Query-key pairs of tokens with `num_before` of their document before them."""
    return num_tokens * (num_tokens + 1) // 2 + num_tokens * num_before


def _placed(
    long: list[Span], short: list[Span], capacity: int, ring_degree: int
) -> tuple[list[int], tuple[tuple[Span, ...], ...]]:
    """The work and the spans of each rank."""
    room, work = [capacity] * ring_degree, [0] * ring_degree
    whole: list[list[Span]] = [[] for _ in room]
    early: list[list[Span]] = [[] for _ in room]
    late: list[list[Span]] = [[] for _ in room]
    for start, stop in sorted(long):
        position = start
        for chunk, size in enumerate(_chunk_sizes(stop - start, room, ring_degree)):
            rank = min(chunk, 2 * ring_degree - 1 - chunk)
            if size:
                (early if chunk < ring_degree else late)[rank].append((position, position + size))
            work[rank] += _work(size, position - start)
            room[rank] -= size
            position += size
    ranks = [(work[rank], rank) for rank in range(ring_degree)]
    heapq.heapify(ranks)
    cut = []
    for start, stop in short:
        full = []
        while ranks and room[ranks[0][1]] < stop - start:
            full.append(heapq.heappop(ranks))
        if ranks:
            _, rank = ranks[0]
            whole[rank].append((start, stop))
            work[rank] += _work(stop - start)
            room[rank] -= stop - start
            heapq.heapreplace(ranks, (work[rank], rank))
        else:
            cut.append((start, stop))
        for entry in full:  # a shorter one may fit
            heapq.heappush(ranks, entry)
    for start, stop in cut:
        position = start
        while position < stop:
            rank = max(range(ring_degree), key=lambda rank: (room[rank], -work[rank]))
            size = min(room[rank], stop - position)
            whole[rank].append((position, position + size))
            work[rank] += _work(size, position - start)
            room[rank] -= size
            position += size
    return work, tuple((*sorted(own), *early[rank], *late[rank]) for rank, own in enumerate(whole))


def _chunk_sizes(num_tokens: int, room: list[int], ring_degree: int) -> list[int]:
    """Of the 2R chunks of a document: as equal as they can be, one token more for ranks with the most room."""
    size, more = divmod(num_tokens, 2 * ring_degree)
    sizes = [size] * (2 * ring_degree)
    order = sorted(range(ring_degree), key=lambda rank: -room[rank])
    for number in range(more):  # each rank's early chunk, then its late one
        rank = order[number % ring_degree]
        sizes[rank if number < ring_degree else 2 * ring_degree - 1 - rank] += 1
    return sizes
