"""Prompts to tokens under the ring: the prompt is read by all ranks together, then one token follows the other.

The last token of a prompt is the first that is decoded. So the ring reads the prompt without computing any logits, and
every rank computes those of each token, as all of them hold all weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.engine.base import Engine
from recipes.inference.sampling import GREEDY, Sampler, Sampling
from recipes.run.errors import RunFailed
from ring_attention.decoding import CachedAttention


class Decoder:
    """Decodes one sequence after the other. Every rank must make the same calls, and gets the same tokens.

    Args:
        engine: with the weights that decode, of stage 0.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine.attention is not None
        engine.deepspeed.eval()
        self._model: Any = engine.model
        self._device = engine.device
        self._cached = CachedAttention(engine.attention)
        self._tokens: list[int] = []
        self._num_new = 0
        self._rope_switch: int | None = self._model.rope_switch

    @property
    def cache_bytes(self) -> int:
        """Of keys and values on this rank."""
        return self._cached.num_bytes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Collection[int] = (),
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """The tokens that follow each prompt: at most `max_new_tokens`, and none from the first of `stop` on."""
        completions = []
        for index, prompt in enumerate(prompts):
            self.read(prompt, max_new_tokens)
            completions.append(list(self.decode(stop, Sampler(sampling, index))))
        return completions

    @torch.no_grad()
    def read(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Keep the keys and values of a prompt of at least one token, all but the last, for `decode`."""
        assert prompt, "a prompt has at least one token"
        self._tokens, self._num_new = list(prompt), max_new_tokens
        num_tokens = len(prompt) - 1
        self._cached.start(num_tokens, max_new_tokens)
        if num_tokens:
            layout, rank = self._cached.layout(num_tokens), self._cached.sequence_rank
            shard_1S = layout.shard(torch.tensor([self._tokens[:-1]]), rank, 1).to(self._device)
            self._model.hidden_states(shard_1S, layout.positions(rank)[None].to(self._device), self._cached)

    def decode(self, stop: Collection[int], sampler: Sampler) -> Iterator[int]:
        """The tokens that follow what was read, as they come; ends before a token of `stop`.

        Raises:
            RunFailed: on every rank, if logits are not numbers.
        """
        for num_before in range(self._num_new):
            logits_V = self._next_logits(self._num_new - num_before)
            if logits_V.isnan().any():
                raise RunFailed(
                    f"the logits after {len(self._tokens):,} tokens are NaN: use engine.dtype=bf16 or fp32 if this is "
                    "fp16, and look whether the model's training has diverged",
                    of_all_ranks=True,
                )
            token = int(self._cached.from_first_rank(sampler(logits_V)))
            if token in stop:
                return
            self._tokens.append(token)
            yield token

    @torch.no_grad()
    def _next_logits(self, num_left: int) -> Tensor:
        """[V]: of the token after all so far."""
        position = len(self._tokens) - 1
        if position == self._rope_switch and self._cached.max_position < position:
            self.read(self._tokens, num_left)  # the keys so far were rotated by other frequencies
        self._cached.step(position)
        token_11 = torch.tensor([self._tokens[-1:]], device=self._device)
        hidden_11E = self._model.hidden_states(token_11, torch.full_like(token_11, position), self._cached)
        return self._model.logits(hidden_11E)[0, 0]
