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
from ring_attention.merge import merge
from ring_attention.schedule import BlockPair, Spans, Stage, num_tokens
from ring_attention.trace import labelled


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
    for step, stage in enumerate(ring.stages):
        hop, incoming = ring.forward_keys(kv, here, step, "forward")  # flies while this block is computed
        if here is not None:
            running.attend(ring.block, ring.scale, stage.pairs, q_BSHD, here, stage.keys, step == last)
        if hop is not None:
            hop.wait()
        here = incoming
    return running.result()


def ring_backward(
    ring: Ring, dout_BSHE: Tensor, q_BSHD: Tensor, kv: KeysValues, out_BSHE: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v; out and lse are the merged ones, so each block's softmax is the global one.

    Every rank must call it. K,V travel again; their gradients follow one stage behind, summed in fp32 (fp64 for fp64
    input), and go home from the last rank that used them.
    """
    state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    dq_BSHD = torch.zeros_like(q_BSHD, dtype=state_dtype)
    own = KeysValues(*(torch.zeros_like(part, dtype=state_dtype) for part in (kv.k_BTKD, kv.v_BTKE)))
    homecoming: list[tuple[KeysValues, Spans]] = []
    here: KeysValues | None = kv
    gradients: KeysValues | None = None  # of the keys that are here, as summed by the ranks before
    gradient_hop: Hop | None = None
    for step, stage in enumerate(ring.stages):
        hop, incoming = ring.forward_keys(kv, here, step, "backward")
        if step == 0:
            target, spans = own, stage.keys
        else:
            target, spans = gradients, stage.gradients
            if stage.gradients and stage.gradients_from is None:
                target = kv.empty(num_tokens(stage.gradients), state_dtype)
                _message(target).zero_()
        if here is not None:
            for row, part, *block in attend_backward(
                ring.block, ring.scale, stage.pairs, stage.keys, dout_BSHE, q_BSHD, here, out_BSHE, lse_BHS
            ):
                if gradient_hop is not None:  # waited for after the first block, which it overlaps
                    gradient_hop.wait()
                    gradient_hop = None
                assert target is not None
                add_block(dq_BSHD, target, spans, row, part, *block)
                del block
        if gradient_hop is not None:
            gradient_hop.wait()

        sends, receives, gradients = [], [], None
        if stage.gradients_to is not None:
            assert target is not None
            sends.append((target, stage.gradients_to))
        following = ring.stages[step + 1] if step + 1 < len(ring.stages) else None
        if following is not None and following.gradients_from is not None:
            gradients = kv.empty(num_tokens(following.gradients), state_dtype)
            receives.append((gradients, following.gradients_from))
        if stage.home is not None:
            homecoming.append((kv.empty(num_tokens(stage.home.spans), state_dtype), stage.home.spans))
            receives.append((homecoming[-1][0], stage.home.peer))
        gradient_hop = ring.post(f"backward dK,dV after stage {step}", sends, receives)
        if hop is not None:
            hop.wait()
        here = incoming
    if gradient_hop is not None:
        gradient_hop.wait()
    with labelled("merge"):
        for come, spans in homecoming:
            own.add_(ring.stages[0].keys, come, spans)
    return dq_BSHD.to(q_BSHD.dtype), own.k_BTKD.to(kv.k_BTKD.dtype), own.v_BTKE.to(kv.v_BTKE.dtype)


def add_block(
    dq_BSHD: Tensor, target: KeysValues, spans: Spans, row: slice, part: Rectangle, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Add one block's gradients to those of its queries and, among `spans`, of its keys and values."""
    keys = slice(start := offset(spans, part.k_start), start + part.num_keys)
    with labelled("merge"):
        dq_BSHD[row, part.q_start : part.q_stop] += dq
        target.k_BTKD[row, keys] += dk
        target.v_BTKE[row, keys] += dv


class RunningAttention:
    """out [B, S, H, E] and lse [B, H, S] over the keys seen so far.

    The first block's result is what its kernel gave; merged ones are fp32 (fp64 for fp64 input), the last in the dtype
    of the input. So a single block is not touched, and two are merged in one pass.
    """

    def __init__(self, q_BSHD: Tensor, v_BTKE: Tensor) -> None:
        self._shape = torch.Size((*q_BSHD.shape[:3], v_BTKE.shape[-1]))
        self._dtype, self._state_dtype = q_BSHD.dtype, torch.promote_types(q_BSHD.dtype, torch.float32)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def result(self) -> tuple[Tensor, Tensor]:
        """out in the dtype of the input, lse in fp32 (fp64 for fp64 input)."""
        assert self._out is not None, "no keys were seen"
        assert self._lse is not None
        return self._out.to(self._dtype), self._lse

    def attend(
        self,
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
                ends = is_last and number == len(tiles)
                self._merge(row, queries, out, lse, self._dtype if ends else self._state_dtype)

    def _merge(self, row: slice, queries: slice, out: Tensor, lse: Tensor, dtype: torch.dtype) -> None:
        if self._out is None or self._lse is None:
            if out.shape == self._shape:
                self._out, self._lse = out, lse
                return
            self._out = out.new_zeros(self._shape, dtype=self._state_dtype)
            self._lse = lse.new_full((self._shape[0], self._shape[2], self._shape[1]), float("-inf"))
        target = self._out
        if target.dtype != dtype:
            target = out.new_empty(self._shape, dtype=dtype) if out.shape == self._shape else target.to(dtype)
        merge(target[row, queries], self._out[row, queries], self._lse[row, :, queries], out, lse)
        self._out = target


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
) -> Iterable[tuple[slice, Rectangle, Tensor, Tensor, Tensor]]:
    """(rows, rectangle, dq, dk, dv) of each block."""
    for row, part in _tiles(block, pairs):
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
        yield (row, part, *gradients)


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
        kv = KeysValues(k_BSKD, v_BSKE)
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
