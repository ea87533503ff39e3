"""The backward pass of the ring as a schedule: what each step computes and adds, and where each sum ends.

The steps are the ring's own (`schedule`), with two differences:

- A gradient return overlaps with the step after it. The last one has no such step, so part of the local attention is
  held back and computed while that return travels, in one more step. It is half of the batch's rows, or, of a single
  row, the early half of the queries.
- Two gradient returns are added in one pass, which reads and writes the sum once. Both of their receive buffers are
  then in use, so the pass comes before the next return is posted.

dQ, dK and dV are summed in fp32 and written once in the input's dtype, with the last addend. The parts of a tensor that
get their last addend in different steps are its pieces.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

from ring_attention.layout import Layout, Span, Spans, union
from ring_attention.mask import Mask
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import Message, RingStep, ring_schedule
from ring_attention.tiles import AttentionTile

KernelTiles = Callable[[MaskedBlock], list[MaskedBlock]]  # `AttentionKernel.split`


class TileRows(NamedTuple):
    """Tiles, and the rows of the batch [start, stop) of those that are not of one row."""

    tiles: tuple[AttentionTile, ...]
    rows: Span


class LocalSplit(NamedTuple):
    """The local attention in two. Gradients of queries before and from `middle` end in different steps."""

    first: TileRows
    held_back: TileRows | None = None
    middle: int | None = None


class GradientPiece(NamedTuple):
    """Rows and tokens of a gradient that get their last addend in step `last_step`, and are written with it.

    None is for a piece that ends before the last ring step. Writing it then would allocate the result early.
    """

    rows: Span
    tokens: Span
    last_step: int | None


class BackwardStep(NamedTuple):
    """One step of the backward pass. Tiles' keys and spans count the source's local tokens.

    Args:
        source: the ring rank that owns the keys.
        compute: the tiles of this step.
        gradients: the source's tokens whose dK,dV this step computes: sent to the source, if that is another rank.
        gradient_return: this rank's tokens whose dK,dV another rank sends back after this step.
        add: the steps whose dK,dV of this rank's tokens to add to its own.
    """

    source: int
    compute: TileRows
    gradients: Spans
    gradient_return: Message | None
    add: tuple[int, ...]


class BackwardSchedule(NamedTuple):
    """The steps; and the pieces of dQ, and of dK and dV of this rank's own tokens."""

    steps: tuple[BackwardStep, ...]
    dq_pieces: tuple[GradientPiece, ...]
    own_pieces: tuple[GradientPiece, ...]


@functools.lru_cache(maxsize=16)
def backward_schedule(
    layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel_tiles: KernelTiles
) -> BackwardSchedule:
    """The backward pass of `ring_rank`, with the steps of `ring_schedule` as the first ones."""
    ring_steps = ring_schedule(layout, mask, ring_rank)
    rows, local = (0, batch), ring_steps[0]
    split = LocalSplit(TileRows(local.tiles, rows))
    if ring_steps[-1].gradient_return is not None:
        split = split_local(local.tiles, batch, kernel_tiles)
    add = _additions(ring_steps)
    steps = [BackwardStep(ring_rank, split.first, local.keys, None, add[0])]
    steps += [
        BackwardStep(step.source, TileRows(step.tiles, rows), step.gradients, step.gradient_return, added)
        for step, added in zip(ring_steps[1:], add[1:], strict=False)
    ]
    if split.held_back is not None:
        gradients = union((tile.block.k_start, tile.block.k_stop) for tile in split.held_back.tiles)
        steps.append(BackwardStep(ring_rank, split.held_back, gradients, None, (*add[-1], len(ring_steps))))
    elif len(add) > len(ring_steps):
        steps.append(BackwardStep(ring_rank, TileRows((), rows), (), None, add[-1]))
    row_spans, query_edges = [rows], [0, layout.ring_length]
    if split.held_back is not None and split.middle is not None:
        row_spans = sorted({split.first.rows, split.held_back.rows})
        query_edges.insert(1, split.middle)
    dq_pieces = []
    for row_span, query_span in itertools.product(row_spans, itertools.pairwise(query_edges)):
        last_step = _last_step(steps, row_span, query_span)
        is_early = split.held_back is not None and last_step < len(ring_steps) - 1
        dq_pieces.append(GradientPiece(row_span, query_span, None if is_early else last_step))
    last_addition = max((number for number, step in enumerate(steps) if step.add), default=0)
    own_pieces = [GradientPiece(row_span, (0, layout.ring_length), last_addition) for row_span in row_spans]
    return BackwardSchedule(tuple(steps), tuple(dq_pieces), tuple(own_pieces))


def split_local(tiles: tuple[AttentionTile, ...], batch: int, kernel_tiles: KernelTiles) -> LocalSplit:
    """Split the local attention: into halves of the batch's rows, or of a single row into late and early queries.

    It stays whole if it is several tiles, as with windows and documents. It also does if the kernel needs several calls
    for half of the queries, which cost more than the overlap gains (FFPA, 4 x 5,000 tokens, 16 heads x 512: 52.7 ms
    instead of 47.6, with 1.4 ms more hidden).
    """
    whole = LocalSplit(TileRows(tiles, (0, batch)))
    if len(tiles) != 1 or tiles[0].row is not None or batch == 0:
        return whole
    block, half = tiles[0].block, batch // 2
    middle = (block.q_start + block.q_stop) // 2
    late = block.part(middle, block.q_stop, block.k_start, block.k_stop)
    early = block.part(block.q_start, middle, block.k_start, block.k_stop)
    if late is None or early is None:
        return whole
    if batch > 1:
        return LocalSplit(TileRows(tiles, (half, batch)), TileRows(tiles, (0, half)), middle)
    if any(len(kernel_tiles(part)) > 1 for part in (late, early)):
        return whole
    first, held_back = (TileRows((AttentionTile(None, part),), (0, 1)) for part in (late, early))
    return LocalSplit(first, held_back, middle)


def _additions(ring_steps: tuple[RingStep, ...]) -> list[tuple[int, ...]]:
    """The gradient returns to add in each step, by the ring step that they belong to.

    A return arrives in the step after its own. It waits for the next one, unless that is the last: the last return is
    added in a step of its own, with what was held back. That step also waits for the last gradients to be sent.
    """
    num_steps, last = len(ring_steps), ring_steps[-1]
    one_more = bool(last.gradients or last.gradient_return)
    additions: list[tuple[int, ...]] = []
    waiting: tuple[int, ...] = ()
    for number in range(num_steps + one_more):
        if number > 0 and ring_steps[number - 1].gradient_return is not None:
            waiting += (number - 1,)
        is_due = waiting and (waiting[0] < number - 1 or number >= num_steps - 1)
        additions.append(waiting if is_due else ())
        waiting = () if is_due else waiting
    return additions


def _last_step(steps: list[BackwardStep], rows: Span, queries: Span) -> int:
    """The last step that computes a gradient of these queries in these rows."""

    def overlap(one: Span, other: Span) -> bool:
        return max(one[0], other[0]) < min(one[1], other[1])

    numbers = [
        number
        for number, step in enumerate(steps)
        for tile in step.compute.tiles
        if overlap(rows, step.compute.rows) and overlap(queries, (tile.block.q_start, tile.block.q_stop))
    ]
    return max(numbers, default=0)
