"""The next token from logits: the most likely one, or drawn. Shapes: V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature, top_k and top_p apply in this order, as in transformers.

    Args:
        temperature: divides the logits; 0 is greedy, and the others have no effect.
        top_k: keep so many most likely tokens; None is all.
        top_p: keep the fewest most likely tokens whose probabilities add up to this; 1 is all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """[V] in fp32, not greedy."""
        logits_V = (logits_V.float() - logits_V.max()) / self.temperature  # a small temperature overflows otherwise
        if self.top_k is not None and self.top_k < len(logits_V):
            smallest_kept = logits_V.topk(self.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < smallest_kept, float("-inf"))
        probabilities_V = logits_V.softmax(0)
        if self.top_p < 1:
            ordered, order = probabilities_V.sort(descending=True)
            is_kept = ordered.cumsum(0) - ordered < self.top_p  # what lies before does not suffice
            probabilities_V = torch.zeros_like(probabilities_V).index_copy(0, order, ordered * is_kept)
        return probabilities_V / probabilities_V.sum()


GREEDY = Sampling()


class Sampler:
    """Chooses the tokens of one text.

    Args:
        index: of the text among those of one seed: each has random numbers of its own.
    """

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed((sampling.seed << 20) + index)  # on the CPU: equal everywhere

    def __call__(self, logits_V: Tensor) -> Tensor:
        """A token, an int64 scalar on the logits' device. Among equally likely ones greedy takes the first."""
        if not self._sampling.temperature:
            return logits_V.argmax()
        cumulative_V = self._sampling.probabilities(logits_V).double().cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64).to(logits_V.device)
        # the first token whose cumulative probability exceeds the number; it has a probability itself
        return torch.searchsorted(cumulative_V, drawn * cumulative_V[-1], right=True).clamp(max=len(logits_V) - 1)
