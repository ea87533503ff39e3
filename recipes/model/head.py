"""From the last layer's output to logits or, tile by tile, straight to the loss: logits of all tokens never exist then.

Between `transformer`, whose last module it is, and `kernels`, which has the loss of given logits.

Shapes: B batch, S local tokens, T tokens of all sequences or of a tile, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recipes.model.ops import cross_entropy_sum
from recipes.model.tiles import add_product_, tiles, zeros_to_sum


class Head(nn.Linear):
    """The projection to logits, without bias; given labels, the loss.

    All of it is in this module's own `forward`, around which ZeRO-3 gathers the weight.

    Args:
        tile_tokens: how many tokens have logits at once when there are labels; 0: all.
    """

    def __init__(self, hidden_size: int, vocab_size: int, tile_tokens: int = 0) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.tile_tokens = tile_tokens

    def forward(self, input: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of [B, S, E]; with labels what `cross_entropy_sum` makes of them."""
        if labels_BS is None:
            return super().forward(input)
        if self.tile_tokens == 0 or labels_BS.numel() <= self.tile_tokens:
            return cross_entropy_sum(super().forward(input), labels_BS)
        return tiled_cross_entropy_sum(input, self.weight, labels_BS, self.tile_tokens)


def tiled_cross_entropy_sum(x_BSE: Tensor, weight_VE: Tensor, labels_BS: Tensor, tile_tokens: int) -> Tensor:
    """`cross_entropy_sum` of the logits x W^T, which exist for `tile_tokens` tokens at a time, forward and backward.

    The gradients are computed at once, in the forward pass: the logits would else have to be computed again. Until
    the backward pass brings the factor they stay in fp32 (fp64 in fp64), the weight's as the sum over tiles; then they
    are rounded once, as those of all logits are.

    Args:
        x_BSE: in the weight's dtype.
        labels_BS: int64.
    """
    if not torch.is_grad_enabled():  # which a function's needs_input_grad does not look at
        x_BSE, weight_VE = x_BSE.detach(), weight_VE.detach()
    return _TiledCrossEntropy.apply(x_BSE.flatten(0, -2), weight_VE, labels_BS.flatten(), tile_tokens)  # pyright: ignore[reportReturnType]


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, tile_tokens: int) -> Tensor:
        loss = zeros_to_sum(x_TE.new_empty(()))
        dx_TE = zeros_to_sum(x_TE) if ctx.needs_input_grad[0] else None
        dweight_VE = zeros_to_sum(weight_VE) if ctx.needs_input_grad[1] else None
        for tile in tiles(len(x_TE), tile_tokens):
            loss += _tile(x_TE[tile], weight_VE, labels_T[tile], None if dx_TE is None else dx_TE[tile], dweight_VE)
        ctx.save_for_backward(dx_TE, dweight_VE)
        ctx.dtype = weight_VE.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx_TE, dweight_VE = ctx.saved_tensors
        factor = grad_outputs[0]
        return (
            None if dx_TE is None else _scaled(dx_TE, factor, ctx.dtype),
            None if dweight_VE is None else _scaled(dweight_VE, factor, ctx.dtype),
            None,
            None,
        )


def _tile(x_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, dx_TE: Tensor | None, dweight_VE: Tensor | None) -> Tensor:
    """The loss of one tile, a scalar; adds to `dx_TE`, which is the tile's own, and to `dweight_VE`.

    A function of its own, so that its logits are gone before the next tile's come.
    """
    logits_TV = x_TE @ weight_VE.T
    if dx_TE is None and dweight_VE is None:
        return cross_entropy_sum(logits_TV, labels_T)
    with torch.enable_grad():
        loss = cross_entropy_sum(logits_TV.requires_grad_(), labels_T)
    (dlogits_TV,) = torch.autograd.grad(loss, logits_TV)
    if dx_TE is not None:
        add_product_(dx_TE, dlogits_TV, weight_VE)
    if dweight_VE is not None:
        add_product_(dweight_VE, dlogits_TV.T, x_TE)
    return loss.detach()


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded to `dtype` once."""
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))
