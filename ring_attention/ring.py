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

from ring_attention.band import Rectangle
from ring_attention.blocks import Block
from ring_attention.exchange import Hop, Move, P2PExchange
from ring_attention.kv import KeysValues, offset
from ring_attention.layout import Layout
from ring_attention.mask import Mask
from ring_attention.running import RunningAttention, RunningSum
from ring_attention.schedule import (
    BlockPair,
    Spans,
    Stage,
    gradients_room,
    home_room,
    keys_room,
    num_tokens,
    tokens_in_rooms,
)
from ring_attention.trace import labelled


class Moving(NamedTuple):
    """K,V or their gradients, as a message to or from a ring rank; `room` is as in `exchange.Move`."""

    what: KeysValues
    peer: int
    room: str


@dataclass(frozen=True)
class Ring:
    """Everything a ring needs beside its tensors: what to compute and send, with which kernel, and how K,V move."""

    stages: tuple[Stage, ...]
    exchange: P2PExchange | None  # None where there is one stage
    block: Block
    scale: float

    def post(self, purpose: str, sends: list[Moving], receives: list[Moving]) -> Hop | None:
        """Post a hop, if there is anything to move."""
        if not sends and not receives:
            return None
        assert self.exchange is not None, "several stages need an exchange"
        out, into = ([Move(_message(moving.what), *moving[1:]) for moving in moves] for moves in (sends, receives))
        return self.exchange.post(purpose, out, into)

    def receive(self, like: KeysValues, tokens: int, peer: int, room: str, dtype: torch.dtype | None = None) -> Moving:
        """What will come from `peer`: so many tokens of the same kind."""
        assert self.exchange is not None
        k = like.k_BTKD
        message = self.exchange.room(room, like.numel(tokens), dtype or k.dtype, k.device)
        return Moving(KeysValues.of_message(message, like.shapes_of(tokens)), peer, room)

    def forward_keys(
        self, own: KeysValues, here: KeysValues | None, step: int, way: str
    ) -> tuple[Hop | None, KeysValues | None]:
        """Post the hop of K,V after stage `step`; returns what will be here once it is done."""
        stage, room, sends, receives = self.stages[step], keys_room(step), [], []
        if stage.forward is not None:
            assert here is not None
            sends.append(Moving(here.take(stage.keys, stage.forward.spans), stage.forward.peer, room))
        if stage.direct is not None:
            sends.append(Moving(own.take(self.stages[0].keys, stage.direct.spans), stage.direct.peer, room))
        following = self.stages[step + 1] if step + 1 < len(self.stages) else None
        if following is not None and following.keys_from is not None:
            receives.append(self.receive(own, num_tokens(following.keys), following.keys_from, room))
        incoming = receives[0].what if receives else None
        return self.post(f"{way} K,V after stage {step}", sends, receives), incoming


def ring_forward(ring: Ring, q_BSHD: Tensor, kv: KeysValues) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over all keys of the ring.

    Every rank must call it. Returns out [B, S, H, E] in the input's dtype, cast once at the end, and lse [B, H, S] in
    fp32 (fp64 for fp64 input).
    """
    running = RunningAttention(q_BSHD, kv.v_BTKE)
    last = max((step for step, stage in enumerate(ring.stages) if stage.pairs), default=0)
    here: KeysValues | None = kv
    for step, stage in enumerate(ring.stages):
        hop, incoming = ring.forward_keys(kv, here, step, "forward")  # flies while this block is computed
        if here is not None:
            attend_forward(running, ring.block, ring.scale, stage.pairs, q_BSHD, here, stage.keys, step == last)
        if hop is not None:
            hop.wait()
        here = incoming
    return running.result()


def ring_backward(
    ring: Ring, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v; out and lse are the merged ones, so each block's softmax is the global one.

    Every rank must call it. K,V travel again; their gradients follow one stage behind, as `gradient_dtype` says, and go
    home from the last rank that used them.
    """
    travel_dtype = gradient_dtype(kv.k_BTKD.dtype, len(ring.stages))
    dq = RunningSum(q_BSHD.shape, q_BSHD.dtype)
    own = [RunningSum(part.shape, part.dtype) for part in (kv.k_BTKD, kv.v_BTKE)]
    last = max((step for step, stage in enumerate(ring.stages) if stage.pairs), default=0)
    last_home = max((step for step, stage in enumerate(ring.stages) if stage.home is not None), default=None)
    here: KeysValues | None = kv
    gradients: KeysValues | None = None  # of the keys that are here, as summed by the ranks before
    home: tuple[KeysValues, Spans, bool] | None = None  # of own keys, on their way; whether they are the last
    gradient_hop: Hop | None = None
    for step, stage in enumerate(ring.stages):
        hop, incoming = ring.forward_keys(kv, here, step, "backward")
        if step == 0:
            sums, spans, ends = own, stage.keys, last_home is None
        elif gradients is not None:  # more is added in place
            sums = [RunningSum(part.shape, travel_dtype, part) for part in (gradients.k_BTKD, gradients.v_BTKE)]
            spans, ends = stage.gradients, False
        else:
            spans, ends = stage.gradients, False
            sums = [RunningSum(shape, travel_dtype) for shape in kv.shapes_of(num_tokens(spans))]
        if here is not None:
            blocks = attend_backward(
                ring.block, ring.scale, stage.pairs, stage.keys, dout_BSHE, q_BSHD, here, out_BSHE, lse_BHS
            )
            for row, part, is_last, *block in blocks:
                if gradient_hop is not None:  # waited for after the first block, which it overlaps
                    gradient_hop.wait()
                    gradient_hop = None
                add_block(dq, sums, spans, row, part, (is_last and step == last, is_last and ends), *block)
                del block
        if gradient_hop is not None:
            gradient_hop.wait()
        if home is not None:
            _add_home(own, ring.stages[0].keys, *home)

        sends, receives = [], []
        if stage.gradients_to is not None:
            if gradients is None:
                gradients = kv.empty(num_tokens(spans), travel_dtype)
                gradients.k_BTKD.copy_(sums[0].total)
                gradients.v_BTKE.copy_(sums[1].total)
            room = home_room(step) if stage.gradients_to == stage.source else gradients_room(step)
            sends.append(Moving(gradients, stage.gradients_to, room))
        gradients = home = None
        following = ring.stages[step + 1] if step + 1 < len(ring.stages) else None
        if following is not None and following.gradients_from is not None:
            tokens, room = num_tokens(following.gradients), gradients_room(step)
            receives.append(ring.receive(kv, tokens, following.gradients_from, room, travel_dtype))
            gradients = receives[-1].what
        if stage.home is not None:
            tokens, room = num_tokens(stage.home.spans), home_room(step)
            receives.append(ring.receive(kv, tokens, stage.home.peer, room, travel_dtype))
            home = receives[-1].what, stage.home.spans, step == last_home
        gradient_hop = ring.post(f"backward dK,dV after stage {step}", sends, receives)
        if hop is not None:
            hop.wait()
        here = incoming
    if gradient_hop is not None:
        gradient_hop.wait()
    if home is not None:
        _add_home(own, ring.stages[0].keys, *home)
    with labelled("merge"):
        return dq.result(), own[0].result(), own[1].result()


def gradient_dtype(dtype: torch.dtype, num_stages: int) -> torch.dtype:
    """What dK,dV travel in: fp32 (fp64 for fp64 input), as ranks add to them on the way; of two stages as computed."""
    return dtype if num_stages <= 2 else torch.promote_types(dtype, torch.float32)


def _add_home(own: list[RunningSum], keys: Spans, come: KeysValues, spans: Spans, is_last: bool) -> None:
    """Add gradients that came home to those of this rank's own keys; after the last ones nothing more comes."""
    position = 0
    with labelled("merge"):
        for start, stop in spans:
            here = slice(offset(keys, start), offset(keys, start) + stop - start)
            there = slice(position, position := position + stop - start)
            for total, part in zip(own, (come.k_BTKD, come.v_BTKE), strict=True):
                total.add(slice(None), here, part[:, there], is_last and (start, stop) == spans[-1])


def rooms_in_bytes(layout: Layout, mask: Mask, k_BSKD: Tensor, v_BSKE: Tensor, trains: bool) -> dict[str, int]:
    """What `P2PExchange.connect` wants to know: the most that any rank receives in each room.

    Args:
        trains: whether there is a backward pass.
    """
    kv, rooms = KeysValues(k_BSKD, v_BSKE), {}
    travel_dtype = gradient_dtype(k_BSKD.dtype, layout.ring_degree)
    for room, tokens in tokens_in_rooms(layout, mask).items():
        is_keys = room.startswith("keys")
        if is_keys or trains:
            rooms[room] = kv.numel(tokens) * (k_BSKD.dtype if is_keys else travel_dtype).itemsize
    return rooms


def add_block(
    dq_sum: RunningSum,
    sums: list[RunningSum],
    spans: Spans,
    row: slice,
    part: Rectangle,
    ends: tuple[bool, bool],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add one block's gradients to those of its queries and, among `spans`, of its keys and values.

    Args:
        ends: whether nothing more comes: to dq, to dk and dv.
    """
    keys = slice(start := offset(spans, part.k_start), start + part.num_keys)
    with labelled("merge"):
        dq_sum.add(row, slice(part.q_start, part.q_stop), dq, ends[0])
        for total, gradient in zip(sums, (dk, dv), strict=True):
            total.add(row, keys, gradient, ends[1])


def attend_forward(
    running: RunningAttention,
    block: Block,
    scale: float,
    pairs: Iterable[BlockPair],
    q_BSHD: Tensor,
    here: KeysValues,
    keys: Spans,
    is_last: bool,
) -> None:
    """Merge in the attention of `pairs`, whose keys are `here`; after the last ones nothing more comes."""
    tiles = list(_tiles(block, pairs))
    for number, (row, part) in enumerate(tiles, 1):
        queries = slice(part.q_start, part.q_stop)
        k_BTKD, v_BTKE = _keys_of(row, part, here, keys)
        with labelled("attention block"):
            out, lse = block.forward(q_BSHD[row, queries], k_BTKD, v_BTKE, part.lower, part.upper, scale)
        with labelled("merge"):
            running.add(row, queries, out, lse, is_last and number == len(tiles))


def attend_backward(
    block: Block,
    scale: float,
    pairs: Iterable[BlockPair],
    keys: Spans,
    dout_BSHE: Tensor,
    q_BSHD: Tensor,
    here: KeysValues,
    out_BSHE: Tensor,
    lse_BHS: Tensor,
) -> Iterable[tuple[slice, Rectangle, bool, Tensor, Tensor, Tensor]]:
    """(rows, rectangle, whether it is the last, dq, dk, dv) of each block."""
    tiles = list(_tiles(block, pairs))
    for number, (row, part) in enumerate(tiles, 1):
        queries = slice(part.q_start, part.q_stop)
        k_BTKD, v_BTKE = _keys_of(row, part, here, keys)
        with labelled("attention block"):
            gradients = block.backward(
                dout_BSHE[row, queries],
                q_BSHD[row, queries],
                k_BTKD,
                v_BTKE,
                out_BSHE[row, queries],
                lse_BHS[row, :, queries],
                part.lower,
                part.upper,
                scale,
            )
        yield (row, part, number == len(tiles), *gradients)


def _tiles(block: Block, pairs: Iterable[BlockPair]) -> Iterable[tuple[slice, Rectangle]]:
    """Rows of the batch and rectangles, cut into what the kernel computes in one call."""
    for pair in pairs:
        row = slice(None) if pair.row is None else slice(pair.row, pair.row + 1)
        for part in block.tiles(pair.rectangle):
            yield row, part


def _keys_of(row: slice, part: Rectangle, here: KeysValues, keys: Spans) -> tuple[Tensor, Tensor]:
    start = offset(keys, part.k_start)
    tokens = slice(start, start + part.num_keys)
    return here.k_BTKD[row, tokens], here.v_BTKE[row, tokens]


def _message(keys_values: KeysValues) -> Tensor:
    assert keys_values.message is not None
    return keys_values.message


class RingFunction(torch.autograd.Function):
    """`ring_forward` with `ring_backward` as its derivative; keeps the local q, k, v, out and lse: O(L/P) memory."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, ring: Ring) -> Tensor:
        everything, first = ring.stages[0].keys, ring.stages[0].forward
        kv = KeysValues.of_parts(k_BSKD, v_BSKE)
        if first is not None and first.spans == everything:
            kv = kv.take(everything, everything)  # the message of the first hop, here and again in the backward pass
        out_BSHE, lse_BHS = ring_forward(ring, q_BSHD, kv)
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
