"""The MLP of a layer, of all tokens at once or tile by tile: hidden activations of all tokens never exist then.

Between `transformer`, whose layers have one each, and `kernels`, which has SwiGLU.

Shapes: B batch, S local tokens, T tokens of all sequences or of a tile, E hidden size, F MLP size, U what goes up: F,
or 2 F for SwiGLU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from recipes.model.ops import swiglu
from recipes.model.tiles import add_product_, tiles, zeros_to_sum


class MLP(nn.Module):
    """down(activation(up(x))).

    Args:
        tile_tokens: of how many tokens hidden activations exist at once; 0: of all.
    """

    def __init__(self, config: ModelConfig, tile_tokens: int = 0) -> None:
        super().__init__()
        self.gated, self.tile_tokens = config.mlp == "swiglu", tile_tokens
        self.up = nn.Linear(config.hidden_size, config.mlp_size * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)
        if tile_tokens:  # ZeRO-3 gathers both weights at once, around all tiles, and again for the backward pass
            set_z3_leaf_module(self, True)

    def forward(self, x_BSE: Tensor) -> Tensor:
        if self.tile_tokens == 0 or x_BSE.shape[:-1].numel() <= self.tile_tokens:
            return self.of_all(x_BSE)
        x_TE = x_BSE.flatten(0, -2)
        if torch.is_grad_enabled():
            parameters = self.up.weight, self.up.bias, self.down.weight, self.down.bias
            x_TE = _TiledBackward.apply(x_TE, *parameters, self.gated, self.tile_tokens)
        return _TiledForward.apply(x_TE, self).view_as(x_BSE)  # pyright: ignore[reportAttributeAccessIssue]

    def of_all(self, x: Tensor) -> Tensor:
        """[..., E] of [..., E], without tiles."""
        return self.down(_activation(self.up(x), self.gated))


def _activation(hidden_TU: Tensor, gated: bool) -> Tensor:
    return swiglu(hidden_TU) if gated else F.gelu(hidden_TU)


class _TiledForward(torch.autograd.Function):
    """The MLP's output [T, E]; its gradient is handed on as it comes, to `_TiledBackward`."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, mlp: MLP) -> Tensor:
        out_TE = torch.empty_like(x_TE)
        for tile in tiles(len(x_TE), mlp.tile_tokens):
            out_TE[tile] = mlp.of_all(x_TE[tile])
        return out_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


class _TiledBackward(torch.autograd.Function):
    """x as it is; in the backward pass, from the gradient of the MLP's OUTPUT, those of x and of the parameters.

    A function of its own, before the one that computes the output, so that the tensors it needs are kept before
    anything is computed: a layer that is computed again (`torch.utils.checkpoint`) stops at the last tensor that it
    keeps, so no tile is computed for that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TE: Tensor,
        up_UE: Tensor,
        up_bias_U: Tensor | None,
        down_EF: Tensor,
        down_bias_E: Tensor | None,
        gated: bool,
        tile_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(x_TE, up_UE, up_bias_U, down_EF, down_bias_E)
        ctx.gated, ctx.tile_tokens = gated, tile_tokens
        return x_TE.view_as(x_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dout_TE = grad_outputs[0]
        x_TE, *parameters = ctx.saved_tensors
        dx_TE = torch.empty_like(x_TE)
        sums = [None if parameter is None else zeros_to_sum(parameter) for parameter in parameters]
        for tile in tiles(len(x_TE), ctx.tile_tokens):
            _tile_backward(dout_TE[tile], x_TE[tile], dx_TE[tile], parameters, sums, ctx.gated)
        return dx_TE, *(None if total is None else total.to(x_TE.dtype) for total in sums), None, None


def _tile_backward(
    dout_TE: Tensor,
    x_TE: Tensor,
    dx_TE: Tensor,
    parameters: list[Tensor],
    sums: list[Any],
    gated: bool,
) -> None:
    """Writes `dx_TE` of one tile, and adds to the sums for (up, its bias, down, its bias), None where there is no bias.

    A function of its own, so that its activations are gone before the next tile's come. The product with `down` is not
    computed again, for no gradient needs it.
    """
    up_UE, up_bias_U, down_EF, _ = parameters
    dup_UE, dup_bias_U, ddown_EF, ddown_bias_E = sums
    hidden_TU = F.linear(x_TE, up_UE, up_bias_U).requires_grad_()
    with torch.enable_grad():
        active_TF = _activation(hidden_TU, gated)
    add_product_(ddown_EF, dout_TE.T, active_TF.detach())
    (dhidden_TU,) = torch.autograd.grad(active_TF, hidden_TU, dout_TE @ down_EF)
    add_product_(dup_UE, dhidden_TU.T, x_TE)
    torch.mm(dhidden_TU, up_UE, out=dx_TE)
    if up_bias_U is not None:
        dup_bias_U += dhidden_TU.sum(0, dtype=dup_bias_U.dtype)
        ddown_bias_E += dout_TE.sum(0, dtype=ddown_bias_E.dtype)
