"""Which tokens each rank of a ring holds so that packed documents give all ranks equal work. Pure integers.

A long document is spread over a block of ranks as zigzag does: of k ranks, the r-th holds chunks r and 2k-1-r of 2k. A
short one lies whole on one rank, which needs no message for it. The longest are placed first, each where the work is
least; the shortest fill up to equally many tokens, and those that fit nowhere are cut. How long is long depends on the
others: as few documents are spread, and over as few ranks, as it takes, because each message has its cost.

Blocks are the ring, its halves, their halves and so on, as far as these are whole. A rank's local order is short
documents, pieces of cut ones, the early chunks of long ones, then their late chunks, those of larger blocks first. So
what two ranks share lies together on both, and so do the documents that need no other rank's keys: attention is a few
varlen calls, however many documents there are.
"""

from __future__ import annotations

import functools
import heapq
import itertools

Span = tuple[int, int]  # [start, stop)
ENOUGH = 1.05  # work of the busiest rank over the mean's: no more documents are spread
SHARES = [2.0**-n for n in range(9)]  # of a rank's mean work, for what a document may have on one rank


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
    best = None
    for sizes in _choices(documents, mean, length // ring_degree, ring_degree):
        placement = _Placement(length // ring_degree, ring_degree)
        placement.place(documents, sizes)
        if best is None or max(placement.work) < max(best.work):
            best = placement
        if max(placement.work) <= ENOUGH * mean:
            break
    assert best is not None
    return best.spans()


def _work(num_tokens: int, num_before: int = 0) -> int:
    """Query-key pairs of tokens with `num_before` of their document before them."""
    return num_tokens * (num_tokens + 1) // 2 + num_tokens * num_before


def _choices(documents: list[Span], mean_work: float, capacity: int, ring_degree: int) -> list[tuple[int, ...]]:
    """Over how many ranks to spread each of the longest documents, the others being short. The fewest copies first."""
    shares = [mean_work * share for share in SHARES]
    choices = {
        _block_sizes(documents, longest_short, share, capacity, ring_degree)
        for share, longest_short in itertools.combinations_with_replacement(shares, 2)
    }

    def num_copies(sizes: tuple[int, ...]) -> int:
        """Keys of a document that its ranks copy, all together: each has two chunks, and all before them."""
        return sum((stop - start) * (size - 1) for (start, stop), size in zip(documents, sizes, strict=False))

    return sorted(choices, key=lambda sizes: (num_copies(sizes), sizes))


def _block_sizes(
    documents: list[Span], longest_short: float, share: float, capacity: int, ring_degree: int
) -> tuple[int, ...]:
    """Blocks of those with more work than `longest_short`, in which a rank has no more than `share` of one's work."""
    legal = [ring_degree]
    while legal[-1] % 2 == 0:
        legal.append(legal[-1] // 2)
    sizes = []
    for start, stop in documents:
        work, num_tokens = _work(stop - start), stop - start
        if work <= longest_short and num_tokens <= capacity:
            break
        needed = max(2, work / share, num_tokens / capacity)
        sizes.append(min((size for size in legal if size >= needed), default=ring_degree))
    return tuple(sizes)


class _Placement:
    """Documents on ranks, which have room for `capacity` tokens each."""

    def __init__(self, capacity: int, ring_degree: int) -> None:
        self.room, self.work = [capacity] * ring_degree, [0] * ring_degree
        self._whole, self._cut_off, self._early, self._late = ([[] for _ in self.room] for _ in range(4))

    def place(self, documents: list[Span], block_sizes: tuple[int, ...]) -> None:
        """The longest over blocks of these sizes, and the others each on one rank."""
        short = documents[len(block_sizes) :]
        for document, size in zip(documents, block_sizes, strict=False):
            if not self._spread(document, size):
                short.append(document)
        cut = self._put_whole(short)
        for document in cut:
            self._cut(document)

    def spans(self) -> tuple[tuple[Span, ...], ...]:
        parts = zip(self._whole, self._cut_off, self._early, self._late, strict=True)
        return tuple((*sorted(whole), *cut_off, *early, *late) for whole, cut_off, early, late in parts)

    def _spread(self, document: Span, size: int) -> bool:
        """Over the block with the least work of those with room for it; False if none has."""
        start, stop = document
        blocks = [range(first, first + size) for first in range(0, len(self.room), size)]
        for block in sorted(blocks, key=lambda block: (max(self.work[rank] for rank in block), block.start)):
            chunks = _chunk_sizes(stop - start, [self.room[rank] for rank in block])
            of_ranks = [early + late for early, late in zip(chunks[:size], chunks[: -size - 1 : -1], strict=True)]
            if any(self.room[rank] < own for rank, own in zip(block, of_ranks, strict=True)):
                continue
            for index, num_tokens in enumerate(chunks):
                rank = block[min(index, 2 * size - 1 - index)]
                if num_tokens:
                    self._add((self._early if index < size else self._late)[rank], rank, start, num_tokens, document[0])
                start += num_tokens
            return True
        return False

    def _put_whole(self, documents: list[Span]) -> list[Span]:
        """Each on the rank with the least work that has room; returns those for which none has."""
        ranks = [(work, rank) for rank, work in enumerate(self.work)]
        heapq.heapify(ranks)
        too_full: list[tuple[int, int]] = []  # (-room, rank) of ranks that had no room: a shorter document may fit
        left_over = []
        for start, stop in documents:
            while too_full and -too_full[0][0] >= stop - start:
                _, rank = heapq.heappop(too_full)
                heapq.heappush(ranks, (self.work[rank], rank))
            while ranks and self.room[ranks[0][1]] < stop - start:
                _, rank = heapq.heappop(ranks)
                heapq.heappush(too_full, (-self.room[rank], rank))
            if ranks:
                rank = ranks[0][1]
                self._add(self._whole[rank], rank, start, stop - start, start)
                heapq.heapreplace(ranks, (self.work[rank], rank))
            else:
                left_over.append((start, stop))
        return left_over

    def _cut(self, document: Span) -> None:
        """Into pieces for the ranks with the most room."""
        start, stop = document
        while start < stop:
            rank = max(range(len(self.room)), key=lambda rank: (self.room[rank], -self.work[rank]))
            num_tokens = min(self.room[rank], stop - start)
            self._add(self._cut_off[rank], rank, start, num_tokens, document[0])
            start += num_tokens

    def _add(self, spans: list[Span], rank: int, start: int, num_tokens: int, document_start: int) -> None:
        spans.append((start, start + num_tokens))
        self.work[rank] += _work(num_tokens, start - document_start)
        self.room[rank] -= num_tokens


def _chunk_sizes(num_tokens: int, room: list[int]) -> list[int]:
    """Of the 2k chunks of a document on k ranks: as equal as can be, one token more for ranks with the most room."""
    size, more = divmod(num_tokens, 2 * len(room))
    sizes = [size] * (2 * len(room))
    order = sorted(range(len(room)), key=lambda rank: -room[rank])
    for number in range(more):  # each rank's early chunk, then its late one
        rank = order[number % len(room)]
        sizes[rank if number < len(room) else 2 * len(room) - 1 - rank] += 1
    return sizes
