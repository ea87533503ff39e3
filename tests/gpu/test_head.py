"""The tiled loss on a GPU, which accumulates half-precision products in fp32, against fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from data.shard import IGNORED_LABEL
from recipes.model.head import Head
from tests.tools.measure import LIMIT, relative_error

pytestmark = pytest.mark.gpu
BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 500, 96, 320
TILE = 384  # 1000 tokens, so the last tile has 232


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tiled_loss_and_gradients_equal_untiled_ones_in_fp64(dtype: torch.dtype):
    torch.manual_seed(1)
    x = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN).div(8).to(dtype)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels[:, ::7] = IGNORED_LABEL
    results = []
    for device, compute_dtype, tile_tokens in (("cpu", torch.float64, 0), ("cuda", dtype, TILE)):
        head = Head(HIDDEN, VOCABULARY, tile_tokens).to(device, compute_dtype)
        head.load_state_dict({"weight": weight})
        leaf = x.to(device, compute_dtype).requires_grad_()
        loss = head(leaf, labels.to(device))
        results.append([loss.detach(), *torch.autograd.grad(loss / 3, (leaf, head.weight))])
    for expected, got in zip(*results, strict=True):
        assert relative_error(got.cpu(), expected) < LIMIT[dtype]
