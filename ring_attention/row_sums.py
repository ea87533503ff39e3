"""Sums of rows that indices name: the keys and values that a pass copies, and gradients of keys that several runs have.

On a GPU `row_sums_triton` does each in one pass over memory. Shapes: B batch, T tokens of a row of the batch, N rows,
F numbers of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def sum_rows(
    target_BTF: Tensor, own_BTF: Tensor, received_NF: Tensor, addends: Tensor, starts: Tensor | None = None
) -> None:
    """Write sums of rows to `target`, in its order: in fp32 (fp64), in the order of the addends, rounded once.

    All tensors of numbers have one dtype, and may be views.

    Args:
        own_BTF, received_NF: the rows, numbered from 0: those of `own`, then those of `received`.
        addends: int64, the number of each addend's row, one sum after the other.
        starts: int64, where each sum's addends begin; None: each sum is a copy of one row.
    """
    if target_BTF.is_cuda and target_BTF.dtype != torch.float64:
        from ring_attention.row_sums_triton import launch_sums  # needs Triton, which CPU builds lack

        launch_sums(target_BTF, own_BTF, received_NF, addends, starts)
        return
    rows_NF = own_BTF.flatten(0, 1)
    if len(received_NF):
        rows_NF = torch.cat((rows_NF, received_NF))
    if starts is None:
        sums_NF = rows_NF.index_select(0, addends)
    else:
        sums_NF = embedding_bag(addends, rows_NF, starts, mode="sum")
    target_BTF.copy_(sums_NF.view(target_BTF.shape))
