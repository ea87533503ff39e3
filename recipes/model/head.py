"""The output head: hidden states to logits or, with a tiled loss, straight to the loss without the full logits.

Shapes: B batch, S local tokens, T tokens of all sequences or of a tile, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recipes.model.ops import add_matmul_, cross_entropy_sum, fp32_zeros_like


class Head(nn.Linear):
    """The projection to logits, without bias. ZeRO-3 gathers the weight around `forward`, so the loss is in there too.

    Args:
        tile_tokens: how many tokens have logits at the same time when there are labels; 0: all.
    """

    def __init__(self, hidden_size: int, vocab_size: int, tile_tokens: int = 0) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.tile_tokens = tile_tokens

    def forward(self, input: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """[B, S, E] to logits [B, S, V] or, with int64 labels, to the loss of `cross_entropy_sum`."""
        if labels_BS is None:
            return super().forward(input)
        if self.tile_tokens == 0 or labels_BS.numel() <= self.tile_tokens:
            return cross_entropy_sum(super().forward(input), labels_BS)
        x_TE, labels_T, weight_VE = input.flatten(0, -2), labels_BS.flatten(), self.weight
        if torch.is_grad_enabled():
            return _TiledCrossEntropy.apply(x_TE, weight_VE, labels_T, self.tile_tokens)  # pyright: ignore[reportReturnType]
        tiles = zip(x_TE.split(self.tile_tokens), labels_T.split(self.tile_tokens), strict=True)
        return torch.stack([cross_entropy_sum(x @ weight_VE.T, labels) for x, labels in tiles]).sum()


class _TiledCrossEntropy(torch.autograd.Function):
    """`cross_entropy_sum` of x W^T, tile by tile (as in Liger's fused linear cross-entropy).

    The forward pass computes the gradients too: otherwise the backward pass would compute the logits again. Gradients
    stay in fp32 (fp64 for fp64 input) until the backward pass multiplies them by its factor and rounds once.
    """

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, tile_tokens: int) -> Tensor:
        dx_TE, dweight_VE = fp32_zeros_like(x_TE), fp32_zeros_like(weight_VE)
        loss = dx_TE.new_zeros(())
        for x, labels, dx in zip(*(t.split(tile_tokens) for t in (x_TE, labels_T, dx_TE)), strict=True):
            loss += _tile(x, weight_VE, labels, dx, dweight_VE)
        ctx.save_for_backward(dx_TE, dweight_VE)
        ctx.dtype = weight_VE.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = grad_outputs[0].reshape(1)
        gradients = (torch.mul(t, factor, out=torch.empty_like(t, dtype=ctx.dtype)) for t in ctx.saved_tensors)
        return *gradients, None, None


def _tile(x_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, dx_TE: Tensor, dweight_VE: Tensor) -> Tensor:
    """The loss of one tile, a scalar; adds to this tile's `dx_TE` and to `dweight_VE`.

    A function of its own, so that its logits are freed before the next tile's are computed.
    """
    logits_TV = (x_TE @ weight_VE.T).requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy_sum(logits_TV, labels_T)
    (dlogits_TV,) = torch.autograd.grad(loss, logits_TV)
    add_matmul_(dx_TE, dlogits_TV, weight_VE)
    add_matmul_(dweight_VE, dlogits_TV.T, x_TE)
    return loss.detach()
