"""A pass over packed documents in one exchange: literal plans, when it is chosen, and how many kernel calls it has."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from recipes.benchmark.rank_alone import rank_alone
from ring_attention import CAUSAL, FULL, Mask
from ring_attention.balance import MOST_SHARDS
from ring_attention.direct import attend_over_ring
from ring_attention.direct_plan import DirectPlan, direct_plan
from ring_attention.direct_routing import Parcel, goes_direct, local_runs, parcels, tokens_sent
from ring_attention.kernels import KERNELS, GradientTargets, KernelParams, SavedTensors, Scores
from ring_attention.kernels.base import Segments, band_mask
from ring_attention.kernels.reference import ReferenceKernel
from ring_attention.layout import LAYOUTS, Layout, num_tokens
from ring_attention.masked_block import MaskedBlock
from ring_attention.routing import required_keys
from ring_attention.row_sums import KeysAndValues
from tests.tools.packed_speed import mixes
from tests.unit.test_balance import log_normal_ends

VARLEN = KERNELS["flash_attn_4"]

# the first rank has a whole document and the start of one, the second its end and a whole one
TWO, TWO_MASK = Layout("contiguous", 2, 16), CAUSAL.packed([0, 6, 10, 16])
# documents of 12, 12, 2, 2, 2 and 2 tokens, the long ones over two ranks
FOUR_ENDS = (0, 12, 24, 26, 28, 30, 32)
FOUR, FOUR_MASK = Layout("balanced", 4, 32, documents=FOUR_ENDS), CAUSAL.packed(FOUR_ENDS)


def shown(plan: DirectPlan) -> list[list[tuple]]:
    """Block and segments of each call of both parts."""
    return [
        [(call.block, call.segments and [*call.segments.lengths]) for call in calls]
        for calls in (plan.whole_calls, plan.rest_calls)
    ]


def indices(plan: DirectPlan) -> tuple:
    sent, keys, returned, own = plan.indices(torch.device("cpu"))
    return sent.tolist(), keys.tolist(), *([x.tolist() for x in sums] for sums in (returned, own))


def test_the_end_of_a_document_gets_its_start():
    first, second = (DirectPlan(TWO, TWO_MASK, rank, 1, VARLEN) for rank in range(2))
    assert (first.whole, first.rest, second.whole, second.rest) == ((0, 6), (6, 8), (2, 8), (0, 2))
    assert shown(first) == [[(MaskedBlock(0, 6, 0, 6, None, 0), None)], [(MaskedBlock(0, 2, 0, 2, None, 0), None)]]
    assert shown(second) == [[(MaskedBlock(0, 6, 0, 6, None, 0), None)], [(MaskedBlock(0, 2, 0, 4, None, 2), None)]]
    assert (first.own_parcels, first.received_parcels) == ((Parcel(1, 2, 0, 0),), ())
    assert (second.own_parcels, second.received_parcels) == ((), (Parcel(0, 2, 0, 0),))
    # of the first: its gradients are its own and those that return
    assert indices(first) == ([0, 1], [0, 1], [[], []], [[0, 2, 1, 3], [0, 2]])
    # of the second: keys are those that arrive, then its own
    assert indices(second) == ([], [2, 3, 0, 1], [[0, 1], [0, 1]], [[2, 3], [0, 1]])


def test_rows_that_share_their_documents_are_one_call_and_one_message():
    second = DirectPlan(TWO, TWO_MASK, 1, 2, VARLEN)
    assert indices(second)[1] == [4, 5, 0, 1, 6, 7, 2, 3]
    assert [len(calls) for calls in (second.whole_calls, second.rest_calls)] == [1, 1]


def test_runs_of_one_document_copy_their_prefix_each():
    plan = DirectPlan(FOUR, FOUR_MASK, 1, 1, VARLEN)  # has 26 and 27, then 3 to 6 and 6 to 9
    whole = [(MaskedBlock(0, 2, 0, 2, None, 0), None)]
    assert shown(plan) == [whole, [(MaskedBlock(0, 6, 0, 15, None, 0), [(3, 6), (3, 9)])]]
    sent, keys, returned, own = indices(plan)
    assert sent == [0, 1, 2, 3, 4, 5]
    assert keys == [6, 7, 8, 0, 1, 2, 6, 7, 8, 0, 1, 2, 3, 4, 5]  # 6 to 8 arrive
    assert returned == [[0, 6, 1, 7, 2, 8], [0, 2, 4]]
    assert own == [[3, 9, 15, 4, 10, 16, 5, 11, 17, 12, 18, 13, 19, 14, 20], [0, 3, 6, 9, 11, 13]]


def test_a_window_copies_its_own_keys_only():
    mask = Mask(left=1).packed([0, 6, 10, 16])
    (run,) = local_runs(TWO, mask, 1).of_rest
    assert run.first_key == 7
    assert shown(DirectPlan(TWO, mask, 1, 1, VARLEN))[1] == [(MaskedBlock(0, 2, 0, 3, 0, 1), None)]
    assert tokens_sent(TWO, mask) == [(1, 0), (0, 1)]


def test_what_goes_direct():
    assert goes_direct(TWO, TWO_MASK)
    assert goes_direct(FOUR, FOUR_MASK)
    assert not goes_direct(TWO, CAUSAL)
    assert not goes_direct(TWO, FULL.packed([0, 6, 10, 16]))
    assert not goes_direct(TWO, CAUSAL.packed([[0, 6, 16], [0, 10, 16]]))
    assert not goes_direct(Layout("zigzag", 1, 16), TWO_MASK)
    assert direct_plan(TWO, CAUSAL, 0, 1, VARLEN) is None


@pytest.mark.parametrize("degree", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_document_over_all_ranks_goes_around_the_ring(name: str, degree: int):
    ends = (0, 128 * degree)
    assert not goes_direct(
        Layout(name, degree, ends[-1], documents=ends if name == "balanced" else None), CAUSAL.packed(ends)
    )


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths, st.integers(2, 8), st.sampled_from(LAYOUTS), st.sampled_from([None, 0, 3, 20]))
@settings(max_examples=150, deadline=None)
def test_all_ranks_plan_the_same_exchange(lengths: list[int], degree: int, name: str, left: int | None):
    ends = tuple(itertools.accumulate(lengths, initial=0))
    layout = Layout(name, degree, ends[-1], documents=ends if name == "balanced" else None)
    mask = Mask(left).packed(ends)
    of_ranks = [parcels(layout, mask, rank) for rank in range(degree)]
    sent = {(rank, p.peer): p for rank, (own, _) in enumerate(of_ranks) for p in own}
    received = {(p.peer, rank): p for rank, (_, others) in enumerate(of_ranks) for p in others}
    assert sent.keys() == received.keys()
    for pair, parcel in sent.items():
        assert (parcel.num_tokens, parcel.start_at_peer) == (received[pair].num_tokens, received[pair].start)
        assert parcel.start == received[pair].start_at_peer
    for own, others in of_ranks:  # they lie one after the other
        for some in (own, others):
            starts = itertools.accumulate((parcel.num_tokens for parcel in some), initial=0)
            assert [parcel.start for parcel in some] == [*starts][:-1]
    if goes_direct(layout, mask):
        for rank in range(degree):
            check_part(DirectPlan(layout, mask, rank, 1, VARLEN), layout, mask, rank)


def check_part(plan: DirectPlan, layout: Layout, mask: Mask, rank: int) -> None:
    """Each query of the rest sees each key that the mask allows once, and no other."""
    positions = layout.positions(rank)
    rest = positions[plan.rest[0] : plan.rest[1]]
    pool = [rest]
    for parcel in plan.received_parcels:
        spans = required_keys(layout, mask)[parcel.peer][(rank - parcel.peer) % layout.ring_degree]
        assert num_tokens(spans) == parcel.num_tokens
        pool += [layout.positions(parcel.peer)[start:stop] for start, stop in spans]
    keys = torch.cat(pool)[plan.indices(torch.device("cpu")).keys]
    seen = torch.zeros(len(rest), layout.padded_length, dtype=torch.int64)
    for block, segments in shown(plan)[1]:
        of_call = seen[block.q_start : block.q_stop]
        lengths = segments or [(block.num_queries, block.num_keys)]
        band = KernelParams(block.lower, block.upper, 1.0)
        if segments is None:  # counts from the first query and key, segments from the last
            diagonal = block.num_keys - block.num_queries
            lower, upper = (None if bound is None else bound - diagonal for bound in band[:2])
            band = KernelParams(lower, upper, 1.0)
        for inner in Segments(lengths).blocks(band):
            allowed = band_mask(inner.num_queries, inner.num_keys, inner.lower, inner.upper, torch.device("cpu"))
            of_keys = keys[block.k_start + inner.k_start : block.k_start + inner.k_stop]
            of_call[inner.q_start : inner.q_stop].index_add_(1, of_keys, allowed.long())
    assert torch.equal(seen, mask.allows(rest, torch.arange(layout.padded_length)).long())


@pytest.mark.parametrize("left", [None, 1000])
@pytest.mark.parametrize("seed", [None, 0, 4, 5, 6])
def test_a_log_normal_mix_is_two_kernel_calls_on_a_ring_of_eight(seed: int | None, left: int | None):
    """That of the benchmark, and random ones whose documents have up to 8,192 tokens, as many as a rank."""
    ends = [0, *itertools.accumulate(mixes(65536)["log-normal"])] if seed is None else [0]
    generator = random.Random(seed)
    while ends[-1] < 65536:
        ends.append(min(65536, ends[-1] + int(min(8192, max(64, generator.lognormvariate(7.3, 1.3))))))
    layout, mask = Layout("balanced", 8, 65536, documents=tuple(ends)), Mask(left).packed(ends)
    for rank in range(8):
        plan = direct_plan(layout, mask, rank, 1, VARLEN)
        assert plan is not None
        assert len(plan.whole_calls) + len(plan.rest_calls) <= 2


@pytest.mark.parametrize("degree", [2, 4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_memory_stays_within_a_few_shards(degree: int, seed: int):
    ends = log_normal_ends(8192 * degree, seed)
    layout, mask = Layout("balanced", degree, ends[-1], documents=ends), CAUSAL.packed(ends)
    rests = [local_runs(layout, mask, rank).of_rest for rank in range(degree)]
    copies = max(sum(run.start - first_key for run, first_key, _ in rest) for rest in rests)
    sent = max(own for own, _ in tokens_sent(layout, mask))
    assert goes_direct(layout, mask) == (max(copies, sent) < min(MOST_SHARDS, degree / 2) * 8192)


class Stub(ReferenceKernel):
    """Its calls cost nothing that is counted, and write where they are told to."""

    has_varlen = True

    def forward_to(
        self,
        target_BSHE: Tensor | None,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor]:
        assert target_BSHE is not None
        with _disable_current_modes():
            return target_BSHE.zero_(), torch.zeros(1, q_BSHD.shape[2], q_BSHD.shape[1])

    def backward_to(
        self,
        targets: GradientTargets,
        dout_BSHE: Tensor,
        saved: SavedTensors,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _disable_current_modes():
            parts = zip(targets, saved, strict=False)
            dq, dk, dv = (torch.zeros_like(x) if target is None else target.zero_() for target, x in parts)
            return dq, dk, dv


ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)


class Counter(TorchDispatchMode):
    """Counts operations that start a kernel, so neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        starts_nothing = func.is_view or func in ALLOCATIONS or func is torch.ops.aten.promote_types.default
        self.num_operations += not starts_nothing
        return func(*args, **(kwargs or {}))


def one_launch(target: KeysAndValues, *arguments: Any) -> None:
    """Stands for `sum_rows`, which is one kernel on a GPU."""
    target[0].zero_()


def test_the_host_starts_few_operations(monkeypatch: pytest.MonkeyPatch):
    """Beside the kernel calls: each costs it several microseconds."""
    monkeypatch.setattr("ring_attention.direct_exchange.sum_rows", one_launch)
    ends = tuple(itertools.accumulate(mixes(65536)["log-normal"], initial=0))
    layout, mask = Layout("balanced", 8, 65536, documents=ends), CAUSAL.packed(ends)
    ring = rank_alone(layout, mask, 2, Stub(), Scores(1.0))
    dout, *drawn = torch.randn(4, 1, 8192, 1, 8).bfloat16()
    q, k, v = (x.detach().requires_grad_() for x in drawn)
    attend_over_ring(q, k, v, None, ring)  # copies indices once
    with Counter() as forward:
        out = attend_over_ring(q, k, v, None, ring)
    with Counter() as backward:
        out.backward(dout)
    assert forward.num_operations == 4  # copies to send and to compute with; each part's lse, to one tensor
    assert backward.num_operations == 5  # the same copies; sums to return and own ones; the buffer, which is random
