"""What each rank of a ring computes and receives in each ring step, as arrays that the simulator sweeps over.

Pure integers, from `ring_attention.schedule`. Under a plain causal mask a pair's tiles depend only on which of the two
ranks holds the earlier chunks. So three ranks say all about a thousand, whose schedules would take minutes.

Arrays are [N, R]: N ring steps, R ring ranks. Tokens are those of one row of the batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ring_attention.backward_schedule import KernelTiles, TileRows, backward_schedule, split_local
from ring_attention.layout import Layout, num_tokens
from ring_attention.mask import CAUSAL, Mask
from ring_attention.schedule import ring_schedule

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RingWork:
    """A pass over the ring. In the backward pass a last step has what was held back of the local attention.

    Args:
        tiles: the distinct sets of tiles.
        kind: [N, R] which of them a rank computes.
        keys: [N, R] tokens whose K,V arrive for the step. None do in step 0 and in the last one of a backward pass.
        keys_from: [N, R] the rank that sends them.
        gradients: [N, R] tokens whose dK,dV a rank returns to their owner after the step; all 0 in a forward pass.
    """

    tiles: tuple[TileRows, ...]
    kind: Integers
    keys: Integers
    keys_from: Integers
    gradients: Integers

    @property
    def ring_degree(self) -> int:
        return self.kind.shape[1]


def ring_work(layout: Layout, mask: Mask, batch: int, kernel_tiles: KernelTiles | None = None) -> RingWork:
    """The work of all ranks, in ring steps also where packed documents take one exchange (`exchange_time`).

    Args:
        batch: rows, in each of which the mask is the same unless its documents differ.
        kernel_tiles: how a kernel splits blocks (`AttentionKernel.split`), for a backward pass. None: a forward pass.
    """
    if mask == CAUSAL and layout.name != "balanced" and layout.ring_degree > 3:
        return _of_three(layout, batch, kernel_tiles)
    return _of_all(layout, mask, batch, kernel_tiles)


def _of_all(layout: Layout, mask: Mask, batch: int, kernel_tiles: KernelTiles | None) -> RingWork:
    degree, trains = layout.ring_degree, kernel_tiles is not None
    num_steps = degree + trains
    keys, gradients, kind = (np.zeros((num_steps, degree), np.int64) for _ in range(3))
    keys_from = np.tile(np.arange(degree), (num_steps, 1))
    numbers: dict[TileRows, int] = {}
    for rank in range(degree):
        steps = ring_schedule(layout, mask, rank)
        computed = [TileRows(step.tiles, (0, batch)) for step in steps]
        if kernel_tiles is not None:
            backward = backward_schedule(layout, mask, rank, batch, kernel_tiles).steps
            computed = [step.compute for step in backward]
            computed += [TileRows((), (0, batch))] * (num_steps - len(computed))
        for number, tiles in enumerate(computed):
            kind[number, rank] = numbers.setdefault(tiles, len(numbers))
        for number, step in enumerate(steps[1:], start=1):
            if step.keys_from is not None:
                keys[number, rank], keys_from[number, rank] = num_tokens(step.keys), step.keys_from
            if trains:
                gradients[number, rank] = num_tokens(step.gradients)
    return RingWork(tuple(numbers), kind, keys, keys_from, gradients)


def _of_three(layout: Layout, batch: int, kernel_tiles: KernelTiles | None) -> RingWork:
    """The same for a causal mask: the middle rank of three meets its own keys, then earlier ones, then later ones."""
    degree = layout.ring_degree
    three = dataclasses.replace(layout, ring_degree=3, length=3 * layout.ring_length)
    local, earlier, later = ring_schedule(three, CAUSAL, 1)
    number, rank = np.ogrid[:degree, :degree]
    source = (rank - number) % degree
    is_earlier = source < rank
    of_earlier, of_later = num_tokens(earlier.gradients), num_tokens(later.gradients)
    attended = np.where(is_earlier, of_earlier, of_later)
    attended[0] = 0
    # keys travel on while anyone ahead needs them: ranks after the source, then from 0 on those before it
    keys = np.where(is_earlier, np.where(source > 0, max(of_earlier, of_later), of_earlier), of_later)
    keys[0] = 0
    kind = np.where(is_earlier, 1, 2)
    kind[0] = 0
    keys_from = np.broadcast_to((rank - 1) % degree, keys.shape)
    tiles = [TileRows(step.tiles, (0, batch)) for step in (local, earlier, later)]
    if kernel_tiles is None:
        return RingWork(tuple(tiles), kind, keys, keys_from, np.zeros_like(keys))
    split = split_local(local.tiles, batch, kernel_tiles)
    held_back = split.held_back or TileRows((), (0, batch))
    tiles += [split.first, held_back, TileRows((), (0, batch))]
    # a rank holds back if the last ring step returns gradients to it, from the rank before the one before it
    holds_back = np.roll(attended[-1], 1 - degree) > 0
    kind = np.vstack([kind, np.where(holds_back, 4, 5)])
    kind[0] = np.where(holds_back, 3, 0)
    nothing = np.zeros((1, degree), np.int64)
    return RingWork(
        tuple(tiles),
        kind,
        np.vstack([keys, nothing]),
        np.vstack([keys_from, np.arange(degree)]),
        np.vstack([attended, nothing]),
    )
