# pyright: reportMissingImports=false, reportIndexIssue=false
"""`sum_rows` on a GPU: each program writes one entry, or a part of it. Sums are in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_attention.merge_triton import run_again, run_first

_MAX_COLUMNS = 2048  # per program


# counts change with each batch of documents: a kernel for each kind of number would be compiled again and again
@triton.jit(do_not_specialize=["num_sums", "num_addends", "num_own", "target_tokens", "own_tokens"])
def sum_rows_kernel(
    target_k, target_v, own_k, own_v, received, addends, starts,
    target_k_b, target_k_t, target_v_b, target_v_t,
    own_k_b, own_k_t, own_v_b, own_v_t,
    num_sums, num_addends, num_own, target_tokens, own_tokens,
    K_SIZE: tl.constexpr, SIZE: tl.constexpr, IS_COPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)  # of the sum, in the order of [B, T]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    v_column = column - K_SIZE
    is_k, is_v = column < K_SIZE, (column >= K_SIZE) & (column < SIZE)
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
            total += tl.load(own_k + b * own_k_b + t * own_k_t + column, mask=is_k, other=0.0).to(tl.float32)
            total += tl.load(own_v + b * own_v_b + t * own_v_t + v_column, mask=is_v, other=0.0).to(tl.float32)
        else:
            n = (row - num_own).to(tl.int64)
            total += tl.load(received + n * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    b, t = (number // target_tokens).to(tl.int64), (number % target_tokens).to(tl.int64)
    rounded = total.to(target_k.dtype.element_ty)
    tl.store(target_k + b * target_k_b + t * target_k_t + column, rounded, mask=is_k)
    tl.store(target_v + b * target_v_b + t * target_v_t + v_column, rounded, mask=is_v)


def launch_sums(
    target: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    received: Tensor,
    addends: Tensor,
    starts: Tensor | None,
) -> None:
    """As `sum_rows`, in fp32 or half precision."""
    (target_k, target_v), (own_k, own_v) = target, own
    tensors = (target_k, target_v, own_k, own_v, received, addends, addends if starts is None else starts)
    batch, target_tokens, k_size = target_k.shape
    num_sums, own_tokens, size = batch * target_tokens, own_k.shape[1], k_size + target_v.shape[2]
    columns = min(triton.next_power_of_2(size), _MAX_COLUMNS)
    strides = (*target_k.stride()[:2], *target_v.stride()[:2], *own_k.stride()[:2], *own_v.stride()[:2])
    counts = (num_sums, addends.shape[0], own_k.shape[0] * own_tokens, target_tokens, own_tokens)
    numbers = (*strides, *counts, k_size, size, starts is None, columns)
    alignments = tuple([x.data_ptr() % 16 for x in tensors])
    key, arguments = (sum_rows_kernel, numbers, alignments, received.dtype), (*tensors, *numbers)
    if not run_again(key, arguments):
        assert all(x.stride(2) == 1 for x in tensors[:4]), [x.stride() for x in tensors[:4]]
        run_first(key, sum_rows_kernel, (num_sums, triton.cdiv(size, columns), 1), arguments)
