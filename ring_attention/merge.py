"""The online softmax: joins attention over disjoint sets of keys. State stays in fp32 (fp64 for fp64 input).

    lse = log(exp(lse_1) + exp(lse_2))
    out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

Shapes: out [B, S, H, E], lse [B, H, S]. Source: Milakov & Gimelshein 2018; Dao et al. 2022, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out_BSHE: Tensor, lse_BHS: Tensor, block_out_BSHE: Tensor, block_lse_BHS: Tensor) -> None:
    """Merge one block's result into the running (out, lse), in place.

    A running lse of -inf is a row that has seen no key yet and takes the block's result as it is; the block's own
    must be finite, which trimmed rectangles guarantee.
    """
    # exp(lse_2 - lse) = sigmoid(lse_2 - lse_1), and the two weights sum to 1, so the update is one lerp
    weight_BSH1 = torch.sigmoid(block_lse_BHS - lse_BHS).transpose(1, 2).unsqueeze(-1)
    out_BSHE.lerp_(block_out_BSHE.to(out_BSHE.dtype), weight_BSH1.to(out_BSHE.dtype))
    lse_BHS.copy_(torch.logaddexp(lse_BHS, block_lse_BHS))
