"""The online softmax: joins attention over two disjoint sets of keys. State stays in fp32 (fp64 for fp64 input).

    lse = log(exp(lse_1) + exp(lse_2))
    out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

Shapes: out [B, S, H, D], lse [B, H, S]. Source: Milakov & Gimelshein 2018; Dao et al. 2022, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out_BSHD: Tensor, lse_BHS: Tensor, block_out_BSHD: Tensor, block_lse_BHS: Tensor) -> None:
    """Merge one block's result into the running (out, lse), in place. Both lse must be finite: no fully masked row."""
    # exp(lse_2 - lse) = sigmoid(lse_2 - lse_1), and the two weights sum to 1, so the update is one lerp
    weight_BSH1 = torch.sigmoid(block_lse_BHS - lse_BHS).transpose(1, 2).unsqueeze(-1)
    out_BSHD.lerp_(block_out_BSHD.to(out_BSHD.dtype), weight_BSH1)
    torch.logaddexp(lse_BHS, block_lse_BHS, out=lse_BHS)
