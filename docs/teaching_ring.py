"""Causal ring attention in 60 lines, to read beside the paper: no kernel, no overlap, no tricks.

Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023. The fast version is
`ring_attention/ring.py`. `tests/distributed/test_teaching_ring.py` compares this file with plain attention.

Each rank keeps its queries. Keys and values travel around the ring, one rank per step, until each rank has seen all.
Shapes: q, k, v, out [B, H, S, D] and lse [B, H, S, 1], with S tokens per rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def positions_of(rank: int, num_ranks: int, length: int, zigzag: bool) -> Tensor:
    """The positions in the sequence of a rank's tokens. In zigzag a rank holds an early and a late chunk."""
    if not zigzag:
        return torch.arange(length).chunk(num_ranks)[rank]
    chunks = torch.arange(length).chunk(2 * num_ranks)
    return torch.cat((chunks[rank], chunks[2 * num_ranks - 1 - rank]))


def rotate(*tensors: Tensor) -> list[Tensor]:
    """Send tensors to the next rank, and return those of the previous one."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    received = [torch.empty_like(tensor) for tensor in tensors]
    sends = [dist.P2POp(dist.isend, tensor.contiguous(), (rank + 1) % num_ranks) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, (rank - 1) % num_ranks) for tensor in received]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    return received


def causal_scores(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """[B, H, S, T]: the scaled scores, -inf where a key comes after the query."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(k_positions[None, :] > q_positions[:, None], float("-inf"))


class TeachingRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        own_k, own_v, k_positions = k, v, positions
        out, lse = torch.zeros_like(q), torch.full_like(q[..., :1], float("-inf"))
        for _ in range(dist.get_world_size()):
            scores = causal_scores(q, k, positions, k_positions)
            new_lse = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))  # the online softmax
            out = out * (lse - new_lse).exp() + (scores - new_lse).exp() @ v
            lse = new_lse
            k, v, k_positions = rotate(k, v, k_positions)
        ctx.save_for_backward(q, own_k, own_v, positions, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, positions, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta, k_positions = (dout * out).sum(-1, keepdim=True), positions
        for _ in range(dist.get_world_size()):
            p = (causal_scores(q, k, positions, k_positions) - lse).exp()  # lse is over all keys, so p is too
            ds = p * (dout @ v.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
            dv = dv + p.transpose(-1, -2) @ dout
            dk = dk + ds.transpose(-1, -2) @ q
            dq = dq + ds @ k
            k, v, k_positions, dk, dv = rotate(k, v, k_positions, dk, dv)  # each gradient travels with its keys
        return dq, dk, dv, None  # after a whole round, dk and dv are back at their owner
