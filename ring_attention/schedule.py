"""Which block pairs a ring rank computes at each stage. Pure integers: takes a rank, never a process group.

At stage t, ring rank r holds the keys and values of rank (r - t) mod P. What its queries may see of them is, for a
causal mask, at most one rectangle or one triangle of the layout's two chunks, so a stage costs one kernel call:

    zigzag, source == r     both chunks against both: a plain causal square
            source <  r     all queries see the source's early chunk, none its late one
            source >  r     the late queries see both chunks, the early ones none
    contiguous, source == r causal square;  source < r  full square;  source > r  nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from ring_attention.layout import Layout


@dataclass(frozen=True)
class BlockPair:
    """Local queries [q_start, q_stop) against the source's keys [k_start, k_stop); `causal` implies a square."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool

    @property
    def work(self) -> int:
        """Query-key pairs that attend."""
        num_queries, num_keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return num_queries * (num_queries + 1) // 2 if self.causal else num_queries * num_keys


@dataclass(frozen=True)
class Stage:
    """One step of the ring: whose keys and values are here, and the block pair to compute (None: all masked)."""

    source: int
    pair: BlockPair | None


def causal_schedule(layout: Layout, ring_rank: int) -> tuple[Stage, ...]:
    """The P stages of `ring_rank`, the local one first. Padding counts as tokens: it lies behind all real ones."""
    chunk, local = layout.chunk_length, layout.local_length
    stages = []
    for step in range(layout.ring_degree):
        source = (ring_rank - step) % layout.ring_degree
        if source == ring_rank:
            pair = BlockPair(0, local, 0, local, causal=True)
        elif layout.name == "contiguous":
            pair = BlockPair(0, local, 0, local, causal=False) if source < ring_rank else None
        elif source < ring_rank:
            pair = BlockPair(0, local, 0, chunk, causal=False)
        else:
            pair = BlockPair(chunk, local, 0, local, causal=False)
        stages.append(Stage(source, pair))
    return tuple(stages)


def work_per_rank(layout: Layout) -> list[list[int]]:
    """Query-key pairs per rank per stage: ``work[ring_rank][stage]``."""
    return [
        [stage.pair.work if stage.pair else 0 for stage in causal_schedule(layout, ring_rank)]
        for ring_rank in range(layout.ring_degree)
    ]


def imbalance(layout: Layout) -> float:
    """Lockstep time over mean work, at least 1: what waiting for the slowest rank of each stage costs.

    A stage takes as long as its busiest rank, so the time is the sum over stages of the maximum over ranks.
    """
    work = work_per_rank(layout)
    lockstep = sum(max(rank_work[step] for rank_work in work) for step in range(layout.ring_degree))
    mean = sum(map(sum, work)) / layout.ring_degree
    return lockstep / mean
