"""The ring itself: a loop over stages, forward and backward, as one autograd function.

Sits between `attention` (the modules users build) and `schedule`, `exchange`, `blocks` and `merge`, which it joins.
Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers", 2023; Dao, FlashAttention-2, section 3.1.

Shapes: B batch, S local tokens, H query heads, K key-value heads, D head size; kv is k and v stacked, [2, B, S, K, D].
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

    def post(self, tensor: Tensor, name: str, step: int) -> Hop:
        assert self.exchange is not None, "several stages need an exchange"
        return self.exchange.post(tensor, f"{name} after stage {step}")


def ring_forward(ring: Ring, q_BSHD: Tensor, kv_2BSKD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over all keys of the ring.

    Every rank must call it. Returns out [B, S, H, D] in the input's dtype, cast once at the end, and lse [B, H, S] in
    fp32 (fp64 for fp64 input).
    """
    out_BSHD = lse_BHS = hop = None
    for step, stage in enumerate(ring.stages):
        if step + 1 < len(ring.stages):  # the next hop flies while this block is computed
            hop = ring.post(kv_2BSKD, "forward K,V", step)
        if (pair := stage.pair) is not None:
            queries, keys = slice(pair.q_start, pair.q_stop), slice(pair.k_start, pair.k_stop)
            k_BSKD, v_BSKD = kv_2BSKD[:, :, keys]
            block_out, block_lse = ring.block.forward(q_BSHD[:, queries], k_BSKD, v_BSKD, pair.causal, ring.scale)
            if out_BSHD is None or lse_BHS is None:
                assert block_out.shape[1] == q_BSHD.shape[1], "the first pair must cover every query"
                state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
                # copies: the merge works in place, and a kernel may return a view of what it keeps
                out_BSHD, lse_BHS = block_out.to(state_dtype, copy=True), block_lse.to(state_dtype, copy=True)
            else:
                merge_(out_BSHD[:, queries], lse_BHS[:, :, queries], block_out, block_lse)
        if hop is not None:
            kv_2BSKD, hop = hop.wait(), None
    assert out_BSHD is not None, "no stage had a block pair"
    assert lse_BHS is not None
    return out_BSHD.to(q_BSHD.dtype), lse_BHS


def ring_backward(
    ring: Ring, dout_BSHD: Tensor, q_BSHD: Tensor, kv_2BSKD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the local q and kv; out and lse are the merged ones, so each block's softmax is the global one.

    Every rank must call it. K,V go round again; the accumulated dK,dV follow one hop behind them, in fp32 (fp64 for
    fp64 input), and after the last stage one more hop takes them home.
    """
    state_dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    dq_BSHD = torch.zeros_like(q_BSHD, dtype=state_dtype)
    dkv_2BSKD = torch.zeros_like(kv_2BSKD, dtype=state_dtype)
    kv_hop = dkv_hop = block_grads = None
    for step, stage in enumerate(ring.stages):
        if step + 1 < len(ring.stages):
            kv_hop = ring.post(kv_2BSKD, "backward K,V", step)
        if (pair := stage.pair) is not None:
            queries, keys = slice(pair.q_start, pair.q_stop), slice(pair.k_start, pair.k_stop)
            k_BSKD, v_BSKD = kv_2BSKD[:, :, keys]
            block_grads = ring.block.backward(
                dout_BSHD[:, queries],
                q_BSHD[:, queries],
                k_BSKD,
                v_BSKD,
                out_BSHD[:, queries],
                lse_BHS[:, :, queries],
                pair.causal,
                ring.scale,
            )
        if dkv_hop is not None:  # waited for after the block, which it overlaps
            dkv_2BSKD = dkv_hop.wait()
        if pair is not None and block_grads is not None:
            dq_BSHD[:, pair.q_start : pair.q_stop] += block_grads[0]
            dkv_2BSKD[0, :, pair.k_start : pair.k_stop] += block_grads[1]
            dkv_2BSKD[1, :, pair.k_start : pair.k_stop] += block_grads[2]
        if len(ring.stages) > 1:
            dkv_hop = ring.post(dkv_2BSKD, "backward dK,dV", step)
        if kv_hop is not None:
            kv_2BSKD, kv_hop = kv_hop.wait(), None
    if dkv_hop is not None:
        dkv_2BSKD = dkv_hop.wait()
    return dq_BSHD.to(q_BSHD.dtype), dkv_2BSKD.to(kv_2BSKD.dtype)


class RingFunction(torch.autograd.Function):
    """`ring_forward` with `ring_backward` as its derivative; keeps the local q, k, v, out and lse: O(L/P) memory."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, ring: Ring) -> Tensor:
        kv_2BSKD = torch.stack((k_BSKD, v_BSKD))  # one message per hop
        out_BSHD, lse_BHS = ring_forward(ring, q_BSHD, kv_2BSKD)
        ctx.ring = ring
        ctx.save_for_backward(q_BSHD, kv_2BSKD, out_BSHD, lse_BHS)
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq_BSHD, dkv_2BSKD = ring_backward(ctx.ring, grad_outputs[0], *ctx.saved_tensors)
        return dq_BSHD, dkv_2BSKD[0], dkv_2BSKD[1], None
