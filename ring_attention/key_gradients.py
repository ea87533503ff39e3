"""dK and dV in the ring's backward pass: those that a rank computes for others, and the sums of its own.

Each step's dK,dV go to their owner, which adds them. They travel in one of two forms:

- Rounded to the input's dtype. Every kernel can, for any mask.
- As the kernel's own fp32 sums, where the kernel has such (flash-attn-4 with grouped heads) and all ranks cut keys at
  its tiles. Nothing is rounded before the owner has the sum of all ranks, and no step launches the kernels that round.
  A message is twice as long. Other rings (ring-flash-attention, picotron) always send fp32.

Shapes: B batch, T local tokens, N tokens of a step, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ring_attention.accumulators import GradientAccumulator
from ring_attention.attend import TileGradients
from ring_attention.backward_schedule import BackwardSchedule, BackwardStep, GradientPiece
from ring_attention.kernels import AttentionKernel, DqSum
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout, Spans, num_tokens, slice_within
from ring_attention.mask import CAUSAL, FULL, Mask
from ring_attention.merge import add_up
from ring_attention.trace import profiler_range


class KeyGradients(ABC):
    """dK and dV of one backward pass.

    Args:
        like: own keys and values, in the dtype of messages.
    """

    def __init__(self, like: KeysValues) -> None:
        self.like = like
        self._returned: dict[int, KeysValues] = {}  # dK,dV of own tokens, by the step that computed them

    @abstractmethod
    def start(self, step: BackwardStep, number: int, is_local: bool) -> Tensor | None:
        """Begin a step. Returns what the kernel's calls are to add to (`DqSum.add`), if they can."""

    @abstractmethod
    def add(self, tile: TileGradients, ends: int | None) -> None:
        """Add one call's gradients: the last of step `ends`, unless that is None."""

    @abstractmethod
    def end(self, step: BackwardStep, number: int, is_local: bool) -> KeysValues | None:
        """Add what was returned to own gradients, and return what to send to the step's source."""

    def expect(self, number: int, arriving: KeysValues) -> None:
        """Own gradients that another rank computed in this step. They are there once the transfer has ended."""
        self._returned[number] = arriving

    @abstractmethod
    def result(self) -> tuple[Tensor, Tensor]:
        """(dk [B, T, K, D], dv [B, T, K, E]) in the input's dtype."""


class RoundedKeyGradients(KeyGradients):
    """Each step's dK,dV are rounded once, and their owner sums them in fp32."""

    def __init__(self, kv: KeysValues, schedule: BackwardSchedule) -> None:
        super().__init__(kv)
        own_dk, own_dv = (GradientAccumulator(x.shape, x.dtype, schedule.own_pieces) for x in (kv.k_BTKD, kv.v_BTKE))
        self._own, self._step = (own_dk, own_dv), (own_dk, own_dv)

    def start(self, step: BackwardStep, number: int, is_local: bool) -> None:
        if number == 0:
            return
        dtype = self.like.k_BTKD.dtype
        if is_local:  # own ones that were held back are not rounded yet
            dtype = sum_dtype(dtype)
        num_rows, length = step.compute.rows[1] - step.compute.rows[0], num_tokens(step.gradients)
        pieces = (GradientPiece((0, num_rows), (0, length), number),)
        dk, dv = (
            GradientAccumulator((num_rows, length, *x.shape[2:]), dtype, pieces)
            for x in (self.like.k_BTKD, self.like.v_BTKE)
        )
        self._step = dk, dv

    def add(self, tile: TileGradients, ends: int | None) -> None:
        dk, dv = self._step
        assert tile.dk is not None
        assert tile.dv is not None
        dk.add(tile.rows, tile.keys, tile.dk, ends)
        dv.add(tile.rows, tile.keys, tile.dv, ends)

    def end(self, step: BackwardStep, number: int, is_local: bool) -> KeysValues | None:
        dk, dv = self._step
        self._step = self._own  # a step's memory is free once its message is sent
        if number in step.add:
            self._returned[number] = KeysValues(dk.partial_sum(), dv.partial_sum(), step.gradients)
        if step.add:
            self._add_returned([self._returned.pop(source) for source in step.add], number)
        if not step.gradients or is_local:
            return None
        return KeysValues(dk.result().contiguous(), dv.result().contiguous(), step.gradients)

    def _add_returned(self, returned: list[KeysValues], number: int) -> None:
        runs = [
            (slice(0, len(kv.k_BTKD)), slice(*span), kv, slice_within(kv.spans, *span))
            for kv in returned
            for span in kv.spans
        ]
        own_dk, own_dv = self._own
        with profiler_range("merge"):
            own_dk.add_together([(rows, tokens, kv.k_BTKD[:, run]) for rows, tokens, kv, run in runs], number)
            own_dv.add_together([(rows, tokens, kv.v_BTKE[:, run]) for rows, tokens, kv, run in runs], number)

    def result(self) -> tuple[Tensor, Tensor]:
        own_dk, own_dv = self._own
        return own_dk.result(), own_dv.result()


class SummedKeyGradients(KeyGradients):
    """The kernel adds a step's dK,dV to fp32 sums [2, B, K, N * D] in an order of its own, in which they travel.

    Args:
        scale: of the scores, by which the kernel leaves dK to be multiplied.
    """

    def __init__(self, kv: KeysValues, dq_sum: DqSum, scale: float) -> None:
        self._kv, self._dq_sum, self._scale = kv, dq_sum, scale
        self._own = self._step = self._zeros(kv.spans)
        super().__init__(self._message(self._own, kv.spans))

    def start(self, step: BackwardStep, number: int, is_local: bool) -> Tensor:
        self._step = self._own if is_local else self._zeros(step.gradients)
        return self._step

    def add(self, tile: TileGradients, ends: int | None) -> None:
        assert tile.dk is None, "the kernel adds all of them"

    def end(self, step: BackwardStep, number: int, is_local: bool) -> KeysValues | None:
        sums, self._step = self._step, self._own
        # what was held back the kernel has added by itself
        returned = [self._returned.pop(source) for source in step.add if source != number]
        if len({kv.spans for kv in returned}) == 1:
            self._add_returned(returned)  # in one pass
        else:
            for kv in returned:
                self._add_returned([kv])
        return None if is_local or not step.gradients else self._message(sums, step.gradients)

    def _add_returned(self, returned: list[KeysValues]) -> None:
        """All of the same tokens."""
        spans, head_dim, values = returned[0].spans, self._kv.k_BTKD.shape[3], []
        for kv in returned:
            assert kv.message is not None
            values.append(kv.message.view(*self._own.shape[:3], -1))
        with profiler_range("merge"):
            for span in spans:
                run = slice_within(spans, *span)
                total = _tokens(self._own, slice(*span), head_dim)
                add_up(total, [total, *(_tokens(sums, run, head_dim) for sums in values)])

    def result(self) -> tuple[Tensor, Tensor]:
        return self._dq_sum.round_keys(self._own, self._kv.k_BTKD, self._scale)

    def _zeros(self, spans: Spans) -> Tensor:
        batch, _, num_heads, head_dim = self._kv.k_BTKD.shape
        shape = 2, batch, num_heads, num_tokens(spans) * head_dim
        return self._kv.k_BTKD.new_zeros(shape, dtype=sum_dtype(self._kv.k_BTKD.dtype))

    def _message(self, sums: Tensor, spans: Spans) -> KeysValues:
        batch, _, num_heads, head_dim = self._kv.k_BTKD.shape
        shape = torch.Size((batch, num_tokens(spans), num_heads, head_dim))
        return KeysValues.of_message(sums.view(-1), (shape, shape), spans)


def _tokens(sums_2BKN: Tensor, tokens: slice, head_dim: int) -> Tensor:
    """[2 * B, T, K, D], a view. `add_up` compiles a kernel for each number of its third dim."""
    numbers = sums_2BKN[..., tokens.start * head_dim : tokens.stop * head_dim]
    return numbers.unflatten(3, (-1, head_dim)).flatten(0, 1).transpose(1, 2)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


def cuts_at_chunks(layout: Layout, mask: Mask) -> bool:
    """Whether attention tiles begin and end with chunks, or halves of the ring rank's tokens, on all ranks."""
    return layout.name != "balanced" and mask in (CAUSAL, FULL)


def sums_travel(kernel: AttentionKernel, layout: Layout, mask: Mask, q_BSHD: Tensor, kv: KeysValues) -> bool:
    """Whether dK,dV travel as the kernel's sums: the same on all ranks, whose calls then all cut keys at its tiles."""
    if not kernel.sums_keys or not cuts_at_chunks(layout, mask):
        return False
    tile = kernel.key_sum_tile(q_BSHD, kv.k_BTKD, kv.v_BTKE)
    return tile is not None and layout.ring_length % (2 * tile) == 0  # halves are the least that a rank computes
