"""What a loop over blocks has so far: attention's output with its lse, and sums of gradients.

Between `ring` and `gather`, which loop, and `merge`. Both take over a first block that is the whole, and add to it in
place, and write the last result in the dtype of the input: one block or two cost no copy, and are rounded once.

Shapes: B batch, S tokens, H heads, D head size, E value head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.merge import merge


class RunningAttention:
    """out [B, S, H, E] and lse [B, H, S] over the keys seen so far.

    In between, out is fp32 (fp64 for fp64 input), as lse always is.
    """

    def __init__(self, q_BSHD: Tensor, v_BTKE: Tensor) -> None:
        self._shape = torch.Size((*q_BSHD.shape[:3], v_BTKE.shape[-1]))
        self._dtype, self._state_dtype = q_BSHD.dtype, torch.promote_types(q_BSHD.dtype, torch.float32)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the dtype of the input, and lse."""
        assert self._out is not None, "no keys were seen"
        assert self._lse is not None
        return self._out.to(self._dtype), self._lse

    def add(self, row: slice, queries: slice, out: Tensor, lse: Tensor, is_last: bool) -> None:
        """Merge in one block's result for some rows of the batch and some queries."""
        if self._out is None or self._lse is None:
            if out.shape == self._shape:
                self._out, self._lse = out, lse
                return
            self._out = out.new_zeros(self._shape, dtype=self._state_dtype)
            self._lse = lse.new_full((self._shape[0], self._shape[2], self._shape[1]), float("-inf"))
        dtype, target = self._dtype if is_last else self._state_dtype, self._out
        if target.dtype != dtype:
            target = out.new_empty(self._shape, dtype=dtype) if out.shape == self._shape else target.to(dtype)
        merge(target[row, queries], self._out[row, queries], self._lse[row, :, queries], out, lse)
        self._out = target


class RunningSum:
    """The sum of blocks' parts of a [B, S, H, D] tensor, which start as 0.

    In between, it is fp32 (fp64 for fp64 input).

    Args:
        dtype: of the result.
        start: what is there already, in fp32 (fp64): it is added to in place.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, start: Tensor | None = None) -> None:
        self._shape, self._dtype, self._total = shape, dtype, start
        self._state_dtype = torch.promote_types(dtype, torch.float32)

    @property
    def total(self) -> Tensor:
        """So far."""
        assert self._total is not None, "nothing was added"
        return self._total

    def result(self) -> Tensor:
        """In `dtype`."""
        return self.total.to(self._dtype)

    def add(self, row: slice, tokens: slice, part: Tensor, is_last: bool) -> None:
        if self._total is None:
            if part.shape == self._shape:
                self._total = part
                return
            self._total = part.new_zeros(self._shape, dtype=self._state_dtype)
        dtype = self._dtype if is_last else self._state_dtype
        if dtype == self._state_dtype:
            self._total = self._total.to(dtype)  # before, for PyTorch computes in the wider dtype of what it adds
        target = self._total
        if target.dtype != dtype:
            target = part.new_empty(self._shape, dtype=dtype) if part.shape == self._shape else target.to(dtype)
        torch.add(self._total[row, tokens], part, out=target[row, tokens])
        self._total = target
