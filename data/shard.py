"""Which sequences a data rank gets, and which of their tokens a sequence rank holds.

A step takes sequences in the corpus's order: for each micro-batch and each data rank, `micro_batch_size` of them. The
order does not depend on the number of ranks that share a sequence, so neither does the training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ring_attention.layout import Layout

IGNORED_LABEL = -100  # torch's default ignore_index


@dataclass(frozen=True)
class TokenBatch:
    """This rank's shard of B sequences; all int64."""

    tokens_BS: Tensor
    positions_1S: Tensor  # global positions, the same for every sequence
    labels_BS: Tensor  # the token that follows each token, or IGNORED_LABEL

    def num_valid(self) -> Tensor:
        """The number of labels other than IGNORED_LABEL, a scalar in fp64."""
        return (self.labels_BS != IGNORED_LABEL).sum().double()


@dataclass(frozen=True)
class Sharder:
    """This rank's coordinates, and the shape of a step."""

    layout: Layout
    sequence_rank: int
    data_rank: int
    data_degree: int
    micro_batch_size: int

    def token_batch(self, sequences: np.ndarray) -> TokenBatch:
        """This rank's shard of full sequences [B, L+1]; padding gets an ignored label."""
        full = torch.from_numpy(sequences.astype(np.int64))
        return TokenBatch(
            self.layout.shard(full[:, :-1], self.sequence_rank, dim=1),
            self.layout.positions(self.sequence_rank).unsqueeze(0),
            self.layout.shard(full[:, 1:], self.sequence_rank, dim=1, pad_value=IGNORED_LABEL),
        )

    def steps(self, sequences: Iterable[np.ndarray], accumulation_steps: int) -> Iterator[list[TokenBatch]]:
        """This rank's micro-batches of each step; an incomplete last step is dropped."""
        global_micro_batch = self.data_degree * self.micro_batch_size
        first = self.data_rank * self.micro_batch_size
        for step in _batched(sequences, accumulation_steps * global_micro_batch):
            if len(step) < accumulation_steps * global_micro_batch:
                return
            yield [
                self.token_batch(np.stack(step[start + first : start + first + self.micro_batch_size]))
                for start in range(0, len(step), global_micro_batch)
            ]

    def validation(self, sequences: Iterable[np.ndarray]) -> Iterator[TokenBatch]:
        """This rank's shard of all `sequences`, one sequence per data rank at a time.

        Every rank gets equally many batches. Where sequences run out, the batch has no valid labels.
        """
        for group in _batched(sequences, self.data_degree):
            if self.data_rank < len(group):
                yield self.token_batch(group[self.data_rank][None])
            else:
                batch = self.token_batch(group[0][None])
                yield replace(batch, labels_BS=torch.full_like(batch.labels_BS, IGNORED_LABEL))


def _batched(sequences: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """itertools.batched, which Python 3.11 lacks."""
    iterator = iter(sequences)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
