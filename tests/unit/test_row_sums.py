"""Sums and copies of rows that indices name, on the CPU."""

import pytest
import torch

from ring_attention.row_sums import sum_rows

OWN = torch.arange(24.0).view(2, 6, 2)[:, 1:3]  # rows 2 3, 4 5, 14 15, 16 17
RECEIVED = torch.tensor([[-1.0, -1.0, 100.0, 200.0]])[:, 2:]  # the fifth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_and_copies_into_views(dtype: torch.dtype):
    whole = torch.full((1, 5, 2), -1.0, dtype=dtype)
    target = whole[:, 1:4]
    sum_rows(target, OWN.to(dtype), RECEIVED.to(dtype), torch.tensor([4, 3, 0, 0, 0]), torch.tensor([0, 2, 2]))
    assert whole.tolist() == [[[-1, -1], [116, 217], [0, 0], [6, 9], [-1, -1]]]
    sum_rows(target, OWN.to(dtype), RECEIVED[:0].to(dtype), torch.tensor([3, 3, 1]))
    assert whole.tolist() == [[[-1, -1], [16, 17], [16, 17], [4, 5], [-1, -1]]]


def test_half_precision_is_rounded_once():
    """Three halves of the last place of 256: each by itself would be rounded away."""
    rows = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().view(1, 4, 1)
    target = torch.empty(1, 1, 1, dtype=torch.bfloat16)
    sum_rows(target, rows, rows[0, :0], torch.arange(4), torch.tensor([0]))
    assert target.item() == 260.0
