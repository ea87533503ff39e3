"""What a rank computes and exchanges in a pass with one exchange: kernel calls and indices, once per batch.

An entry is the K and V of one token in one row of the batch, side by side. A rank's pool has the entries of its own
rest, then those that it received. The keys of the rest's kernel call are copies of the pool's entries: runs of one
document share a prefix. Their gradients are summed by entry.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention.direct_routing import LocalRuns, goes_direct, local_runs, parcels, tiles
from ring_attention.kernel_calls import plan_calls
from ring_attention.kernels import AttentionKernel
from ring_attention.layout import Layout, Span
from ring_attention.mask import Mask
from ring_attention.routing import required_keys


class Sums(NamedTuple):
    """Which addends each sum has, for `embedding_bag`: `addends`, one sum after the other, and where each begins."""

    addends: Tensor
    starts: Tensor


class Indices(NamedTuple):
    """int64, on one device.

    Args:
        sent: the entries of the own rest to send, parcel after parcel.
        keys: the pool's entry of each key of the rest's call.
        returned: of the keys' gradients, sums for the entries that were received.
        own: of the keys' gradients and then those that other ranks return, sums for the own rest.
    """

    sent: Tensor
    keys: Tensor
    returned: Sums
    own: Sums


class DirectPlan:
    """A rank's pass. Compared by identity.

    Args:
        whole, rest: the local tokens of the two parts, of which one may be empty.
        whole_calls, rest_calls: their kernel calls, which count queries and keys from the part's first.
        own_parcels: of the own keys, which other ranks need.
        received_parcels: of the keys that arrive.
    """

    def __init__(self, layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel) -> None:
        runs, rows = local_runs(layout, mask)[ring_rank], (0, batch)
        self.whole, self.batch = runs.whole, batch
        self.rest = _others(runs.whole, layout.ring_length)
        self.own_parcels, self.received_parcels = parcels(layout, mask)[ring_rank]
        self.num_keys = sum(run.stop - first_key for run, first_key, _ in runs.of_rest)
        calls = []
        for of_part, num_keys in ((runs.of_whole, _length(self.whole)), (runs.of_rest, self.num_keys)):
            num_queries = sum(part.run.stop - part.run.start for part in of_part)
            calls.append(plan_calls(kernel, tiles(of_part, mask), rows, num_queries, ((0, num_keys),)))
        self.whole_calls, self.rest_calls = calls
        self._indices = {torch.device("cpu"): self._find_indices(layout, mask, ring_rank, runs)}

    def indices(self, device: torch.device) -> Indices:
        """One copy to the device for all layers, for which the host does not wait."""
        if device not in self._indices:
            sent, keys, returned, own = self._indices[torch.device("cpu")]
            parts = sent, keys, *returned, *own
            packed = torch.cat(parts)
            packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
            sent, keys, *sums = packed.split([len(part) for part in parts])
            self._indices[device] = Indices(sent, keys, Sums(*sums[:2]), Sums(*sums[2:]))
        return self._indices[device]

    def cut(self, x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
        """The whole documents of a tensor of all local tokens, and the rest."""
        first = min(self.whole, self.rest)
        parts = x.split((_length(first), x.shape[dim] - _length(first)), dim)
        return (parts[0], parts[1]) if first == self.whole else (parts[1], parts[0])

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The inverse of `cut`, given the parts that have tokens."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(tuple(parts if self.whole < self.rest else reversed(parts)), dim)

    def _find_indices(self, layout: Layout, mask: Mask, ring_rank: int, runs: LocalRuns) -> Indices:
        required, degree, batch = required_keys(layout, mask), layout.ring_degree, torch.arange(self.batch)[:, None]
        start, num_rest = self.rest[0], _length(self.rest)
        sent = []
        for parcel in self.own_parcels:
            spans = required[ring_rank][(parcel.peer - ring_rank) % degree]
            sent.append(((_tokens(spans) - start) + num_rest * batch).flatten())
        # of each position in the pool: its entry in row 0, and how many entries further on it is in the next row
        first, step = (torch.full((layout.padded_length,), -1) for _ in range(2))
        positions = _positions(layout, ring_rank)[start : start + num_rest]
        first[positions], step[positions] = torch.arange(num_rest), num_rest
        for peer, num_tokens, offset, _ in self.received_parcels:
            spans = required[peer][(ring_rank - peer) % degree]
            positions = _positions(layout, peer)[_tokens(spans)]
            first[positions] = self.batch * (num_rest + offset) + torch.arange(num_tokens)
            step[positions] = num_tokens
        keys = _tokens([(first_key, run.stop) for run, first_key, _ in runs.of_rest])
        keys = (first[keys] + batch * step[keys]).flatten()
        sent, num_own = _concatenated(sent), self.batch * num_rest
        num_received = self.batch * sum(parcel.num_tokens for parcel in self.received_parcels)
        return Indices(
            sent,
            keys,
            _sums(keys - num_own, num_received),
            _sums(torch.cat((torch.where(keys < num_own, keys, -1), sent)), num_own),
        )


@functools.lru_cache(maxsize=16)
def direct_plan(layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel) -> DirectPlan | None:
    """Once per batch of documents, for all layers. None if the pass goes around the ring."""
    return DirectPlan(layout, mask, ring_rank, batch, kernel) if goes_direct(layout, mask) else None


def _length(span: Span) -> int:
    return span[1] - span[0]


def _others(span: Span, length: int) -> Span:
    """The tokens of a rank before a span at its end, or behind one at its start."""
    return (0, span[0]) if span[0] else (span[1], length)


def _tokens(spans: Sequence[Span]) -> Tensor:
    return _concatenated([torch.arange(*span) for span in spans])


def _positions(layout: Layout, ring_rank: int) -> Tensor:
    return _tokens([(run.start, run.stop) for run in layout.runs(ring_rank)])


def _concatenated(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _sums(sum_of_addend: Tensor, num_sums: int) -> Sums:
    """Given the sum that each addend belongs to; a negative one is none. Addends keep their order."""
    counts = torch.bincount(sum_of_addend[sum_of_addend >= 0], minlength=num_sums)
    order = torch.argsort(sum_of_addend, stable=True)
    return Sums(order[len(order) - int(counts.sum()) :], counts.cumsum(0) - counts)
