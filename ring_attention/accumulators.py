"""What a loop over blocks has so far: attention's output with its lse, and sums of gradients.

Between `ring` and `gather`, which loop, and `merge`. Both take over a first block that is the whole, and add to it in
place, and write the last result in the dtype of the input: one block or two cost no copy, and are rounded once. Only
pieces that their last part does not write are copied to where they belong.

Shapes: B batch, S tokens, H heads, D head size, E value head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ring_attention.merge import add_up, merge


class OnlineSoftmaxAccumulator:
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


TimeBreakdown = list[tuple[slice, slice, Tensor]]  # rows, tokens, and [those rows, those tokens, H, D]
Interval = tuple[int, int]  # from, and up to


class GradientAccumulator:
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

    def result(self) -> Tensor:
        """In `dtype`."""
        assert self._total is not None, "nothing was added"
        if self._target is None or self._is_in_place:
            return self._total.to(self._dtype)
        return self._target().copy_(self._total)

    def add(self, row: slice, tokens: slice, part: Tensor, is_last: bool) -> None:
        """Add one part, which is kept if it is the first and the whole."""
        if self._total is None:
            if part.shape == self._shape:
                self._total = part
                return
            self._total = part.new_zeros(self._shape, dtype=self._state_dtype)
        if is_last and self._dtype != self._state_dtype:
            target = self._room(self._total, part.shape == self._shape)
        else:
            # before, for PyTorch computes in the wider dtype of what it adds
            target = self._total = self._total.to(self._state_dtype)
        torch.add(self._total[row, tokens], part, out=target[row, tokens])
        self._total = target

    def add_several(self, parts: TimeBreakdown, is_last: bool) -> None:
        """Add parts of all rows, which may overlap, in one pass; keeps none of them."""
        if not parts:
            return
        assert all(len(part) == self._shape[0] for _, _, part in parts), "parts are of all rows"
        edges = sorted({0, self._shape[1], *(edge for _, tokens, _ in parts for edge in (tokens.start, tokens.stop))})
        like = parts[0][2] if self._total is None else self._total
        if is_last and self._dtype != self._state_dtype:
            target = self._room(like, True)
        else:
            is_there = self._total is not None and self._total.dtype == self._state_dtype
            target = like if is_there else like.new_empty(self._shape, dtype=self._state_dtype)
        for start, stop in itertools.pairwise(edges):
            inside = [
                part[:, start - tokens.start : stop - tokens.start]
                for _, tokens, part in parts
                if tokens.start <= start and stop <= tokens.stop
            ]
            before = [] if self._total is None else [self._total[:, start:stop]]
            if before + inside:
                add_up(target[:, start:stop], before + inside)
            else:
                target[:, start:stop].zero_()
        self._total = target

    def _room(self, like: Tensor, all_is_written: bool) -> Tensor:
        """For the result, which holds the total unless all of it will be written; the total itself where it serves."""
        if self._target is None and self._total is not None and self._total.dtype == self._dtype:
            return self._total
        target = like.new_empty(self._shape, dtype=self._dtype) if self._target is None else self._target()
        self._is_in_place = True
        return target if all_is_written else target.copy_(like)


class PiecewiseSum:
    """As `GradientAccumulator`, in pieces, the first half of which are complete later than the others.

    A piece is some rows and a run of their tokens: what a kernel gives for just these is taken over as it is.

    Args:
        like: a tensor like the result.
        row_cuts, token_cuts: where one piece ends and the next starts.
    """

    def __init__(self, like: Tensor, row_cuts: tuple[int, ...] = (), token_cuts: tuple[int, ...] = ()) -> None:
        self._whole = _LazyTensor(like)
        row_runs = itertools.pairwise((0, *row_cuts, like.shape[0]))
        token_runs = itertools.pairwise((0, *token_cuts, like.shape[1]))
        self._regions = list(itertools.product(row_runs, token_runs))
        self._pieces = []
        for rows, tokens in self._regions:
            target = functools.partial(self._whole.region, rows, tokens) if len(self._regions) > 1 else None
            shape = torch.Size((rows[1] - rows[0], tokens[1] - tokens[0], *like.shape[2:]))
            self._pieces.append(GradientAccumulator(shape, like.dtype, target=target))

    def add(self, row: slice, tokens: slice, part: Tensor, is_last: bool, later: bool = False) -> None:
        """Add to the pieces that it meets.

        Args:
            is_last: whether nothing more comes to those that are complete `later`, or to the others.
        """
        for number, (piece, region) in enumerate(zip(self._pieces, self._regions, strict=True)):
            if inside := _within(region, row, tokens, part):
                piece.add(*inside, is_last and later == (number < len(self._pieces) // 2))

    def add_several(self, parts: TimeBreakdown, is_last: bool) -> None:
        """As `GradientAccumulator`'s; each is of all rows of the pieces that it meets."""
        for piece, region in zip(self._pieces, self._regions, strict=True):
            piece.add_several([inside for part in parts if (inside := _within(region, *part))], is_last)

    def result(self) -> Tensor:
        results = [piece.result() for piece in self._pieces]
        return results[0] if self._whole.tensor is None else self._whole.tensor


def _within(
    region: tuple[Interval, Interval], row: slice, tokens: slice, part: Tensor
) -> tuple[slice, slice, Tensor] | None:
    """What a region has of a part, numbered as in the region."""
    own, others = [], []
    for (start, stop), taken, size in zip(region, (row, tokens), part.shape[:2], strict=True):
        offset = taken.start or 0  # a slice of all rows has none
        first, last = max(start, offset), min(stop, offset + size)
        if first >= last and size:  # of an empty batch, all has a part
            return None
        own.append(slice(first - start, last - start))
        others.append(slice(first - offset, last - offset))
    return own[0], own[1], part[others[0], others[1]]


class _LazyTensor:
    """Made when first asked for. Knows nothing of who asks: in a cycle with them it would outlive its layer, until
    Python collects garbage.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self.tensor = like, None

    def region(self, rows: Interval, tokens: Interval) -> Tensor:
        if self.tensor is None:
            self.tensor = torch.empty_like(self._like, memory_format=torch.contiguous_format)
        return self.tensor[slice(*rows), slice(*tokens)]
