"""The order in which the ring computes, posts and waits, on a single process: what overlaps with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention import CAUSAL, LocalAttention
from ring_attention.accumulators import GradientAccumulator
from ring_attention.kernels import KERNELS, KernelParams, SavedTensors
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.masked_block import MaskedBlock
from ring_attention.ring import Ring, ring_backward, ring_forward


class Recorder:
    """A transport and a kernel that record their calls. Messages that arrive are 0."""

    def __init__(self, ring_rank: int) -> None:
        self.ring_rank = ring_rank
        self.events: list[str] = []
        self._kernel = KERNELS["reference"]

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
        return self._kernel.split(block)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        self.events.append(f"forward {q.shape[1]} x {k.shape[1]}")
        return self._kernel.forward(q, k, v, params)

    def backward(self, dout: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        self.events.append(f"backward {saved.q_BSHD.shape[1]} x {saved.k_BTKD.shape[1]}")
        return self._kernel.backward(dout, saved, params)


def events(ring_degree: int, ring_rank: int, batch: int = 1) -> list[str]:
    layout, recorder = Layout("zigzag", ring_degree, 8 * ring_degree), Recorder(ring_rank)
    q, k, v, dout = torch.randn(4, batch, 8, 2, 16).bfloat16()
    fake: Any = recorder
    ring = Ring(layout, CAUSAL, fake, fake, 0.25)
    kv = KeysValues.of_parts(k, v)
    out, lse = ring_forward(ring, q, kv)
    ring_backward(ring, dout, q, kv, out, lse)
    return recorder.events


def test_every_transfer_of_a_ring_of_two_overlaps_with_attention():
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


def test_gradient_returns_overlap_with_the_next_ring_step():
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


def test_an_empty_batch_has_gradients():
    leaves = [torch.empty(0, 8, 2, 16, requires_grad=True) for _ in range(3)]
    LocalAttention("reference")(*leaves, 0).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4])
def test_each_piece_of_dq_ends_with_its_last_addend(ring_degree: int, batch: int, monkeypatch: pytest.MonkeyPatch):
    """So that it is rounded and written once, in the pass that adds the last one."""
    make, add = GradientAccumulator.__init__, GradientAccumulator.add
    made: list[GradientAccumulator] = []
    addends: dict[int, list[tuple[Any, ...]]] = {}

    def making(self: GradientAccumulator, *args: Any) -> None:
        make(self, *args)
        made.append(self)

    def adding(self: GradientAccumulator, rows: slice, tokens: slice, part: Tensor, ends: int | None = None) -> None:
        addends.setdefault(id(self), []).append((rows, tokens, part, ends))
        add(self, rows, tokens, part, ends)

    monkeypatch.setattr(GradientAccumulator, "__init__", making)
    monkeypatch.setattr(GradientAccumulator, "add", adding)
    for ring_rank in range(ring_degree):
        made.clear()
        addends.clear()
        events(ring_degree, ring_rank, batch)
        dq = made[0]  # the first that a backward pass makes
        assert len(dq._pieces) == (1 if ring_degree == 1 else 2 * batch)
        for piece in dq._pieces:
            met = [ends for *addend, ends in addends[id(dq)] if dq._within(piece, (addend[0], addend[1], addend[2]))]
            assert met[-1] == piece.last_step
            assert piece.last_step not in met[:-1]


@pytest.mark.parametrize("is_taken_over", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_returned_gradients_are_added_in_fp32_until_the_last(dtype: torch.dtype, is_taken_over: bool):
    """Two halves of a unit in the last place, which no sum in 16 bits would see."""
    unit = 2 / torch.finfo(dtype).eps
    everything, tokens = slice(None), slice(0, 2)
    big, one = (torch.full((1, 2, 1, 4), x, dtype=dtype) for x in (unit, 1.0))
    total = GradientAccumulator(big.shape, dtype)
    if is_taken_over:
        total.add(everything, tokens, big)
        total.add_together([(everything, tokens, one)], ends=-1)
    else:
        total.add_together([(everything, tokens, big), (everything, tokens, one)], ends=-1)
    total.add_together([(everything, tokens, one)], ends=0)
    assert torch.equal(total.result(), big + 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ring_degree", [2, 3, 4, 5, 6])
def test_own_gradients_are_rounded_with_the_last_return(ring_degree: int, batch: int, monkeypatch: pytest.MonkeyPatch):
    """Returns are added two at a time, the last one with what was held back."""
    add_together = GradientAccumulator.add_together
    calls: list[tuple[GradientAccumulator, int, int]] = []

    def adding(self: GradientAccumulator, addends: Any, ends: int) -> None:
        calls.append((self, len(addends), ends))
        add_together(self, addends, ends)

    monkeypatch.setattr(GradientAccumulator, "add_together", adding)
    for ring_rank in range(ring_degree):
        calls.clear()
        events(ring_degree, ring_rank, batch)
        for total in {call[0] for call in calls}:
            own = [call[1:] for call in calls if call[0] is total]
            assert [ends in {piece.last_step for piece in total._pieces} for _, ends in own] == [
                *[False] * (len(own) - 1),
                True,
            ]
            assert all(num_addends == 2 for num_addends, _ in own[: (ring_degree - 2) // 2])
            assert own[-1][0] == 2
