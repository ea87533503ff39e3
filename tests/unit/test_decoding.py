"""One query over the keys of several ranks: attention to a part, and the merge of the parts."""

from __future__ import annotations

import pytest
import torch

import ring_attention.decoding as decoding
from ring_attention.decoding import attend_to_keys, merge_parts
from ring_attention.kernels import Scores
from tests.tools.measure import relative_error


def drawn(num_keys: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 3, num_keys, 16), torch.randn(2, 3, num_keys, 8)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def written_out(q, k, v, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of each query head with the keys of its group."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = torch.einsum("bhd,bhtd->bht", q, k) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    return torch.einsum("bht,bhte->bhe", logits.softmax(-1), v), logits.logsumexp(-1)


@pytest.mark.parametrize("scores", [Scores(0.25), Scores(0.7, softcap=1.5)])
def test_out_and_lse_of_one_query(scores: Scores, monkeypatch):
    monkeypatch.setattr(decoding, "TILE_KEYS", 10)
    q, k, v = drawn(37)
    for found, expected in zip(attend_to_keys(q, k, v, scores), written_out(q, k, v, scores), strict=True):
        assert relative_error(found, expected) < 1e-14


def test_half_precision_is_summed_in_fp32():
    q, k, v = drawn(300, torch.bfloat16)
    out, lse = attend_to_keys(q, k, v, Scores(0.25))
    expected_out, expected_lse = written_out(q.double(), k.double(), v.double(), Scores(0.25))
    assert out.dtype == lse.dtype == torch.float32
    assert relative_error(out, expected_out) < 1e-6
    assert relative_error(lse, expected_lse) < 1e-6


def test_parts_merge_to_the_whole_and_an_empty_part_counts_nothing():
    scores = Scores(0.25)
    q, k, v = drawn(37)
    bounds = [(0, 11), (11, 11), (11, 37)]
    parts = [attend_to_keys(q, k[:, :, start:stop], v[:, :, start:stop], scores) for start, stop in bounds]
    assert (parts[1][0] == 0).all()
    assert (parts[1][1] == float("-inf")).all()
    outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    for found, expected in zip(merge_parts(outs, lses), attend_to_keys(q, k, v, scores), strict=True):
        assert relative_error(found, expected) < 1e-14
