"""Documents dealt out from both ends of a line, on which they lie end to end, the shortest first: see `balance`.

Each rank takes tokens from the line's start, which have few keys, and tokens from its end, which have many, so many of
each that it has the mean work. It cuts two documents at most, of which the next ranks take the rest. One document alone
is dealt out as in zigzag. Positions are those of the line. Pure integers.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right

from ring_attention.placement import Document, RankSpans, Span, pairs

# Work over the mean's that a rank takes at most, and that it leaves for each of the others at most, to save a cut
TAKES, LEAVES = 1.04, 1.02


def dealt_spans(documents: list[Document], capacity: int, ring_degree: int, cut: int) -> RankSpans:
    """Of each rank, in local order: whole documents, then pieces.

    Args:
        documents: the longest first, with as many tokens as ranks have room for.
        capacity: tokens that a rank has room for.
        cut: for each token of a document, how far from the mean work a rank may be, in query-key pairs, rather than to
            cut the document.
    """
    line = _Line(documents[::-1], cut)
    start, stop, found = 0, capacity * ring_degree, []
    for others in reversed(range(1, ring_degree)):
        num_last = line.num_last(start, stop, capacity, others)
        parts = (start, start + capacity - num_last), (stop - num_last, stop)
        start, stop = parts[0][1], parts[1][0]
        found.append(line.spans(*parts))
    return (*found, line.spans((start, stop)))


class _Line:
    """Of documents, the shortest first."""

    def __init__(self, documents: list[Document], cut: int) -> None:
        self._documents, self._cut = documents, cut
        self._starts = [0, *itertools.accumulate([stop - start for start, stop, _ in documents])]
        self._work_before = [0, *itertools.accumulate([work for _, _, work in documents])]

    def spans(self, *parts: Span) -> tuple[Span, ...]:
        """The positions of the sequence that lie between positions of the line."""
        whole, cut = [], []
        for start, stop in parts:
            number = self._document(start)
            while start < stop:
                (first, last, _), offset = self._documents[number], self._starts[number]
                span = first + start - offset, min(last, first + stop - offset)
                (whole if span == (first, last) else cut).append(span)
                number += 1
                start = self._starts[number]
        return (*sorted(whole), *sorted(cut))

    def num_last(self, start: int, stop: int, capacity: int, others: int) -> int:
        """How many of a rank's tokens are the last of those from `start` to `stop`, which it shares with `others`."""
        left, mean = self._work(stop) - self._work(start), self._work_before[-1] / self._starts[-1] * capacity
        goal, most, least = left / (others + 1), TAKES * mean, left - LEAVES * mean * others

        def with_work(number: int) -> tuple[int, int]:
            return number, left - self._work(stop - number) + self._work(start + capacity - number)

        edges = [with_work(number) for number in self._edges(start, stop, capacity)]
        roots = [  # work is linear between edges
            with_work(number + int((goal - work) * (next_number - number) / (next_work - work)))
            for (number, work), (next_number, next_work) in itertools.pairwise(edges)
            if (work < goal) != (next_work < goal)
        ]
        possible = [
            (self._cut * self._num_cut(start + capacity - number, stop - number) + abs(work - goal), number)
            for number, work in (*edges, *roots)
            if least <= work <= most
        ]
        if possible:
            return min(possible)[1]
        return min((abs(work - goal), number) for number, work in (*edges, *roots))[1]

    def _edges(self, start: int, stop: int, capacity: int) -> list[int]:
        """Numbers of last tokens with which no document is cut at one end or the other, and the least and the most."""
        early = self._starts[bisect_left(self._starts, start) : bisect_right(self._starts, start + capacity)]
        late = self._starts[bisect_left(self._starts, stop - capacity) : bisect_right(self._starts, stop)]
        return sorted({0, capacity, *[start + capacity - edge for edge in early], *[stop - edge for edge in late]})

    def _document(self, position: int) -> int:
        """The number of the document that has it."""
        return bisect_right(self._starts, position) - 1

    def _work(self, position: int) -> int:
        """Of the tokens before it."""
        number = self._document(position)
        return self._work_before[number] + pairs(position - self._starts[number])

    def _num_cut(self, *positions: int) -> int:
        """Tokens of the documents that these positions cut."""
        found = [(self._document(position), position) for position in positions]
        cut = {number for number, position in found if self._starts[number] != position}
        return sum([self._starts[number + 1] - self._starts[number] for number in cut])
