"""The MLP of a layer, optionally tiled: then the hidden activations of all tokens never exist at the same time.

Shapes: B batch, S local tokens, T tokens of all sequences or of a tile, E hidden size, F MLP size, U outputs of an up
projection: F, or 2 F for gate and up in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.schema import ModelConfig
from recipes.model.ops import add_matmul_, fp32_zeros_like, swiglu

Activation = Callable[..., Tensor]  # of the outputs of the up projections, [..., U] each, to [..., F]


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
        return tiled_mlp(x_BSE, [self.up], self.down, swiglu if self.gated else F.gelu, self.tile_tokens)


def tiled_mlp(
    x_BSE: Tensor, ups: Sequence[nn.Linear], down: nn.Linear, activation: Activation, tile_tokens: int
) -> Tensor:
    """down(activation(up(x) for each of `ups`)), [..., E] to [..., E].

    Args:
        tile_tokens: how many tokens have hidden activations at the same time; 0: all.
    """
    if tile_tokens == 0 or x_BSE.shape[:-1].numel() <= tile_tokens:
        return _untiled(x_BSE, ups, down, activation)
    x_TE = x_BSE.flatten(0, -2)
    if torch.is_grad_enabled():
        parameters = [parameter for linear in (*ups, down) for parameter in (linear.weight, linear.bias)]
        x_TE = _TiledBackward.apply(x_TE, activation, tile_tokens, *parameters)
    return _TiledForward.apply(x_TE, ups, down, activation, tile_tokens).view_as(x_BSE)  # pyright: ignore[reportAttributeAccessIssue]


def _untiled(x: Tensor, ups: Sequence[nn.Linear], down: nn.Linear, activation: Activation) -> Tensor:
    return down(activation(*(up(x) for up in ups)))


class _TiledForward(torch.autograd.Function):
    """The MLP's output [T, E]. Its gradient passes through unchanged to `_TiledBackward`."""

    @staticmethod
    def forward(
        ctx: Any, x_TE: Tensor, ups: Sequence[nn.Linear], down: nn.Linear, activation: Activation, tile_tokens: int
    ) -> Tensor:
        out_TE = torch.empty_like(x_TE)
        for x, out in zip(x_TE.split(tile_tokens), out_TE.split(tile_tokens), strict=True):
            out.copy_(_untiled(x, ups, down, activation))
        return out_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None, None, None, None


class _TiledBackward(torch.autograd.Function):
    """The identity on x. Its backward pass takes the gradient of the MLP's OUTPUT and gives those of x and parameters
    (weight and bias of each up projection, then of the down projection; None where there is no bias).

    It is separate from `_TiledForward` and runs before it for the sake of activation checkpointing. Recomputation stops
    at the last tensor saved for backward. All tensors are saved here, so no tile's forward pass is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, activation: Activation, tile_tokens: int, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TE, *parameters)
        ctx.activation, ctx.tile_tokens = activation, tile_tokens
        return x_TE.view_as(x_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TE, *parameters = ctx.saved_tensors
        dx_TE = torch.empty_like(x_TE)
        totals = [
            fp32_zeros_like(parameter) if needs_gradient else None
            for parameter, needs_gradient in zip(parameters, ctx.needs_input_grad[3:], strict=True)
        ]
        for dout, x, dx in zip(*(t.split(ctx.tile_tokens) for t in (grad_outputs[0], x_TE, dx_TE)), strict=True):
            _tile_backward(dout, x, dx, parameters, totals, ctx.activation)
        return dx_TE, None, None, *(None if total is None else total.to(x_TE.dtype) for total in totals)


def _tile_backward(
    dout_TE: Tensor,
    x_TE: Tensor,
    dx_TE: Tensor,
    parameters: list[Tensor],
    totals: list[Any],
    activation: Activation,
) -> None:
    """Write one tile's `dx_TE`; add to the parameters' gradients in `totals`, where there are any.

    A function of its own, so that its activations are freed before the next tile's are computed. It does not recompute
    the down projection, which no gradient needs.
    """
    *ups, (down_EF, _) = zip(parameters[::2], parameters[1::2], strict=True)
    *up_totals, (ddown_EF, ddown_bias_E) = zip(totals[::2], totals[1::2], strict=True)
    hidden = [F.linear(x_TE, weight_UE, bias_U).requires_grad_() for weight_UE, bias_U in ups]
    with torch.enable_grad():
        active_TF = activation(*hidden)
    if ddown_EF is not None:
        add_matmul_(ddown_EF, dout_TE.T, active_TF.detach())
    if ddown_bias_E is not None:
        ddown_bias_E += dout_TE.sum(0, dtype=ddown_bias_E.dtype)
    dhidden = torch.autograd.grad(active_TF, hidden, dout_TE @ down_EF)
    for number, (dhidden_TU, (weight_UE, _), (dweight_UE, dbias_U)) in enumerate(
        zip(dhidden, ups, up_totals, strict=True)
    ):
        if dweight_UE is not None:
            add_matmul_(dweight_UE, dhidden_TU.T, x_TE)
        if dbias_U is not None:
            dbias_U += dhidden_TU.sum(0, dtype=dbias_U.dtype)
        if number == 0:
            torch.mm(dhidden_TU, weight_UE, out=dx_TE)
        else:
            dx_TE.addmm_(dhidden_TU, weight_UE)
