"""Keys and values, or their gradients, of some tokens of one rank, as one message.

Shapes: B batch, T tokens, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_attention.layout import Spans, num_tokens, offset


@dataclass(frozen=True)
class KeysValues:
    """k [B, T, K, D] and v [B, T, K, E]. If `message` is set, they are views of that contiguous vector."""

    k_BTKD: Tensor
    v_BTKE: Tensor
    message: Tensor | None = None

    @classmethod
    def of_parts(cls, k_BTKD: Tensor, v_BTKE: Tensor) -> KeysValues:
        """k and v as given. They already are one message if v lies right after k in memory."""
        adjacent = (
            k_BTKD.is_contiguous()
            and v_BTKE.is_contiguous()
            and k_BTKD.untyped_storage().data_ptr() == v_BTKE.untyped_storage().data_ptr()
            and v_BTKE.storage_offset() == k_BTKD.storage_offset() + k_BTKD.numel()
        )
        message = k_BTKD.as_strided((k_BTKD.numel() + v_BTKE.numel(),), (1,)) if adjacent else None
        return cls(k_BTKD, v_BTKE, message)

    @classmethod
    def of_message(cls, message: Tensor, shapes: Sequence[torch.Size]) -> KeysValues:
        """Views of a message, given the shapes of k and v."""
        k, v = (
            part.view(shape) for part, shape in zip(message.split([s.numel() for s in shapes]), shapes, strict=True)
        )
        return cls(k, v, message)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The message, or the two contiguous vectors that form one."""
        return (self.k_BTKD.view(-1), self.v_BTKE.view(-1)) if self.message is None else (self.message,)

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        return self.k_BTKD.shape, self.v_BTKE.shape

    def shapes_of(self, tokens: int) -> list[torch.Size]:
        """The shapes of k and v with so many tokens."""
        return [torch.Size((shape[0], tokens, *shape[2:])) for shape in self.shapes]

    def numel(self, tokens: int) -> int:
        """The size of a message with so many tokens."""
        return sum(shape.numel() for shape in self.shapes_of(tokens))

    def empty(self, tokens: int, dtype: torch.dtype | None = None) -> KeysValues:
        """A new message with so many tokens, not initialised."""
        return self.of_message(self.k_BTKD.new_empty(self.numel(tokens), dtype=dtype), self.shapes_of(tokens))

    def take(self, held: Spans, wanted: Spans) -> KeysValues:
        """The `wanted` ones of the `held` tokens as a message: a copy, unless this is one with just these tokens."""
        if wanted == held and self.message is not None:
            return self
        taken, position = self.empty(num_tokens(wanted)), 0
        for start, stop in wanted:
            source, target = offset(held, start), slice(position, position + stop - start)
            taken.k_BTKD[:, target] = self.k_BTKD[:, source : source + stop - start]
            taken.v_BTKE[:, target] = self.v_BTKE[:, source : source + stop - start]
            position += stop - start
        return taken
