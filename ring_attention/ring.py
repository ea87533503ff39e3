"""The ring itself: a loop over stages, forward and backward, as one autograd function.

Sits between `attention` (the modules users build) and `schedule`, `exchange`, `blocks` and `merge`, which it joins.
Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers", 2023; Dao, FlashAttention-2, section 3.1.

Shapes: B batch, S local tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ring_attention.blocks import Block
from ring_attention.exchange import Hop, P2PExchange
from ring_attention.merge import merge_
from ring_attention.schedule import Stage


@dataclass(frozen=True)
class Ring:
    """Everything a ring needs beside its tensors: what to compute (stages), where (block), and how to move K,V."""

    stages: tuple[Stage, ...]
    exchange: P2PExchange | None  # None where there is one stage
    block: Block
    scale: float


def ring_forward(ring: Ring, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over all keys of the ring.

    Every rank must call it. Returns out [B, S, H, D] in the input's dtype, cast once at the end, and lse [B, H, S] in
    fp32 (fp64 for fp64 input).
    """
    out_BSHD = lse_BHS = None
    for step, stage in enumerate(ring.stages):
        hop = _post(ring, (k_BSKD, v_BSKD), step) if step + 1 < len(ring.stages) else None
        if (pair := stage.pair) is not None:
            queries, keys = slice(pair.q_start, pair.q_stop), slice(pair.k_start, pair.k_stop)
            block_out, block_lse = ring.block.forward(
                q_BSHD[:, queries], k_BSKD[:, keys], v_BSKD[:, keys], pair.causal, ring.scale
            )
            if out_BSHD is None or lse_BHS is None:
                assert block_out.shape[1] == q_BSHD.shape[1], "the first pair must cover every query"
                state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
                # copies: the merge works in place, and a kernel may return a view of what it keeps
                out_BSHD, lse_BHS = block_out.to(state_dtype, copy=True), block_lse.to(state_dtype, copy=True)
            else:
                merge_(out_BSHD[:, queries], lse_BHS[:, :, queries], block_out, block_lse)
        if hop is not None:
            k_BSKD, v_BSKD = hop.wait()
    assert out_BSHD is not None, "no stage had a block pair"
    assert lse_BHS is not None
    return out_BSHD.to(q_BSHD.dtype), lse_BHS


def ring_backward(
    ring: Ring, dout_BSHD: Tensor, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v; out and lse are the merged ones, so each block's softmax is the global one.

    Every rank must call it. K,V go round again; the accumulated dK,dV follow one hop behind them, in fp32 (fp64 for
    fp64 input), and after the last stage one more hop takes them home.
    """
    state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    dq_BSHD = torch.zeros_like(q_BSHD, dtype=state_dtype)
    dkv_hop = None
    dk_BSKD = torch.zeros_like(k_BSKD, dtype=state_dtype)
    dv_BSKD = torch.zeros_like(v_BSKD, dtype=state_dtype)
    for step, stage in enumerate(ring.stages):
        kv_hop = _post(ring, (k_BSKD, v_BSKD), step) if step + 1 < len(ring.stages) else None
        block_grads = None
        if (pair := stage.pair) is not None:
            queries, keys = slice(pair.q_start, pair.q_stop), slice(pair.k_start, pair.k_stop)
            block_grads = ring.block.backward(
                dout_BSHD[:, queries],
                q_BSHD[:, queries],
                k_BSKD[:, keys],
                v_BSKD[:, keys],
                out_BSHD[:, queries],
                lse_BHS[:, :, queries],
                pair.causal,
                ring.scale,
            )
        if dkv_hop is not None:  # waited for after the block, which it overlaps
            dk_BSKD, dv_BSKD = dkv_hop.wait()
        if pair is not None and block_grads is not None:
            dq_BSHD[:, pair.q_start : pair.q_stop] += block_grads[0]
            dk_BSKD[:, pair.k_start : pair.k_stop] += block_grads[1]
            dv_BSKD[:, pair.k_start : pair.k_stop] += block_grads[2]
        if len(ring.stages) > 1:
            dkv_hop = _post(ring, (dk_BSKD, dv_BSKD), step)
        if kv_hop is not None:
            k_BSKD, v_BSKD = kv_hop.wait()
    if dkv_hop is not None:
        dk_BSKD, dv_BSKD = dkv_hop.wait()
    return dq_BSHD.to(q_BSHD.dtype), dk_BSKD.to(k_BSKD.dtype), dv_BSKD.to(v_BSKD.dtype)


def _post(ring: Ring, tensors: tuple[Tensor, Tensor], step: int) -> Hop:
    assert ring.exchange is not None, "several stages need an exchange"
    return ring.exchange.post(tensors, step)


class RingFunction(torch.autograd.Function):
    """`ring_forward` with `ring_backward` as its derivative; keeps the local q, k, v, out and lse: O(L/P) memory."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, ring: Ring) -> Tensor:
        out_BSHD, lse_BHS = ring_forward(ring, q_BSHD, k_BSKD, v_BSKD)
        ctx.ring = ring
        ctx.save_for_backward(q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS)
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ring_backward(ctx.ring, grad_outputs[0], *ctx.saved_tensors), None
