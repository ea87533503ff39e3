"""First derivatives only: backward passes that refuse to be differentiated themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Makes backward(ctx, saved_tensors, *grad_outputs) the backward pass of a torch.autograd.Function.

    A derivative of its gradients raises NotImplementedError.

    Torch's decorator of this name lets gradients pass as constants where no `grad_outputs` needs a gradient, as those
    of a sum do not: a gradient penalty then lacks its second-order part, without an error.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # torch.utils.checkpoint lets them be read once
        with torch.no_grad():
            gradients = backward(ctx, saved, *grad_outputs)
        if not torch.is_grad_enabled():  # enabled by create_graph=True
            return gradients
        # the Function's output is among the saved tensors and leads to all inputs: any second derivative gets here
        return _NoSecondDerivative.apply(len(gradients), *gradients, *saved, *grad_outputs)

    return once


class _NoSecondDerivative(torch.autograd.Function):
    """Passes the first `num_gradients` of its inputs on."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *inputs: Any) -> tuple[Any, ...]:
        return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(
            "a second derivative of attention is not supported: take gradients of its outputs only, without "
            "create_graph=True, or use torch's scaled_dot_product_attention on one rank"
        )
