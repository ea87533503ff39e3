"""Measures what forecasts are made of on this host: devices, kernels, the host's calls, and links between ranks.

All ranks do the same at the same time, as in training. A speed is that of the slowest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.monitor.call_timer import CallSeconds, seconds_of_a_call
from recipes.planning.attention_time import BACKWARD_PRODUCTS
from recipes.planning.measured import AttentionSpeed, ProductSpeed
from recipes.planning.plan import DTYPES, Plan
from recipes.planning.speeds import HEAD_NUMBERS
from ring_attention import LocalAttention, RingAttention
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelParams, KernelSpec, SavedTensors, choose_kernel
from ring_attention.topology import ring_order
from ring_attention.trace import visible_ring_steps
from ring_attention.transport import P2PMessage, make_transport
from ring_attention.transport.collectives import all_gather

HOST_TOKENS, HOST_HEADS = 128, (8, 2)  # per rank, of calls so small that the host is what takes time


class Sizes(NamedTuple):
    """What is measured on a kind of device.

    Args:
        timed_s: duration of each measurement: on a GPU long enough for the clock of a long step.
        message_bytes: a short message and a long one, neither of which waits for the host.
        weight: inputs and outputs of the products.
        head_dims: in addition to the model's.
        numbers: in all heads.
        lengths: tokens of causal squares.
    """

    timed_s: float
    memory_bytes: int
    message_bytes: tuple[int, int]
    weight: tuple[int, int]
    tokens: tuple[int, ...]
    head_dims: tuple[int, ...]
    numbers: int
    lengths: tuple[int, ...]


LENGTHS = 2_048, 4_096, 8_192, 16_384, 32_768, 131_072
SIZES = {
    "cuda": Sizes(
        0.5, 2**30, (2**27, 2**29), (4_096, 14_336), (256, 1_024, 4_096, 16_384, 65_536), (64, 128), 4_096, LENGTHS
    ),
    "cpu": Sizes(0.02, 2**24, (2**18, 2**20), (128, 384), (64, 256, 1_024), (), 128, (64, 256, 1_024)),
}


class HostTimes(NamedTuple):
    """As in `MeasuredSpeeds`."""

    call_ms: float
    ring_step_ms: float | None
    backward_issue: float


class LinkSpeeds(NamedTuple):
    """Of a rank to its neighbour, and in collectives. `used` is the transport to the neighbour."""

    latency_us: float
    gb_per_s: float
    all_gather_gb_per_s: float
    all_to_all_gb_per_s: float
    used: str


class DeviceSpeeds:
    """The measurements, on one rank. Every rank must make the same ones in the same order."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._sizes = plan, SIZES[plan.device_type]
        self._device = torch.device(plan.device_type)
        self._dtype = DTYPES[plan.config.engine.dtype]
        self.head_dims = sorted({*self._sizes.head_dims, plan.config.model.head_dim})

    def memory_gb_per_s(self) -> float:
        """Of a sum of two tensors: two are read, one is written."""
        x, y, total = (torch.zeros(self._sizes.memory_bytes // 4, device=self._device) for _ in range(3))
        return _rounded(3 * self._sizes.memory_bytes / self._time(lambda: torch.add(x, y, out=total)).total / 1e9)

    def host_copy_gb_per_s(self) -> float | None:
        """Of copies to the host and back, to memory that is pinned; None on the CPU."""
        if self._plan.device_type == "cpu":
            return None
        x = torch.zeros(self._sizes.memory_bytes // 4, device=self._device)
        on_host = torch.empty(x.shape, pin_memory=True)

        def copy() -> None:
            on_host.copy_(x, non_blocking=True)
            x.copy_(on_host, non_blocking=True)

        return _rounded(2 * self._sizes.memory_bytes / self._time(copy).total / 1e9)

    def products(self) -> Iterator[ProductSpeed]:
        """y = x W^T, dx = dy W and dW = dy^T x, by tokens."""
        num_in, num_out = self._sizes.weight
        weight = self._draw(num_out, num_in)
        for tokens in self._sizes.tokens:
            x, dy = self._draw(tokens, num_in), self._draw(tokens, num_out)
            seconds = self._time(lambda x=x, dy=dy: (F.linear(x, weight), dy @ weight, dy.T @ x)).total
            yield ProductSpeed(tokens, _rounded(3 * 2 * tokens * num_in * num_out / seconds / 1e12))

    def attention(self, head_dim: int) -> Iterator[AttentionSpeed]:
        """The kernel that such heads get, over causal squares."""
        heads = 4 * max(1, self._sizes.numbers // head_dim // 4)
        for length in self._sizes.lengths:
            q, k, v, dout = (
                self._draw(1, length, number, head_dim) for number in (heads, heads // 4, heads // 4, heads)
            )
            kernel, _ = choose_kernel(KernelSpec.of(q, k, v), self._plan.config.attention.kernel)
            params = KernelParams(None, 0, head_dim**-0.5)
            forward_s = self._time(functools.partial(kernel.forward, q, k, v, params)).total
            saved = SavedTensors(q, k, v, *kernel.forward(q, k, v, params))
            backward_s = self._time(functools.partial(kernel.backward, dout, saved, params)).total
            flops = 4 * heads * head_dim * length * (length + 1) / 2
            size = length * (heads * head_dim / HEAD_NUMBERS) ** 0.5
            forward, backward = flops / forward_s / 1e12, BACKWARD_PRODUCTS * flops / backward_s / 1e12
            yield AttentionSpeed(kernel.name, head_dim, _rounded(size), _rounded(forward), _rounded(backward))

    def host(self) -> HostTimes:
        """Of calls on the rank alone and, if there are several ranks, on a ring of them."""
        kernel, degree = self._plan.config.attention.kernel, self._plan.num_ranks
        call_s, both_s = self._issued_s(LocalAttention(kernel))
        if degree == 1:
            return HostTimes(_rounded(1e3 * call_s), None, _rounded(max(0.1, both_s / call_s - 1)))
        group, transport = self._groups.get_sequence_parallel_group(), self._plan.transport
        ring = RingAttention(kernel, group, layout="zigzag", transport=transport, hosts=self._groups.hosts)
        with visible_ring_steps():  # else so few tokens have CUDA graphs
            forward_s, both_s = self._issued_s(ring)
        step_s = max(1e-6, (forward_s - call_s) / degree)
        backward_issue = max(0.1, (both_s - forward_s) / (call_s + step_s * (degree + 1)))
        return HostTimes(_rounded(1e3 * call_s), _rounded(1e3 * step_s), _rounded(backward_issue))

    def links(self) -> LinkSpeeds:
        """To a neighbour, by the ring's transport, and of collectives.

        What a long message takes longer than a short one gives the speed, and what is left of the short one's time is
        the latency.
        """
        group = self._groups.get_sequence_parallel_group()
        degree, (short, long) = self._plan.num_ranks, self._sizes.message_bytes
        transport = make_transport(self._plan.transport, group, ring_order(self._groups.hosts))
        message = torch.zeros(long, dtype=torch.uint8, device=self._device)
        names = itertools.cycle(("keys0", "keys1"))
        transport.connect(message, {"keys0": long, "keys1": long})

        def send(num_bytes: int) -> None:
            name, rank = next(names), transport.ring_rank
            buffer = transport.receive_buffer(name, num_bytes, torch.uint8, self._device)
            sends = [P2PMessage((message[:num_bytes],), (rank + 1) % degree, name)]
            receives = [P2PMessage((buffer,), (rank - 1) % degree, name)]
            transport.post("calibrating", sends, receives).wait()

        short_s, long_s = (self._time(functools.partial(send, num_bytes)).total for num_bytes in (short, long))
        latency_s = short_s - short * (long_s - short_s) / (long - short)
        latency_s = min(max(0.0, latency_s), min(short_s, long_s) / 2)  # times on a CPU vary
        own = message[: long // degree // 512 * 512]
        gathered_s = self._time(functools.partial(all_gather, own, group)).total
        swapped = message[: long // degree * degree]
        received = torch.empty_like(swapped)
        swapped_s = self._time(lambda: dist.all_to_all_single(received, swapped, group=group)).total
        # what is left of a collective's time without latency is at least half of it
        gathered_s, swapped_s = (max(time_s / 2, time_s - latency_s) for time_s in (gathered_s, swapped_s))
        return LinkSpeeds(
            latency_us=_rounded(1e6 * latency_s),
            gb_per_s=_rounded(long / (long_s - latency_s) / 1e9),
            all_gather_gb_per_s=_rounded(len(own) * (degree - 1) / gathered_s / 1e9),
            all_to_all_gb_per_s=_rounded(len(swapped) * (degree - 1) / degree / swapped_s / 1e9),
            used=transport.used or "",
        )

    @functools.cached_property
    def _groups(self) -> ParallelGroups:
        return ParallelGroups(1, self._plan.num_ranks)

    def _issued_s(self, attention: Any) -> tuple[float, float]:
        """Until the host has issued a call, and a call with its backward pass."""
        head_dim, (heads, kv_heads) = [self._plan.config.model.head_dim, *self._sizes.head_dims][-1], HOST_HEADS
        q, dout = (self._draw(1, HOST_TOKENS, heads, head_dim) for _ in range(2))
        k, v = self._draw(2, 1, HOST_TOKENS, kv_heads, head_dim).unbind(0)  # one message, as the recipes' model has it
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        forward = self._time(lambda: attention(*leaves, 0))
        return forward.issued, self._time(lambda: torch.autograd.grad(attention(*leaves, 0), leaves, dout)).issued

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device).to(self._dtype)

    def _time(self, call: Callable[[], Any]) -> CallSeconds:
        call()  # compiles kernels, connects ranks
        return seconds_of_a_call(call, self._device, self._sizes.timed_s)


def _rounded(value: float) -> float:
    """With four digits, which is more than is certain."""
    return float(f"{value:.4g}")
