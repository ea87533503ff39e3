"""The ring itself: a loop over stages, forward and backward, as one autograd function.

Sits between `sequence` (what the modules share) and `schedule`, `exchange`, `blocks` and `merge`, which it joins.
Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers", 2023; Dao, FlashAttention-2, section 3.1.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_attention.accumulators import GradientAccumulator, OnlineSoftmaxAccumulator, PiecewiseSum, TimeBreakdown
from ring_attention.attend import ALL_ROWS, TileGradients, attend_backward, attend_forward
from ring_attention.checkpointing import saved_or_computed
from ring_attention.kernels import AttentionKernel
from ring_attention.kv import KeysValues, offset
from ring_attention.layout import Layout
from ring_attention.mask import Mask
from ring_attention.schedule import (
    AttentionTile,
    Spans,
    Stage,
    buffer_tokens,
    gradient_buffer,
    keys_buffer,
    num_tokens,
)
from ring_attention.trace import numbered, profiler_range
from ring_attention.transport import P2PMessage, P2PTransport, Transfer


class Moving(NamedTuple):
    """K,V or their gradients, to or from a ring rank; `room` is as in `exchange.P2PMessage`."""

    what: KeysValues
    peer: int
    room: str


@dataclass(frozen=True)
class Ring:
    """Everything a ring needs beside its tensors: what to compute and send, with which kernel, and how K,V move."""

    stages: tuple[Stage, ...]
    exchange: P2PTransport | None  # None where there is one stage
    block: AttentionKernel
    scale: float

    def post(self, purpose: str, sends: list[Moving], receives: list[Moving]) -> Transfer | None:
        """Post a hop, if there is anything to move."""
        if not sends and not receives:
            return None
        assert self.exchange is not None, "several stages need an exchange"
        out, into = ([P2PMessage(moving.what.parts, *moving[1:]) for moving in moves] for moves in (sends, receives))
        return self.exchange.post(purpose, out, into)

    def receive(self, like: KeysValues, tokens: int, peer: int, room: str) -> Moving:
        """What will come from `peer`: so many tokens of the same kind."""
        assert self.exchange is not None
        k = like.k_BTKD
        message = self.exchange.receive_buffer(room, like.numel(tokens), k.dtype, k.device)
        return Moving(KeysValues.of_message(message, like.shapes_of(tokens)), peer, room)

    def forward_keys(
        self, own: KeysValues, here: KeysValues | None, step: int, way: str
    ) -> tuple[Transfer | None, KeysValues | None]:
        """Post the hop of K,V after stage `step`; returns what will be here once it is done."""
        stage, room, sends, receives = self.stages[step], keys_buffer(step), [], []
        if stage.forward is not None:
            assert here is not None
            sends.append(Moving(here.take(stage.keys, stage.forward.spans), stage.forward.peer, room))
        if stage.direct is not None:
            sends.append(Moving(own.take(self.stages[0].keys, stage.direct.spans), stage.direct.peer, room))
        following = self.stages[step + 1] if step + 1 < len(self.stages) else None
        if following is not None and following.keys_from is not None:
            receives.append(self.receive(own, num_tokens(following.keys), following.keys_from, room))
        incoming = receives[0].what if receives else None
        return self.post(f"{way} K,V after ring step {step}", sends, receives), incoming


def ring_forward(ring: Ring, q_BSHD: Tensor, kv: KeysValues) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over all keys of the ring.

    Every rank must call it. Returns out [B, S, H, E] in the input's dtype, cast once at the end, and lse [B, H, S] in
    fp32 (fp64 for fp64 input).
    """
    running = OnlineSoftmaxAccumulator(q_BSHD, kv.v_BTKE)
    last = max((step for step, stage in enumerate(ring.stages) if stage.pairs), default=0)
    here: KeysValues | None = kv
    for step, stage in numbered("forward ring step", ring.stages):
        hop, incoming = ring.forward_keys(kv, here, step, "forward")  # flies while this block is computed
        if here is not None:
            attend_forward(running, ring.block, ring.scale, stage.pairs, q_BSHD, here, stage.keys, step == last)
        if hop is not None:
            hop.wait()
        here = incoming
    return running.result()


class Part(NamedTuple):
    """What is computed in one go: of these rows, if a pair names none."""

    pairs: tuple[AttentionTile, ...]
    rows: slice = ALL_ROWS


class LocalBlock(NamedTuple):
    """The local block of a backward pass: what is computed at once, and what is left for when the last dK,dV fly home.

    The cuts are where dq ends at different times; half of its pieces, the first ones, with `later`.
    """

    at_once: Part
    later: Part | None = None
    row_cuts: tuple[int, ...] = ()
    query_cuts: tuple[int, ...] = ()


Sums = list[GradientAccumulator] | list[PiecewiseSum]


def ring_backward(
    ring: Ring, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v; out and lse are the merged ones, so each block's softmax is the global one.

    Every rank must call it. K,V travel again. Each stage's dK,dV go straight home, as the kernel gives them, in the
    input's dtype, and are summed there in fp32. Where some come home after the last stage, part of the local block is
    left for when they are on their way (`split`).
    """
    return _Backward(ring, dout_BSHE, q_BSHD, kv, out_BSHE, lse_BHS).run()


class _ComingHome(NamedTuple):
    """dK,dV of own tokens, from the rank that had the keys in stage `step`."""

    step: int
    what: KeysValues
    spans: Spans


class _Backward:
    """What `ring_backward` has so far."""

    def __init__(
        self, ring: Ring, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
    ) -> None:
        self._ring, self._kv = ring, kv
        self._queries = dout_BSHE, q_BSHD, out_BSHE, lse_BHS
        self._comes_home = any(stage.home is not None for stage in ring.stages)
        local = ring.stages[0].pairs
        is_last = ring.stages[-1].home is not None
        self._local = split(local, ring.block, len(q_BSHD)) if is_last else LocalBlock(Part(local))
        self._last = max((step for step, stage in enumerate(ring.stages) if step and stage.pairs), default=0)
        self._dq = PiecewiseSum(q_BSHD, self._local.row_cuts, self._local.query_cuts)
        self._own = [PiecewiseSum(part, self._local.row_cuts) for part in (kv.k_BTKD, kv.v_BTKE)]
        self._hop: Transfer | None = None  # which takes gradients home
        self._coming: _ComingHome | None = None  # with it
        self._came: list[_ComingHome] = []  # and was not added yet

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        ring, here = self._ring, self._kv
        for step, stage in numbered("backward ring step", ring.stages):
            hop, incoming = ring.forward_keys(self._kv, here, step, "backward")
            sums, spans = self._sums_of(step)
            if here is not None:
                for block in self._blocks(Part(stage.pairs) if step else self._local.at_once, here, stage.keys):
                    self._add(block, step, sums, spans)
                    del block
            self._arrive()  # which this stage's blocks overlapped
            if self._came and self._came[0].step < step - 1:  # its room is wanted; two are added in one pass
                self._add_own(self._came)
                self._came = []
            self._post(step, sums)
            del sums  # else they outlive their hop
            if hop is not None:
                hop.wait()
            here = incoming
        return self._finish()

    def _blocks(self, part: Part, here: KeysValues, keys: Spans) -> Iterable[TileGradients]:
        dout_BSHE, q_BSHD, out_BSHE, lse_BHS = self._queries
        return attend_backward(
            self._ring.block, self._ring.scale, part.pairs, keys, dout_BSHE, q_BSHD, here, out_BSHE, lse_BHS, part.rows
        )

    def _sums_of(self, step: int) -> tuple[Sums, Spans]:
        """Where dK,dV of the keys that are here are summed, and which tokens of their source these are."""
        if step == 0:
            return self._own, self._ring.stages[0].keys
        spans = self._ring.stages[step].gradients
        shapes = self._kv.shapes_of(num_tokens(spans))
        return [GradientAccumulator(shape, self._kv.k_BTKD.dtype) for shape in shapes], spans

    def _arrive(self) -> None:
        if self._hop is not None:
            self._hop.wait()
            self._hop = None
        if self._coming is not None:
            self._came.append(self._coming)
            self._coming = None

    def _add(self, block: TileGradients, step: int, sums: Sums, spans: Spans) -> None:
        """Add one block's gradients."""
        part = block.part
        keys = slice(start := offset(spans, part.k_start), start + part.num_keys)
        dq_ends = block.is_last and step == self._last
        ends = block.is_last and (sums is not self._own or not self._comes_home)
        with profiler_range("merge"):
            self._dq.add(block.row, slice(part.q_start, part.q_stop), block.dq, dq_ends)
            for total, gradient in zip(sums, (block.dk, block.dv), strict=True):
                total.add(block.row, keys, gradient, ends)

    def _post(self, step: int, sums: Sums) -> None:
        """Send the gradients of this stage's keys home, and receive those of own ones."""
        ring, stage, sends, receives = self._ring, self._ring.stages[step], [], []
        if stage.gradients:
            gradients = KeysValues(*(total.result().contiguous() for total in sums))
            sends.append(Moving(gradients, stage.source, gradient_buffer(step)))
        if stage.home is not None:
            peer, spans = stage.home.peer, stage.home.spans
            receives.append(ring.receive(self._kv, num_tokens(spans), peer, gradient_buffer(step)))
            self._coming = _ComingHome(step, receives[-1].what, spans)
        self._hop = ring.post(f"backward dK,dV after ring step {step}", sends, receives)

    def _finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """With the last gradients on their way, compute what was left; then add them."""
        left: tuple[TimeBreakdown, TimeBreakdown] = [], []  # of dK and of dV
        if self._local.later is not None:
            for block in self._blocks(self._local.later, self._kv, self._ring.stages[0].keys):
                part = block.part
                with profiler_range("merge"):
                    self._dq.add(block.row, slice(part.q_start, part.q_stop), block.dq, block.is_last, later=True)
                for parts, gradient in zip(left, (block.dk, block.dv), strict=True):
                    parts.append((block.row, slice(part.k_start, part.k_stop), gradient))
        if self._coming is not None:
            self._add_own(self._came)
            self._came = []
        self._arrive()
        self._add_own(self._came, left, is_last=True)
        with profiler_range("merge"):
            return self._dq.result(), self._own[0].result(), self._own[1].result()

    def _add_own(
        self, came: list[_ComingHome], left: tuple[TimeBreakdown, TimeBreakdown] = ([], []), is_last: bool = False
    ) -> None:
        """Add what came home, and what was left of the local block, to dK and dV of this rank's own tokens."""
        with profiler_range("merge"):
            for total, parts, number in zip(self._own, left, (0, 1), strict=True):
                total.add_several([*parts, *(part for each in came for part in self._parts(each)[number])], is_last)

    def _parts(self, came: _ComingHome) -> tuple[TimeBreakdown, TimeBreakdown]:
        """What came for dK and for dV, by run of this rank's tokens."""
        keys, position = self._ring.stages[0].keys, 0
        found: tuple[TimeBreakdown, TimeBreakdown] = [], []
        for start, stop in came.spans:
            here = slice(offset(keys, start), offset(keys, start) + stop - start)
            for parts, gradient in zip(found, (came.what.k_BTKD, came.what.v_BTKE), strict=True):
                parts.append((ALL_ROWS, here, gradient[:, position : position + stop - start]))
            position += stop - start
        return found


def split(pairs: tuple[AttentionTile, ...], kernel: AttentionKernel, batch: int) -> LocalBlock:
    """A local block in two: half of its rows each, or of a single one the late half of its queries and the early half.

    Left whole if it is several already, as with windows and documents, or if the kernel needs several calls for half
    of the queries: their copies and sums cost more than what is hidden (FFPA at 4 x 5,000 tokens, 16 heads x 512: a
    call took 52.7 ms instead of 47.6, although it hid 1.4 ms more).
    """
    whole = LocalBlock(Part(pairs))
    if len(pairs) != 1 or pairs[0].row is not None:
        return whole
    rectangle = pairs[0].rectangle
    middle = (rectangle.q_start + rectangle.q_stop) // 2
    late = rectangle.part(middle, rectangle.q_stop, rectangle.k_start, rectangle.k_stop)
    early = rectangle.part(rectangle.q_start, middle, rectangle.k_start, rectangle.k_stop)
    if late is None or early is None:
        return whole
    if batch > 1:
        rows = batch // 2
        return LocalBlock(Part(pairs, slice(rows, batch)), Part(pairs, slice(0, rows)), (rows,), (middle,))
    if any(len(kernel.split(half)) > 1 for half in (late, early)):
        return whole
    return LocalBlock(Part((AttentionTile(None, late),)), Part((AttentionTile(None, early),)), (), (middle,))


def buffer_bytes(layout: Layout, mask: Mask, k_BSKD: Tensor, v_BSKE: Tensor, trains: bool) -> dict[str, int]:
    """What `P2PTransport.connect` wants to know: the most that any rank receives in each room.

    Args:
        trains: whether there is a backward pass.
    """
    kv = KeysValues(k_BSKD, v_BSKE)
    return {
        room: kv.numel(tokens) * k_BSKD.dtype.itemsize
        for room, tokens in buffer_tokens(layout, mask).items()
        if trains or room.startswith("keys")
    }


class RingFunction(torch.autograd.Function):
    """`ring_forward` with `ring_backward` as its derivative; keeps the local q, k, v, out and lse: O(L/P) memory."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, ring: Ring) -> Tensor:
        everything, first = ring.stages[0].keys, ring.stages[0].forward
        kv = KeysValues.of_parts(k_BSKD, v_BSKE)
        if first is not None and first.spans == everything:
            kv = kv.take(everything, everything)  # the message of the first hop, here and again in the backward pass
        out_BSHE, lse_BHS = saved_or_computed(lambda: ring_forward(ring, q_BSHD, kv))
        ctx.ring, ctx.kv_shapes = ring, kv.shapes
        ctx.save_for_backward(
            q_BSHD, out_BSHE, lse_BHS, *(kv.k_BTKD, kv.v_BTKE) if kv.message is None else (kv.message,)
        )
        return out_BSHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BSHD, out_BSHE, lse_BHS, *saved = ctx.saved_tensors
        kv = KeysValues(*saved) if len(saved) == 2 else KeysValues.of_message(saved[0], ctx.kv_shapes)
        return *ring_backward(ctx.ring, grad_outputs[0].contiguous(), q_BSHD, kv, out_BSHE, lse_BHS), None
