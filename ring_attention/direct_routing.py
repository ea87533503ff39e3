"""Packed documents in one exchange: each rank sends its keys straight to the ranks that attend to them. Pure integers.

Most packed documents lie whole on one rank, and the others need few keys of other ranks. Then a ring step has little to
compute, and the host's cost of its kernel calls is all that is measured. So a pass has one exchange and two parts: the
whole documents, while the keys travel, and the rest, each run of queries against a copy of all its keys.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import NamedTuple

from ring_attention.layout import Layout, Run, Span, num_tokens
from ring_attention.mask import Mask
from ring_attention.masked_block import MaskedBlock
from ring_attention.routing import required_keys
from ring_attention.tiles import AttentionTile, runs_by_document

# A rank copies fewer earlier keys for its runs than so many times its own tokens, and sends fewer: memory stays O(L/P).
# One document over all k ranks would copy k - 0.5 times as many in zigzag, k - 1 times in contiguous. The limit is no
# more than k / 2, so it stays on the ring, which computes beside all messages.
MOST_COPIES = 3


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
        run, distance = self.run, self.run.start - self.first_key
        lower = None if mask.left is None else distance - mask.left
        stops = query_start + run.stop - run.start, key_start + run.stop - self.first_key
        block = MaskedBlock(query_start, stops[0], key_start, stops[1], lower, distance).trimmed()
        assert block is not None, "a run sees its own tokens"
        return replace(block, upper=distance)  # of one query it excludes nothing, but all runs have one band


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

    @property
    def num_copies(self) -> int:
        """Keys before the runs' own tokens."""
        return sum(run.start - first_key for run, first_key, _ in self.of_rest)


@functools.lru_cache(maxsize=16)
def local_runs(layout: Layout, mask: Mask) -> tuple[LocalRuns, ...]:
    """Of each ring rank, under a causal mask with one row of documents."""
    (documents,) = mask.spans(layout.padded_length)
    return tuple(_of_rank(layout.runs(rank), documents, mask, layout.ring_length) for rank in range(layout.ring_degree))


def _of_rank(runs: tuple[Run, ...], documents: list[Span], mask: Mask, length: int) -> LocalRuns:
    parts = []
    for index, of_document in runs_by_document(runs, documents).items():
        start, stop = documents[index]
        for run in of_document:
            first_key = start if mask.left is None else max(start, run.start - mask.left)
            parts.append(DocumentRun(run, first_key, (run.start, run.stop) == (start, stop)))
    parts.sort(key=lambda part: part.run.local_start)
    cut = [number for number, part in enumerate(parts) if not part.is_whole]
    if not cut:
        return LocalRuns((0, length), tuple(parts), ())
    before, behind = parts[: cut[0]], parts[cut[-1] + 1 :]
    end, start = parts[cut[0]].run.local[0], parts[cut[-1]].run.local[1]
    if end >= length - start:
        return LocalRuns((0, end), tuple(before), tuple(parts[cut[0] :]))
    return LocalRuns((start, length), tuple(behind), tuple(parts[: cut[-1] + 1]))


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
def parcels(layout: Layout, mask: Mask) -> tuple[Parcels, ...]:
    """Of each ring rank."""
    required, degree = required_keys(layout, mask), layout.ring_degree
    sent = [[num_tokens(spans) for spans in of_source] for of_source in required]  # [source][distance]
    received = [[sent[(rank - distance) % degree][distance] for distance in range(degree)] for rank in range(degree)]
    sent_before, received_before = (
        [[*itertools.accumulate(of_rank, initial=0)] for of_rank in counts] for counts in (sent, received)
    )
    found = []
    for rank in range(degree):
        own, others = [], []
        for distance in range(1, degree):
            target, source = (rank + distance) % degree, (rank - distance) % degree
            own.append(
                Parcel(target, sent[rank][distance], sent_before[rank][distance], received_before[target][distance])
            )
            others.append(
                Parcel(source, received[rank][distance], received_before[rank][distance], sent_before[source][distance])
            )
        found.append(Parcels(*(tuple(parcel for parcel in some if parcel.num_tokens) for some in (own, others))))
    return tuple(found)


def most_shards(ring_degree: int) -> float:
    """How many times its own tokens a rank at most copies and sends in one exchange."""
    return min(MOST_COPIES, ring_degree / 2)


@functools.lru_cache(maxsize=16)
def goes_direct(layout: Layout, mask: Mask) -> bool:
    """Whether a pass is one exchange rather than a ring. Equal on all ranks."""
    if layout.ring_degree == 1 or mask.right != 0 or len(mask.documents or ()) != 1:
        return False
    most = most_shards(layout.ring_degree) * layout.ring_length
    if max(of_rank.num_copies for of_rank in local_runs(layout, mask)) >= most:
        return False
    return max(tokens_sent(layout, mask, rank)[0] for rank in range(layout.ring_degree)) < most


def tokens_sent(layout: Layout, mask: Mask, ring_rank: int) -> tuple[int, int]:
    """Tokens whose K,V a rank sends in a pass, and tokens whose dK,dV it sends in a backward pass."""
    own, received = (sum(parcel.num_tokens for parcel in some) for some in parcels(layout, mask)[ring_rank])
    return own, received
