"""Sums over attention tiles: the output with its lse, by the online softmax, and gradients.

State is fp32 (fp64 for fp64 input). The last addend's sum is written in the input's dtype, so each number is rounded
once beyond its kernels. A first addend that covers the whole result is taken over without a copy.

Shapes: B batch, S tokens, H heads, D head size, E value head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ring_attention.backward_schedule import GradientPiece
from ring_attention.merge import add_up, merge
from ring_attention.sinks import join_sinks

Addend = tuple[slice, slice, Tensor]  # rows, tokens, and values [those rows, those tokens, H, D]


class _Tile(NamedTuple):
    rows: slice
    queries: slice
    out_BSHE: Tensor
    lse_BHS: Tensor


class OnlineSoftmaxAccumulator:
    """out [B, S, H, E] and lse [B, H, S] over the keys seen so far. Sinks [H] join the result, in the dtype of lse.

    Tiles of the same queries are merged two at a time: the state is fp32, and moving it is most of what a merge takes.
    """

    def __init__(self, q_BSHD: Tensor, v_BTKE: Tensor, sinks_H: Tensor | None = None) -> None:
        self._shape = torch.Size((*q_BSHD.shape[:3], v_BTKE.shape[-1]))
        self._dtype, self._state_dtype = q_BSHD.dtype, torch.promote_types(q_BSHD.dtype, torch.float32)
        self._sinks_H = sinks_H
        self._state: tuple[Tensor, Tensor] | None = None  # out and lse
        self._waiting: _Tile | None = None

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the input's dtype, and lse in fp32 (fp64). To be called once, after the last tile."""
        assert self._state is not None, "no keys were seen"
        assert self._waiting is None, "no tile was the last"
        out, lse = self._state if self._sinks_H is None else join_sinks(*self._state, self._sinks_H)
        return out.to(self._dtype), lse

    def add(self, rows: slice, queries: slice, out: Tensor, lse: Tensor, is_last: bool) -> None:
        """Merge in one tile's result, or keep it until the next one's."""
        if self._state is None and self._waiting is None and out.shape == self._shape:
            self._state = out, lse
            return
        tiles = [_Tile(rows, queries, out, lse)]
        if self._waiting is not None:
            if self._waiting[:2] == (rows, queries):
                tiles.insert(0, self._waiting)
            else:
                self._merge([self._waiting], is_last=False)
            self._waiting = None
        if len(tiles) == 1 and not is_last:
            self._waiting = tiles[0]
        else:
            self._merge(tiles, is_last)

    def _merge(self, tiles: list[_Tile], is_last: bool) -> None:
        rows, queries, out, lse = tiles[0]
        if self._state is None:
            batch, tokens, heads, _ = self._shape
            zeros = out.new_zeros(self._shape, dtype=self._state_dtype)
            self._state = zeros, lse.new_full((batch, heads, tokens), float("-inf"))
        old_out, old_lse = self._state
        # sinks are yet to join, and `result` rounds after that
        dtype = self._dtype if is_last and self._sinks_H is None else self._state_dtype
        target = old_out
        if target.dtype != dtype:
            target = out.new_empty(self._shape, dtype=dtype) if out.shape == self._shape else target.to(dtype)
        results = [tile[2:] for tile in tiles]
        if out.shape == self._shape:  # slices cost the host
            merge(target, old_out, old_lse, results)
        else:
            merge(target[rows, queries], old_out[rows, queries], old_lse[rows, :, queries], results)
        self._state = target, old_lse


class GradientAccumulator:
    """The sum of tiles' gradients, [B, S, H, D].

    Args:
        pieces: get their last addends in different steps (`backward_schedule`), and do not overlap; by default the
            whole is one that ends in step 0.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, pieces: tuple[GradientPiece, ...] | None = None
    ) -> None:
        self._shape, self._dtype = torch.Size(shape), dtype
        self._state_dtype = torch.promote_types(dtype, torch.float32)
        self._is_rounded = dtype != self._state_dtype
        self._pieces = pieces or (GradientPiece((0, shape[0]), (0, shape[1]), 0),)
        sizes = [[stop - start for start, stop in (piece.rows, piece.tokens)] for piece in self._pieces]
        self._shapes = [torch.Size((*rows_and_tokens, *shape[2:])) for rows_and_tokens in sizes]
        self._sums: list[Tensor | None] = [None] * len(self._pieces)
        self._is_written = [False] * len(self._pieces)  # to the result
        self._result: Tensor | None = None  # if there are several pieces

    def add(self, rows: slice, tokens: slice, values: Tensor, ends: int | None = None) -> None:
        """Add one tile's gradient, which may be taken over: the last addend of step `ends`, unless that is None."""
        for index, piece in enumerate(self._pieces):
            addend = self._within(piece, (rows, tokens, values))
            if addend is None:
                continue
            *corner, part = addend
            total, shape = self._sums[index], self._shapes[index]
            if total is None and part.shape == shape:
                self._sums[index] = part
            elif self._is_rounded and ends is not None and ends == piece.last_step and part.shape[0] == shape[0]:
                self._add_in_one_pass(index, [addend], is_last=True)
            else:
                if total is None:
                    total = part.new_zeros(shape, dtype=self._state_dtype)
                # converted first: PyTorch computes in the wider dtype of the two
                total = self._sums[index] = total.to(self._state_dtype)
                total[*corner].add_(part)

    def add_together(self, addends: list[Addend], ends: int) -> None:
        """Add the last addends of step `ends` in one pass, and keep none of them.

        They may overlap. Each has all rows of the pieces it meets.
        """
        for index, piece in enumerate(self._pieces):
            within = [part for addend in addends if (part := self._within(piece, addend)) is not None]
            if within:
                self._add_in_one_pass(index, within, is_last=self._is_rounded and ends == piece.last_step)

    def partial_sum(self) -> Tensor:
        """The sum of a single piece so far, in the dtype that it has."""
        (total,) = self._sums
        assert total is not None, "nothing was added"
        return total

    def result(self) -> Tensor:
        """The sum in `dtype`."""
        if len(self._pieces) == 1:
            return self.partial_sum().to(self._dtype)
        for index, total in enumerate(self._sums):
            assert total is not None, "nothing was added"
            if not self._is_written[index]:
                self._place_of(index, total).copy_(total)
        assert self._result is not None
        return self._result

    def _add_in_one_pass(self, index: int, addends: list[Addend], is_last: bool) -> None:
        total, shape = self._sums[index], self._shapes[index]
        if is_last:
            target = self._place_of(index, addends[0][2])
            self._is_written[index] = True
        elif total is not None and total.dtype == self._state_dtype:
            target = total
        else:
            target = addends[0][2].new_empty(shape, dtype=self._state_dtype)
        edges = {0, shape[1], *(edge for _, tokens, _ in addends for edge in (tokens.start, tokens.stop))}
        for start, stop in itertools.pairwise(sorted(edges)):
            parts = [
                _tokens(values, start - tokens.start, stop - tokens.start)
                for _, tokens, values in addends
                if tokens.start <= start and stop <= tokens.stop
            ]
            if total is not None and (parts or target is not total):
                parts.insert(0, _tokens(total, start, stop))
            if parts:
                add_up(_tokens(target, start, stop), parts)
            elif total is None:
                target[:, start:stop].zero_()
        self._sums[index] = target

    def _place_of(self, index: int, like: Tensor) -> Tensor:
        """Where the result of a piece belongs: in the result, or in the sum itself if its dtype allows."""
        total, piece = self._sums[index], self._pieces[index]
        if len(self._pieces) == 1 and total is not None and total.dtype == self._dtype:
            return total
        if len(self._pieces) == 1:
            return like.new_empty(self._shape, dtype=self._dtype)
        if self._result is None:
            self._result = like.new_empty(self._shape, dtype=self._dtype)
        return self._result[slice(*piece.rows), slice(*piece.tokens)]

    def _within(self, piece: GradientPiece, addend: Addend) -> Addend | None:
        """The part of an addend in a piece, with rows and tokens counted from the piece's corner."""
        if len(self._pieces) == 1:
            return addend
        inner, outer = [], []
        for (start, stop), taken, size in zip(piece[:2], addend[:2], addend[2].shape[:2], strict=True):
            first = taken.start or 0  # a slice of all rows has none
            low, high = max(start, first), min(stop, first + size)
            if low >= high:
                return None
            inner.append(slice(low - start, high - start))
            outer.append(slice(low - first, high - first))
        return inner[0], inner[1], addend[2][outer[0], outer[1]]


def _tokens(x_BSHD: Tensor, start: int, stop: int) -> Tensor:
    """All tokens are the tensor itself: a slice costs the host 3 us."""
    return x_BSHD if stop - start == x_BSHD.shape[1] else x_BSHD[:, start:stop]
