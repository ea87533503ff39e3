"""What a ring rank computes, sends and receives at each stage. Pure integers: takes a rank, never a process group.

At stage t, ring rank r works with keys and values of rank (r - t) mod R, its source. Only ranks that need some of a
source's keys get any: neighbours among them hand on what they and those behind them need, and where a stretch of
ranks needs none, the source itself sends to the first rank behind it. Gradients of K,V go straight home after each
stage, where they are summed. With a causal mask and zigzag all ranks need all sources, and every stage is one kernel
call:

    source == r     both chunks against both: a causal square
    source <  r     all queries see the source's early chunk, none its late one
    source >  r     the late queries see both chunks, the early ones none
"""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ring_attention.layout import Layout, Run
from ring_attention.mask import CAUSAL, Mask
from ring_attention.masked_block import MaskedBlock

Spans = tuple[tuple[int, int], ...]  # tokens of one rank as [start, stop), rising and apart


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """A block of attention: which row of the batch (None: all), and which local queries meet which source's keys."""

    row: int | None
    rectangle: MaskedBlock


@dataclass(frozen=True)
class Message:
    """Tokens of one rank's K,V, or of their gradients, to or from a ring rank."""

    peer: int
    spans: Spans


@dataclass(frozen=True)
class Stage:
    """One step of the ring; spans count the source's local tokens.

    Args:
        source: the ring rank whose keys and values these are.
        pairs: what to compute.
        keys: which of the source's tokens are here: all at stage 0, later what came; () if none did.
        keys_from: the rank that sent them; None if none did.
        forward: which of them go on, for the next rank's next stage.
        direct: which of this rank's own go straight to a rank further on, for its next stage.
        gradients: of which of the source's tokens dK,dV go home after this stage; () at stage 0 and without pairs.
        home: which of this rank's own dK,dV come home after this stage.
    """

    source: int
    pairs: tuple[AttentionTile, ...]
    keys: Spans
    keys_from: int | None
    forward: Message | None
    direct: Message | None
    gradients: Spans
    home: Message | None

    @property
    def work(self) -> int:
        """Query-key pairs that attend, in one row of the batch, or in all where rows differ."""
        return sum(pair.rectangle.work for pair in self.pairs)

    @property
    def keys_sent(self) -> int:
        """Tokens whose K,V this rank sends after this stage."""
        return sum(num_tokens(message.spans) for message in (self.forward, self.direct) if message)


@functools.lru_cache(maxsize=16)  # packed training has a new mask in each step, shared by all layers
def ring_schedule(layout: Layout, mask: Mask, ring_rank: int) -> tuple[Stage, ...]:
    """The stages of `ring_rank`, the local one first. Padding counts as tokens: it lies behind all real ones.

    Raises:
        ValueError: if the mask's documents reach beyond the layout's padded length.
    """
    degree = layout.ring_degree
    needs, routes, documents = _required_keys(layout, mask), _routes(layout, mask), mask.spans(layout.padded_length)

    def carried(source: int, hops: int) -> Spans:
        """Tokens of `source` that travel to the rank so many hops on."""
        return routes[source][hops] if 0 < hops < degree else ()

    stages = []
    for step in range(degree):
        source, following = (ring_rank - step) % degree, (ring_rank + 1) % degree
        keys, further = carried(source, step), carried(source, step + 1)
        own, own_further = carried(ring_rank, step), carried(ring_rank, step + 1)
        come_from = (ring_rank - 1) % degree if carried(source, step - 1) else source
        stages.append(
            Stage(
                source,
                find_tiles(layout.runs(ring_rank), layout.runs(source), mask, documents),
                keys if step else ((0, layout.ring_length),),
                come_from if keys else None,
                Message(following, further) if further and (keys or step == 0) else None,
                Message((ring_rank + step + 1) % degree, own_further) if step and own_further and not own else None,
                needs[source][step],
                Message((ring_rank + step) % degree, needs[ring_rank][step]) if needs[ring_rank][step] else None,
            )
        )
    return tuple(stages)


def work_per_rank(layout: Layout, mask: Mask = CAUSAL) -> list[list[int]]:
    """Query-key pairs per ring rank per stage: ``work[ring_rank][stage]``."""
    return [[stage.work for stage in ring_schedule(layout, mask, rank)] for rank in range(layout.ring_degree)]


def imbalance(layout: Layout, mask: Mask = CAUSAL) -> float:
    """Lockstep time over mean work, at least 1: what waiting for the slowest rank of each stage costs.

    A stage takes as long as its busiest rank, so the time is the sum over stages of the maximum over ranks.
    """
    work = work_per_rank(layout, mask)
    lockstep = sum(max(rank_work[step] for rank_work in work) for step in range(layout.ring_degree))
    mean = sum(map(sum, work)) / layout.ring_degree
    return lockstep / mean


def num_tokens(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def tokens_sent(layout: Layout, mask: Mask, ring_rank: int) -> tuple[int, int]:
    """(tokens whose K,V a rank sends in a pass over the ring, tokens whose dK,dV it sends in a backward pass)."""
    stages = ring_schedule(layout, mask, ring_rank)
    return sum(stage.keys_sent for stage in stages), sum(num_tokens(stage.gradients) for stage in stages)


def keys_buffer(step: int) -> str:
    """Where the K,V land whose receive is posted after a stage: while one room is computed with, the other fills."""
    return f"keys{step % 2}"


def gradient_buffer(step: int) -> str:
    """Where the dK,dV of a rank's own keys land after a stage: while one room waits to be added, the other fills."""
    return f"gradients{step % 2}"


@functools.lru_cache(maxsize=16)
def buffer_tokens(layout: Layout, mask: Mask) -> dict[str, int]:
    """How many tokens at most any rank receives in each room: the same on all ranks. Packed documents count as one."""
    tokens: dict[str, int] = {}

    def need(room: str, spans: Spans) -> None:
        # packs differ from step to step, and rooms should not
        size = num_tokens(spans) if mask.documents is None else layout.ring_length
        tokens[room] = max(tokens.get(room, 0), size)

    for journey, needed in zip(_routes(layout, mask), _required_keys(layout, mask), strict=True):
        for hops in range(1, layout.ring_degree):
            if journey[hops]:
                need(keys_buffer(hops - 1), journey[hops])
                need(gradient_buffer(hops), needed[hops])
    return tokens


def find_tiles(
    query_runs: Sequence[Run], key_runs: Sequence[Run], mask: Mask, documents: list[list[tuple[int, int]]]
) -> tuple[AttentionTile, ...]:
    """The block pairs of local queries and keys at these runs of a sequence; `documents` are `mask.spans(length)`."""
    pairs = []
    for row, spans in enumerate(documents):
        for first, last in _documents_of(query_runs, key_runs, spans):
            for start, stop in spans[first:last]:
                pieces = [
                    piece
                    for queries in _clipped(query_runs, start, stop)
                    for keys in _clipped(key_runs, start, stop)
                    if (piece := _band_of(queries, keys, mask)) is not None
                ]
                pairs += [AttentionTile(row if len(documents) > 1 else None, piece) for piece in _join(pieces)]
    return tuple(pairs)


@functools.lru_cache(maxsize=8)
def _required_keys(layout: Layout, mask: Mask) -> list[list[Spans]]:
    """``needs[source][hops]``: which of a source's tokens the rank so many hops on attends to; () for itself."""
    degree = layout.ring_degree
    documents, runs = mask.spans(layout.padded_length), [layout.runs(rank) for rank in range(degree)]
    needs = []
    for source in range(degree):
        needs.append([()] * degree)
        for hops in range(1, degree):
            pairs = find_tiles(runs[(source + hops) % degree], runs[source], mask, documents)
            needs[-1][hops] = _union((pair.rectangle.k_start, pair.rectangle.k_stop) for pair in pairs)
    return needs


@functools.lru_cache(maxsize=8)
def _routes(layout: Layout, mask: Mask) -> list[list[Spans]]:
    """``routes[source][hops]``: which of a source's tokens travel to the rank so many hops on.

    Those that it needs itself or, if it needs any, that its neighbours behind it need, up to the first that needs none.
    """
    routes = []
    for needed in _required_keys(layout, mask):
        journey: list[Spans] = [()] * len(needed)
        for hops in reversed(range(1, len(needed))):
            if needed[hops]:
                journey[hops] = _union([*needed[hops], *(journey[hops + 1] if hops + 1 < len(needed) else ())])
        routes.append(journey)
    return routes


def _union(spans: Iterable[tuple[int, int]]) -> Spans:
    union: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((start, stop))
    return tuple(union)


def _documents_of(
    query_runs: Sequence[Run], key_runs: Sequence[Run], spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Index ranges, rising and apart, of the documents that have queries and keys here."""

    def touched(runs: Sequence[Run]) -> list[tuple[int, int]]:
        return [
            (
                bisect.bisect_right(spans, run.position, key=_start) - 1,
                bisect.bisect_left(spans, run.position + run.length, key=_start),
            )
            for run in runs
        ]

    shared = [
        (max(first, other_first), min(last, other_last))
        for first, last in touched(query_runs)
        for other_first, other_last in touched(key_runs)
    ]
    return list(_union((first, last) for first, last in shared if first < last))


_start = operator.itemgetter(0)


def _clipped(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """What of `runs` lies at positions [start, stop)."""
    clipped = []
    for run in runs:
        first, last = max(run.position, start), min(run.position + run.length, stop)
        if first < last:
            clipped.append(Run(run.local_start + first - run.position, first, last - first))
    return clipped


def _band_of(queries: Run, keys: Run, mask: Mask) -> MaskedBlock | None:
    offset = queries.position - keys.position
    return MaskedBlock(
        queries.local_start,
        queries.local_start + queries.length,
        keys.local_start,
        keys.local_start + keys.length,
        None if mask.left is None else offset - mask.left,
        None if mask.right is None else offset + mask.right,
    ).trimmed()


def _join(pieces: list[MaskedBlock]) -> list[MaskedBlock]:
    """As few rectangles as pairwise joining gives, so as few kernel calls."""
    for index, piece in enumerate(pieces):
        for other_index in range(index + 1, len(pieces)):
            if (joined := piece.joined(pieces[other_index])) is not None:
                rest = [part for number, part in enumerate(pieces) if number not in (index, other_index)]
                return _join([joined, *rest])
    return pieces
