"""The ring itself: a loop over stages, forward and backward, as one autograd function.

Sits between `sequence` (what the modules share) and `schedule`, `exchange`, `blocks` and `merge`, which it joins.
Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers", 2023; Dao, FlashAttention-2, section 3.1.

Shapes: B batch, S local tokens, T tokens of a source, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_attention.band import Rectangle
from ring_attention.blocks import Block
from ring_attention.exchange import Hop, P2PExchange
from ring_attention.kv import KeysValues, offset
from ring_attention.running import RunningAttention, RunningSum
from ring_attention.schedule import BlockPair, Spans, Stage, num_tokens
from ring_attention.trace import labelled, numbered


@dataclass(frozen=True)
class Ring:
    """Everything a ring needs beside its tensors: what to compute and send, with which kernel, and how K,V move."""

    stages: tuple[Stage, ...]
    exchange: P2PExchange | None  # None where there is one stage
    block: Block
    scale: float

    def post(
        self, purpose: str, sends: list[tuple[KeysValues, int]], receives: list[tuple[KeysValues, int]]
    ) -> Hop | None:
        """Post a hop, if there is anything to move."""
        if not sends and not receives:
            return None
        assert self.exchange is not None, "several stages need an exchange"
        out, into = ([(_message(keys_values), peer) for keys_values, peer in moves] for moves in (sends, receives))
        return self.exchange.post(purpose, out, into)

    def forward_keys(
        self, own: KeysValues, here: KeysValues | None, step: int, way: str
    ) -> tuple[Hop | None, KeysValues | None]:
        """Post the hop of K,V after stage `step`; returns what will be here once it is done."""
        stage, sends, receives, incoming = self.stages[step], [], [], None
        if stage.forward is not None:
            assert here is not None
            sends.append((here.take(stage.keys, stage.forward.spans), stage.forward.peer))
        if stage.direct is not None:
            sends.append((own.take(self.stages[0].keys, stage.direct.spans), stage.direct.peer))
        following = self.stages[step + 1] if step + 1 < len(self.stages) else None
        if following is not None and following.keys_from is not None:
            incoming = own.empty(num_tokens(following.keys))
            receives.append((incoming, following.keys_from))
        return self.post(f"{way} K,V after stage {step}", sends, receives), incoming


def ring_forward(ring: Ring, q_BSHD: Tensor, kv: KeysValues) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over all keys of the ring.

    Every rank must call it. Returns out [B, S, H, E] in the input's dtype, cast once at the end, and lse [B, H, S] in
    fp32 (fp64 for fp64 input).
    """
    running = RunningAttention(q_BSHD, kv.v_BTKE)
    last = max((step for step, stage in enumerate(ring.stages) if stage.pairs), default=0)
    here: KeysValues | None = kv
    for step, stage in numbered("forward stage", ring.stages):
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
    comes_home = any(stage.home is not None for stage in ring.stages)
    homecoming: list[tuple[KeysValues, Spans]] = []
    here: KeysValues | None = kv
    gradients: KeysValues | None = None  # of the keys that are here, as summed by the ranks before
    gradient_hop: Hop | None = None
    for step, stage in numbered("backward stage", ring.stages):
        hop, incoming = ring.forward_keys(kv, here, step, "backward")
        if step == 0:
            sums, spans, ends = own, stage.keys, not comes_home
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

        sends, receives = [], []
        if stage.gradients_to is not None:
            if gradients is None:
                gradients = kv.empty(num_tokens(spans), travel_dtype)
                gradients.k_BTKD.copy_(sums[0].total)
                gradients.v_BTKE.copy_(sums[1].total)
            sends.append((gradients, stage.gradients_to))
        gradients = None
        following = ring.stages[step + 1] if step + 1 < len(ring.stages) else None
        if following is not None and following.gradients_from is not None:
            gradients = kv.empty(num_tokens(following.gradients), travel_dtype)
            receives.append((gradients, following.gradients_from))
        if stage.home is not None:
            homecoming.append((kv.empty(num_tokens(stage.home.spans), travel_dtype), stage.home.spans))
            receives.append((homecoming[-1][0], stage.home.peer))
        gradient_hop = ring.post(f"backward dK,dV after stage {step}", sends, receives)
        if hop is not None:
            hop.wait()
        here = incoming
    if gradient_hop is not None:
        gradient_hop.wait()
    with labelled("merge"):
        _add_homecoming(own, ring.stages[0].keys, homecoming)
        return dq.result(), own[0].result(), own[1].result()


def gradient_dtype(dtype: torch.dtype, num_stages: int) -> torch.dtype:
    """What dK,dV travel in: fp32 (fp64 for fp64 input), as ranks add to them on the way; of two stages as computed."""
    return dtype if num_stages <= 2 else torch.promote_types(dtype, torch.float32)


def _add_homecoming(own: list[RunningSum], keys: Spans, homecoming: list[tuple[KeysValues, Spans]]) -> None:
    for number, (come, spans) in enumerate(homecoming, 1):
        position = 0
        for start, stop in spans:
            here = slice(offset(keys, start), offset(keys, start) + stop - start)
            there = slice(position, position := position + stop - start)
            ends = number == len(homecoming) and (start, stop) == spans[-1]
            for total, part in zip(own, (come.k_BTKD, come.v_BTKE), strict=True):
                total.add(slice(None), here, part[:, there], ends)


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
