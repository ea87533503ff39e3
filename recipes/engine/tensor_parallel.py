"""Tensor parallelism of a layer, as Megatron-LM has it: each rank has some heads and a part of the MLP.

The first matrix of each half of a layer is cut by columns (its outputs), the second by rows (its inputs), so one
exchange before and one after each half is all there is. The baseline that ring attention is compared with; `pipeline`
builds it.

With sequence-sharded norms a rank holds S/T of the tokens between the matrices: an all-gather goes in, a
reduce-scatter out (Korthikanti et al. 2022, section 4.2.2). Else all ranks hold all of them, and an all-reduce goes out
(Shoeybi et al. 2019, section 3).

Shapes: B batch, S the tokens of this rank, L those that the matrices see (T * S, or S), E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.model.transformer import Layer


@dataclass
class TensorRanks:
    """The ranks that share each layer's weights.

    Args:
        sequence_sharded: whether each holds its part of the tokens between the matrices.
        group: DeepSpeed's, which it builds after it has asked for the stages' layers.
    """

    degree: int
    rank: int
    sequence_sharded: bool
    group: Any = None

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's rows."""
        return tensor.chunk(self.degree)[self.rank]


def _all_gather(x_BSE: Tensor, ranks: TensorRanks) -> Tensor:
    """[B, S, E] -> [B, T * S, E], sequence by sequence: so nothing is copied beside the transfer."""
    batch, tokens, size = x_BSE.shape
    gathered = x_BSE.new_empty(batch, ranks.degree * tokens, size)
    for whole, part in zip(gathered, x_BSE.contiguous(), strict=True):
        dist.all_gather_into_tensor(whole, part, group=ranks.group)
    return gathered


def _reduce_scatter(x_BLE: Tensor, ranks: TensorRanks, async_op: bool = False) -> tuple[Tensor, list[Any]]:
    """[B, T * S, E] -> the sum over ranks of this rank's [B, S, E], sequence by sequence, and what to wait for."""
    batch, tokens, size = x_BLE.shape
    summed = x_BLE.new_empty(batch, tokens // ranks.degree, size)
    works = [
        dist.reduce_scatter_tensor(part, whole, group=ranks.group, async_op=async_op)
        for part, whole in zip(summed, x_BLE.contiguous(), strict=True)
    ]
    return summed, works


class _ColumnFunction(torch.autograd.Function):
    """x W^T + b for this rank's rows of W; in the backward pass the exchange flies beside the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, weight: Tensor, bias: Tensor | None, ranks: TensorRanks) -> Tensor:
        x_BLE = _all_gather(x_BSE, ranks) if ranks.sequence_sharded else x_BSE
        ctx.save_for_backward(x_BLE, weight)
        ctx.ranks, ctx.has_bias = ranks, bias is not None
        return F.linear(x_BLE, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BLE, weight = ctx.saved_tensors
        ranks: TensorRanks = ctx.ranks
        dy = grad_outputs[0]
        dx = dy @ weight
        works: list[Any]
        if ranks.sequence_sharded:
            dx, works = _reduce_scatter(dx, ranks, async_op=True)
        else:
            dx = dx.contiguous()
            works = [dist.all_reduce(dx, group=ranks.group, async_op=True)]
        dy = dy.flatten(0, 1)
        dweight = dy.T @ x_BLE.flatten(0, 1)
        dbias = dy.sum(0) if ctx.has_bias else None
        for work in works:
            work.wait()
        return dx, dweight, dbias, None


class _SumFunction(torch.autograd.Function):
    """The sum over ranks: of this rank's tokens with sequence-sharded norms, else of all."""

    @staticmethod
    def forward(ctx: Any, x_BLE: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.ranks = ranks
        if ranks.sequence_sharded:
            return _reduce_scatter(x_BLE, ranks)[0]
        summed = x_BLE.contiguous()  # the caller's product, which nothing else reads
        dist.all_reduce(summed, group=ranks.group)
        ctx.mark_dirty(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = grad_outputs[0]
        return _all_gather(gradient, ctx.ranks) if ctx.ranks.sequence_sharded else gradient, None


class ColumnLinear(nn.Linear):
    """Some outputs of a linear layer: [B, S, E] -> [B, L, outputs of this rank].

    Args:
        rows: this rank's rows of the weight and of the bias.
    """

    def __init__(self, whole: nn.Linear, ranks: TensorRanks, rows: Tensor) -> None:
        super().__init__(whole.in_features, len(rows), whole.bias is not None, device="meta")
        self.ranks = ranks
        self.weight = _cut(whole.weight[rows])
        if whole.bias is not None:
            self.bias = _cut(whole.bias[rows])

    def forward(self, input: Tensor) -> Tensor:
        return _ColumnFunction.apply(input, self.weight, self.bias, self.ranks)  # pyright: ignore[reportReturnType]


class RowLinear(nn.Linear):
    """A linear layer whose inputs lie over the ranks: [B, L, inputs of this rank] -> [B, S, E]; the bias comes once."""

    def __init__(self, whole: nn.Linear, ranks: TensorRanks) -> None:
        super().__init__(whole.in_features // ranks.degree, whole.out_features, whole.bias is not None, device="meta")
        self.ranks = ranks
        self.weight = _cut(ranks.part(whole.weight.T).T)
        if whole.bias is not None:
            self.bias = whole.bias

    def forward(self, input: Tensor) -> Tensor:
        summed = _SumFunction.apply(F.linear(input, self.weight), self.ranks)
        return summed if self.bias is None else summed + self.bias  # pyright: ignore[reportReturnType, reportOperatorIssue]


def _cut(tensor: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))
    parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue] - each rank's own, for DeepSpeed's gradient norm
    return parameter


def cut_layer_(layer: Layer, ranks: TensorRanks) -> Layer:
    """Keep this rank's heads and part of the MLP, in place."""
    if ranks.degree == 1:
        return layer
    attention, mlp = layer.attention, layer.mlp
    numbers = torch.arange(attention.qkv.out_features, device=attention.qkv.weight.device)
    heads = numbers.view(-1, attention.head_dim).split(attention.head_counts)
    attention.qkv = ColumnLinear(attention.qkv, ranks, torch.cat([ranks.part(part).flatten() for part in heads]))
    num_heads, num_kv_heads, _ = (count // ranks.degree for count in attention.head_counts)
    attention.head_counts = (num_heads, num_kv_heads, num_kv_heads)
    attention.out = RowLinear(attention.out, ranks)
    halves = numbers.new_tensor(range(mlp.up.out_features)).chunk(2 if mlp.gated else 1)
    mlp.up = ColumnLinear(mlp.up, ranks, torch.cat([ranks.part(half) for half in halves]))
    mlp.down = RowLinear(mlp.down, ranks)
    return layer


def share_gradients_(module: nn.Module, ranks: TensorRanks) -> None:
    """Make the gradients of whole parameters equal on all tensor ranks; in fp32.

    With sequence-sharded norms each rank saw some of the tokens: the sum. Else each saw all: the mean, or ranks would
    drift apart where a kernel's order of summing is not fixed, as of an embedding on a GPU.
    """
    if ranks.degree == 1:
        return
    share = 1 if ranks.sequence_sharded else ranks.degree

    def shared(gradient: Tensor) -> Tensor:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ranks.group)
        return (total / share).to(gradient.dtype)

    for parameter in module.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.register_hook(shared)
