"""What a loop over blocks has so far: attention's output with its lse, and sums of gradients.

Between `ring` and `gather`, which loop, and `merge`. Both take over a first block that is the whole, and add to it in
place, and write the last result in the dtype of the input: one block or two cost no copy, and are rounded once.

Shapes: B batch, S tokens, H heads, D head size, E value head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ring_attention.merge import add_up, merge


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


Parts = list[tuple[slice, Tensor]]  # tokens, and [B, those tokens, H, D]


class RunningSum:
    """The sum of blocks' parts of a [B, S, H, D] tensor, which start as 0.

    In between, it is fp32 (fp64 for fp64 input).

    Args:
        dtype: of the result.
        start: what is there already, in fp32 (fp64): it is added to in place.
        target: gives where the result shall be, once it is time; wherever it happens to be if not given.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        start: Tensor | None = None,
        target: Callable[[], Tensor] | None = None,
    ) -> None:
        self._shape, self._dtype, self._total, self._target = shape, dtype, start, target
        self._is_in_place = False  # the total is where the result shall be
        self._state_dtype = torch.promote_types(dtype, torch.float32)

    @property
    def total(self) -> Tensor:
        """So far."""
        assert self._total is not None, "nothing was added"
        return self._total

    def result(self) -> Tensor:
        """In `dtype`."""
        if self._target is None or self._is_in_place:
            return self.total.to(self._dtype)
        return self._target().copy_(self.total)

    def add(self, row: slice, tokens: slice, part: Tensor, is_last: bool) -> None:
        if self._total is None:
            if part.shape == self._shape:
                self._total = part
                return
            self._total = part.new_zeros(self._shape, dtype=self._state_dtype)
        if is_last and self._dtype != self._state_dtype:
            target = self._room(part.shape == self._shape)
        else:
            # before, for PyTorch computes in the wider dtype of what it adds
            target = self._total = self._total.to(self._state_dtype)
        torch.add(self._total[row, tokens], part, out=target[row, tokens])
        self._total = target

    def add_several(self, parts: Parts, is_last: bool) -> None:
        """Add parts of all rows, which may overlap; the last ones are rounded once, together."""
        if not is_last or self._dtype == self._state_dtype:
            for tokens, part in parts:
                self.add(slice(None), tokens, part, False)
            return
        if not parts:
            return
        edges = sorted({0, self._shape[1], *(edge for tokens, _ in parts for edge in (tokens.start, tokens.stop))})
        target = self._room(True)
        for start, stop in itertools.pairwise(edges):
            inside = [
                part[:, start - tokens.start : stop - tokens.start]
                for tokens, part in parts
                if tokens.start <= start and stop <= tokens.stop
            ]
            add_up(target[:, start:stop], [self.total[:, start:stop], *inside])
        self._total = target

    def _room(self, all_is_written: bool) -> Tensor:
        """For the result, which holds the total unless all of it will be written; the total itself where it serves."""
        if self._target is None and self.total.dtype == self._dtype:
            return self.total
        target = self.total.new_empty(self._shape, dtype=self._dtype) if self._target is None else self._target()
        self._is_in_place = True
        return target if all_is_written else target.copy_(self.total)


class PiecewiseSum:
    """As `RunningSum`, of dq, whose pieces, runs of tokens, are complete at different times.

    Args:
        like: a tensor like the result.
        cuts: where one piece ends and the next starts.
    """

    def __init__(self, like: Tensor, cuts: tuple[int, ...]) -> None:
        self._whole = _LazyTensor(like)
        self._runs = list(itertools.pairwise((0, *cuts, like.shape[1])))
        self._pieces = []
        for start, stop in self._runs:
            target = functools.partial(self._whole.tokens, start, stop) if cuts else None
            shape = torch.Size((like.shape[0], stop - start, *like.shape[2:]))
            self._pieces.append(RunningSum(shape, like.dtype, target=target))

    def add(self, row: slice, tokens: slice, part: Tensor, is_last: tuple[bool, ...]) -> None:
        """Add to the pieces that `tokens` are in; `is_last` says of each whether nothing more comes."""
        for (start, stop), piece, piece_ends in zip(self._runs, self._pieces, is_last, strict=True):
            first, last = max(start, tokens.start), min(stop, tokens.stop)
            if first < last:
                inside = part[:, first - tokens.start : last - tokens.start]
                piece.add(row, slice(first - start, last - start), inside, piece_ends)

    def result(self) -> Tensor:
        results = [piece.result() for piece in self._pieces]
        return results[0] if self._whole.tensor is None else self._whole.tensor


class _LazyTensor:
    """Made when first asked for. Knows nothing of who asks: in a cycle with them it would outlive its layer, until
    Python collects garbage.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self.tensor = like, None

    def tokens(self, start: int, stop: int) -> Tensor:
        if self.tensor is None:
            self.tensor = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        return self.tensor[:, start:stop]
