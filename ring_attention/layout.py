"""Which positions of the sequence each rank holds. Pure integers.

The ranks that share a sequence form a grid of ring_degree x ulysses_degree. The sequence is padded at its end so that
every rank holds equally many tokens, and cut into chunks for the ring:

- ``contiguous``: ring rank r of R holds chunk r of R. The last rank has most of the causal work.
- ``zigzag``: ring rank r holds chunks r and 2R-1-r of 2R: an early and a late one, which balances causal work.
- ``balanced``: depends on the documents of the batch: short ones whole on one rank, long ones over several (`balance`).

The Ulysses ranks of one ring rank are neighbours and share its tokens in equal runs: sequence rank = ring_rank *
ulysses_degree + ulysses_rank. Padding comes after all real tokens, so no causal query sees it, and its labels are
ignored. Other masks must name the real tokens: `Mask.packed([0, length])`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention.balance import balanced_spans

LAYOUTS = ("zigzag", "contiguous", "balanced")

Span = tuple[int, int]  # [start, stop)
Spans = tuple[Span, ...]  # local tokens of one rank: sorted, and neither overlapping nor adjacent


def num_tokens(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def slice_within(spans: Spans, start: int, stop: int) -> slice:
    """Where tokens [start, stop) are among the tokens of `spans`, of which one must have them all."""
    position = 0
    for first, last in spans:
        if first <= start < last:
            return slice(position + start - first, position + stop - first)
        position += last - first
    raise AssertionError(f"token {start} is not in {spans}")


def union(spans: Iterable[Span]) -> Spans:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


class Run(NamedTuple):
    """The positions [start, stop) of the sequence, whose tokens lie on a rank from `local_start` on."""

    local_start: int
    start: int
    stop: int

    @property
    def local(self) -> Span:
        return self.local_start, self.local_start + self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """How `length` tokens are laid out over ring_degree x ulysses_degree ranks.

    Args:
        documents: for balanced: 0, then the end of each document of the sequence; None is one document.
        is_causal: for balanced: whether queries see all earlier tokens of their document, and no later ones.

    Raises:
        ValueError: for an unknown name, a degree below 1, a length below 1, or documents of another layout.
    """

    name: str
    ring_degree: int
    length: int
    ulysses_degree: int = 1
    documents: tuple[int, ...] | None = None
    is_causal: bool = True

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout={self.name!r} is unknown: use one of {', '.join(LAYOUTS)}")
        for name in ("ring_degree", "length", "ulysses_degree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.documents is not None and self.name != "balanced":
            raise ValueError(f"layout={self.name} does not depend on documents: leave them out")

    @property
    def chunks_per_ring_rank(self) -> int:
        return 2 if self.name == "zigzag" and self.ring_degree > 1 else 1

    @property
    def num_chunks(self) -> int:
        return self.ring_degree * self.chunks_per_ring_rank

    @property
    def chunk_length(self) -> int:
        """Tokens per chunk, padding included, so that a ring rank's tokens divide among its Ulysses ranks."""
        multiple = self.ulysses_degree // math.gcd(self.ulysses_degree, self.chunks_per_ring_rank)
        return -(-self.length // (self.num_chunks * multiple)) * multiple

    @property
    def ring_length(self) -> int:
        """Tokens per ring rank, padding included."""
        return self.chunks_per_ring_rank * self.chunk_length

    @property
    def local_length(self) -> int:
        """Tokens per rank, padding included."""
        return self.ring_length // self.ulysses_degree

    @property
    def padded_length(self) -> int:
        """Tokens of all ranks, padding included."""
        return self.ring_degree * self.ring_length

    def chunks(self, ring_rank: int) -> tuple[int, ...]:
        """The chunks of a ring rank, in local order; not of balanced, which has other pieces."""
        chunks = ring_rank, self.num_chunks - 1 - ring_rank
        return chunks[: self.chunks_per_ring_rank]

    def runs(self, ring_rank: int) -> tuple[Run, ...]:
        """The positions of a ring rank as runs, in local order. Adjacent chunks are one run."""
        local_start, runs = 0, []
        if self.name == "balanced":
            spans = self._balanced_spans[ring_rank]
        else:
            size = self.chunk_length
            spans = union((chunk * size, (chunk + 1) * size) for chunk in self.chunks(ring_rank))
        for start, stop in spans:
            runs.append(Run(local_start, start, stop))
            local_start += stop - start
        return tuple(runs)

    @functools.cached_property
    def _balanced_spans(self) -> tuple[tuple[Span, ...], ...]:
        """Kept here too: a look-up by a thousand documents takes as long as to find the runs of a rank."""
        documents, degrees = self.documents or (0,), (self.ring_degree, self.ulysses_degree)
        return balanced_spans(documents, self.padded_length, *degrees, self.is_causal)

    def rank_runs(self, sequence_rank: int) -> tuple[Run, ...]:
        """A rank's tokens as runs: its share of those of its ring rank."""
        ring_rank, ulysses_rank = divmod(sequence_rank, self.ulysses_degree)
        first, runs = ulysses_rank * self.local_length, []
        for run in self.runs(ring_rank):
            start, stop = max(run.local[0], first), min(run.local[1], first + self.local_length)
            if start < stop:
                offset = run.start - run.local_start
                runs.append(Run(start - first, start + offset, stop + offset))
        return tuple(runs)

    def positions(self, sequence_rank: int) -> Tensor:
        """Global positions [S] (int64) of a rank's tokens. Positions from `length` on are padding."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self.rank_runs(sequence_rank)])

    def shard(self, global_tensor: Tensor, sequence_rank: int, dim: int, pad_value: float = 0) -> Tensor:
        """A rank's part of `global_tensor`: `length` on `dim` becomes `local_length`.

        Raises:
            ValueError: if the tensor does not have `length` entries on `dim`.
        """
        if global_tensor.shape[dim] != self.length:
            raise ValueError(f"dim {dim} has {global_tensor.shape[dim]} entries, the layout is for {self.length}")
        padding_shape = list(global_tensor.shape)
        padding_shape[dim] = self.padded_length - self.length
        padded = torch.cat([global_tensor, global_tensor.new_full(padding_shape, pad_value)], dim)
        return padded.index_select(dim, self.positions(sequence_rank).to(padded.device))

    def unshard(self, local_tensors: Sequence[Tensor], dim: int) -> Tensor:
        """The inverse of `shard`, given the tensors of sequence ranks 0, 1, ...; padding is removed."""
        positions = torch.cat([self.positions(rank) for rank in range(self.ring_degree * self.ulysses_degree)])
        gathered = torch.cat(list(local_tensors), dim)
        order = torch.argsort(positions)[: self.length].to(gathered.device)
        return gathered.index_select(dim, order)
