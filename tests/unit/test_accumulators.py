"""The online softmax over tiles, and sums of gradients: any order, any parts, rounded once, without needless copies."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from ring_attention import accumulators
from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator
from ring_attention.backward_schedule import GradientPiece

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
EVERYTHING, FIRST, LAST = slice(None), slice(0, 3), slice(3, 6)


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[2, 6, 3, 4] and two halves of its tokens."""
    whole, half, other = (torch.randn(2, n, 3, 4, dtype=torch.float64).to(dtype) for n in (6, 3, 3))
    return whole, half, other


def assert_rounded_once(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Half a unit in the last place; the rest is the sum's own rounding in fp32 (fp64) where terms cancel."""
    assert got.dtype == dtype
    rtol, atol = {torch.float64: (1e-15, 1e-14), torch.float32: (2e-7, 2e-6), torch.bfloat16: (2.0**-8, 2e-6)}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("parts", "merges"),
    [
        ([EVERYTHING] * 5, [2, 2]),
        ([EVERYTHING] * 4, [2, 1]),
        ([EVERYTHING, EVERYTHING, LAST, LAST, LAST], [1, 2, 1]),  # as of a ring under a causal mask, in zigzag
        ([EVERYTHING, LAST, FIRST], [1, 1]),
        ([LAST, FIRST, EVERYTHING], [1, 1, 1]),  # the first tile lacks queries
        ([LAST, EVERYTHING], [1, 1]),
        ([LAST, EVERYTHING, EVERYTHING], [1, 2]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_the_same_queries_are_merged_two_at_a_time(
    dtype: torch.dtype, parts: list[slice], merges: list[int], monkeypatch: pytest.MonkeyPatch
):
    seen, merge = [], accumulators.merge
    monkeypatch.setattr(accumulators, "merge", lambda *arguments: seen.append(len(arguments[3])) or merge(*arguments))
    q, total = torch.randn(2, 6, 3, 4, dtype=dtype), torch.zeros(2, 6, 3, 4, dtype=torch.float64)
    weights = torch.zeros(2, 3, 6, dtype=torch.float64)
    accumulator = OnlineSoftmaxAccumulator(q, q)
    for number, part in enumerate(parts):
        out = torch.randn(2, 6, 3, 4, dtype=torch.float64)[:, part].to(dtype)
        lse = torch.randn(2, 3, 6, dtype=torch.promote_types(dtype, torch.float32))[..., part].clone()
        weight = lse.double().exp()
        total[:, part] += out.double() * weight.transpose(1, 2)[..., None]
        weights[..., part] += weight
        accumulator.add(EVERYTHING, part, out, lse, is_last=number == len(parts) - 1)
    out, lse = accumulator.result()
    assert seen == merges
    assert_rounded_once(out, total / weights.transpose(1, 2)[..., None], dtype)
    torch.testing.assert_close(lse.double(), weights.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_rounded_once(dtype: torch.dtype):
    """Parts of all and of some tokens, in any order: the exact sum, rounded to the dtype."""
    whole, half, other = draw(dtype)
    exact = whole.double().clone()
    exact[:, FIRST] += half.double()
    exact[:, LAST] += other.double()
    exact += whole.double()
    total = GradientAccumulator(whole.shape, dtype)
    total.add(EVERYTHING, slice(0, 6), whole.clone())
    total.add(EVERYTHING, FIRST, half)
    total.add(EVERYTHING, slice(0, 6), whole.clone())
    total.add(EVERYTHING, LAST, other, ends=0)
    assert_rounded_once(total.result(), exact, dtype)

    parts = GradientAccumulator(whole.shape, dtype)
    parts.add(EVERYTHING, LAST, other)
    parts.add(EVERYTHING, FIRST, half, ends=0)
    assert torch.equal(parts.result(), torch.cat((half, other), 1))

    addends = [(EVERYTHING, FIRST, half), (EVERYTHING, slice(0, 6), whole.clone()), (EVERYTHING, LAST, other)]
    in_one_pass = GradientAccumulator(whole.shape, dtype)
    in_one_pass.add(EVERYTHING, slice(0, 6), whole.clone())
    in_one_pass.add_together(addends, ends=0)
    assert_rounded_once(in_one_pass.result(), exact, dtype)

    without_a_first = GradientAccumulator(whole.shape, dtype)
    without_a_first.add_together([(EVERYTHING, slice(0, 6), whole.clone()), *addends], ends=0)
    assert_rounded_once(without_a_first.result(), exact, dtype)


PIECES = {
    "one": (GradientPiece((0, 2), (0, 6), 1),),
    "tokens": (GradientPiece((0, 2), (0, 3), 2), GradientPiece((0, 2), (3, 6), 1)),
    "rows": (GradientPiece((0, 1), (0, 6), 2), GradientPiece((1, 2), (0, 6), 1)),
    "both": tuple(GradientPiece(rows, tokens, 2 - rows[0]) for rows in ((0, 1), (1, 2)) for tokens in ((0, 3), (3, 6))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_each_piece_of_a_sum_is_rounded_once(pieces: tuple[GradientPiece, ...], dtype: torch.dtype):
    """Pieces end in different steps. Parts are of all and of some rows and tokens."""
    whole, half, other = draw(dtype)
    exact = 2 * whole.double()
    exact[:, FIRST] += half.double()
    exact[:, LAST] += other.double()
    for in_one_pass in (False, True):
        total = GradientAccumulator(whole.shape, dtype, pieces)
        total.add(slice(1, 2), slice(0, 6), whole[1:].clone())
        total.add(EVERYTHING, LAST, other.clone())
        total.add(EVERYTHING, slice(0, 6), whole.clone())
        last = [(EVERYTHING, FIRST, half), (slice(0, 1), slice(0, 6), whole[:1])]
        if not in_one_pass:
            total.add(*last[0], ends=1 if len(pieces) > 1 else None)
            total.add(*last[1], ends=2 if len(pieces) > 1 else 1)
        elif all(piece.rows != (0, 2) for piece in pieces):  # in one pass, addends have all rows of the pieces
            total.add_together(last, ends=2)
        else:
            continue
        assert_rounded_once(total.result(), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_addend_is_the_result(dtype: torch.dtype):
    whole, *_ = draw(dtype)
    total = GradientAccumulator(whole.shape, dtype)
    total.add(EVERYTHING, slice(0, 6), whole, ends=0)
    assert total.result() is whole


def test_values_that_are_added_together_are_not_kept():
    """They are receive buffers, which the next message overwrites."""
    whole, *_ = draw(torch.bfloat16)
    total = GradientAccumulator(whole.shape, whole.dtype)
    total.add_together([(EVERYTHING, slice(0, 6), whole)], ends=-1)
    expected = whole.clone()
    whole.fill_(float("nan"))
    assert torch.equal(total.result(), expected)


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_memory_is_free_as_soon_as_the_accumulator_is(pieces: tuple[GradientPiece, ...]):
    """A reference cycle would keep it until Python collects garbage: the gradients of several layers at once."""
    whole, *_ = draw(torch.bfloat16)
    total = GradientAccumulator(whole.shape, whole.dtype, pieces)
    total.add(EVERYTHING, slice(0, 6), whole)
    total.add(EVERYTHING, slice(0, 6), whole.clone(), ends=1)
    total.add(EVERYTHING, FIRST, whole[:, FIRST].clone(), ends=2)
    result = weakref.ref(total.result())
    gc.disable()
    try:
        del total
        assert result() is None
    finally:
        gc.enable()
