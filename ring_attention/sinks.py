"""Attention sinks: a learned logit per query head, which joins the softmax's denominator and has no value.

    lse = log(exp(sink) + sum_j exp(s_j))
    out = sum_j exp(s_j - lse) v_j

No kernel knows of sinks. They join once, after the last merge, and the kernels' backward passes take the joined out and
lse. Shapes: B batch, S local tokens, H query heads, E value head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join_sinks(out_BSHE: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with sinks, from that without: `out`, scaled in place, and a new lse. Sinks have the dtype of lse."""
    joined_BHS = torch.logaddexp(lse_BHS, sinks_H[:, None])
    out_BSHE.mul_(torch.exp(lse_BHS - joined_BHS).transpose(1, 2).unsqueeze(-1))
    return out_BSHE, joined_BHS


def sinks_gradient(dout_BSHE: Tensor, out_BSHE: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """[H]: the gradient of sinks, given out and lse with sinks; in the dtype of lse.

    dsink = -sum over rows and queries of exp(sink - lse) <dout, out>
    """
    delta_BSH = out_BSHE.to(lse_BHS.dtype, copy=True).mul_(dout_BSHE).sum(-1)
    return -(torch.exp(sinks_H[:, None] - lse_BHS) * delta_BSH.transpose(1, 2)).sum((0, 2))


def ulysses_heads(num_heads: int, num_kv_heads: int, ulysses_rank: int, ulysses_degree: int) -> slice:
    """The query heads that a rank computes under Ulysses: those of its key-value heads, a contiguous block.

    DeepSpeed gives the first ranks one key-value head more where the ranks do not divide them.
    """
    smallest, num_larger = divmod(num_kv_heads, ulysses_degree)
    start, stop = (rank * smallest + min(rank, num_larger) for rank in (ulysses_rank, ulysses_rank + 1))
    return slice(start * num_heads // num_kv_heads, stop * num_heads // num_kv_heads)
