import pytest
import torch

from ring_attention.layout import LAYOUTS, Layout
from ring_attention.schedule import BlockPair, Stage, causal_schedule, imbalance, work_per_rank


def test_zigzag_on_three_ranks():
    layout = Layout("zigzag", ring_degree=3, length=12)  # chunks of 2, 4 tokens a rank
    square = BlockPair(0, 4, 0, 4, causal=True)
    early_keys = BlockPair(0, 4, 0, 2, causal=False)
    late_queries = BlockPair(2, 4, 0, 4, causal=False)
    assert causal_schedule(layout, 0) == (Stage(0, square), Stage(2, late_queries), Stage(1, late_queries))
    assert causal_schedule(layout, 1) == (Stage(1, square), Stage(0, early_keys), Stage(2, late_queries))
    assert causal_schedule(layout, 2) == (Stage(2, square), Stage(1, early_keys), Stage(0, early_keys))


def test_contiguous_on_three_ranks():
    layout = Layout("contiguous", ring_degree=3, length=12)
    square, full = BlockPair(0, 4, 0, 4, causal=True), BlockPair(0, 4, 0, 4, causal=False)
    assert causal_schedule(layout, 0) == (Stage(0, square), Stage(2, None), Stage(1, None))
    assert causal_schedule(layout, 1) == (Stage(1, square), Stage(0, full), Stage(2, None))
    assert causal_schedule(layout, 2) == (Stage(2, square), Stage(1, full), Stage(0, full))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 5, 16, 31])
def test_every_causal_pair_of_tokens_is_computed_exactly_once(name: str, ring_degree: int, length: int):
    layout = Layout(name, ring_degree, length)
    seen = torch.zeros(layout.padded_length, layout.padded_length, dtype=torch.int)
    for rank in range(ring_degree):
        queries = layout.positions(rank)
        for stage in causal_schedule(layout, rank):
            if (pair := stage.pair) is None:
                continue
            block = torch.ones(pair.q_stop - pair.q_start, pair.k_stop - pair.k_start, dtype=torch.int)
            rows = queries[pair.q_start : pair.q_stop]
            columns = layout.positions(stage.source)[pair.k_start : pair.k_stop]
            seen[rows[:, None], columns[None, :]] += block.tril() if pair.causal else block
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_work_counts_query_key_pairs():
    assert work_per_rank(Layout("zigzag", 2, 8)) == [[10, 8], [10, 8]]
    assert work_per_rank(Layout("contiguous", 2, 8)) == [[10, 0], [10, 16]]


@pytest.mark.parametrize("ring_degree", [2, 4, 8, 64])
def test_zigzag_is_balanced_and_contiguous_is_not(ring_degree: int):
    assert imbalance(Layout("zigzag", ring_degree, 128 * ring_degree)) == 1.0
    assert imbalance(Layout("contiguous", ring_degree, 128 * ring_degree)) > 1.3
