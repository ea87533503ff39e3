"""What the ring does in which order, without a neighbour: what is computed while messages fly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention import CAUSAL, FULL, Mask
from ring_attention.band import Rectangle
from ring_attention.blocks import BLOCKS
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.ring import Ring, ring_backward, ring_forward, split_queries
from ring_attention.running import PiecewiseSum
from ring_attention.schedule import BlockPair, ring_schedule


class Recorder:
    """For an exchange and a kernel: says what was asked for. Messages that come are 0."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._block = BLOCKS["reference"]

    def room(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[Any], receives: list[Any]) -> Any:
        events = self.events
        events.append(f"post {purpose}")

        class Hop:
            def wait(self) -> None:
                events.append(f"wait {purpose}")

        return Hop()

    def tiles(self, rectangle: Rectangle) -> list[Rectangle]:
        return self._block.tiles(rectangle)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *band: Any) -> tuple[Tensor, Tensor]:
        self.events.append(f"forward {q.shape[1]} x {k.shape[1]}")
        return self._block.forward(q, k, v, *band)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.events.append(f"backward {q.shape[1]} x {k.shape[1]}")
        return self._block.backward(dout, q, k, *rest)


def events(ring_degree: int, ring_rank: int) -> list[str]:
    layout, recorder = Layout("zigzag", ring_degree, 8 * ring_degree), Recorder()
    q, k, v, dout = torch.randn(4, 1, 8, 2, 16)
    fake: Any = recorder
    ring = Ring(ring_schedule(layout, CAUSAL, ring_rank), fake, fake, 0.25)
    out, lse = ring_forward(ring, q, KeysValues(k, v))
    ring_backward(ring, dout, q, KeysValues(k, v), out, lse)
    return recorder.events


def test_on_a_ring_of_two_every_hop_flies_beside_a_block():
    assert events(2, 0) == [
        "post forward K,V after stage 0",
        "forward 8 x 8",
        "wait forward K,V after stage 0",
        "forward 4 x 8",
        "post backward K,V after stage 0",
        "backward 4 x 8",  # the late queries
        "wait backward K,V after stage 0",
        "backward 4 x 8",
        "post backward dK,dV after stage 1",
        "backward 4 x 4",  # the early ones
        "wait backward dK,dV after stage 1",
    ]


def test_on_a_longer_ring_gradients_follow_one_stage_behind():
    backward = [event for event in events(4, 2) if "forward" not in event]
    assert backward == [
        "post backward K,V after stage 0",
        "backward 4 x 8",
        "wait backward K,V after stage 0",
        "post backward K,V after stage 1",
        "backward 8 x 4",
        "post backward dK,dV after stage 1",
        "wait backward K,V after stage 1",
        "post backward K,V after stage 2",
        "backward 8 x 4",
        "wait backward dK,dV after stage 1",
        "post backward dK,dV after stage 2",
        "wait backward K,V after stage 2",
        "backward 4 x 8",
        "wait backward dK,dV after stage 2",
        "post backward dK,dV after stage 3",
        "backward 4 x 4",
        "wait backward dK,dV after stage 3",
    ]


@pytest.mark.parametrize("mask", [CAUSAL, FULL.packed([0, 32]), Mask(left=31), Mask(left=5)])
def test_the_halves_of_a_local_block_are_all_of_it(mask: Mask):
    pairs = ring_schedule(Layout("zigzag", 2, 32), mask, 0)[0].pairs
    at_once, later = split_queries(pairs, BLOCKS["reference"])
    halves = [*at_once, *([later] if later else [])]
    assert sum(pair.rectangle.work for pair in halves) == sum(pair.rectangle.work for pair in pairs)
    if len(pairs) > 1:
        assert later is None
    else:
        assert [pair.rectangle.q_start for pair in halves] == [8, 0]
        assert [pair.rectangle.q_stop for pair in halves] == [16, 8]


def test_a_causal_square_is_split_into_all_that_late_queries_see_and_a_smaller_square():
    at_once, later = split_queries((BlockPair(None, Rectangle(0, 8, 0, 8, None, 0)),), BLOCKS["reference"])
    assert at_once == (BlockPair(None, Rectangle(4, 8, 0, 8, None, 4)),)
    assert later == BlockPair(None, Rectangle(0, 4, 0, 4, None, 0))


def test_a_kernel_that_needs_several_calls_for_a_half_gets_the_whole():
    pairs = (BlockPair(None, Rectangle(0, 8, 0, 8, None, 0)),)
    assert len(BLOCKS["ffpa"].tiles(Rectangle(4, 8, 0, 8, None, 4))) == 2
    assert split_queries(pairs, BLOCKS["ffpa"]) == (pairs, None)


def test_rows_that_differ_are_not_split():
    pairs = (BlockPair(0, Rectangle(0, 8, 0, 8, None, 0)), BlockPair(1, Rectangle(0, 8, 0, 8, None, 0)))
    assert split_queries(pairs, BLOCKS["reference"]) == (pairs, None)
    assert split_queries(pairs[:1], BLOCKS["reference"]) == (pairs[:1], None)


@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4])
def test_each_piece_of_dq_ends_with_its_last_part(ring_degree: int, monkeypatch: pytest.MonkeyPatch):
    """So that it is rounded once."""
    add, flags = PiecewiseSum.add, {}

    def recording(self: PiecewiseSum, row: slice, tokens: slice, part: Tensor, is_last: tuple[bool, ...]) -> None:
        for piece, ((start, stop), ends) in enumerate(zip(self._runs, is_last, strict=True)):
            if max(start, tokens.start) < min(stop, tokens.stop):
                flags.setdefault(piece, []).append(ends)
        add(self, row, tokens, part, is_last)

    monkeypatch.setattr(PiecewiseSum, "add", recording)
    for ring_rank in range(ring_degree):
        flags.clear()
        events(ring_degree, ring_rank)
        assert len(flags) == (1 if ring_degree == 1 else 2)
        assert all(own[-1] and not any(own[:-1]) for own in flags.values()), flags
