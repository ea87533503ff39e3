"""What functions share that take their tokens tile by tile. Below `head` and `mlp`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def tiles(num_tokens: int, tile_tokens: int) -> Iterator[slice]:
    """Slices of `tile_tokens` tokens; the last has what is left."""
    for start in range(0, num_tokens, tile_tokens):
        yield slice(start, start + tile_tokens)


def zeros_to_sum(tensor: Tensor) -> Tensor:
    """In the tensor's shape, for sums over tiles: in fp32, of fp64 in fp64."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for half-precision factors too without rounding the product to their dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]
    else:  # the CPU has no such product
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
