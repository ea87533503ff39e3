"""Which tokens each rank of a ring holds so that packed documents give all ranks equal work. Pure integers.

A long document is spread over some ranks as zigzag does: of k ranks, the r-th holds chunks r and 2k-1-r of 2k. A short
one lies whole on one rank, which needs no message for it. The longest are placed first, each on as few ranks as stay at
the mean work with it, and on those with the least. The shortest fill up to equally many tokens, and those that fit
nowhere are cut. If ranks differ in their work then, documents are spread over more of them.

A rank's local order is short documents, pieces of cut ones, the early chunks of long ones, then their late chunks,
those of longer documents first. So documents that need no other rank's keys lie together, and mostly what two ranks
share does: attention is a few varlen calls, however many documents there are.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator

Span = tuple[int, int]  # [start, stop)
ENOUGH = 1.05  # work of the busiest rank over the mean's: no more documents are spread
TARGETS = (1.04, 1.0)  # of a rank's work over the mean's, for the ranks that a document is spread over
SHARES = tuple(2.0**-n for n in range(9))  # the most that a rank has of one document's work, over the mean rank's work


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
    placement = next(_placements(documents, length // ring_degree, ring_degree, mean, ENOUGH * mean), None)
    if placement is None:
        *_, placement = _placements(documents, length // ring_degree, ring_degree, mean, math.inf)
    return placement.spans()


def _placements(
    documents: list[Span], capacity: int, ring_degree: int, mean: float, most: float
) -> Iterator[_Placement]:
    """Those whose busiest rank has `most` work or less, each with less than the one before. `mean` is a rank's work."""
    for share, target in itertools.product(SHARES, TARGETS):
        placement = _Placement(capacity, ring_degree, SHARES[-1] * mean)
        if placement.place(documents, share * mean, target * mean, most):
            yield placement
            most = max(placement.work) - 1


def _work(num_tokens: int, num_before: int = 0) -> int:
    """Query-key pairs of tokens with `num_before` of their document before them."""
    return num_tokens * (num_tokens + 1) // 2 + num_tokens * num_before


class _Placement:
    """Documents on ranks, which have room for `capacity` tokens each. Those with `negligible` work are not spread."""

    def __init__(self, capacity: int, ring_degree: int, negligible: float) -> None:
        self._negligible = negligible
        self.room, self.work = [capacity] * ring_degree, [0] * ring_degree
        self._by_work = [(0, rank) for rank in range(ring_degree)]  # always sorted
        self._whole, self._cut_off, self._early, self._late = ([[] for _ in self.room] for _ in range(4))

    def place(self, documents: list[Span], share: float, target: float, most: float) -> bool:
        """The longest first. A rank has `share` of the work of one at most, and `target` in all if that is possible.

        Returns False as soon as a rank has more than `most`.
        """
        left_over = []
        for document in documents:
            if not self._put(document, share, target):
                left_over.append(document)
            elif self._by_work[-1][0] > most:
                return False
        for document in left_over:
            self._cut(document)
        return max(self.work) <= most

    def spans(self) -> tuple[tuple[Span, ...], ...]:
        parts = zip(self._whole, self._cut_off, self._early, self._late, strict=True)
        return tuple((*sorted(whole), *cut_off, *early, *late) for whole, cut_off, early, late in parts)

    def _put(self, document: Span, share: float, target: float) -> bool:
        """On the fewest ranks that keep to both; False if none have room."""
        num_tokens, work, num_ranks = document[1] - document[0], _work(document[1] - document[0]), len(self.room)
        if work > self._negligible:
            fewest = math.ceil(max(1, work / share, work / max(1, target - self._by_work[0][0])))
            for size in self._sizes(num_tokens, work, min(fewest, num_ranks), target):
                enough = (rank for _, rank in self._by_work if self.room[rank] * size >= num_tokens)
                ranks = list(itertools.islice(enough, size))
                if len(ranks) < size or (self.work[ranks[-1]] + work / size > target and size < num_ranks):
                    continue
                if self._spread(document, sorted(ranks)):
                    return True
        return self._put_whole(document)

    def _sizes(self, num_tokens: int, work: int, fewest: int, target: float) -> Iterator[int]:
        """Numbers of ranks to try. All ranks may exceed the target; of fewer there must be so many that do not."""
        yield fewest
        most = len(self.room)
        possible = sum(
            of_rank + work / most <= target and self.room[rank] * most >= num_tokens for of_rank, rank in self._by_work
        )
        yield from range(fewest + 1, min(possible, most - 1) + 1)
        if fewest < most:
            yield most

    def _put_whole(self, document: Span) -> bool:
        """On the rank with the least work that has room; False if none has."""
        start, stop = document
        for index, (_, rank) in enumerate(self._by_work):
            if self.room[rank] >= stop - start:
                self._add(self._whole[rank], rank, start, stop - start, start)
                del self._by_work[index]
                bisect.insort(self._by_work, (self.work[rank], rank))
                return True
        return False

    def _spread(self, document: Span, ranks: list[int]) -> bool:
        """Over these ranks, or whole on one; False if one has no room for its chunks."""
        start, stop = document
        size = len(ranks)
        if size == 1:
            return self._put_whole(document)
        chunks = _chunk_sizes(stop - start, [self.room[rank] for rank in ranks])
        of_ranks = [early + late for early, late in zip(chunks[:size], chunks[: -size - 1 : -1], strict=True)]
        if any(self.room[rank] < own for rank, own in zip(ranks, of_ranks, strict=True)):
            return False
        for index, num_tokens in enumerate(chunks):
            rank = ranks[min(index, 2 * size - 1 - index)]
            if num_tokens:
                self._add((self._early if index < size else self._late)[rank], rank, start, num_tokens, document[0])
            start += num_tokens
        self._by_work = sorted(zip(self.work, range(len(self.work)), strict=True))
        return True

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
