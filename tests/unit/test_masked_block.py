"""The algebra of rectangles against sets of pairs, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.kernels.aten_flash import AtenFlashKernel
from ring_attention.kernels.base import KernelParams, flash_window, split_causal
from ring_attention.kernels.cpu_flash import CpuFlashKernel
from ring_attention.masked_block import MaskedBlock

BOUND = st.none() | st.integers(-8, 8)


@st.composite
def rectangles(draw, lower=BOUND) -> MaskedBlock:
    q_start, k_start = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    q_stop, k_stop = q_start + draw(st.integers(1, 7)), k_start + draw(st.integers(1, 7))
    return MaskedBlock(q_start, q_stop, k_start, k_stop, draw(lower), draw(BOUND))


def pairs(rectangle: MaskedBlock | None) -> set[tuple[int, int]]:
    if rectangle is None:
        return set()
    lower = -100 if rectangle.lower is None else rectangle.lower
    upper = 100 if rectangle.upper is None else rectangle.upper
    return {
        (rectangle.q_start + i, rectangle.k_start + j)
        for i in range(rectangle.num_queries)
        for j in range(rectangle.num_keys)
        if lower <= j - i <= upper
    }


@given(rectangles())
@settings(max_examples=500)
def test_trimming_keeps_the_pairs_and_leaves_no_empty_row_or_column(rectangle: MaskedBlock):
    trimmed, expected = rectangle.trimmed(), pairs(rectangle)
    assert pairs(trimmed) == expected
    if trimmed is not None:
        assert trimmed.work == len(expected)
        assert {i for i, _ in expected} == set(range(trimmed.q_start, trimmed.q_stop))
        assert {j for _, j in expected} == set(range(trimmed.k_start, trimmed.k_stop))
        assert trimmed.trimmed() == trimmed


@given(rectangles(), st.data())
@settings(max_examples=300)
def test_a_part_has_the_pairs_within(rectangle: MaskedBlock, data):
    q_start = data.draw(st.integers(rectangle.q_start, rectangle.q_stop - 1))
    k_start = data.draw(st.integers(rectangle.k_start, rectangle.k_stop - 1))
    q_stop = data.draw(st.integers(q_start + 1, rectangle.q_stop))
    k_stop = data.draw(st.integers(k_start + 1, rectangle.k_stop))
    part = rectangle.part(q_start, q_stop, k_start, k_stop)
    within = {(i, j) for i, j in pairs(rectangle) if q_start <= i < q_stop and k_start <= j < k_stop}
    assert pairs(part) == within


@given(rectangles(), rectangles())
@settings(max_examples=500)
def test_joining_is_exact_or_refused(one: MaskedBlock, other: MaskedBlock):
    one_trimmed, other_trimmed = one.trimmed(), other.trimmed()
    if one_trimmed is None or other_trimmed is None or pairs(one) & pairs(other):
        return
    joined = one_trimmed.joined(other_trimmed)
    assert joined is None or pairs(joined) == pairs(one) | pairs(other)


def test_two_triangles_and_a_square_join_to_a_triangle():
    trapezoid = MaskedBlock(0, 2, 0, 2, None, 0).joined(MaskedBlock(2, 4, 0, 2))
    assert trapezoid is not None
    assert trapezoid == MaskedBlock(0, 4, 0, 2, None, 0)
    assert trapezoid.joined(MaskedBlock(2, 4, 2, 4, None, 0)) == MaskedBlock(0, 4, 0, 4, None, 0)


@given(rectangles(lower=st.none()))
@settings(max_examples=300)
def test_causal_tiles_are_full_or_causal_squares(rectangle: MaskedBlock):
    trimmed = rectangle.trimmed()
    if trimmed is None:
        return
    tiles = split_causal(trimmed)
    assert len(tiles) <= 3
    assert all(tile.is_full or tile.is_causal_square for tile in tiles)
    assert sorted(pair for tile in tiles for pair in pairs(tile)) == sorted(pairs(trimmed))


def test_the_cpu_kernel_cuts_a_window_into_short_rows():
    window = MaskedBlock(0, 1000, 0, 1000, -64, 0)
    tiles = CpuFlashKernel().split(window)
    assert sorted(pair for tile in tiles for pair in pairs(tile)) == sorted(pairs(window))
    assert sum(tile.num_queries * tile.num_keys for tile in tiles) < 3 * window.work


def flash_pairs(tile: MaskedBlock) -> set[tuple[int, int]]:
    """What FlashAttention-2 computes, given its window: a bound of at least the number of keys becomes none, and no
    right bound beside a left one becomes the number of keys.
    """
    num_queries, num_keys = tile.num_queries, tile.num_keys
    left, right = flash_window(num_queries, num_keys, KernelParams(tile.lower, tile.upper, 1.0), -1).values()
    left, right = (-1 if bound >= num_keys else bound for bound in (left, right))
    if left >= 0 and right < 0:
        right = num_keys
    diagonal = num_keys - num_queries
    return {
        (tile.q_start + i, tile.k_start + j)
        for i in range(num_queries)
        for j in range(num_keys)
        if (left < 0 or j >= i + diagonal - left) and (right < 0 or j <= i + diagonal + right)
    }


@given(rectangles())
@settings(max_examples=1000)
def test_flash_attention_gets_windows_that_it_reads_right(rectangle: MaskedBlock):
    trimmed = rectangle.trimmed()
    if trimmed is not None:
        computed = [pair for tile in AtenFlashKernel().split(trimmed) for pair in flash_pairs(tile)]
        assert sorted(computed) == sorted(pairs(trimmed))
