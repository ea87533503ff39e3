"""The tiled MLP on a GPU, with its kernels, against fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from conf.schema import ModelConfig
from recipes.model.mlp import MLP
from tests.tools.measure import LIMIT, relative_error

pytestmark = pytest.mark.gpu
BATCH, LENGTH, HIDDEN, WIDTH = 2, 500, 96, 256
TILE = 384  # 1000 tokens, so the last tile has 232


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tiled_output_and_gradients_equal_untiled_ones_in_fp64(dtype: torch.dtype, mlp: str):
    torch.manual_seed(1)
    config = ModelConfig(hidden_size=HIDDEN, mlp_size=WIDTH, mlp=mlp, bias=mlp == "gelu")
    weights = {name: weight.to(dtype) for name, weight in MLP(config).state_dict().items()}
    x, dout = (torch.randn(BATCH, LENGTH, HIDDEN).to(dtype) for _ in range(2))
    results = []
    for device, compute_dtype, tile_tokens in (("cpu", torch.float64, 0), ("cuda", dtype, TILE)):
        made = MLP(config, tile_tokens).to(device, compute_dtype)
        made.load_state_dict(weights)
        leaf = x.to(device, compute_dtype).requires_grad_()
        out = made(leaf)
        gradients = torch.autograd.grad(out, (leaf, *made.parameters()), dout.to(device, compute_dtype))
        results.append([out.detach(), *gradients])
    for expected, got in zip(*results, strict=True):
        assert relative_error(got.cpu(), expected) < LIMIT[dtype]
