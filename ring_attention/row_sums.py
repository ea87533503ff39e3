"""Sums of entries that indices name: keys and values that a pass copies, and gradients of keys that several runs have.

On a GPU `row_sums_triton` does each in one launch and one pass over memory. An entry is the K and the V of one token of
one row of the batch. Shapes: B batch, T tokens of a row, F = K*D or K*E numbers of a token's K or V.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

KeysAndValues = tuple[Tensor, Tensor]  # [B, T, F] each, whose last dim lies side by side; they may be views


def sum_rows(
    target: KeysAndValues, own: KeysAndValues, received: Tensor, addends: Tensor, starts: Tensor | None = None
) -> None:
    """Write sums of entries to `target`, in its order: in fp32 (fp64), in the order of the addends, rounded once.

    All tensors of numbers have one dtype.

    Args:
        own, received: the entries, numbered from 0: own ones row after row, then those of a contiguous vector, in which
            each entry's V follows its K.
        addends: int64, the number of each addend's entry, one sum after the other.
        starts: int64, where each sum's addends begin; None: each sum is a copy of one entry.
    """
    if received.is_cuda and received.dtype != torch.float64:
        from ring_attention.row_sums_triton import launch_sums  # needs Triton, which CPU builds lack

        launch_sums(target, own, received, addends, starts)
        return
    for target_BTF, own_BTF, received_NF in zip(target, own, entries(received, own), strict=True):
        rows_NF = own_BTF.flatten(0, 1)
        if len(received_NF):
            rows_NF = torch.cat((rows_NF, received_NF))
        if starts is None:
            sums_NF = rows_NF.index_select(0, addends)
        else:
            sums_NF = embedding_bag(addends, rows_NF, starts, mode="sum")
        target_BTF.copy_(sums_NF.view(target_BTF.shape))


def entries(vector: Tensor, like: KeysAndValues) -> tuple[Tensor, ...]:
    """K and V [N, F] of the entries of a vector, in which each one's V follows its K."""
    sizes = [part.shape[2] for part in like]
    return vector.view(-1, sum(sizes)).split_with_sizes(sizes, 1)
