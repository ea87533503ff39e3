"""Packed documents in one exchange with their two parts on two streams: all ranks of a ring, in turn, on one GPU.

Each rank runs until it has met what the others send: keys are right in the second round, gradients in the third. Inputs
and what arrives are late, and each part is held up in turn, so whoever reads too early reads NaN or an older number.
Without a GPU, tests/unit/test_streams.py finds what two streams touch without order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ring_attention import CAUSAL
from ring_attention.direct import attend_over_ring
from ring_attention.direct_plan import direct_plan
from ring_attention.kernels import KernelSpec, Scores, choose_kernel
from ring_attention.ring import Ring
from ring_attention.streams import SideStream
from ring_attention.transport import P2PMessage, Transfer
from ring_attention.transport.copy_engine import CopyStream
from tests.cases import Case, attend, check, draw
from tests.distributed.test_direct import random_cases

pytestmark = pytest.mark.gpu

NUM_RANKS, LATE_CYCLES = 4, 2_000_000  # about 1 ms


@dataclass
class Network:
    """What ranks sent, by purpose, sender and receiver; the stream that carries it, and how late it comes."""

    late_cycles: int
    sent: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)


class LateTransport:
    """One rank's, which waits for no other: unknown messages are zeros."""

    def __init__(self, ring_rank: int, network: Network) -> None:
        self.ring_rank, self._network = ring_rank, network
        self.graphs = None

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((numel,), float("nan"), dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        sent, stream = self._network.sent, self._network.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self._network.late_cycles)
            for message in sends:
                key = purpose, self.ring_rank, message.peer
                if key not in sent:
                    sent[key] = torch.empty_like(message.tensor)
                sent[key].copy_(message.tensor)
            for message in receives:
                known = sent.get((purpose, message.peer, self.ring_rank))
                (part,) = message.parts
                part.zero_() if known is None else part.copy_(known)
        arrived = stream.record_event()
        wait = lambda: torch.cuda.current_stream().wait_event(arrived)  # noqa: E731
        return Transfer([(purpose, wait)], [part for message in sends for part in message.parts])


class RankInTurn:
    """As an attention module, for `attend`."""

    def __init__(self, case: Case, rank: int, network: Network) -> None:
        self.sequence_rank, self._case = rank, case
        self._transport: Any = LateTransport(rank, network)
        self._late_cycles = network.late_cycles

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch_dim_idx: int, softcap: None, sinks: Tensor | None
    ) -> Tensor:
        torch.cuda._sleep(self._late_cycles)
        q, k, v = (1 * (x.transpose(0, 1) if batch_dim_idx else x).contiguous() for x in (q, k, v))
        layout = self._case.global_layout
        mask = self._case.mask.within(layout.padded_length)
        kernel, _ = choose_kernel(KernelSpec.of(q, k, v, mask.left is not None), self._case.kernel)
        ring = Ring(layout, mask, self._transport, kernel, Scores(q.shape[-1] ** -0.5))
        assert direct_plan(layout, mask, self.sequence_rank, len(q), kernel) is not None
        out = attend_over_ring(
            q, k, v, None if sinks is None else sinks.to(torch.promote_types(q.dtype, torch.float32)), ring
        )
        # what this stream freed is taken and overwritten at once
        for size in (q.numel(), k.numel(), v.numel(), out.numel()):
            torch.full((2 * size,), float("nan"), dtype=torch.float32, device=q.device)
        return out.transpose(0, 1) if batch_dim_idx else out


@contextlib.contextmanager
def held_up(part: str) -> Iterator[None]:
    """One part of each pass is late: "rest" runs on the side stream, "whole" on the current one. None with "none"."""
    work = SideStream.work

    def late_work(self: SideStream) -> Any:
        if part == "whole":
            torch.cuda._sleep(LATE_CYCLES)
        context = work(self)
        if part == "rest":
            with work(self):
                torch.cuda._sleep(LATE_CYCLES)
        return context

    with patch.object(SideStream, "work", late_work):
        yield


def ranks_in_turn(case: Case, late_cycles: int = LATE_CYCLES) -> list[list[Tensor]]:
    network, inputs = Network(late_cycles), [x.cuda() for x in draw(case)]
    for _ in range(2):
        for rank in range(case.num_ranks):
            attend(case, RankInTurn(case, rank, network), inputs)  # pyright: ignore[reportArgumentType]
    return [attend(case, RankInTurn(case, rank, network), inputs) for rank in range(case.num_ranks)]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("part", ["none", "rest", "whole"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_random_documents_equal_whole_attention(dtype: torch.dtype, part: str):
    for case in random_cases(NUM_RANKS, 20, dtype):
        case = replace(case, head_dim=64, value_head_dim=None, softcap=None)
        with held_up(part):
            check(case, ranks_in_turn(case))


@pytest.mark.parametrize("late_cycles", [0, LATE_CYCLES])
@pytest.mark.parametrize("part", ["none", "rest", "whole"])
def test_long_documents_in_the_fast_kernel(part: str, late_cycles: int):
    """Of several tiles, so that both parts run at once. Ten times, with the same bits in the output each time."""
    mask = CAUSAL.packed([0, 300, 900, 1000, 1900, 2000, 2048])
    sizes: dict[str, Any] = {"length": 2048, "batch": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    case = Case("ring", NUM_RANKS, layout="balanced", mask=mask, dtype=torch.bfloat16, **sizes)
    with held_up(part):
        first, *others = (ranks_in_turn(case, late_cycles) for _ in range(10))
    check(case, first)
    for shards in others:
        for (out, *gradients), (first_out, *first_gradients) in zip(shards, first, strict=True):
            assert torch.equal(out, first_out)
            torch.testing.assert_close(gradients, first_gradients, rtol=0.02, atol=0.02)  # the kernel's order of adding


def test_a_copy_stream_copies_beside_the_computing_stream_and_leaves_it_current():
    copies, current = CopyStream(torch.device("cuda", 0)), torch.cuda.current_stream()
    source, target = torch.arange(1000.0, device="cuda"), torch.zeros(1000, device="cuda")
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.cuda._sleep(LATE_CYCLES)
    source += 1
    copies.wait_for_compute()
    copies.copy(target, source)
    copies.write_flag(flag, 3)
    assert torch.cuda.current_stream() == current
    copies.make_compute_wait([(flag, 3)], copies.record_event(), reset=True)
    assert target.tolist() == list(range(1, 1001))
    assert flag.item() == 0
