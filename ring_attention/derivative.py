"""First derivatives only: backward passes that refuse to be differentiated themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """For the backward pass of a torch.autograd.Function: a derivative of its gradients raises NotImplementedError.

    Torch's decorator of this name lets gradients pass as constants where no `grad_outputs` needs a gradient, as those
    of a sum do not: a gradient penalty then lacks its second-order part, without an error.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled():  # enabled by create_graph=True
            return gradients
        # The saved tensors have the Function's output among them, which leads to all of its inputs: no derivative of a
        # gradient, whatever it is taken for, goes around the error.
        return _NoSecondDerivative.apply(len(gradients), *gradients, *ctx.saved_tensors, *grad_outputs)

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
