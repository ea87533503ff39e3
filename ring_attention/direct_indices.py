"""Which entries a rank sends, copies and sums in a pass with one exchange.

An entry is the K and V of one token in one row of the batch. A rank's pool numbers the entries of its own rest,
then those that it received. The keys of the rest's kernel call are copies of the pool's entries: runs of one document
share a prefix. Their gradients are summed by entry.

The host plans with spans of entries, which are as many as pieces of documents. The device writes out their indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention.direct_routing import LocalRuns, Parcel, Parcels
from ring_attention.layout import Layout, Span, slice_within
from ring_attention.mask import Mask
from ring_attention.routing import cut_documents, required_keys


class Sums(NamedTuple):
    """Which addends each sum has, for `sum_rows`: `addends`, one sum after the other, and where each begins."""

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


class SumRun(NamedTuple):
    """Sums one after the other, given the addends of the first: each next sum has the next one of each."""

    num_sums: int
    addends: list[int]


class EntrySpans(NamedTuple):
    """What `Indices` has, as spans of entries and runs of sums."""

    sent: list[Span]
    keys: list[Span]
    returned: list[SumRun]
    own: list[SumRun]

    def indices(self, device: torch.device) -> Indices:
        """Nothing is copied to the device, and the host does not wait for it."""
        sent, keys = _entries(self.sent, device), _entries(self.keys, device)
        return Indices(sent, keys, _sums(self.returned, device), _sums(self.own, device))


def entry_spans(
    layout: Layout, mask: Mask, ring_rank: int, batch: int, runs: LocalRuns, rest: Span, exchanged: Parcels
) -> EntrySpans:
    """Of a rank whose rest has the local tokens `rest`."""
    required, degree = required_keys(layout, mask), layout.ring_degree
    num_rest = rest[1] - rest[0]
    sent = [
        (start - rest[0] + row * num_rest, stop - rest[0] + row * num_rest)
        for parcel in exchanged.own
        for row in range(batch)
        for start, stop in required[ring_rank][(parcel.peer - ring_rank) % degree]
    ]
    num_own = batch * num_rest
    keys = _joined(_key_spans(layout, mask, ring_rank, batch, runs, rest, exchanged.received), num_own)
    addends = list(_with_places([*keys, *sent]))
    return EntrySpans(
        sent,
        keys,
        _sum_runs([(start - num_own, stop - num_own, place) for start, stop, place in addends if start >= num_own]),
        _sum_runs([span for span in addends if span[0] < num_own]),
    )


def _key_spans(
    layout: Layout, mask: Mask, ring_rank: int, batch: int, runs: LocalRuns, rest: Span, arriving: Sequence[Parcel]
) -> list[Span]:
    """The entries of the keys of each run of the rest, row after row."""
    required, degree, num_rest = required_keys(layout, mask), layout.ring_degree, rest[1] - rest[0]
    received = {parcel.peer: parcel for parcel in arriving}
    (documents,) = cut_documents(layout, mask)
    pieces_of = {run: pieces for _, pieces in documents for rank, run in pieces if rank == ring_rank}
    of_row: list[tuple[int, int, int]] = []  # a span of the first row, and how many entries further the next row's is
    for run, first_key, _ in runs.of_rest:
        for rank, piece in pieces_of.get(run, ((ring_rank, run),)):
            start, stop = max(piece.start, first_key), min(piece.stop, run.stop)
            if start >= stop:
                continue
            local = piece.local_start + start - piece.start
            if rank == ring_rank:
                first, step = local - rest[0], num_rest
            else:
                parcel, spans = received[rank], required[rank][(ring_rank - rank) % degree]
                first = batch * (num_rest + parcel.start) + slice_within(spans, local, local + stop - start).start
                step = parcel.num_tokens
            of_row.append((first, first + stop - start, step))
    return [(start + row * step, stop + row * step) for row in range(batch) for start, stop, step in of_row]


def _joined(spans: list[Span], edge: int) -> list[Span]:
    """Spans that follow each other, as one, but none across `edge`."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start != edge:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


def _with_places(spans: Iterable[Span]) -> Iterator[tuple[int, int, int]]:
    """Each span and how many entries lie in those before it."""
    place = 0
    for start, stop in spans:
        yield start, stop, place
        place += stop - start


def _sum_runs(spans: list[tuple[int, int, int]]) -> list[SumRun]:
    """Given spans of sums and each one's first addend. Addends keep their order."""
    edges = sorted({edge for start, stop, _ in spans for edge in (start, stop)})
    number = {edge: index for index, edge in enumerate(edges)}
    runs = [SumRun(stop - start, []) for start, stop in itertools.pairwise(edges)]
    for start, stop, addend in spans:
        for index in range(number[start], number[stop]):
            runs[index].addends.append(addend + edges[index] - start)
    return runs


def _entries(spans: list[Span], device: torch.device) -> Tensor:
    """The entries of spans, one after the other."""
    parts = [torch.arange(*span, device=device) for span in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def _sums(runs: list[SumRun], device: torch.device) -> Sums:
    sizes = [num_sums * len(addends) for num_sums, addends in runs]
    found = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    starts = []
    for of_run, first, (num_sums, addends) in zip(
        found.split(sizes), itertools.accumulate(sizes, initial=0), runs, strict=False
    ):
        for addend, of_addend in zip(addends, of_run.view(num_sums, -1).unbind(1), strict=True):
            torch.arange(addend, addend + num_sums, out=of_addend)
        starts.append(torch.arange(first, first + len(of_run), len(addends), device=device))
    return Sums(found, torch.cat(starts) if starts else found)
