"""The MLP of a layer, optionally tiled: then the hidden activations of all tokens never exist at the same time.

Shapes: B batch, S local tokens, T tokens of all sequences or of a tile, E hidden size, F MLP size, U outputs of the up
projection: F, or 2 F for SwiGLU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from recipes.model.ops import add_matmul_, fp32_zeros_like, swiglu


class MLP(nn.Module):
    """down(activation(up(x))).

    Args:
        tile_tokens: how many tokens have hidden activations at the same time; 0: all.
    """

    def __init__(self, config: ModelConfig, tile_tokens: int = 0) -> None:
        super().__init__()
        self.gated, self.tile_tokens = config.mlp == "swiglu", tile_tokens
        self.up = nn.Linear(config.hidden_size, config.mlp_size * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)
        if tile_tokens:  # ZeRO-3 gathers both weights once for all tiles, and again for the backward pass
            set_z3_leaf_module(self, True)

    def forward(self, x_BSE: Tensor) -> Tensor:
        if self.tile_tokens == 0 or x_BSE.shape[:-1].numel() <= self.tile_tokens:
            return self.untiled(x_BSE)
        x_TE = x_BSE.flatten(0, -2)
        if torch.is_grad_enabled():
            parameters = self.up.weight, self.up.bias, self.down.weight, self.down.bias
            x_TE = _TiledBackward.apply(x_TE, self.gated, self.tile_tokens, *parameters)
        return _TiledForward.apply(x_TE, self).view_as(x_BSE)  # pyright: ignore[reportAttributeAccessIssue]

    def untiled(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        return self.down(_activation(self.up(x), self.gated))


def _activation(hidden_TU: Tensor, gated: bool) -> Tensor:
    return swiglu(hidden_TU) if gated else F.gelu(hidden_TU)


class _TiledForward(torch.autograd.Function):
    """The MLP's output [T, E]. Its gradient passes through unchanged to `_TiledBackward`."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, mlp: MLP) -> Tensor:
        out_TE = torch.empty_like(x_TE)
        for x, out in zip(x_TE.split(mlp.tile_tokens), out_TE.split(mlp.tile_tokens), strict=True):
            out.copy_(mlp.untiled(x))
        return out_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


class _TiledBackward(torch.autograd.Function):
    """The identity on x. Its backward pass takes the gradient of the MLP's OUTPUT and gives those of x and parameters
    (up, its bias, down, its bias; None where there is no bias).

    It is separate from `_TiledForward` and runs before it for the sake of activation checkpointing. Recomputation stops
    at the last tensor saved for backward. All tensors are saved here, so no tile's forward pass is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, gated: bool, tile_tokens: int, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TE, *parameters)
        ctx.gated, ctx.tile_tokens = gated, tile_tokens
        return x_TE.view_as(x_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TE, *parameters = ctx.saved_tensors
        dx_TE = torch.empty_like(x_TE)
        totals = [None if parameter is None else fp32_zeros_like(parameter) for parameter in parameters]
        for dout, x, dx in zip(*(t.split(ctx.tile_tokens) for t in (grad_outputs[0], x_TE, dx_TE)), strict=True):
            _tile_backward(dout, x, dx, parameters, totals, ctx.gated)
        return dx_TE, None, None, *(None if total is None else total.to(x_TE.dtype) for total in totals)


def _tile_backward(
    dout_TE: Tensor, x_TE: Tensor, dx_TE: Tensor, parameters: list[Tensor], totals: list[Any], gated: bool
) -> None:
    """Write one tile's `dx_TE`; add to the parameters' gradients.

    A function of its own, so that its activations are freed before the next tile's are computed. It does not recompute
    the down projection, which no gradient needs.
    """
    up_UE, up_bias_U, down_EF, _ = parameters
    dup_UE, dup_bias_U, ddown_EF, ddown_bias_E = totals
    hidden_TU = F.linear(x_TE, up_UE, up_bias_U).requires_grad_()
    with torch.enable_grad():
        active_TF = _activation(hidden_TU, gated)
    add_matmul_(ddown_EF, dout_TE.T, active_TF.detach())
    (dhidden_TU,) = torch.autograd.grad(active_TF, hidden_TU, dout_TE @ down_EF)
    add_matmul_(dup_UE, dhidden_TU.T, x_TE)
    torch.mm(dhidden_TU, up_UE, out=dx_TE)
    if up_bias_U is not None:
        dup_bias_U += dhidden_TU.sum(0, dtype=dup_bias_U.dtype)
        ddown_bias_E += dout_TE.sum(0, dtype=ddown_bias_E.dtype)
