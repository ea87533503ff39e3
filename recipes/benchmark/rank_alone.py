"""One rank of a ring on a machine of its own: its tiles and merges cost what they do on a ring, messages nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels import AttentionKernel, Scores
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.mask import Mask
from ring_attention.ring import Ring
from ring_attention.transport import Transfer


class RankAlone(Ring):
    """Its messages are its own keys and values, or in one exchange random numbers. No gradients travel."""

    def post_keys(self, own: KeysValues, here: KeysValues | None, number: int, direction: str) -> Any:
        return None, own if number + 1 < len(self.steps) else None

    def post_gradients(self, like: KeysValues, step: Any, number: int, gradients: KeysValues | None) -> Any:
        return None, None if step.gradient_return is None else like.empty(step.gradient_return.spans)


class _NoMessages:
    """A transport that sends nothing. What arrives is the same for all layers, and finite: NaN would save power."""

    def __init__(self, ring_rank: int) -> None:
        self.ring_rank = ring_rank
        self.graphs: dict[Hashable, Any] = {}
        self.in_graph = contextlib.nullcontext
        self.receive_buffer = functools.cache(self._receive_buffer)

    def _receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(numel, dtype=dtype, device=device)

    def watched(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def post(self, *messages: Any) -> Transfer:
        return Transfer([], [])


def rank_alone(layout: Layout, mask: Mask, ring_rank: int, kernel: AttentionKernel, scores: Scores) -> Ring:
    """To be given to `attend_over_ring`; its outputs are wrong."""
    transport: Any = _NoMessages(ring_rank)
    return RankAlone(layout, mask, transport, kernel, scores)
