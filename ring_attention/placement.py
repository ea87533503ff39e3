"""Documents whole on one rank, or spread over some ranks as in zigzag: see `balance`. Pure integers.

A long document is spread over some ranks as zigzag does: of k ranks, the r-th holds chunks r and 2k-1-r of 2k. A short
one lies whole on one rank. The longest are placed first, each on as few ranks as stay at the mean work with it, and on
those with the least. The shortest fill up to equally many tokens, and those that fit nowhere are cut. If ranks differ
in their work then, documents are spread over more of them.

A rank's local order is short documents, pieces of cut ones, the early chunks of long ones, then their late chunks,
those of longer documents first. So mostly what two ranks share lies together.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

Span = tuple[int, int]  # [start, stop)
RankSpans = tuple[tuple[Span, ...], ...]  # of each rank
Document = tuple[int, int, int]  # [start, stop) and its work
TARGET = 1.04  # of a rank's work over the mean's, for the ranks that a document is spread over
# The most that a rank has of one document's work, over the mean's. Roots are rounded alike on all CPUs, unlike powers.
SHARES = tuple(math.sqrt(2.0**-n) for n in range(17))
CHECKS = {24 * 2**n for n in range(32)}  # documents, after which it is checked whether the work that is left can fit


def placed_spans(documents: list[Document], capacity: int, ring_degree: int, most: int, fewest: int = 2) -> RankSpans:
    """Of each rank, in local order.

    Args:
        documents: the longest first, with as many tokens as ranks have room for.
        capacity: tokens that a rank has room for.
        most: work that no rank has more of, unless that is impossible.
        fewest: ranks that a document is spread over.
    """
    total = sum(work for _, _, work in documents)
    placement = next(_placements(documents, capacity, ring_degree, total, most, fewest), None)
    if placement is None:
        *_, placement = _placements(documents, capacity, ring_degree, total, total, fewest)
    return placement.spans()


def _placements(
    documents: list[Document], capacity: int, ring_degree: int, total: int, most: int, fewest: int
) -> Iterator[_Placement]:
    """Those whose busiest rank has `most` of the `total` work or less, each with less than the one before."""
    mean, heaviest = total / ring_degree, total
    for share in SHARES:
        if share * mean > heaviest:
            continue  # it allows all that the placement before did
        placement = _Placement(capacity, ring_degree, total, fewest)
        if placement.place(documents, max(1, int(share * mean)), int(TARGET * mean), most):
            yield placement
            most = max(placement.work) - 1
        heaviest = placement.heaviest


def pairs(num_tokens: int, num_before: int = 0) -> int:
    """Query-key pairs of tokens with `num_before` of their document before them."""
    return num_tokens * (num_tokens + 1) // 2 + num_tokens * num_before


def _quotient(number: int, divisor: int) -> int:
    """Rounded up."""
    return -(-number // divisor)


class _Placement:
    """Documents on ranks, which have room for `capacity` tokens each. `total` is the work of all documents."""

    def __init__(self, capacity: int, ring_degree: int, total: int, fewest: int) -> None:
        self._fewest = fewest
        self._total, self._negligible = total, int(SHARES[-1] * total / ring_degree)  # no document with less is spread
        self.room, self.work = [capacity] * ring_degree, [0] * ring_degree
        self.heaviest = 0  # the most work that a rank has of one document that is not cut
        # Two heaps: (work, rank) of ranks that may have room, and (-room, rank) of those that had too little. Spreading
        # a document adds entries for its ranks. The old ones stay, and are dropped when found: they have less work.
        self._by_work = [(0, rank) for rank in range(ring_degree)]
        self._too_full: list[tuple[int, int]] = []
        self._whole, self._cut_off, self._early, self._late = ([[] for _ in self.room] for _ in range(4))

    def place(self, documents: list[Document], share: int, target: int, most: int) -> bool:
        """The longest first. A rank has `share` of the work of one at most, and `target` in all if that is possible.

        Returns False as soon as it is clear that a rank gets more than `most`.
        """
        left_over, room, of_ranks = [], self.room, self.work
        for number, document in enumerate(documents):
            if number in CHECKS and not self._may_keep_to(most, left_over[0] if left_over else document):
                return False
            start, stop, work = document
            rank = self._least_busy(stop - start)
            exceeds = rank is None or work > share or of_ranks[rank] + work > target
            if exceeds and work > self._negligible and self._put_on_several(document, share, target):
                if max(of_ranks) > most:
                    return False
            elif rank is None:
                left_over.append(document)
            else:
                self._whole[rank].append((start, stop))
                room[rank] -= stop - start
                of_ranks[rank] += work
                heapq.heapreplace(self._by_work, (of_ranks[rank], rank))
                if work > self.heaviest:
                    self.heaviest = work
                if of_ranks[rank] > most:
                    return False
        return self._cut(left_over, most)

    def _may_keep_to(self, most: int, longest: Document) -> bool:
        """Whether the work that is left may fit. No token of it has more than the longest document's last one."""
        num_keys = longest[1] - longest[0]
        possible = sum([min(most - work, room * num_keys) for work, room in zip(self.work, self.room, strict=True)])
        return possible >= self._total - sum(self.work)

    def spans(self) -> RankSpans:
        parts = zip(self._whole, self._cut_off, self._early, self._late, strict=True)
        return tuple((*sorted(whole), *cut_off, *early, *late) for whole, cut_off, early, late in parts)

    def _least_busy(self, num_tokens: int) -> int | None:
        """The rank with the least work of those with room for a document that is no longer than those before it."""
        while self._too_full and -self._too_full[0][0] >= num_tokens:
            rank = heapq.heappop(self._too_full)[1]
            heapq.heappush(self._by_work, (self.work[rank], rank))
        while self._by_work:
            work, rank = self._by_work[0]
            if work == self.work[rank]:
                if self.room[rank] >= num_tokens:
                    return rank
                heapq.heappush(self._too_full, (-self.room[rank], rank))
            heapq.heappop(self._by_work)
        return None

    def _put_on_several(self, document: Document, share: int, target: int) -> bool:
        """On two ranks or more. All ranks may exceed the target; of fewer there must be so many that do not."""
        start, stop, work = document
        num_tokens, most = stop - start, len(self.room)
        fewest = max(self._fewest, _quotient(work, share), _quotient(work, max(1, target - min(self.work))))
        most_work, least_room = target - _quotient(work, most), _quotient(num_tokens, most)
        room, of_ranks = self.room, self.work
        possible = [rank for rank in range(most) if of_ranks[rank] <= most_work and room[rank] >= least_room]
        possible.sort(key=of_ranks.__getitem__)
        rooms = sorted([room[rank] for rank in possible], reverse=True)
        for size in range(fewest, min(len(possible), most - 1) + 1):
            most_work, least_room = target - _quotient(work, size), _quotient(num_tokens, size)
            if of_ranks[possible[size - 1]] > most_work or rooms[size - 1] < least_room:
                continue  # so many ranks have more work or less room
            ranks = list(itertools.islice((rank for rank in possible if room[rank] >= least_room), size))
            if of_ranks[ranks[-1]] <= most_work and self._spread(document, sorted(ranks)):
                return True
        smallest = 2 * (num_tokens // (2 * most))  # of any rank: what is over goes to ranks with room
        return min(room) >= smallest and self._spread(document, [*range(most)])

    def _spread(self, document: Document, ranks: list[int]) -> bool:
        """False if one has no room for its chunks."""
        start, stop, work = document
        rooms = [self.room[rank] for rank in ranks]
        sizes = _chunk_sizes(stop - start, rooms)
        if any(early + late > room for early, late, room in zip(sizes, reversed(sizes), rooms, strict=False)):
            return False
        chunks = [*itertools.pairwise(itertools.accumulate(sizes, initial=start))]
        for rank, early, late in zip(ranks, chunks, reversed(chunks), strict=False):
            for spans, (first, last) in ((self._early, early), (self._late, late)):
                if first < last:
                    self._add(spans[rank], rank, first, last - first, pairs(last - first, first - start))
            heapq.heappush(self._by_work, (self.work[rank], rank))
        self.heaviest = max(self.heaviest, _quotient(work, len(ranks)))
        return True

    def _cut(self, documents: list[Document], most: int) -> bool:
        """Into pieces for the ranks with the most room, of those the ones with the least work."""
        by_room = [(-room, work, rank) for rank, (room, work) in enumerate(zip(self.room, self.work, strict=True))]
        heapq.heapify(by_room)
        for start, stop, _ in documents:
            first = start
            while first < stop:
                rank = by_room[0][2]
                num_tokens = min(self.room[rank], stop - first)
                self._add(self._cut_off[rank], rank, first, num_tokens, pairs(num_tokens, first - start))
                if self.work[rank] > most:
                    return False
                heapq.heapreplace(by_room, (-self.room[rank], self.work[rank], rank))
                first += num_tokens
        return True

    def _add(self, spans: list[Span], rank: int, start: int, num_tokens: int, work: int) -> None:
        spans.append((start, start + num_tokens))
        self.work[rank] += work
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
