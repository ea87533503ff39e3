"""Ring attention: the loop over ring steps, forward and backward, as one autograd function.

The schedules say what to compute and send, `transport` moves K,V, and `kernels` compute.
Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers", 2023; Dao, FlashAttention-2, section 3.1.
`docs/teaching_ring.py` is the same algorithm in 60 lines.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator
from ring_attention.attend import BackwardInputs, attend_backward, attend_forward, shared_dq_sum
from ring_attention.backward_schedule import BackwardStep, backward_schedule
from ring_attention.checkpointing import saved_or_computed
from ring_attention.derivative import once_differentiable
from ring_attention.kernel_calls import KernelCall, plan_calls
from ring_attention.kernels import AttentionKernel, Scores
from ring_attention.key_gradients import RoundedKeyGradients, SummedKeyGradients, sum_dtype, sums_travel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.mask import Mask
from ring_attention.pass_graph import has_graphs, run_pass
from ring_attention.schedule import Message, RingStep, buffer_tokens, gradient_buffer, keys_buffer, ring_schedule
from ring_attention.sinks import sinks_gradient
from ring_attention.trace import numbered, profiler_range
from ring_attention.transport import P2PMessage, P2PTransport, Transfer


@dataclass(frozen=True)
class Ring:
    """All that a ring needs besides its tensors. `transport` is None for a ring of one rank."""

    layout: Layout
    mask: Mask
    transport: P2PTransport | None
    kernel: AttentionKernel
    scores: Scores

    @property
    def rank(self) -> int:
        return 0 if self.transport is None else self.transport.ring_rank

    @cached_property
    def steps(self) -> tuple[RingStep, ...]:
        return ring_schedule(self.layout, self.mask, self.rank)

    def connect(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, sinks_H: Tensor | None) -> None:
        """Prepare the transfers of a call with these inputs. Without a backward pass only K,V have receive buffers."""
        if self.transport is None:
            return
        trains = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q_BSHD, k_BSKD, v_BSKE, sinks_H)
        )
        kv = KeysValues.of_parts(k_BSKD, v_BSKE)
        key_bytes = gradient_bytes = kv.numel(((0, 1),)) * k_BSKD.dtype.itemsize  # of a token
        if trains and sums_travel(self.kernel, self.layout, self.mask, q_BSHD, kv):
            gradient_bytes = kv.numel(((0, 1),)) * sum_dtype(k_BSKD.dtype).itemsize
        sizes = {}
        for name, num_tokens in buffer_tokens(self.layout, self.mask).items():
            if name.startswith("keys"):
                sizes[name] = num_tokens * key_bytes
            elif trains:
                sizes[name] = num_tokens * gradient_bytes
        self.transport.connect(q_BSHD, sizes)

    def post_keys(
        self, own: KeysValues, here: KeysValues | None, number: int, direction: str
    ) -> tuple[Transfer | None, KeysValues | None]:
        """Start the K,V transfers during ring step `number`. Returns them, and the K,V of the next step."""
        if number + 1 >= len(self.steps):
            return None, None
        step, following, sends = self.steps[number], self.steps[number + 1], []
        if step.send_next is not None:
            assert here is not None
            sends.append((step.send_next.peer, here.take(step.send_next.spans)))
        if step.send_direct is not None:
            sends.append((step.send_direct.peer, own.take(step.send_direct.spans)))
        arriving = None if following.keys_from is None else Message(following.keys_from, following.keys)
        return self._post(f"{direction} K,V after ring step {number}", keys_buffer(number), own, sends, arriving)

    def post_gradients(
        self, like: KeysValues, step: BackwardStep, number: int, gradients: KeysValues | None
    ) -> tuple[Transfer | None, KeysValues | None]:
        """Start to send a step's dK,dV to their owner. Returns the transfers, and dK,dV of own tokens that return.

        Args:
            like: all own keys and values, in the dtype of dK,dV.
        """
        sends = [] if gradients is None else [(step.source, gradients)]
        purpose, buffer = f"backward dK,dV after ring step {number}", gradient_buffer(number)
        return self._post(purpose, buffer, like, sends, step.gradient_return)

    def _post(
        self, purpose: str, buffer: str, like: KeysValues, sends: list[tuple[int, KeysValues]], arriving: Message | None
    ) -> tuple[Transfer | None, KeysValues | None]:
        if not sends and arriving is None:
            return None, None
        assert self.transport is not None, "several ring steps need a transport"
        incoming, receives, k = None, [], like.k_BTKD
        if arriving is not None:
            vector = self.transport.receive_buffer(buffer, like.numel(arriving.spans), k.dtype, k.device)
            incoming = like.view(vector, arriving.spans)
            receives = [P2PMessage(incoming.parts, arriving.peer, buffer)]
        sent = [P2PMessage(kv.parts, peer, buffer) for peer, kv in sends]
        return self.transport.post(purpose, sent, receives), incoming


@functools.lru_cache(maxsize=16)
def forward_calls(
    layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel
) -> tuple[tuple[KernelCall, ...], ...]:
    """The kernel calls of each ring step; once per batch of documents, for all layers."""
    steps = ring_schedule(layout, mask, ring_rank)
    return tuple(plan_calls(kernel, step.tiles, (0, batch), layout.ring_length, step.keys) for step in steps)


@functools.lru_cache(maxsize=16)
def backward_calls(
    layout: Layout, mask: Mask, ring_rank: int, batch: int, kernel: AttentionKernel, sums_keys: bool = False
) -> tuple[tuple[KernelCall, ...], ...]:
    """The same for `backward_schedule`. With `sums_keys` gradients of own keys are counted among all own ones."""
    steps = backward_schedule(layout, mask, ring_rank, batch, kernel.split).steps
    ring_steps = ring_schedule(layout, mask, ring_rank)
    arrived = [step.keys for step in ring_steps]
    arrived += [ring_steps[0].keys] * (len(steps) - len(arrived))  # of what was held back of the local attention
    return tuple(
        plan_calls(
            *(kernel, step.compute.tiles, step.compute.rows, layout.ring_length, keys),
            keys if sums_keys and step.source == ring_rank else step.gradients,
        )
        for step, keys in zip(steps, arrived, strict=True)
    )


def ring_forward(ring: Ring, q_BSHD: Tensor, kv: KeysValues, sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over all keys of the ring. Every rank must call it.

    Returns out [B, S, H, E] in the input's dtype, rounded once, and lse [B, H, S] in fp32 (fp64 for fp64 input).
    """
    accumulator = OnlineSoftmaxAccumulator(q_BSHD, kv.v_BTKE, sinks_H)
    calls = forward_calls(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel)
    last = max((number for number, of_step in enumerate(calls) if of_step), default=0)
    here: KeysValues | None = kv
    for number, _ in numbered("forward ring step", ring.steps):
        transfer, incoming = ring.post_keys(kv, here, number, "forward")  # travels during this step's attention
        if here is not None:
            attend_forward(accumulator, ring.kernel, ring.scores, calls[number], q_BSHD, here, number == last)
        if transfer is not None:
            transfer.wait()
        here = incoming
    return accumulator.result()


def ring_backward(
    ring: Ring, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v, given the out and lse of `ring_forward`. Every rank must call it.

    K,V travel around the ring again. Each step's dK,dV go straight to their owner, and `backward_schedule` says when
    the owner adds them.

    Precision: `key_gradients` says in which form dK,dV travel. In bf16 on an H200 their errors are those of one device
    where they travel as the kernel's sums, and 1.21 to 1.23 times those where each step rounds them. That of dQ is 1.00
    times where the kernel sums dQ by itself (docs/results/parity.md).
    """
    schedule = backward_schedule(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel.split)
    inputs = BackwardInputs(dout_BSHE, q_BSHD, out_BSHE, lse_BHS)
    sums_keys = sums_travel(ring.kernel, ring.layout, ring.mask, q_BSHD, kv)
    calls = backward_calls(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel, sums_keys)
    dq_sum = shared_dq_sum(ring.kernel, inputs, calls)
    dq = GradientAccumulator(q_BSHD.shape, q_BSHD.dtype, schedule.dq_pieces if dq_sum is None else None)
    if sums_keys:
        assert dq_sum is not None
        key_gradients = SummedKeyGradients(kv, dq_sum, ring.scores.scale)
    else:
        key_gradients = RoundedKeyGradients(kv, schedule)
    incoming = gradient_transfer = None
    for number, step in numbered("backward ring step", schedule.steps):
        is_local = step.source == ring.rank
        here = kv if is_local else incoming
        key_transfer, incoming = ring.post_keys(kv, here, number, "backward")  # travels during this step's attention
        sums = key_gradients.start(step, number, is_local)
        if here is not None:
            for tile in attend_backward(ring.kernel, ring.scores, calls[number], inputs, here, dq_sum, sums):
                ends = number if tile.is_last else None
                with profiler_range("merge"):
                    if tile.dq is not None:
                        dq.add(tile.rows, tile.queries, tile.dq, ends if dq_sum is None else None)
                    key_gradients.add(tile, ends)
                del tile  # its memory is free before the next kernel call
        del sums
        if gradient_transfer is not None:
            gradient_transfer.wait()  # it travelled during this step's attention
        gradients = key_gradients.end(step, number, is_local)
        gradient_transfer, arriving = ring.post_gradients(key_gradients.like, step, number, gradients)
        if arriving is not None:
            key_gradients.expect(number, arriving)
        del gradients, arriving  # the transfer holds what it needs
        if key_transfer is not None:
            key_transfer.wait()
    with profiler_range("merge"):
        if dq_sum is not None:
            dq.add(slice(0, len(q_BSHD)), slice(0, q_BSHD.shape[1]), dq_sum.result(ring.scores.scale), ends=0)
        return dq.result(), *key_gradients.result()


class RingFunction(torch.autograd.Function):
    """`ring_forward`, with `ring_backward` as its derivative. Saves the local q, k, v, out and lse: O(L/P) memory."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, sinks_H: Tensor | None, ring: Ring) -> Tensor:
        first, kv = ring.steps[0].send_next, KeysValues.of_parts(k_BSKD, v_BSKE)
        if first is not None and first.spans == kv.spans and not has_graphs(ring, q_BSHD):
            kv = kv.take(kv.spans)  # one message, for the first transfer of both passes
        out_BSHE, lse_BHS = saved_or_computed(lambda: _forward(ring, q_BSHD, kv, sinks_H))
        ctx.ring, ctx.kv_shapes = ring, (kv.k_BTKD.shape, kv.v_BTKE.shape)
        saved_kv = (kv.k_BTKD, kv.v_BTKE) if kv.message is None else (kv.message,)
        ctx.save_for_backward(q_BSHD, out_BSHE, lse_BHS, sinks_H, *saved_kv)
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: tuple[Tensor, ...], *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        q_BSHD, out_BSHE, lse_BHS, sinks_H, *saved_kv = saved
        if len(saved_kv) == 2:
            kv = KeysValues.of_parts(*saved_kv)
        else:
            kv = KeysValues.of_message(saved_kv[0], ctx.kv_shapes, ctx.ring.steps[0].keys)
        dout_BSHE = grad_outputs[0].contiguous()
        dsinks = sinks_gradient(dout_BSHE, out_BSHE, lse_BHS, sinks_H) if ctx.needs_input_grad[3] else None
        return *_backward(ctx.ring, dout_BSHE, q_BSHD, kv, out_BSHE, lse_BHS), dsinks, None


def _forward(ring: Ring, q_BSHD: Tensor, kv: KeysValues, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    if not has_graphs(ring, q_BSHD):
        return ring_forward(ring, q_BSHD, kv, sinks_H)

    def compute(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return ring_forward(ring, q, KeysValues.of_parts(k, v), sinks)

    calls = functools.partial(forward_calls, ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel)
    out_BSHE, lse_BHS = run_pass(ring, "forward", compute, calls, (q_BSHD, kv.k_BTKD, kv.v_BTKE, sinks_H))
    return out_BSHE, lse_BHS


def _backward(
    ring: Ring, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_graphs(ring, q_BSHD):
        return ring_backward(ring, dout_BSHE, q_BSHD, kv, out_BSHE, lse_BHS)

    def compute(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return ring_backward(ring, dout, q, KeysValues.of_parts(k, v), out, lse)

    def calls() -> object:
        sums_keys = sums_travel(ring.kernel, ring.layout, ring.mask, q_BSHD, kv)
        return backward_calls(ring.layout, ring.mask, ring.rank, len(q_BSHD), ring.kernel, sums_keys)

    tensors = (dout_BSHE, q_BSHD, kv.k_BTKD, kv.v_BTKE, out_BSHE, lse_BHS)
    dq, dk, dv = run_pass(ring, "backward", compute, calls, tensors)
    return dq, dk, dv
