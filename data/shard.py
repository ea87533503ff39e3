"""Which sequences a data rank gets, and which of their tokens a sequence rank holds.

A step takes sequences in the corpus's order: for each micro-batch and each data rank, `micro_batch_size` of them. The
order does not depend on the number of ranks that share a sequence, so neither does the training. A rank reads its own
positions alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.corpus import IGNORED_LABEL, Pack
from ring_attention.layout import Layout

DocumentEnds = tuple[tuple[int, ...], ...]  # of each row: 0, then the end of each document, over all ranks' tokens


@dataclass(frozen=True)
class TokenBatch:
    """This rank's shard of B sequences of L tokens; tensors are int64.

    Args:
        positions_BS: each token's place in its document; [1, S] if all rows have the same.
        labels_BS: the token that follows each token, or IGNORED_LABEL.
        documents: what attention must keep apart, as `ring_attention.Mask` takes it; None: each row is one document.
        lengths: of the documents of this micro-batch on all data ranks, without padding: the work of a step.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    labels_BS: Tensor
    documents: DocumentEnds | None = None
    lengths: tuple[int, ...] = ()

    def num_valid(self) -> Tensor:
        """The number of labels other than IGNORED_LABEL, a scalar in fp64."""
        return (self.labels_BS != IGNORED_LABEL).sum().double()


@dataclass(frozen=True)
class Step:
    """This rank's micro-batches of one step, and the last sequence of the step over all data ranks."""

    micro_batches: list[TokenBatch]
    last: Pack

    @property
    def lengths(self) -> list[int]:
        """Of the documents of all micro-batches on all data ranks."""
        return [length for batch in self.micro_batches for length in batch.lengths]


@dataclass(frozen=True)
class Sharder:
    """This rank's coordinates, and the shape of a step.

    Args:
        document_mask: whether documents are kept apart, and positions restart with each.
    """

    layout: Layout
    sequence_rank: int
    data_rank: int
    data_degree: int
    micro_batch_size: int
    document_mask: bool = True

    def token_batch(self, packs: Sequence[Pack], lengths: Iterable[int] = ()) -> TokenBatch:
        """This rank's shard of B sequences; padding gets an ignored label.

        Args:
            lengths: as in `TokenBatch`.
        """
        layout = self.layout_of(packs)
        tokens, labels = zip(*(self._read(pack, layout) for pack in packs), strict=True)
        documents, positions_BS = None, layout.positions(self.sequence_rank).unsqueeze(0)
        if self.document_mask:
            documents = tuple(pack.boundaries for pack in packs)
            positions_BS = torch.stack([restarted(positions_BS[0], row) for row in documents])
        as_tensors = (torch.from_numpy(np.stack(rows)) for rows in (tokens, labels))
        tokens_BS, labels_BS = as_tensors
        return TokenBatch(tokens_BS, positions_BS, labels_BS, documents, tuple(lengths))

    def steps(self, packs: Iterable[Pack], accumulation_steps: int) -> Iterator[Step]:
        """This rank's micro-batches of each step; an incomplete last step is dropped."""
        global_micro_batch = self.data_degree * self.micro_batch_size
        for step in _batched(packs, accumulation_steps * global_micro_batch):
            if len(step) < accumulation_steps * global_micro_batch:
                return
            micro_batches = [step[start:][:global_micro_batch] for start in range(0, len(step), global_micro_batch)]
            first = self.data_rank * self.micro_batch_size
            own = [
                self.token_batch(all_[first:][: self.micro_batch_size], self.lengths(all_)) for all_ in micro_batches
            ]
            yield Step(own, step[-1])

    def validation(self, packs: Iterable[Pack]) -> Iterator[TokenBatch]:
        """This rank's shard of all `packs`, one sequence per data rank at a time.

        Every rank gets equally many batches. Where sequences run out, the batch has no valid labels.
        """
        for group in _batched(packs, self.data_degree):
            if self.data_rank < len(group):
                yield self.token_batch([group[self.data_rank]])
            else:
                batch = self.token_batch(group[:1])
                yield replace(batch, labels_BS=torch.full_like(batch.labels_BS, IGNORED_LABEL))

    def lengths(self, packs: Iterable[Pack]) -> Iterator[int]:
        """Of what attention takes for one document."""
        for pack in packs:
            if self.document_mask:
                yield from (stop - start for start, stop in itertools.pairwise(pack.boundaries))
            else:
                yield pack.num_tokens

    def layout_of(self, packs: Sequence[Pack]) -> Layout:
        """Of a micro-batch: balanced depends on its documents, and takes one sequence."""
        if self.layout.name != "balanced" or not self.document_mask:
            return self.layout
        (pack,) = packs
        return replace(self.layout, documents=pack.boundaries)

    def _read(self, pack: Pack, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """[S] tokens and labels."""
        tokens_S = np.zeros(layout.local_length, np.int64)
        labels_S = np.full(layout.local_length, IGNORED_LABEL, np.int64)
        for run in layout.rank_runs(self.sequence_rank):
            num = max(0, min(run.stop, pack.length) - run.start)  # without the layout's padding
            local = slice(run.local_start, run.local_start + num)
            tokens_S[local], labels_S[local] = pack.read(run.start, run.start + num)
        return tokens_S, labels_S


def restarted(positions: Tensor, boundaries: tuple[int, ...]) -> Tensor:
    """Each position's distance from the start of its document. Padding counts as a document."""
    starts = torch.tensor(boundaries)
    return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]


def _batched(items: Iterable[Pack], size: int) -> Iterator[tuple[Pack, ...]]:
    """itertools.batched, which Python 3.11 lacks."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
