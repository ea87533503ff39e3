"""Sums and copies of rows that indices name, on the CPU."""

import pytest
import torch

from ring_attention.row_sums import sum_rows

OWN_K = torch.arange(24.0).view(2, 6, 2)[:, 1:3]  # 2 3, 4 5, 14 15, 16 17
OWN_V = torch.tensor([[[100.0], [200.0]], [[300.0], [400.0]]])
RECEIVED = torch.tensor([-1.0, -1.0, 500.0])  # the fifth: K, K, V


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_and_copies_into_views(dtype: torch.dtype):
    own, received = (OWN_K.to(dtype), OWN_V.to(dtype)), RECEIVED.to(dtype)
    whole_k, v = torch.full((1, 5, 2), -1.0, dtype=dtype), torch.empty(1, 3, 1, dtype=dtype)
    target = whole_k[:, 1:4], v
    sum_rows(target, own, received, torch.tensor([4, 3, 0, 0, 0]), torch.tensor([0, 2, 2]))
    assert whole_k.tolist() == [[[-1, -1], [15, 16], [0, 0], [6, 9], [-1, -1]]]
    assert v.tolist() == [[[900], [0], [300]]]
    sum_rows(target, own, received[:0], torch.tensor([3, 3, 1]))
    assert whole_k.tolist() == [[[-1, -1], [16, 17], [16, 17], [4, 5], [-1, -1]]]
    assert v.tolist() == [[[400], [400], [200]]]


def test_half_precision_is_rounded_once():
    """Three halves of the last place of 256: each by itself would be rounded away."""
    rows = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().view(1, 4, 1)
    target = torch.empty(1, 1, 1, dtype=torch.bfloat16), torch.empty(1, 1, 1, dtype=torch.bfloat16)
    sum_rows(target, (rows, -rows), rows.new_empty(0), torch.arange(4), torch.tensor([0]))
    assert [x.item() for x in target] == [260.0, -260.0]
