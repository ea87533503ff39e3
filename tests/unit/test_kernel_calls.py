"""Few kernel calls for many documents: literal plans, and counts for many layouts."""

from __future__ import annotations

import itertools
import random

import pytest

from ring_attention import CAUSAL, Mask
from ring_attention.gather import gathered_calls
from ring_attention.kernel_calls import KernelCall, plan_calls
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout
from ring_attention.masked_block import MaskedBlock
from ring_attention.ring import backward_calls, forward_calls
from ring_attention.tiles import AttentionTile

REFERENCE, VARLEN = KERNELS["reference"], KERNELS["flash_attn_4"]


def square(start: int, stop: int, window: int | None = None) -> MaskedBlock:
    lower = None if window is None else -window
    block = MaskedBlock(start, stop, start, stop, lower, 0).trimmed()
    assert block is not None
    return block


def shown(calls: tuple[KernelCall, ...]) -> list[tuple]:
    return [(call.rows.start, call.rows.stop, call.block, call.segments and [*call.segments.lengths]) for call in calls]


def test_documents_behind_each_other_are_one_call():
    tiles = [AttentionTile(None, square(*span)) for span in ((0, 4), (4, 5), (5, 12))]
    expected = [(0, 1, MaskedBlock(0, 12, 0, 12, None, 0), [(4, 4), (1, 1), (7, 7)])]
    assert shown(plan_calls(VARLEN, tiles, (0, 1), 12, ((0, 12),))) == expected
    assert shown(plan_calls(REFERENCE, tiles, (0, 1), 12, ((0, 12),))) == expected


def test_a_window_counts_where_a_document_is_longer():
    tiles = [AttentionTile(None, square(*span, window=3)) for span in ((0, 4), (4, 12))]
    assert [tile.block.lower for tile in tiles] == [None, -3]
    assert shown(plan_calls(VARLEN, tiles, (0, 1), 12, ((0, 12),))) == [
        (0, 1, MaskedBlock(0, 12, 0, 12, -3, 0), [(4, 4), (8, 8)])
    ]


def test_blocks_with_gaps_or_another_band_are_calls_of_their_own_causal_ones_first():
    full, squares = MaskedBlock(4, 9, 0, 4), [square(0, 4), square(9, 12), square(13, 14)]
    tiles = [AttentionTile(None, block) for block in (full, *squares)]
    assert [call.block for call in plan_calls(VARLEN, tiles, (0, 1), 14, ((0, 14),))] == [*squares, full]


def test_full_blocks_behind_each_other_are_one_call_also_where_their_keys_have_arrived_without_others():
    """As from a rank that holds early chunks (0, 4) and (4, 6), and later ones behind them."""
    blocks = [MaskedBlock(8, 12, 20, 24), MaskedBlock(12, 14, 30, 32)]
    tiles = [AttentionTile(None, block) for block in blocks]
    (call,) = plan_calls(VARLEN, tiles, (0, 1), 14, ((20, 24), (30, 32)), ((10, 12), (20, 24), (30, 32)))
    assert call.block == MaskedBlock(8, 14, 0, 6)
    assert call.segments
    assert [*call.segments.lengths] == [(4, 4), (2, 2)]
    assert call.gradients == slice(2, 8)
    apart = plan_calls(VARLEN, tiles, (0, 1), 14, ((20, 24), (26, 28), (30, 32)), ((20, 24), (30, 32)))
    assert [(call.block.k_start, call.gradients) for call in apart] == [(0, slice(0, 4)), (6, slice(4, 6))]


def test_rows_with_documents_of_their_own_are_one_call_where_all_are_whole():
    rows = [[(0, 3), (3, 8)], [(0, 8)]]
    tiles = [AttentionTile(row, square(*span)) for row, spans in enumerate(rows) for span in spans]
    assert shown(plan_calls(VARLEN, tiles, (0, 2), 8, ((0, 8),))) == [
        (0, 2, MaskedBlock(0, 8, 0, 8, None, 0), [(3, 3), (5, 5), (8, 8)])
    ]
    partial = [tile for tile in tiles if tile.block.q_stop == 3 or tile.row == 1]
    assert [call.rows for call in plan_calls(VARLEN, partial, (0, 2), 8, ((0, 8),))] == [slice(0, 1), slice(1, 2)]


def test_rows_that_share_their_documents_are_one_call_where_they_are_whole():
    tiles = [AttentionTile(None, square(*span)) for span in ((0, 3), (3, 8))]
    (call,) = plan_calls(VARLEN, tiles, (0, 2), 8, ((0, 8),))
    assert call.segments
    assert [*call.segments.lengths] == [(3, 3), (5, 5)] * 2
    assert len(plan_calls(VARLEN, tiles, (0, 2), 9, ((0, 9),))) == 2


def test_a_kernel_without_varlen_and_windows_gets_only_blocks_that_are_one_call_each():
    lacking = KERNELS["ffpa"]
    assert not lacking.has_varlen
    tiles = [AttentionTile(None, MaskedBlock(0, 2, 0, 4, None, 2)), AttentionTile(None, square(4, 8))]
    calls = plan_calls(lacking, tiles, (0, 1), 8, ((0, 8),))
    assert all(call.segments is None for call in calls)
    assert all(lacking.split(call.block) == [call.block] for call in calls)


@pytest.mark.parametrize("left", [None, 40])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_the_calls_of_a_ring_step_do_not_grow_with_the_documents(name: str, degree: int, left: int | None):
    generator = random.Random(0)
    layout = Layout(name, degree, 4096)
    ends = sorted({0, 4096, *(generator.randrange(4096) for _ in range(400))})
    mask = Mask(left).packed(ends)
    for rank, plan in itertools.product(range(degree), (forward_calls, backward_calls)):
        assert max(map(len, plan(layout, mask, rank, 1, VARLEN))) <= 5
    for rank in range(degree):
        assert len(gathered_calls(layout, mask, rank, 1, VARLEN)) <= 5


def test_a_single_document_has_the_calls_it_had():
    layout = Layout("zigzag", 4, 64)
    for rank in range(4):
        calls = forward_calls(layout, CAUSAL, rank, 2, VARLEN)
        assert [len(of_step) for of_step in calls] == [1, 1, 1, 1]
        assert all(call.segments is None for of_step in calls for call in of_step)
