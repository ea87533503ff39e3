"""The backward schedule in integers: the split of the local attention, what each step adds, and where sums end."""

from __future__ import annotations

import pytest

from ring_attention import CAUSAL, FULL, Layout, Mask
from ring_attention.backward_schedule import (
    BackwardStep,
    GradientPiece,
    LocalSplit,
    TileRows,
    backward_schedule,
    split_local,
)
from ring_attention.kernels import KERNELS
from ring_attention.layout import LAYOUTS
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import Message, ring_schedule
from ring_attention.tiles import AttentionTile

ONE_CALL, CAUSAL_SQUARES = KERNELS["reference"].split, KERNELS["ffpa"].split
ALL, ONE_ROW = ((0, 8),), (0, 1)


def tile(*block: int | None, row: int | None = None) -> AttentionTile:
    return AttentionTile(row, MaskedBlock(*block))  # pyright: ignore[reportArgumentType]


SQUARE = (tile(0, 8, 0, 8, None, 0),)
LATE_QUERIES = TileRows((tile(4, 8, 0, 8),), ONE_ROW)


def test_zigzag_on_two_ranks():
    """The last return overlaps with the early half of the local queries, and is added together with their dK,dV."""
    schedule = backward_schedule(Layout("zigzag", 2, 16), CAUSAL, 0, 1, ONE_CALL)
    assert schedule.steps == (
        BackwardStep(0, TileRows((tile(4, 8, 0, 8, None, 4),), ONE_ROW), ALL, None, ()),
        BackwardStep(1, LATE_QUERIES, ALL, Message(1, ((0, 4),)), ()),
        BackwardStep(0, TileRows((tile(0, 4, 0, 4, None, 0),), ONE_ROW), ((0, 4),), None, (1, 2)),
    )
    assert schedule.dq_pieces == (GradientPiece(ONE_ROW, (0, 4), 2), GradientPiece(ONE_ROW, (4, 8), 1))
    assert schedule.own_pieces == (GradientPiece(ONE_ROW, (0, 8), 2),)


def test_of_several_rows_half_are_held_back():
    schedule = backward_schedule(Layout("zigzag", 2, 16), CAUSAL, 0, 3, CAUSAL_SQUARES)
    assert [step.compute for step in schedule.steps] == [
        TileRows(SQUARE, (1, 3)),
        TileRows(LATE_QUERIES.tiles, (0, 3)),
        TileRows(SQUARE, (0, 1)),
    ]
    assert schedule.dq_pieces == (
        GradientPiece((0, 1), (0, 4), 2),
        GradientPiece((0, 1), (4, 8), 2),
        GradientPiece((1, 3), (0, 4), None),  # no other rank's keys meet the early queries of rank 0
        GradientPiece((1, 3), (4, 8), 1),
    )
    assert schedule.own_pieces == (GradientPiece((0, 1), (0, 8), 2), GradientPiece((1, 3), (0, 8), 2))


@pytest.mark.parametrize(
    ("ring_degree", "additions"),
    [
        (1, [()]),
        (2, [(), (), (1, 2)]),
        (3, [(), (), (1,), (2, 3)]),
        (4, [(), (), (), (1, 2), (3, 4)]),
        (5, [(), (), (), (1, 2), (3,), (4, 5)]),
        (6, [(), (), (), (1, 2), (), (3, 4), (5, 6)]),
    ],
)
def test_two_returns_are_added_at_a_time(ring_degree: int, additions: list[tuple[int, ...]]):
    schedule = backward_schedule(Layout("zigzag", ring_degree, 8 * ring_degree), CAUSAL, 0, 1, ONE_CALL)
    assert [step.add for step in schedule.steps] == additions


MASKS = {
    "causal": CAUSAL,
    "full": FULL,
    "window": Mask(left=3),
    "both ways": Mask(left=2, right=4),
    "packed": CAUSAL.packed([0, 3, 3, 4, 11]),
    "packed rows": Mask(left=4).packed([[0, 2, 5], [0, 7], [0]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_each_return_is_added_once_before_its_buffer_is_used_again(name: str, ring_degree: int, mask: Mask):
    layout = Layout(name, ring_degree, 23)
    for rank in range(ring_degree):
        schedule = backward_schedule(layout, mask, rank, 3, ONE_CALL)
        ring_steps = ring_schedule(layout, mask, rank)
        returns = [number for number, step in enumerate(ring_steps) if step.gradient_return]
        last = schedule.steps[-1]
        assert last.gradient_return is None  # no gradients are in flight after the last step
        assert last.source == rank or not last.gradients
        added = {source: number for number, step in enumerate(schedule.steps) for source in step.add}
        assert sorted(source for step in schedule.steps for source in step.add if source < ring_degree) == returns
        for source in returns:
            assert source < added[source]
            reused = [later for later in returns if later > source and later % 2 == source % 2]
            assert not reused or added[source] <= reused[0]  # in that step, additions come before the post


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_it_computes_all_that_the_ring_computes(name: str, ring_degree: int, batch: int, mask: Mask):
    layout = Layout(name, ring_degree, 23)
    if len(mask.documents or ()) not in (0, 1, batch):
        return
    for rank in range(ring_degree):

        def work(tiles: tuple[AttentionTile, ...], num_rows: int) -> int:
            return sum(tile.block.work * (num_rows if tile.row is None else 1) for tile in tiles)

        steps = [step.compute for step in backward_schedule(layout, mask, rank, batch, ONE_CALL).steps]
        expected = sum(work(step.tiles, batch) for step in ring_schedule(layout, mask, rank))
        assert sum(work(tiles, stop - start) for tiles, (start, stop) in steps) == expected


@pytest.mark.parametrize("mask", [CAUSAL, FULL.packed([0, 32]), Mask(left=31), Mask(left=5)])
def test_the_two_parts_of_the_local_attention_are_all_of_it(mask: Mask):
    tiles = ring_schedule(Layout("zigzag", 2, 32), mask, 0)[0].tiles
    split = split_local(tiles, 1, ONE_CALL)
    parts = [*split.first.tiles, *(split.held_back.tiles if split.held_back else ())]
    assert sum(part.block.work for part in parts) == sum(whole.block.work for whole in tiles)
    if len(tiles) > 1:
        assert split.held_back is None
    else:
        assert [(part.block.q_start, part.block.q_stop) for part in parts] == [(8, 16), (0, 8)]


@pytest.mark.parametrize("split_block", [ONE_CALL, CAUSAL_SQUARES])
def test_half_of_the_rows_is_held_back(split_block):
    split = split_local(SQUARE, 5, split_block)
    assert (split.first, split.held_back) == (TileRows(SQUARE, (2, 5)), TileRows(SQUARE, (0, 2)))


def test_a_kernel_that_needs_several_calls_for_half_of_the_queries_computes_all_at_once():
    assert len(CAUSAL_SQUARES(MaskedBlock(4, 8, 0, 8, None, 4))) == 2
    assert split_local(SQUARE, 1, CAUSAL_SQUARES) == LocalSplit(TileRows(SQUARE, ONE_ROW))


@pytest.mark.parametrize(
    ("tiles", "batch"),
    [
        ((tile(0, 1, 0, 1, None, 0),), 2),
        ((tile(0, 8, 0, 8, None, 0, row=0), tile(0, 8, 0, 8, None, 0, row=1)), 2),
        ((tile(0, 8, 0, 8, None, 0, row=0),), 2),
        (SQUARE, 0),
    ],
    ids=["one query", "rows that differ", "one of the rows", "empty batch"],
)
def test_what_is_not_split(tiles: tuple[AttentionTile, ...], batch: int):
    assert split_local(tiles, batch, ONE_CALL) == LocalSplit(TileRows(tiles, (0, batch)))


@pytest.mark.parametrize("ring_degree", range(2, 9))
def test_in_a_causal_zigzag_part_of_the_local_attention_is_held_back(ring_degree: int):
    layout = Layout("zigzag", ring_degree, 16 * ring_degree)
    for ring_rank in range(ring_degree):
        steps = backward_schedule(layout, CAUSAL, ring_rank, 1, ONE_CALL).steps
        assert [step.gradient_return is not None for step in steps] == [False, *[True] * (ring_degree - 1), False]
        assert steps[-1].compute.tiles


def last_step(steps: tuple[BackwardStep, ...], row: int, token: int) -> int:
    """The last one that computes a gradient of this query."""
    computing = [
        number
        for number, (_, (tiles, rows), *_) in enumerate(steps)
        for tile in tiles
        if tile.row == row or (tile.row is None and row in range(*rows))
        if token in range(tile.block.q_start, tile.block.q_stop)
    ]
    return max(computing, default=0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_pieces_end_with_their_last_addend(name: str, ring_degree: int, batch: int, mask: Mask):
    """So that they are written in the pass that adds it. A piece of dq that ends before the last ring step has None."""
    layout = Layout(name, ring_degree, 23)
    if len(mask.documents or ()) not in (0, 1, batch):
        return
    for rank in range(ring_degree):
        steps, dq_pieces, own_pieces = backward_schedule(layout, mask, rank, batch, ONE_CALL)
        covered = [(row, token) for rows, tokens, _ in dq_pieces for row in range(*rows) for token in range(*tokens)]
        assert sorted(covered) == [(row, token) for row in range(batch) for token in range(layout.ring_length)]
        for rows, tokens, ends in dq_pieces:
            last = max(last_step(steps, row, token) for row in range(*rows) for token in range(*tokens))
            assert ends == last or (ends is None and last < ring_degree - 1)
        last_addition = max((number for number, step in enumerate(steps) if step.add), default=0)
        assert {piece.last_step for piece in own_pieces} == {last_addition}
