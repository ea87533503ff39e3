"""A micro-batch of this rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100  # torch's own ignore_index


@dataclass(frozen=True)
class TokenBatch:
    """What the model sees: this rank's part of some sequences, all int64."""

    tokens_BS: Tensor
    positions_1S: Tensor  # global ones, the same for every sequence
    labels_BS: Tensor  # the successor of each token, or IGNORED_LABEL

    def num_valid(self) -> Tensor:
        """Labels that count, a scalar in fp64."""
        return (self.labels_BS != IGNORED_LABEL).sum().double()

    def without_labels(self) -> TokenBatch:
        """The same tokens, none of which counts."""
        return replace(self, labels_BS=torch.full_like(self.labels_BS, IGNORED_LABEL))
