# pyright: reportMissingImports=false, reportIndexIssue=false
"""`sum_rows` on a GPU: each program writes one row, or a part of it. Tensors have any strides; sums are in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attention.merge_triton import run_again, run_first

_MAX_COLUMNS = 2048  # per program


# counts change with each batch of documents: a kernel for each kind of number would be compiled again and again
@triton.jit(do_not_specialize=["num_sums", "num_addends", "num_own", "target_tokens", "own_tokens"])
def sum_rows_kernel(
    target, own, received, addends, starts,
    target_b, target_t, target_f,
    own_b, own_t, own_f,
    received_n, received_f,
    num_sums, num_addends, num_own, target_tokens, own_tokens,
    row_size: tl.constexpr, IS_COPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)  # of the sum, in the order of [B, T]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < row_size
    if IS_COPY:
        start = number
        stop = number + 1
    else:
        start = tl.load(starts + number)
        stop = tl.load(starts + number + 1, mask=number + 1 < num_sums, other=num_addends)
    total = tl.zeros([COLUMNS], tl.float32)
    for index in range(start, stop):
        row = tl.load(addends + index).to(tl.int32)  # a division of int64 would take longer than the row
        if row < num_own:
            b, t = (row // own_tokens).to(tl.int64), (row % own_tokens).to(tl.int64)
            total += tl.load(own + b * own_b + t * own_t + column * own_f, mask=mask, other=0.0).to(tl.float32)
        else:
            n = (row - num_own).to(tl.int64)
            total += tl.load(received + n * received_n + column * received_f, mask=mask, other=0.0).to(tl.float32)
    b, t = (number // target_tokens).to(tl.int64), (number % target_tokens).to(tl.int64)
    at = target + b * target_b + t * target_t + column * target_f
    tl.store(at, total.to(target.dtype.element_ty), mask=mask)


def launch_sums(
    target_BTF: Tensor, own_BTF: Tensor, received_NF: Tensor, addends: Tensor, starts: Tensor | None
) -> None:
    """As `sum_rows`, in fp32 or half precision."""
    tensors = (target_BTF, own_BTF, received_NF, addends, addends if starts is None else starts)
    batch, target_tokens, row_size = target_BTF.shape
    num_sums, own_tokens = batch * target_tokens, own_BTF.shape[1]
    columns = min(triton.next_power_of_2(row_size), _MAX_COLUMNS)
    strides = (*target_BTF.stride(), *own_BTF.stride(), *received_NF.stride())
    counts = (num_sums, len(addends), len(own_BTF) * own_tokens, target_tokens, own_tokens)
    numbers = (*strides, *counts, row_size, starts is None, columns)
    layouts = tuple((x.dtype, x.data_ptr() % 16) for x in tensors)
    key, arguments = (sum_rows_kernel, numbers, layouts), (*tensors, *numbers)
    if not run_again(key, arguments):
        run_first(key, sum_rows_kernel, (num_sums, triton.cdiv(row_size, columns), 1), arguments)
