"""What a rank computes and exchanges in a pass with one exchange: kernel calls and indices, once per batch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ring_attention.direct_indices import Indices, entry_spans
from ring_attention.direct_routing import goes_direct, local_runs, parcels, tiles
from ring_attention.kernel_calls import plan_calls
from ring_attention.kernels import AttentionKernel
from ring_attention.layout import Layout, Span
from ring_attention.mask import Mask


class DirectPlan:
    """A rank's pass. Compared by identity.

    Args:
        whole, rest: the local tokens of the two parts, of which one may be empty.
        whole_calls, rest_calls: their kernel calls, which count queries and keys from the part's first.
        own_parcels: of the own keys, which other ranks need.
        received_parcels: of the keys that arrive.
    """

    def __init__(self, layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel) -> None:
        runs, rows = local_runs(layout, mask, ring_rank), (0, batch)
        self.whole, self.batch = runs.whole, batch
        self.rest = _others(runs.whole, layout.ring_length)
        self._is_whole_first = self.whole < self.rest
        self._lengths = [_length(part) for part in sorted((self.whole, self.rest))]
        exchanged = parcels(layout, mask, ring_rank)
        self.own_parcels, self.received_parcels = exchanged
        self.num_keys = sum(run.stop - first_key for run, first_key, _ in runs.of_rest)
        calls = []
        for of_part, num_keys in ((runs.of_whole, _length(self.whole)), (runs.of_rest, self.num_keys)):
            num_queries = sum(part.run.stop - part.run.start for part in of_part)
            calls.append(plan_calls(kernel, tiles(of_part, mask), rows, num_queries, ((0, num_keys),)))
        self.whole_calls, self.rest_calls = calls
        self._spans = entry_spans(layout, mask, ring_rank, batch, runs, self.rest, exchanged)
        self._indices: dict[torch.device, Indices] = {}

    def indices(self, device: torch.device) -> Indices:
        """Found once for all layers."""
        if device not in self._indices:
            self._indices[device] = self._spans.indices(device)
        return self._indices[device]

    def cut(self, x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
        """The whole documents of a tensor of all local tokens, and the rest."""
        first, second = x.split_with_sizes(self._lengths, dim)  # split takes the host longer
        return (first, second) if self._is_whole_first else (second, first)


@functools.lru_cache(maxsize=16)
def direct_plan(layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel) -> DirectPlan | None:
    """Once per batch of documents, for all layers. None if the pass goes around the ring."""
    return DirectPlan(layout, mask, ring_rank, batch, kernel) if goes_direct(layout, mask) else None


def _length(span: Span) -> int:
    return span[1] - span[0]


def _others(span: Span, length: int) -> Span:
    """The tokens of a rank before a span at its end, or behind one at its start."""
    return (0, span[0]) if span[0] else (span[1], length)
