"""The simulator of the ring's schedule: small cases worked by hand, and what holds for all."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest

from recipes.planning import ring_work as module
from recipes.planning.ring_simulator import RingCosts, RingTimes, simulate
from recipes.planning.ring_work import RingWork, ring_work
from ring_attention.backward_schedule import TileRows
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import tokens_sent, work_per_rank

TWO = Layout("zigzag", ring_degree=2, length=8)  # chunks of 2; a local square has 10 pairs, each other tile 8
LINE = Layout("contiguous", ring_degree=4, length=4)  # one token a rank; rank 0 sees one key, rank 3 four


def whole(block: MaskedBlock) -> list[MaskedBlock]:
    """How a kernel that can do all blocks splits them."""
    return [block]


def pairs(tiles: TileRows) -> float:
    """A second for each query-key pair."""
    return sum(tile.block.work for tile in tiles.tiles) * (tiles.rows[1] - tiles.rows[0])


def costs(**changes: Any) -> RingCosts:
    """A byte a token, half a byte a second, a second of latency."""
    usual = RingCosts(
        pairs, 1.0, 1.0, 0.25, within_bytes_per_s=0.5, between_bytes_per_s=0.5, latency_s=1.0, ring_ranks_per_host=8
    )
    return dataclasses.replace(usual, **changes)


def ends(times: RingTimes) -> list[float]:
    return times.end_s.tolist()


def exposed(times: RingTimes) -> list[float]:
    return times.exposed_s.sum(axis=0).tolist()


def test_messages_behind_kernels():
    """Rank 0 receives 4 tokens in 1 + 8 s, rank 1 receives 2 in 1 + 4 s; both local squares take 10 s."""
    times = simulate(ring_work(TWO, CAUSAL, 1), costs())
    assert ends(times) == [18, 18]
    assert exposed(times) == [0, 0]


def test_a_slow_link():
    """4 tokens take 1 + 16 s, 7 more than the square. Rank 1 has its 2 tokens after 9 s, but waits for its own send."""
    times = simulate(ring_work(TWO, CAUSAL, 1), costs(within_bytes_per_s=0.25))
    assert ends(times) == [25, 25]
    assert exposed(times) == [7, 7]


def test_a_backward_pass():
    """Two rows: 10 s for one of them, 16 for the ring step, then 10 for the other row, which hide the last returns.

    Rank 1's 4 tokens of dK,dV take 1 + 8 s, rank 0's 2 tokens 1 + 4. Adding takes 0.25 s a token.
    """
    times = simulate(ring_work(TWO, CAUSAL, 2, whole), costs())
    assert ends(times) == [36.5, 37]
    assert times.add_s.tolist() == [0.5, 1]
    assert exposed(times) == [0, 0]


def test_a_last_return_that_nothing_hides():
    """A kernel that cannot split the local square of one row: the returns come after 26 s, and 9 and 5 later."""
    work = ring_work(TWO, CAUSAL, 1, lambda block: [block, block])
    times = simulate(work, costs())
    assert ends(times) == [10 + 8 + 9 + 0.5, 10 + 8 + 9 + 1]  # rank 0 waits until its own 4 tokens are sent
    assert exposed(times) == [9, 9]


def test_a_straggler_stops_only_those_that_need_it():
    """Rank 0's keys came from rank 1 before its kernels: no step waits for all."""
    times = simulate(ring_work(TWO, CAUSAL, 1), costs(slowdown=(1.0, 2.0)))
    assert ends(times) == [18, 36]


def test_a_sender_waits_for_a_receiver_that_is_late():
    """Three ranks of a token each, a second a token, 10 a pair; rank 2 is three times slower.

    Rank 1 passes rank 0's token on from 10 s on, but rank 2 can take it only from 30 on, when it starts its ring step.
    """
    slow = costs(
        tiles_s=lambda tiles: 10 * pairs(tiles), within_bytes_per_s=1.0, latency_s=0.0, slowdown=(1.0, 1.0, 3.0)
    )
    times = simulate(ring_work(Layout("contiguous", 3, 3), CAUSAL, 1), slow)
    assert ends(times) == [10, 31, 90]


def test_links_within_and_between_hosts():
    """Two hosts of two ranks, 10 s a pair, 1 s a token within a host and 20 between.

    Rank 1 to 2 crosses: rank 2 has rank 1's token after 20 s, and computes it until 30. It has rank 0's, which rank 1
    could pass on only from 20 on, after 40, and ends at 50. Rank 3 gets its tokens through rank 2: after 1, 21 and 41.
    """
    slow = costs(
        tiles_s=lambda tiles: 10 * pairs(tiles),
        within_bytes_per_s=1.0,
        between_bytes_per_s=0.05,
        latency_s=0.0,
        ring_ranks_per_host=2,
    )
    times = simulate(ring_work(LINE, CAUSAL, 1), slow)
    assert ends(times) == [10, 40, 50, 51]
    assert times.exposed_s.T.tolist() == [[0, 0, 0, 0], [10, 10, 0, 0], [10, 10, 0, 0], [0, 1, 10, 0]]
    assert times.total_s == 51
    assert times.exposed_total_s == 11
    assert ends(simulate(ring_work(LINE, CAUSAL, 1), dataclasses.replace(slow, ring_ranks_per_host=4))) == [
        10,
        20,
        30,
        40,
    ]


MASKS = {
    "causal": CAUSAL,
    "window": Mask(left=5),
    "full": Mask(right=None),
    "documents": CAUSAL.packed([0, 7, 9, 40]),  # the last is too long for one exchange
    "windows in documents": Mask(left=28).packed([0, 7, 9, 40]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_work_and_messages_are_those_of_the_schedule(name, mask):
    layout = Layout(name, ring_degree=5, length=40)
    forward, backward = ring_work(layout, mask, 1), ring_work(layout, mask, 1, whole)
    for rank in range(5):
        work = [pairs(forward.tiles[kind]) for kind in forward.kind[:, rank]]
        assert work == work_per_rank(layout, mask)[rank]
        assert sum(pairs(backward.tiles[kind]) for kind in backward.kind[:, rank]) == sum(work)
        keys = sum(
            int(n) for n, sender in zip(backward.keys.flat, backward.keys_from.flat, strict=True) if sender == rank
        )
        assert (keys, backward.gradients[:, rank].sum()) == tokens_sent(layout, mask, rank)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel_tiles", [None, whole], ids=["forward", "backward"])
@pytest.mark.parametrize("degree", [4, 5, 8])
@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_three_ranks_say_all_about_a_causal_ring(name, degree, kernel_tiles, batch):
    layout = Layout(name, degree, 16 * degree)
    every, three = (make(layout, batch, kernel_tiles) for make in (_of_all, module._of_three))
    assert _tiles(every) == _tiles(three)
    np.testing.assert_array_equal(every.keys, three.keys)
    np.testing.assert_array_equal(every.gradients, three.gradients)
    np.testing.assert_array_equal(every.keys_from[every.keys > 0], three.keys_from[every.keys > 0])


def _of_all(layout: Layout, batch: int, kernel_tiles: Any) -> RingWork:
    return module._of_all(layout, CAUSAL, batch, kernel_tiles)


def _tiles(work: RingWork) -> list[list[TileRows]]:
    return [[work.tiles[kind] for kind in of_step] for of_step in work.kind]


def test_a_thousand_ranks():
    """Two tokens a rank: a local square of 3 pairs and 1,023 tiles of 2; 8 ranks a host, and fast links between."""
    layout = Layout("zigzag", 1024, 2048)
    started = time.monotonic()
    fast = costs(within_bytes_per_s=1e3, between_bytes_per_s=10.0, latency_s=0.1, ring_ranks_per_host=8)
    times = simulate(ring_work(layout, CAUSAL, 1), fast)
    assert ends(times) == [3 + 1023 * 2] * 1024
    slow = simulate(ring_work(layout, CAUSAL, 1), dataclasses.replace(fast, between_bytes_per_s=0.5))
    # a key pair takes 4.1 s between hosts, and each of the 1,023 transfers crosses somewhere
    assert slow.total_s > 1000 * 4.1
    assert time.monotonic() - started < 20  # of two slow cores; alone it takes one


def test_a_message_for_a_rank_further_on_leaves_after_the_one_for_the_neighbour():
    """Rank 0 of three sends to both others at once: 1 token takes 3 s, so the second message arrives after 6."""
    nothing = np.zeros((2, 3), np.int64)
    keys, keys_from = nothing.copy(), nothing.copy()
    keys[1] = [0, 1, 1]
    work = RingWork((TileRows((), (0, 1)),), nothing, keys, keys_from, nothing)
    assert ends(simulate(work, costs())) == [6, 3, 6]


def test_longer_gradients_arrive_later():
    """4 tokens' dK,dV, which nothing hides here, take 1 + 16 s in place of 1 + 8."""
    work = ring_work(TWO, CAUSAL, 1, whole)
    usual, longer = (simulate(work, costs(gradient_bytes=size)) for size in (1.0, 2.0))
    assert (longer.end_s - usual.end_s).tolist() == [8, 8]
