"""The tiled MLP equals the untiled one, without full hidden activations and with no extra matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from conf.schema import ModelConfig
from recipes.model.mlp import MLP
from tests.tools.measure import relative_error

BATCH, LENGTH, HIDDEN, WIDTH, TILE, NUM_TILES = 2, 11, 12, 50, 4, 6  # 22 tokens: the last tile has 2
aten = torch.ops.aten


def make(mlp: str, tile_tokens: int, dtype: torch.dtype = torch.float64) -> MLP:
    config = ModelConfig(hidden_size=HIDDEN, mlp_size=WIDTH, mlp=mlp, bias=mlp == "gelu")
    made, generator = MLP(config, tile_tokens).double(), torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made.to(dtype)


def inputs(dtype: torch.dtype = torch.float64, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output."""
    generator = torch.Generator().manual_seed(6)
    x, dout = (torch.randn(BATCH, length, HIDDEN, generator=generator, dtype=torch.float64) + 0.3 for _ in range(2))
    return x.to(dtype), dout.to(dtype)


def output_and_gradients(mlp: MLP, x: Tensor, dout: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = mlp(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *mlp.parameters()], dout)]


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("tile_tokens", [1, TILE, 21])
def test_tiled_output_and_gradients_equal_untiled_ones(mlp: str, tile_tokens: int):
    tiled, untiled = (output_and_gradients(make(mlp, tokens), *inputs()) for tokens in (tile_tokens, 0))
    for ours, expected in zip(tiled, untiled, strict=True):
        assert ours.dtype == expected.dtype
        assert relative_error(ours, expected) < 1e-14


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_tiling_loses_no_precision(mlp: str):
    """1024 tiles of one token each against one matrix product, in bf16."""
    x, dout = inputs(torch.bfloat16, length=512)
    exact = output_and_gradients(make(mlp, 0, torch.bfloat16).double(), x.double(), dout.double())
    tiled, untiled = (output_and_gradients(make(mlp, tokens, torch.bfloat16), x, dout) for tokens in (1, 0))
    for ours, one_product, expected in zip(tiled, untiled, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, expected) < 1.05 * relative_error(one_product, expected)


class Operators(TorchDispatchMode):
    """Counts matrix products, and the largest number of tokens that had hidden activations in one tensor."""

    num_products = tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (aten.mm, aten.addmm)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and {WIDTH, 2 * WIDTH} & {*output.shape} and HIDDEN not in output.shape:
                self.tokens = max(self.tokens, output.shape.numel() // max(output.shape))
        return outputs


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    ("recompute", "tile_tokens", "num_products"),
    [(False, 0, 6), (True, 0, 7), (False, TILE, 7 * NUM_TILES), (True, TILE, 7 * NUM_TILES)],
)
def test_one_tile_exists_at_a_time_and_recomputing_a_layer_skips_its_tiles(
    mlp: str, recompute: bool, tile_tokens: int, num_products: int
):
    """Products: two forward, one recomputed, four for gradients."""
    made, (x, dout) = make(mlp, tile_tokens), inputs()
    x.requires_grad_()
    with Operators() as operators:
        out = checkpoint(lambda x: x + made(2 * x), x, use_reentrant=False) if recompute else made(x)
        assert isinstance(out, Tensor)
        out.backward(dout)
    assert (operators.tokens, operators.num_products) == (tile_tokens or BATCH * LENGTH, num_products)


def test_without_gradients_only_the_forward_pass_is_computed():
    x, _ = inputs()
    with Operators() as operators, torch.no_grad():
        out = make("swiglu", TILE)(x)
    assert not out.requires_grad
    assert (operators.tokens, operators.num_products) == (TILE, 2 * NUM_TILES)
