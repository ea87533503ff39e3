"""What the ring does in which order, without a neighbour: what is computed while messages fly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention import CAUSAL, FULL, LocalAttention, Mask
from ring_attention.accumulators import GradientAccumulator, PiecewiseSum
from ring_attention.kernels import KERNELS, KernelParams, SavedTensors
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.masked_block import MaskedBlock
from ring_attention.ring import LocalBlock, Part, Ring, ring_backward, ring_forward, split
from ring_attention.schedule import AttentionTile, ring_schedule


class Recorder:
    """For an exchange and a kernel: says what was asked for. Messages that come are 0."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._block = KERNELS["reference"]

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[Any], receives: list[Any]) -> Any:
        events = self.events
        events.append(f"post {purpose}")

        class Transfer:
            def wait(self) -> None:
                events.append(f"wait {purpose}")

        return Transfer()

    def split(self, block: MaskedBlock) -> list[MaskedBlock]:
        return self._block.split(block)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        self.events.append(f"forward {q.shape[1]} x {k.shape[1]}")
        return self._block.forward(q, k, v, params)

    def backward(self, dout: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        self.events.append(f"backward {saved.q_BSHD.shape[1]} x {saved.k_BTKD.shape[1]}")
        return self._block.backward(dout, saved, params)


def events(ring_degree: int, ring_rank: int, batch: int = 1) -> list[str]:
    layout, recorder = Layout("zigzag", ring_degree, 8 * ring_degree), Recorder()
    q, k, v, dout = torch.randn(4, batch, 8, 2, 16)
    fake: Any = recorder
    ring = Ring(ring_schedule(layout, CAUSAL, ring_rank), fake, fake, 0.25)
    out, lse = ring_forward(ring, q, KeysValues(k, v))
    ring_backward(ring, dout, q, KeysValues(k, v), out, lse)
    return recorder.events


def test_on_a_ring_of_two_every_hop_flies_beside_a_block():
    assert events(2, 0) == [
        "post forward K,V after ring step 0",
        "forward 8 x 8",
        "wait forward K,V after ring step 0",
        "forward 4 x 8",
        "post backward K,V after ring step 0",
        "backward 4 x 8",  # the late queries
        "wait backward K,V after ring step 0",
        "backward 4 x 8",
        "post backward dK,dV after ring step 1",
        "backward 4 x 4",  # the early ones
        "wait backward dK,dV after ring step 1",
    ]


def test_on_a_longer_ring_gradients_follow_one_stage_behind():
    backward = [event for event in events(4, 2) if "forward" not in event]
    assert backward == [
        "post backward K,V after ring step 0",
        "backward 4 x 8",
        "wait backward K,V after ring step 0",
        "post backward K,V after ring step 1",
        "backward 8 x 4",
        "post backward dK,dV after ring step 1",
        "wait backward K,V after ring step 1",
        "post backward K,V after ring step 2",
        "backward 8 x 4",
        "wait backward dK,dV after ring step 1",
        "post backward dK,dV after ring step 2",
        "wait backward K,V after ring step 2",
        "backward 4 x 8",
        "wait backward dK,dV after ring step 2",
        "post backward dK,dV after ring step 3",
        "backward 4 x 4",
        "wait backward dK,dV after ring step 3",
    ]


def square(row: int | None = None) -> AttentionTile:
    return AttentionTile(row, MaskedBlock(0, 8, 0, 8, None, 0))


@pytest.mark.parametrize("mask", [CAUSAL, FULL.packed([0, 32]), Mask(left=31), Mask(left=5)])
def test_the_halves_of_a_local_block_are_all_of_it(mask: Mask):
    pairs = ring_schedule(Layout("zigzag", 2, 32), mask, 0)[0].pairs
    local = split(pairs, KERNELS["reference"], batch=1)
    halves = [*local.at_once.pairs, *(local.later.pairs if local.later else ())]
    assert sum(pair.rectangle.work for pair in halves) == sum(pair.rectangle.work for pair in pairs)
    if len(pairs) > 1:
        assert local.later is None
    else:
        assert [pair.rectangle.q_start for pair in halves] == [8, 0]
        assert [pair.rectangle.q_stop for pair in halves] == [16, 8]


def test_a_causal_square_is_split_into_all_that_late_queries_see_and_a_smaller_square():
    local = split((square(),), KERNELS["reference"], batch=1)
    assert local.at_once == Part((AttentionTile(None, MaskedBlock(4, 8, 0, 8, None, 4)),))
    assert local.later == Part((AttentionTile(None, MaskedBlock(0, 4, 0, 4, None, 0)),))


@pytest.mark.parametrize("kernel", ["reference", "ffpa"])
def test_of_several_rows_half_is_computed_later(kernel: str):
    local = split((square(),), KERNELS[kernel], batch=5)
    assert local.at_once == Part((square(),), slice(2, 5))
    assert local.later == Part((square(),), slice(0, 2))


def test_a_kernel_that_needs_several_calls_for_a_half_gets_the_whole():
    assert len(KERNELS["ffpa"].split(MaskedBlock(4, 8, 0, 8, None, 4))) == 2
    assert split((square(),), KERNELS["ffpa"], batch=1) == LocalBlock(Part((square(),)))


@pytest.mark.parametrize("ring_degree", range(2, 9))
def test_in_a_causal_zigzag_gradients_come_home_after_every_stage_and_the_last(ring_degree: int):
    """So that half of the local block is left for then."""
    layout = Layout("zigzag", ring_degree, 16 * ring_degree)
    for ring_rank in range(ring_degree):
        stages = ring_schedule(layout, CAUSAL, ring_rank)
        assert [stage.home is not None for stage in stages] == [False] + [True] * (ring_degree - 1)


def test_one_query_is_not_split():
    pairs = (AttentionTile(None, MaskedBlock(0, 1, 0, 1, None, 0)),)
    assert split(pairs, KERNELS["reference"], batch=2) == LocalBlock(Part(pairs))


def test_rows_that_differ_are_not_split():
    for pairs in ((square(0), square(1)), (square(0),)):
        assert split(pairs, KERNELS["reference"], batch=2) == LocalBlock(Part(pairs))


def test_no_sequences_at_all_have_gradients():
    leaves = [torch.empty(0, 8, 2, 16, requires_grad=True) for _ in range(3)]
    LocalAttention("reference")(*leaves, 0).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4])
def test_each_piece_of_dq_ends_with_its_last_part(ring_degree: int, batch: int, monkeypatch: pytest.MonkeyPatch):
    """So that it is written once. Of several rows, early queries that are computed at once may end before the last
    block, which has none of them.
    """
    make, add = PiecewiseSum.__init__, GradientAccumulator.add
    made: list[PiecewiseSum] = []  # of which dq is the first
    flags: dict[GradientAccumulator, list[bool]] = {}

    def making(self: PiecewiseSum, *args: Any) -> None:
        make(self, *args)
        made.append(self)

    def adding(self: GradientAccumulator, row: slice, tokens: slice, part: Tensor, is_last: bool) -> None:
        flags.setdefault(self, []).append(is_last)
        add(self, row, tokens, part, is_last)

    monkeypatch.setattr(PiecewiseSum, "__init__", making)
    monkeypatch.setattr(GradientAccumulator, "add", adding)
    for ring_rank in range(ring_degree):
        made.clear()
        events(ring_degree, ring_rank, batch)
        of_pieces = [flags[piece] for piece in made[0]._pieces]
        assert len(of_pieces) == (1 if ring_degree == 1 else 2 * batch)
        assert not any(any(own[:-1]) for own in of_pieces), of_pieces
        ends = [own[-1] for own in of_pieces]
        if len(ends) == 4:
            del ends[2]
        assert all(ends), of_pieces


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_comes_home_is_added_in_fp32_until_the_last(dtype: torch.dtype, is_kept: bool):
    """Two halves of a unit in the last place, which no sum in 16 bits would see."""
    unit = 2 / torch.finfo(dtype).eps
    everything, tokens = slice(None), slice(0, 2)
    big, one = (torch.full((1, 2, 1, 4), x, dtype=dtype) for x in (unit, 1.0))
    total = GradientAccumulator(big.shape, dtype)
    if is_kept:
        total.add(everything, tokens, big, False)
        total.add_several([(everything, tokens, one)], False)
    else:
        total.add_several([(everything, tokens, big), (everything, tokens, one)], False)
    total.add_several([(everything, tokens, one)], True)
    assert torch.equal(total.result(), big + 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ring_degree", [2, 3, 4, 5, 6])
def test_own_gradients_are_rounded_with_the_last_and_added_two_stages_at_a_time(
    ring_degree: int, batch: int, monkeypatch: pytest.MonkeyPatch
):
    add_several = GradientAccumulator.add_several
    calls: list[tuple[GradientAccumulator, int, bool]] = []

    def adding(self: GradientAccumulator, parts: Any, is_last: bool) -> None:
        calls.append((self, len(parts), is_last))
        add_several(self, parts, is_last)

    monkeypatch.setattr(GradientAccumulator, "add_several", adding)
    for ring_rank in range(ring_degree):
        calls.clear()
        events(ring_degree, ring_rank, batch)
        for total in {call[0] for call in calls}:
            own = [call[1:] for call in calls if call[0] is total]
            assert [is_last for _, is_last in own] == [False] * (len(own) - 1) + [True]
            early = [num_parts for num_parts, _ in own[:-1] if num_parts]
            assert all(num_parts == 2 for num_parts in early[:-1])
