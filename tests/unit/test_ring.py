"""The order in which the ring computes, posts and waits, on a single process: what overlaps with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention import CAUSAL, FULL, LocalAttention, Mask
from ring_attention.accumulators import GradientAccumulator
from ring_attention.kernels import KERNELS, DqSum, GradientTargets, KernelParams, SavedTensors, Scores
from ring_attention.kernels.reference import ReferenceKernel
from ring_attention.key_gradients import sums_travel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout, slice_within
from ring_attention.masked_block import MaskedBlock
from ring_attention.ring import Ring, ring_backward, ring_forward
from ring_attention.schedule import ring_schedule
from tests.tools import precision
from tests.unit.test_accumulators import assert_rounded_once


class Recorder:
    """A transport and a kernel that record their calls, and add up the gradients that they give.

    Keys that arrive are 0, and gradients that return are random. `sums` are of dq, and of dk and dv of own tokens.
    """

    def __init__(self, layout: Layout, ring_rank: int, q: Tensor, kv: KeysValues) -> None:
        self.ring_rank = ring_rank
        self.events: list[str] = []
        self.sums = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, kv.k_BTKD, kv.v_BTKE)]
        self._own = kv
        self._schedule = ring_schedule(layout, CAUSAL, ring_rank)
        self._kernel = KERNELS["reference"]

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[Any], receives: list[Any]) -> Any:
        self.events.append(f"post {purpose}")
        recorder = self

        class Transfer:
            def wait(self) -> None:
                recorder.events.append(f"wait {purpose}")
                if "dK,dV" in purpose and receives:
                    recorder._return_gradients(int(purpose.split()[-1]), receives[0].tensor)

        return Transfer()

    def _return_gradients(self, ring_step: int, buffer: Tensor) -> None:
        message = self._schedule[ring_step].gradient_return
        assert message is not None
        returned = self._own.view(buffer.copy_(torch.randn(buffer.shape)), message.spans)
        for start, stop in message.spans:
            within = slice_within(message.spans, start, stop)
            self.sums[1][:, start:stop] += returned.k_BTKD[:, within].double()
            self.sums[2][:, start:stop] += returned.v_BTKE[:, within].double()

    has_varlen = False

    def split(self, block: MaskedBlock) -> list[MaskedBlock]:
        return self._kernel.split(block)

    sums_keys = False

    def dq_sum(self, *inputs: Tensor) -> None:
        return None

    def forward_to(
        self, target: None, q: Tensor, k: Tensor, v: Tensor, segments: None, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        self.events.append(f"forward {q.shape[1]} x {k.shape[1]}")
        return self._kernel.forward(q, k, v, params)

    def backward_to(
        self, targets: GradientTargets, dout: Tensor, saved: SavedTensors, segments: None, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = saved.q_BSHD, saved.k_BTKD
        self.events.append(f"backward {q.shape[1]} x {k.shape[1]}")
        gradients = self._kernel.backward(dout, saved, params)
        is_own = k.untyped_storage().data_ptr() == self._own.k_BTKD.untyped_storage().data_ptr()
        views = (q, k, saved.v_BTKE) if is_own else (q,)
        for total, view, gradient in zip(self.sums, views, gradients, strict=False):
            part_of(total, view).add_(gradient)
        return gradients


def part_of(total: Tensor, view: Tensor) -> Tensor:
    """The part of a tensor [B, S, H, D] that a view has of a contiguous one of its shape."""
    start = view.storage_offset() % total.numel()
    row, token = divmod(start // total.stride(1), total.shape[1])
    return total[row : row + view.shape[0], token : token + view.shape[1]]


class Run:
    """Passes of one rank of a zigzag ring, with 8 tokens a rank."""

    def __init__(self, ring_degree: int, ring_rank: int, batch: int = 1) -> None:
        layout = Layout("zigzag", ring_degree, 8 * ring_degree)
        self._q, k, v, self._dout = torch.randn(4, batch, 8, 2, 16).bfloat16()
        self._kv = KeysValues.of_parts(k, v)
        self.recorder = Recorder(layout, ring_rank, self._q, self._kv)
        fake: Any = self.recorder
        self._ring = Ring(layout, CAUSAL, fake, fake, Scores(0.25))
        self._out, self._lse = ring_forward(self._ring, self._q, self._kv)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        return ring_backward(self._ring, self._dout, self._q, self._kv, self._out, self._lse)


def events(ring_degree: int, ring_rank: int) -> list[str]:
    run = Run(ring_degree, ring_rank)
    run.backward()
    return run.recorder.events


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
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4, 5, 6])
def test_gradients_are_the_sums_of_their_parts_rounded_once(ring_degree: int, batch: int):
    """dq of the kernel calls; dk and dv of the calls on own keys and of what other ranks return."""
    for ring_rank in range(ring_degree):
        run = Run(ring_degree, ring_rank, batch)
        dq, dk, dv = run.backward()
        for got, exact in zip((dq, dk, dv), run.recorder.sums, strict=True):
            assert_rounded_once(got, exact, torch.bfloat16)


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


class SummingKernel(ReferenceKernel):
    """Sums dq, and dk and dv if told to, on whole pairs of tokens by itself, as flash-attn-4 does on its tiles."""

    def __init__(self, sums_keys: bool = False) -> None:
        self.sums_keys = sums_keys

    def dq_sum(self, dout_BSHE: Tensor, q_BSHD: Tensor, out_BSHE: Tensor, lse_BHS: Tensor) -> DqSum:
        return PairsSum(dout_BSHE, q_BSHD, out_BSHE, lse_BHS)

    def key_sum_tile(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor) -> int | None:
        return 2


class PairsSum(DqSum):
    def __init__(self, *inputs: Tensor) -> None:
        self.inputs, self.num_calls = inputs, 0
        self.total = torch.zeros_like(inputs[1], dtype=torch.promote_types(inputs[1].dtype, torch.float32))

    def takes(self, block: MaskedBlock) -> bool:
        return block.q_start % 2 == 0 and (block.q_stop % 2 == 0 or block.q_stop == self.total.shape[1])

    def add(
        self,
        rows: slice,
        block: MaskedBlock,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        params: KernelParams,
        key_sums_2BKN: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        assert self.takes(block)
        queries = slice(block.q_start, block.q_stop)
        dout, q, out = (x[rows, queries] for x in self.inputs[:3])
        saved = SavedTensors(q, k_BTKD, v_BTKE, out, self.inputs[3][rows, :, queries])
        dq, dk, dv = KERNELS["reference"].backward(dout, saved, params)
        self.total[rows, queries] += dq
        self.num_calls += 1
        if key_sums_2BKN is None:
            return dk, dv
        for total, values in zip(key_sums_2BKN, (dk, dv), strict=True):
            pairs = values.transpose(1, 2).unflatten(2, (-1, 2))
            total += pairs.flip(3, 4).flatten(2)  # an order of its own within each pair of keys
        return None, None

    def result(self, scale: float) -> Tensor:
        assert self.num_calls, "a sum that nothing was added to"
        return self.total.to(self.inputs[1].dtype)

    def round_keys(self, key_sums_2BKN: Tensor, k_BTKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        pairs = key_sums_2BKN.unflatten(3, (-1, 2, k_BTKD.shape[3])).flip(4, 5)
        dk, dv = pairs.flatten(3, 4).transpose(2, 3).to(k_BTKD.dtype)
        return dk, dv


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("length", "mask"),
    [
        (48, CAUSAL),  # all calls add to the sum
        (47, CAUSAL.packed([0, 5, 16, 30, 47])),  # some do
        (48, CAUSAL.packed([0, 11, 48])),
        (48, Mask(left=5)),
    ],
)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4])
def test_a_kernel_may_sum_gradients_by_itself(monkeypatch, ring_degree, length, mask, batch):
    layout = Layout("zigzag", ring_degree, length)
    q, k, v, dout = torch.randn(4, batch, length, 2, 8, dtype=torch.float64)
    results = []
    for kernel in (ReferenceKernel(), SummingKernel(), SummingKernel(sums_keys=True)):
        monkeypatch.setattr(precision, "choose_kernel", lambda spec, kernel=kernel: (kernel, ""))
        results.append(precision.simulated_ring(layout, q, k, v, dout, 0.25, mask.within(layout.padded_length)))
    for got in results[1:]:
        for got_tensor, expected in zip(got, results[0], strict=True):
            torch.testing.assert_close(got_tensor, expected)


def test_sums_of_keys_travel_where_all_ranks_cut_keys_at_the_kernels_tiles():
    q, (k, v), kernel = torch.zeros(1, 12, 4, 8), torch.zeros(2, 1, 12, 2, 8), SummingKernel(sums_keys=True)
    kv = KeysValues.of_parts(k, v)

    def travel(name: str, length: int, mask: Mask = CAUSAL, degree: int = 4) -> bool:
        return sums_travel(kernel, Layout(name, degree, length), mask, q, kv)

    assert travel("zigzag", 48)
    assert travel("contiguous", 48)
    assert travel("zigzag", 48, FULL)
    assert not travel("zigzag", 40)  # halves of 10 tokens are 5, not whole pairs
    assert not travel("zigzag", 48, Mask(left=5))
    assert not travel("zigzag", 48, CAUSAL.packed([0, 8, 48]))
    assert not travel("balanced", 48)
    assert not sums_travel(SummingKernel(), Layout("zigzag", 4, 48), CAUSAL, q, kv)


def test_buffers_for_gradients_that_travel_as_sums_are_in_fp32():
    connected: list[dict[str, int]] = []

    class Transport:
        ring_rank = 0

        def connect(self, tensor: Tensor, sizes: dict[str, int]) -> None:
            connected.append(sizes)

    q, (k, v) = torch.zeros(1, 12, 2, 8, dtype=torch.bfloat16), torch.zeros(2, 1, 12, 2, 8, dtype=torch.bfloat16)
    transport: Any = Transport()
    for kernel in (SummingKernel(), SummingKernel(sums_keys=True)):
        ring = Ring(Layout("zigzag", 4, 48), CAUSAL, transport, kernel, Scores(1.0))
        ring.connect(q.requires_grad_(), k, v, None)
    rounded, summed = connected
    assert {name: summed[name] / size for name, size in rounded.items()} == {
        "keys0": 1, "keys1": 1, "gradients0": 2, "gradients1": 2
    }  # fmt: skip
