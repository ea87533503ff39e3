"""The balanced layout: equal tokens, nearly equal work, short documents whole, and few kernel calls."""

from __future__ import annotations

import itertools
import random
import time
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention import CAUSAL, FULL
from ring_attention.balance import balanced_spans, burden_of, most_shards
from ring_attention.direct_routing import goes_direct, local_runs
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout, num_tokens
from ring_attention.line import dealt_spans
from ring_attention.placement import Document, pairs, placed_spans
from ring_attention.ring import backward_calls, forward_calls
from ring_attention.routing import required_keys
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


def documents_of(ends: tuple[int, ...]) -> list[Document]:
    """The longest first."""
    documents = [(start, stop, pairs(stop - start)) for start, stop in itertools.pairwise(ends)]
    return sorted(documents, key=lambda document: -document[2])


def test_one_document_is_zigzag():
    assert balanced_spans((0, 16), 16, 2) == (((0, 4), (12, 16)), ((4, 8), (8, 12)))
    assert balanced_spans((0,), 16, 2) == balanced_spans((0, 16), 16, 2)


def test_as_many_equal_documents_as_ranks_are_one_a_rank():
    assert balanced_spans((0, 8, 16, 24, 32), 32, 4) == (((0, 8),), ((8, 16),), ((16, 24),), ((24, 32),))


class TestPlacement:
    """Whole or spread as zigzag does, on ranks with no more than so much work."""

    def test_short_documents_are_whole_and_long_ones_spread(self):
        # the first has 136 of 172 pairs, the others 10, 10, 10, 3 and 3
        assert placed_spans(documents_of((0, 16, 20, 24, 28, 30, 32)), 16, 2, 90) == (
            ((16, 20), (24, 28), (0, 4), (12, 16)),
            ((20, 24), (28, 30), (30, 32), (4, 8), (8, 12)),
        )

    def test_a_document_is_spread_over_no_more_ranks_than_it_takes(self):
        # of 12, 12, 2, 2, 2 and 2 tokens: a rank has 8, and 42 pairs on average, of which the long ones have 78
        assert placed_spans(documents_of((0, 12, 24, 26, 28, 30, 32)), 8, 4, 44) == (
            ((24, 26), (0, 3), (9, 12)),
            ((26, 28), (3, 6), (6, 9)),
            ((28, 30), (12, 15), (21, 24)),
            ((30, 32), (15, 18), (18, 21)),
        )

    def test_a_document_that_fits_nowhere_is_cut(self):
        """Its pieces lie behind whole documents, and before those of spread ones."""
        assert placed_spans(documents_of((0, 3, 6)), 2, 3, 4) == (((0, 1), (2, 3)), ((5, 6), (1, 2)), ((3, 5),))


class TestDealing:
    """From both ends of a line of documents."""

    def test_one_document_is_zigzag(self):
        assert dealt_spans(documents_of((0, 16)), 4, 4, 1) == (
            *(((0, 2), (14, 16)), ((2, 4), (12, 14)), ((4, 6), (10, 12))),
            ((6, 10),),
        )

    def test_a_rank_takes_short_documents_and_the_end_of_a_long_one(self):
        # pairs: 136 + 3 * 10 + 2 * 3 = 172. The first rank has 36 and the 58 of the last four tokens of the longest.
        ends = (0, 16, 20, 24, 28, 30, 32)
        assert dealt_spans(documents_of(ends), 16, 2, 0) == (
            ((20, 24), (24, 28), (28, 30), (30, 32), (12, 16)),
            ((16, 20), (0, 12)),
        )

    def test_a_cut_can_be_dearer_than_unequal_work(self):
        """Of 240 and 160, and of 200 and 200 tokens: 41,800 and 40,200 pairs."""
        documents = documents_of((0, 240, 400, 600, 800))
        assert dealt_spans(documents, 400, 2, 100) == (((0, 240), (240, 400)), ((400, 600), (600, 800)))
        cut = burden_of(documents, dealt_spans(documents, 400, 2, 0))
        assert cut.work < 41_100
        assert cut.exchanged > 0

    @given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 8), st.sampled_from((0, 200, 10**6)))
    @settings(max_examples=200, deadline=None)
    def test_every_token_is_dealt_once_and_a_document_has_few_pieces(self, lengths, degree, cut):
        ends = (*itertools.accumulate(lengths, initial=0),)
        ends = ends if ends[-1] % degree == 0 else (*ends, ends[-1] + -ends[-1] % degree)
        dealt = dealt_spans(documents_of(ends), ends[-1] // degree, degree, cut)
        assert [sum(stop - start for start, stop in of_rank) for of_rank in dealt] == [ends[-1] // degree] * degree
        spans = sorted(span for of_rank in dealt for span in of_rank)
        assert spans[0][0] == 0
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans))
        pieces = [(rank, bisect_right(ends, start)) for rank, of_rank in enumerate(dealt) for start, _ in of_rank]
        assert len(pieces) - len(set(pieces)) <= (degree if len(ends) == 2 else degree - 1)
        assert all(bisect_right(ends, start) == bisect_right(ends, stop - 1) for start, stop in spans)


def test_long_documents_of_the_benchmark_are_cut_into_few_pieces():
    """Of its mix on a ring of 8, the longest has 2.2 times the mean work, the next 1.9, 0.9 and 0.7 times.

    Zigzag would need up to 10,260 keys of other ranks, and copy up to 14,959.
    """
    ends = tuple(itertools.accumulate(mixes(65536)["log-normal"], initial=0))
    layout, mask = Layout("balanced", 8, 65536, documents=ends), CAUSAL.packed(ends)
    of_ranks = [local_runs(layout, mask, rank).of_rest for rank in range(8)]
    assert max(sum(run.stop - first_key for run, first_key, _ in of_rest) for of_rest in of_ranks) == 12_626
    assert max(sum(run.start - first_key for run, first_key, _ in of_rest) for of_rest in of_ranks) == 6_932
    assert max(len(of_rest) for of_rest in of_ranks) == 3
    assert max(tokens_sent(layout, mask, rank)[0] for rank in range(8)) == 8_444


MIX, LONG = (40_000, 20_000, 4_000, 1_536), (640_000, 320_000, 64_000, 24_576)  # of long ones, copies take no time
EXACT = 10_204, 10_196  # without a token of room to spare, and neither is a multiple of chunks


@pytest.mark.parametrize("lengths", [MIX, (30_000, 15_000, 15_000, 5_536), LONG, EXACT], ids=str)
@pytest.mark.parametrize("degree", [4, 8])
def test_work_is_balanced_in_each_ring_step_of_long_documents(lengths: tuple[int, ...], degree: int):
    ends = tuple(itertools.accumulate(lengths, initial=0))
    layout, mask = Layout("balanced", degree, ends[-1], documents=ends), CAUSAL.packed(ends)
    assert not goes_direct(layout, mask)
    of_steps = [max(of_step) * degree for of_step in zip(*work_per_rank(layout, mask), strict=True)]
    assert sum(of_steps) <= 1.05 * sum(map(pairs, lengths))


def test_a_ring_between_hosts_sends_fewer_keys():
    """Eight ranks, each of which shares its tokens with Ulysses ranks on its host. A document is on four of them."""
    ends = (0, 32_768, 65_536)
    sent = []
    for ulysses_degree in (1, 8):
        layout = Layout("balanced", 8, ends[-1], ulysses_degree, ends)
        sent.append(sum(tokens_sent(layout, CAUSAL.packed(ends), rank)[0] for rank in range(8)))
    assert sent[1] < 0.6 * sent[0]


def test_other_masks_have_equal_work_too():
    """Where queries see the whole document, pieces of unequal length would have unequal work."""
    ends = tuple(itertools.accumulate(mixes(65536)["log-normal"], initial=0))
    imbalances = []
    for is_causal in (True, False):
        layout = Layout("balanced", 8, 65536, documents=ends, is_causal=is_causal)
        work = [sum(of_rank) for of_rank in work_per_rank(layout, FULL.packed(ends))]
        imbalances.append(max(work) * 8 / sum(work))
    assert imbalances[0] > 1.2
    assert imbalances[1] < 1.06


@pytest.mark.parametrize("seed", range(20))
def test_the_layout_knows_what_ranks_exchange(seed: int):
    """As much as one exchange of its spans would be, whether a pass makes it or goes around the ring."""
    generator = random.Random(seed)
    degree = generator.choice((2, 3, 4, 8))
    lengths = [int(generator.lognormvariate(6, 1)) + 1 for _ in range(generator.randint(2, 30))]
    ends = tuple(itertools.accumulate([*lengths, -sum(lengths) % degree or degree], initial=0))
    layout, mask = Layout("balanced", degree, ends[-1], documents=ends), CAUSAL.packed(ends)
    needed = [
        sum(run.start - first_key for run, first_key, _ in local_runs(layout, mask, rank).of_rest)
        for rank in range(degree)
    ]
    sent = [sum(num_tokens(spans) for spans in of_rank) for of_rank in required_keys(layout, mask)]
    spans = balanced_spans(ends, ends[-1], degree)
    assert burden_of(documents_of(ends), spans).exchanged == max(*needed, *sent)
    assert goes_direct(layout, mask) == (max(*needed, *sent) < most_shards(degree) * layout.ring_length)


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
