"""The output head: hidden states to logits or, with a tiled loss, straight to the loss without the full logits.

Shapes: B batch, S local tokens, T tokens of all sequences or of a tile, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.corpus import IGNORED_LABEL
from recipes.model.ops import add_matmul_, cross_entropy_gradient_, cross_entropy_sum, fp32_zeros_like
from recipes.planning.memory import loss_tiles

Transform = Callable[[Tensor], Tensor]


class Head(nn.Linear):
    """The projection to logits, without bias. ZeRO-3 gathers the weight around `forward`, so the loss is in there too.

    Args:
        tile_tokens: how many tokens have logits at the same time when there are labels; 0: all.
        transform: of logits, element by element, such as a cap; None for none.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, tile_tokens: int = 0, transform: Transform | None = None
    ) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.tile_tokens, self.transform = tile_tokens, transform or (lambda logits: logits)

    def forward(self, input: Tensor, labels_BS: Tensor | None = None, by_token: bool = False) -> Tensor:
        """[B, S, E] to logits [B, S, V] or, with int64 labels, to the loss of `cross_entropy_sum`.

        Args:
            by_token: to the `token_scores` of labels instead.
        """
        if labels_BS is None:
            return self.transform(super().forward(input))
        if by_token:
            return self.token_scores(input, labels_BS)
        if self.tile_tokens == 0 or labels_BS.numel() <= self.tile_tokens:
            return cross_entropy_sum(self.transform(super().forward(input)), labels_BS)
        x_TE, weight_VE = input.flatten(0, -2), self.weight
        if not torch.is_grad_enabled():  # needs_input_grad ignores it
            x_TE, weight_VE = x_TE.detach(), weight_VE.detach()
        return _TiledCrossEntropy.apply(x_TE, weight_VE, labels_BS.flatten(), self.tile_tokens, self.transform)  # pyright: ignore[reportReturnType]

    def token_scores(self, x_BSE: Tensor, labels_BS: Tensor) -> Tensor:
        """[2, B, S] in fp32 (fp64 for fp64 input): each label's cross-entropy in nats, and 1 if it is the argmax.

        Both are 0 where there is no label. Only labelled tokens have logits, `tile_tokens` of them at a time.
        """
        x_TE, labels_T = x_BSE.flatten(0, -2), labels_BS.flatten()
        scores_2T = fp32_zeros_like(x_TE[:, 0]).repeat(2, 1)
        labelled = (labels_T != IGNORED_LABEL).nonzero().flatten()
        for tile in labelled.split(self.tile_tokens or max(1, len(labelled))):
            logits_TV = self.transform(F.linear(x_TE[tile], self.weight)).to(scores_2T.dtype)
            scores_2T[0, tile] = F.cross_entropy(logits_TV, labels_T[tile], reduction="none")
            scores_2T[1, tile] = (logits_TV.argmax(-1) == labels_T[tile]).to(scores_2T.dtype)
        return scores_2T.view(2, *labels_BS.shape)


class _TiledCrossEntropy(torch.autograd.Function):
    """`cross_entropy_sum` of x W^T, tile by tile (as in Liger's fused linear cross-entropy).

    The forward pass computes the gradients too: otherwise the backward pass would compute the logits again. Gradients
    stay in fp32 (fp64 for fp64 input) until the backward pass multiplies them by its factor and rounds once. A second
    backward pass raises RuntimeError, because the first frees them.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, tile_tokens: int, transform: Transform
    ) -> Tensor:
        loss = fp32_zeros_like(x_TE.new_empty(()))
        dx_of_tiles: list[Tensor | None] = []
        dweight_VE = fp32_zeros_like(weight_VE) if ctx.needs_input_grad[1] else None
        for start, stop in loss_tiles(len(x_TE), tile_tokens):
            tile = slice(start, stop)
            dx_of_tiles.append(fp32_zeros_like(x_TE[tile]) if ctx.needs_input_grad[0] else None)
            loss += _tile(x_TE[tile], weight_VE, labels_T[tile], transform, dx_of_tiles[-1], dweight_VE)
        ctx.dtype, ctx.sums = weight_VE.dtype, (dx_of_tiles, [dweight_VE])  # autograd would free saved ones too late
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.sums is None:
            raise RuntimeError("the first backward pass of a tiled loss frees its gradients: compute the loss again")
        factor, (dx_of_tiles, dweight) = grad_outputs[0].reshape(1), ctx.sums
        ctx.sums = None
        # dx first: its sums are gone when the weight's gradient, which is larger, exists in both dtypes
        return _rounded(dx_of_tiles, factor, ctx.dtype), _rounded(dweight, factor, ctx.dtype), None, None, None


def _rounded(sums: list[Any], factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The rows of all `sums` times `factor`, in `dtype`; None for sums of None. Empties the list, to free each soon."""
    if sums[0] is None:
        return None
    lengths = [len(rows) for rows in sums]
    total = sums[0].new_empty((sum(lengths), sums[0].shape[1]), dtype=dtype)
    for rows in total.split(lengths):
        torch.mul(sums.pop(0), factor, out=rows)
    return total


def _tile(
    x_TE: Tensor,
    weight_VE: Tensor,
    labels_T: Tensor,
    transform: Transform,
    dx_TE: Tensor | None,
    dweight_VE: Tensor | None,
) -> Tensor:
    """The loss of one tile, a scalar; adds to this tile's `dx_TE` and to `dweight_VE`.

    A function of its own, so that its logits are freed before the next tile's are computed.
    """
    logits_TV = x_TE @ weight_VE.T
    if dx_TE is None and dweight_VE is None:
        return cross_entropy_sum(transform(logits_TV), labels_T)
    with torch.enable_grad():
        output_TV = transform(logits_TV.requires_grad_())
    gradient_TV = output_TV.detach()
    loss = cross_entropy_gradient_(gradient_TV, labels_T)
    (dlogits_TV,) = torch.autograd.grad(output_TV, logits_TV, gradient_TV)
    if dx_TE is not None:
        add_matmul_(dx_TE, dlogits_TV, weight_VE)
    if dweight_VE is not None:
        add_matmul_(dweight_VE, dlogits_TV.T, x_TE)
    return loss
