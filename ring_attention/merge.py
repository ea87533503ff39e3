"""The online softmax, which merges attention over disjoint sets of keys, and sums; in fp32 (fp64 for fp64 input).

    lse = log(exp(lse_1) + exp(lse_2))
    out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

On a GPU `merge_triton` does each in one pass. Shapes: out [B, S, H, E], lse [B, H, S]. Source: Milakov & Gimelshein
2018; Dao et al. 2022, section 3.1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def add_up(target: Tensor, addends: list[Tensor]) -> None:
    """Write the sum of [B, S, H, D] tensors to `target`, rounded once to its dtype.

    `target` may be the first addend. Its dtype is theirs, or fp32 (fp64 for fp64 addends).
    """
    dtype = functools.reduce(torch.promote_types, [addend.dtype for addend in addends], torch.float32)
    if len(addends) == 1:
        target.copy_(addends[0])
    elif target.is_cuda and len(addends) == 3 and dtype == torch.float32:
        from ring_attention.merge_triton import add_three_kernel, launch  # needs Triton, which CPU builds lack

        launch(add_three_kernel, target, *addends)
    elif len(addends) > 2:
        total = addends[0].to(dtype)
        for other in addends[1:-1]:
            total = total + other
        torch.add(total, addends[-1], out=target)
    else:  # PyTorch rounds to the wider dtype of the two addends, so one of them must have the target's
        if target.dtype == dtype != addends[0].dtype:
            addends = [target.copy_(addends[0]), addends[1]]
        torch.add(*addends, out=target)


def merge(target_BSHE: Tensor, out_BSHE: Tensor, lse_BHS: Tensor, tiles: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Merge the outs and lses of one or two tiles into the state: out into `target`, and lse in place.

    `target` may be `out` itself. A row that has seen no key yet has an lse of -inf and takes the tiles' result as it
    is. The tiles' own lse must be finite, as it is for trimmed blocks. The outs may differ in dtype.
    """
    if out_BSHE.is_cuda and lse_BHS.dtype == torch.float32:
        from ring_attention.merge_triton import launch, merge_kernels  # needs Triton, which CPU builds lack

        launch(merge_kernels[len(tiles) - 1], target_BSHE, out_BSHE, lse_BHS, *itertools.chain(*tiles))
        return
    dtype = lse_BHS.dtype
    merged_BSHE = out_BSHE.to(dtype)
    for tile_out_BSHE, tile_lse_BHS in tiles:
        # exp(lse_2 - lse) = sigmoid(lse_2 - lse_1), and the two weights sum to 1, so the update is one lerp
        weight_BSH1 = torch.sigmoid(tile_lse_BHS - lse_BHS).transpose(1, 2).unsqueeze(-1)
        merged_BSHE = torch.lerp(merged_BSHE, tile_out_BSHE.to(dtype), weight_BSH1)
        lse_BHS.copy_(torch.logaddexp(lse_BHS, tile_lse_BHS))
    target_BSHE.copy_(merged_BSHE)
