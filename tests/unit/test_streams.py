"""The second stream of packed documents' passes, without a GPU: what two streams touch is in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ring_attention.checkpointing import selective_checkpointing
from ring_attention.direct import attend_over_ring
from ring_attention.direct_plan import direct_plan
from ring_attention.kernels import KERNELS, Scores
from ring_attention.ring import Ring
from ring_attention.streams import SideStream
from ring_attention.trace import visible_ring_steps
from ring_attention.transport import P2PMessage, Transfer
from ring_attention.transport.copy_engine import BUFFERS
from tests.cases import Case, draw
from tests.distributed.test_direct import random_cases
from tests.race_detector import RaceDetector

NUM_RANKS, KERNEL = 4, KERNELS["reference"]


class Transport:
    """One rank's. Messages are copied on the network's stream, and what arrives is zeros.

    Receive buffers are new in each pass, as of NCCL, or the same for all, as symmetric memory.
    """

    graphs = None

    def __init__(self, ring_rank: int, detector: RaceDetector, shares_buffers: bool) -> None:
        self.ring_rank, self._detector = ring_rank, detector
        self._buffers = {name: torch.empty(10**5, dtype=torch.float64) for name in BUFFERS if shares_buffers}

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._buffers[name][:numel] if self._buffers else torch.empty(numel, dtype=dtype)

    def post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        detector = self._detector
        detector.network.wait_stream(detector.current)
        with detector.on(detector.network):
            sent = [part for message in sends for part in message.parts]
            for part in sent:
                part.clone()
            for message in receives:
                message.tensor.zero_()
        arrived = detector.network.record_event()
        return Transfer([(purpose, lambda: detector.current.wait_event(arrived))], sent)


def train_a_step(case: Case, rank: int, detector: RaceDetector, shares_buffers: bool) -> bool:
    """Three layers, of which one is recomputed, backward, then one without gradients. Whether there are two parts."""
    layout = case.global_layout
    mask = case.mask.within(layout.padded_length)
    transport: Any = Transport(rank, detector, shares_buffers)
    ring = Ring(layout, mask, transport, KERNEL, Scores(0.3))
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in draw(case))
    sinks = torch.randn(case.num_heads, dtype=torch.float64, requires_grad=True) if case.sinks else None
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_over_ring(q * 1, k * 1, v * 1, sinks, ring)

    with detector.watching():
        x = layer(q, k, v)
        x = checkpoint(layer, x + q, k, v, use_reentrant=False, context_fn=selective_checkpointing)
        layer(x + q, k, v).backward(dout)
        with torch.no_grad():
            layer(q, k, v)
        assert detector.current is detector.main
    plan = direct_plan(layout, mask, rank, case.batch, KERNEL)
    assert plan is not None
    return bool(plan.whole_calls and plan.rest_calls)


def cases(number: int) -> list[Case]:
    changes = {"kernel": "reference", "softcap": None, "value_head_dim": None, "head_dim": 8, "batch_dim_idx": 0}
    return [replace(case, contiguous=True, **changes) for case in random_cases(NUM_RANKS, number)]


@pytest.mark.parametrize("shares_buffers", [False, True])
def test_nothing_is_touched_by_two_streams_without_order(shares_buffers: bool):
    num_on_two_streams = 0
    for case in cases(6):
        for rank in range(NUM_RANKS):
            detector = RaceDetector()
            has_two_parts = train_a_step(case, rank, detector, shares_buffers)
            assert detector.races == set(), (case, rank)
            assert (detector.num_operations["side"] > 0) == has_two_parts
            num_on_two_streams += has_two_parts
    assert num_on_two_streams > NUM_RANKS


def without_waiting(method: str) -> Callable[[SideStream], Any]:
    original = getattr(SideStream, method)

    def mutated(self: SideStream, *exception: object) -> Any:
        with patch("tests.race_detector.Stream.wait_event", lambda *_: None):
            return original(self, *exception)

    return mutated


@pytest.mark.parametrize("method", ["__enter__", "__exit__"])
def test_a_stream_that_does_not_wait_is_found(method: str):
    """So the detector can find something."""
    races = set[str]()
    with patch.object(SideStream, method, without_waiting(method)):
        for case in cases(2):
            for rank in range(NUM_RANKS):
                detector = RaceDetector()
                train_a_step(case, rank, detector, shares_buffers=False)
                races |= detector.races
    assert races


def test_a_pass_whose_ring_steps_are_watched_has_one_stream():
    """Else its wait for keys would be measured while whole documents are computed."""
    for rank in range(NUM_RANKS):
        detector = RaceDetector()
        with visible_ring_steps():
            train_a_step(cases(1)[0], rank, detector, shares_buffers=False)
        assert detector.num_operations["side"] == 0


def test_after_an_exception_the_first_stream_is_current_and_waits():
    detector = RaceDetector()
    x = torch.zeros(3)

    def fail() -> None:
        with SideStream(x.device, is_used=True) as side, side.work():
            x.add_(1)
            raise ZeroDivisionError

    with detector.watching():
        with pytest.raises(ZeroDivisionError):
            fail()
        assert detector.current is detector.main
        x.add_(1)
    assert detector.races == set()
    assert detector.num_operations == {"side": 1, "main": 1}
