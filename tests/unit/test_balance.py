"""The balanced layout: equal tokens, nearly equal work, short documents whole, and few kernel calls."""

from __future__ import annotations

import itertools
import random
import time
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention import CAUSAL
from ring_attention.balance import balanced_spans
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout
from ring_attention.ring import backward_calls, forward_calls
from ring_attention.schedule import tokens_sent, work_per_rank
from tests.tools.packed_speed import mixes

VARLEN = KERNELS["flash_attn_4"]


def log_normal_ends(length: int, seed: int) -> tuple[int, ...]:
    """Documents of 64 to 32,768 tokens."""
    generator, ends = random.Random(seed), [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + int(min(32768, max(64, generator.lognormvariate(7.3, 1.3))))))
    return tuple(ends)


def imbalance(layout: Layout, ends: tuple[int, ...]) -> float:
    work = [sum(of_rank) for of_rank in work_per_rank(layout, CAUSAL.packed(ends))]
    return max(work) * len(work) / sum(work)


def test_one_document_is_zigzag():
    assert balanced_spans((0, 16), 16, 2) == (((0, 4), (12, 16)), ((4, 8), (8, 12)))
    assert balanced_spans((0,), 16, 2) == balanced_spans((0, 16), 16, 2)


def test_short_documents_are_whole_and_long_ones_spread():
    # the first has 136 of 172 pairs, the others 10, 10, 10, 3 and 3
    ends = (0, 16, 20, 24, 28, 30, 32)
    assert balanced_spans(ends, 32, 2) == (
        ((16, 20), (24, 28), (0, 4), (12, 16)),
        ((20, 24), (28, 30), (30, 32), (4, 8), (8, 12)),
    )


def test_a_document_is_spread_over_no_more_ranks_than_it_takes():
    # of 12, 12, 2, 2, 2 and 2 tokens: a rank has 8, and 42 pairs on average, of which the long ones have 78
    assert balanced_spans((0, 12, 24, 26, 28, 30, 32), 32, 4) == (
        ((24, 26), (0, 3), (9, 12)),
        ((26, 28), (3, 6), (6, 9)),
        ((28, 30), (12, 15), (21, 24)),
        ((30, 32), (15, 18), (18, 21)),
    )


def test_as_many_equal_documents_as_ranks_are_one_a_rank():
    assert balanced_spans((0, 8, 16, 24, 32), 32, 4) == (((0, 8),), ((8, 16),), ((16, 24),), ((24, 32),))


def test_a_document_that_fits_nowhere_is_cut():
    """Its pieces lie behind whole documents, and before those of spread ones."""
    assert balanced_spans((0, 3, 6), 6, 3) == (((0, 1), (2, 3)), ((5, 6), (1, 2)), ((3, 5),))


def test_few_documents_are_spread_over_few_ranks():
    """Of the benchmark's mix on a ring of 8, the longest has 2.2 times the mean work, the next 1.9, 0.9 and 0.7 times.

    Three more are not whole: one of a third of the mean work, and two short ones that fitted nowhere.
    """
    ends = tuple(itertools.accumulate(mixes(65536)["log-normal"], initial=0))
    layout, mask = Layout("balanced", 8, 65536, documents=ends), CAUSAL.packed(ends)
    ranks_of: dict[int, set[int]] = {}
    for rank in range(8):
        for run in layout.runs(rank):
            ranks_of.setdefault(bisect_right(ends, run.start), set()).add(rank)
    longest = sorted(ranks_of, key=lambda number: ends[number - 1] - ends[number])
    assert [len(ranks_of[number]) for number in longest[:4]] == [3, 2, 1, 1]
    assert sum(len(ranks) > 1 for ranks in ranks_of.values()) == 5
    assert max(tokens_sent(layout, mask, rank)[0] for rank in range(8)) < 0.75 * 8192


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_position_is_on_one_rank_and_all_have_equally_many(lengths: list[int], degree: int):
    ends = tuple(itertools.accumulate(lengths, initial=0))
    layout = Layout("balanced", degree, ends[-1], documents=ends)
    positions = [layout.positions(rank).tolist() for rank in range(degree)]
    assert {len(of_rank) for of_rank in positions} == {layout.local_length}
    assert sorted(itertools.chain(*positions)) == [*range(layout.padded_length)]


@pytest.mark.parametrize("degree", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_work_is_balanced_on_a_log_normal_mix(degree: int, seed: int):
    """8,192 tokens a rank, or 65,536 in all: in both the longest documents have much of the work."""
    for length in {65536, 8192 * degree}:
        ends = log_normal_ends(length, seed)
        spans = balanced_spans(ends, length, degree)
        starts = {stop: start for start, stop in itertools.pairwise(ends)}
        work = []
        for of_rank in spans:
            pairs = 0
            for start, stop in of_rank:
                first = max(begin for begin in (*starts.values(), 0) if begin <= start)
                pairs += sum(range(start - first + 1, stop - first + 1))
            work.append(pairs)
        assert max(work) * degree <= 1.05 * sum(work)


@pytest.mark.parametrize("degree", [2, 8])
def test_kernel_calls_and_messages_are_few(degree: int):
    ends = log_normal_ends(65536, 1)
    layout, mask = Layout("balanced", degree, 65536, documents=ends), CAUSAL.packed(ends)
    for rank, plan in itertools.product(range(degree), (forward_calls, backward_calls)):
        assert max(map(len, plan(layout, mask, rank, 1, VARLEN))) <= 6
    assert imbalance(layout, ends) <= 1.05
    short = tuple(range(0, 65537, 256))
    layout, mask = Layout("balanced", degree, 65536, documents=short), CAUSAL.packed(short)
    assert all(tokens_sent(layout, mask, rank) == (0, 0) for rank in range(degree))
    assert imbalance(layout, short) == 1


@pytest.mark.parametrize("degree", [2, 8, 64])
def test_a_thousand_documents_are_laid_out_in_milliseconds(degree: int):
    generator = random.Random(0)
    ends = tuple(itertools.accumulate((int(generator.lognormvariate(6.5, 1)) + 1 for _ in range(1000)), initial=0))
    length = ends[-1] + -ends[-1] % degree
    balanced_spans.cache_clear()
    started = time.process_time()
    balanced_spans(ends, length, degree)
    assert time.process_time() - started < 0.05  # 1 to 4 ms on a quiet machine
