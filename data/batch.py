"""A micro-batch of this rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    def without_labels(self) -> TokenBatch:
        """The same tokens with all labels ignored."""
        return replace(self, labels_BS=torch.full_like(self.labels_BS, IGNORED_LABEL))
