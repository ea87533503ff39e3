"""The time of packed documents in one exchange: a small case worked by hand, and in a step."""

from __future__ import annotations

import dataclasses

import pytest

from recipes.planning.exchange_time import ExchangeTime
from recipes.planning.ring_simulator import RingCosts
from ring_attention.backward_schedule import TileRows
from ring_attention.direct_routing import goes_direct
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL
from ring_attention.streams import has_side_stream
from tests.unit.test_ring_simulator import costs
from tests.unit.test_step_time import H200S, LENGTH, ring

# each rank has a whole document of 3 tokens, 6 pairs; of one between them rank 0 has the first token, 1 pair, and rank
# 1 the second, 2 pairs, for which it needs one key
TWO = Layout("contiguous", ring_degree=2, length=8)
MASK = CAUSAL.packed([0, 3, 5, 8])


def exchange(costs: RingCosts, memory_s_per_byte: float = 0.0, has_side_stream: bool = False) -> ExchangeTime:
    return ExchangeTime(TWO, MASK, 1, costs, lambda num_bytes: memory_s_per_byte * num_bytes, has_side_stream)


def test_keys_travel_beside_whole_documents():
    """The key takes 1 + 2 s, whole documents 6."""
    assert goes_direct(TWO, MASK)
    assert exchange(costs()).seconds(backward=False) == (6 + 2, 0, 0)
    assert exchange(costs(within_bytes_per_s=0.1)).seconds(backward=False) == (6 + 2, 0, 11 - 6)


def test_hosts_have_links_between_them():
    apart = costs(ring_ranks_per_host=1, between_bytes_per_s=0.1)
    assert exchange(apart).seconds(backward=False) == (6 + 2, 0, 11 - 6)


def test_in_the_backward_pass_gradients_return_after_both_parts():
    """Rank 1 posts its gradients last, after 6 + 2 s, and with a slow link after 11 + 2; they take 3 and 11."""
    assert exchange(costs()).seconds(backward=True) == (6 + 1, 0, 8 + 3 - 7)
    assert exchange(costs(within_bytes_per_s=0.1)).seconds(backward=True) == (6 + 1, 0, 13 + 11 - 7)


def test_with_a_stream_of_its_own_the_rest_does_not_wait_for_whole_documents():
    """Rank 1 posts its gradients after 3 + 2 s. Whole documents take what is left of 8 s beside them."""
    assert exchange(costs(), has_side_stream=True).seconds(backward=True) == (6 + 1, 0, 5 + 3 - 7)
    slow = exchange(costs(within_bytes_per_s=0.1), has_side_stream=True)
    assert slow.seconds(backward=True) == (6 + 1, 0, 13 + 11 - 7)
    assert slow.seconds(backward=False) == (6 + 2, 0, 11 - 6)


@pytest.mark.parametrize(("num_queries", "expected"), [(16_384 * 32, True), (16_384 * 32 + 1, False)])
def test_only_short_passes_on_gpus_have_a_second_stream(num_queries, expected):
    assert has_side_stream(True, num_queries) is expected
    assert not has_side_stream(False, num_queries)


def test_entries_are_copied_and_their_gradients_summed():
    """Rank 1: copies of its own entry and of the one that arrives, read and written.

    In the backward pass two gradients of copies, read, and two sums, written: for rank 0 and for its own token.
    """
    forward, backward = (exchange(costs(), 1.0).seconds(backward)[1] for backward in (False, True))
    assert forward == 2 * 2
    assert backward == forward + 2 + 2


def test_a_straggler_is_the_slowest():
    kernels, _, _ = exchange(costs(slowdown=(2.0, 1.0))).seconds(backward=False)
    assert kernels == 2 * (6 + 1)


@pytest.mark.parametrize("backward", [False, True])
def test_packed_documents_are_issued_as_in_a_ring_of_two(backward):
    packed = CAUSAL.packed(range(0, LENGTH + 1, LENGTH // 64))
    long, two = (dataclasses.replace(ring(degree), mask=packed).attention(packed) for degree in (8, 2))
    assert long.issue_s(backward) == two.issue_s(backward) < ring(8).attention(CAUSAL).issue_s(backward)


def test_the_balanced_layout_follows_the_documents():
    """One of half the length and 32 short ones: spread over ranks, their attention is a fourth of the work of all."""
    packed = CAUSAL.packed([0, *range(LENGTH // 2, LENGTH + 1, LENGTH // 64)])
    zigzag = dataclasses.replace(ring(4), mask=packed)
    balanced = dataclasses.replace(ring(4), mask=packed)
    balanced.config.attention.layout = "balanced"
    assert balanced.parts.attention < zigzag.parts.attention
    slow = dataclasses.replace(balanced, cluster=dataclasses.replace(H200S, link_within_gb_per_s=1.0))
    assert slow.parts.messages > balanced.parts.messages


def test_all_tiles_of_a_part_are_one_call():
    calls: list[TileRows] = []

    def count(tiles: TileRows) -> float:
        calls.append(tiles)
        return 1.0

    exchange(dataclasses.replace(costs(), tiles_s=count))
    assert len(calls) == 2 * TWO.ring_degree
