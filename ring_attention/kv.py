"""Keys and values, or their gradients, of some tokens of one rank, as one message.

Shapes: B batch, T tokens, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention.layout import Spans, num_tokens, slice_within


class KeysValues(NamedTuple):
    """k [B, T, K, D] and v [B, T, K, E]. If `message` is set, they are views of that contiguous vector.

    Args:
        spans: which of their owner's local tokens these are.
    """

    k_BTKD: Tensor
    v_BTKE: Tensor
    spans: Spans
    message: Tensor | None = None

    @classmethod
    def of_parts(cls, k_BTKD: Tensor, v_BTKE: Tensor) -> KeysValues:
        """All keys and values of a rank. They already are one message if v lies right after k in memory."""
        adjacent = (
            k_BTKD.is_contiguous()
            and v_BTKE.is_contiguous()
            and k_BTKD.untyped_storage().data_ptr() == v_BTKE.untyped_storage().data_ptr()
            and v_BTKE.storage_offset() == k_BTKD.storage_offset() + k_BTKD.numel()
        )
        message = k_BTKD.as_strided((k_BTKD.numel() + v_BTKE.numel(),), (1,)) if adjacent else None
        return cls(k_BTKD, v_BTKE, ((0, k_BTKD.shape[1]),), message)

    @classmethod
    def of_message(cls, message: Tensor, shapes: Sequence[torch.Size], spans: Spans) -> KeysValues:
        """Views of a message, given the shapes of k and v."""
        k, v = message.split([shape.numel() for shape in shapes])
        return cls(k.view(shapes[0]), v.view(shapes[1]), spans, message)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The message, or the two contiguous vectors that form one."""
        return (self.k_BTKD.view(-1), self.v_BTKE.view(-1)) if self.message is None else (self.message,)

    def numel(self, spans: Spans) -> int:
        """The size of a message with these tokens."""
        return sum(x.numel() // x.shape[1] for x in (self.k_BTKD, self.v_BTKE)) * num_tokens(spans)

    def view(self, message: Tensor, spans: Spans) -> KeysValues:
        """A message with these tokens; other dims are as here."""
        shapes = [torch.Size((x.shape[0], num_tokens(spans), *x.shape[2:])) for x in (self.k_BTKD, self.v_BTKE)]
        return self.of_message(message, shapes, spans)

    def empty(self, spans: Spans) -> KeysValues:
        """A new message with these tokens, not initialised."""
        return self.view(self.k_BTKD.new_empty(self.numel(spans)), spans)

    def take(self, spans: Spans) -> KeysValues:
        """Some of these tokens as a message: a copy, unless this is one with just these tokens."""
        if spans == self.spans and self.message is not None:
            return self
        taken = self.empty(spans)
        for start, stop in spans:
            source, target = slice_within(self.spans, start, stop), slice_within(spans, start, stop)
            taken.k_BTKD[:, target] = self.k_BTKD[:, source]
            taken.v_BTKE[:, target] = self.v_BTKE[:, source]
        return taken
