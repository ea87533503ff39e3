"""How the tests say that two tensors are equal: ||a - b|| / ||b||, absolute where b is about 0."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Computed in fp64; infinite if anything is not finite."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    difference, size = (got - expected).norm().item(), expected.norm().item()
    if not torch.isfinite(got).all():
        return float("inf")
    return difference / size if size > 1e-12 else difference
