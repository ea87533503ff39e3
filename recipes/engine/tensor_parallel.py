"""Megatron-style tensor parallelism of a layer: each rank has some heads and a shard of the MLP.

In each half of a layer the first matrix is sharded by columns (its outputs) and the second by rows (its inputs), so
communication happens only before and after each half. Norms are sequence-sharded: between the matrices a rank holds
S = L/T tokens; an all-gather goes in and a reduce-scatter comes out (Korthikanti et al. 2022, section 4.2.2).

Shapes: B batch, S tokens of this rank, L = T * S tokens that the matrices see, E hidden size.
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
class TensorGroup:
    """The ranks that share each layer's weights.

    Args:
        group: DeepSpeed's process group, which exists only after DeepSpeed has built the layers.
    """

    degree: int
    rank: int
    group: Any = None

    def shard(self, tensor: Tensor) -> Tensor:
        """This rank's rows."""
        return tensor.chunk(self.degree)[self.rank]


def _all_gather(x_BSE: Tensor, tensor: TensorGroup) -> Tensor:
    """[B, S, E] -> [B, T * S, E], one sequence at a time, which needs no copy."""
    batch, tokens, size = x_BSE.shape
    gathered = x_BSE.new_empty(batch, tensor.degree * tokens, size)
    for full, shard in zip(gathered, x_BSE.contiguous(), strict=True):
        dist.all_gather_into_tensor(full, shard, group=tensor.group)
    return gathered


def _reduce_scatter(x_BLE: Tensor, tensor: TensorGroup, async_op: bool = False) -> tuple[Tensor, list[Any]]:
    """[B, T * S, E] -> this rank's [B, S, E] of the sum over ranks, one sequence at a time, and handles to wait for."""
    batch, tokens, size = x_BLE.shape
    summed = x_BLE.new_empty(batch, tokens // tensor.degree, size)
    handles = [
        dist.reduce_scatter_tensor(shard, full, group=tensor.group, async_op=async_op)
        for shard, full in zip(summed, x_BLE.contiguous(), strict=True)
    ]
    return summed, handles


class _ColumnFunction(torch.autograd.Function):
    """x W^T + b for this rank's rows of W. The backward pass overlaps the reduce-scatter with the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, weight: Tensor, bias: Tensor | None, tensor: TensorGroup) -> Tensor:
        x_BLE = _all_gather(x_BSE, tensor)
        ctx.save_for_backward(x_BLE, weight)
        ctx.tensor, ctx.has_bias = tensor, bias is not None
        return F.linear(x_BLE, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BLE, weight = ctx.saved_tensors
        dy = grad_outputs[0]
        dx, handles = _reduce_scatter(dy @ weight, ctx.tensor, async_op=True)
        dy = dy.flatten(0, 1)
        dweight = dy.T @ x_BLE.flatten(0, 1)
        dbias = dy.sum(0) if ctx.has_bias else None
        for handle in handles:
            handle.wait()
        return dx, dweight, dbias, None


class _ReduceScatter(torch.autograd.Function):
    """The sum over ranks, for this rank's tokens. The backward pass is an all-gather."""

    @staticmethod
    def forward(ctx: Any, x_BLE: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return _reduce_scatter(x_BLE, tensor)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_gather(grad_outputs[0], ctx.tensor), None


class ColumnLinear(nn.Linear):
    """A linear layer sharded by outputs: [B, S, E] -> [B, L, outputs of this rank].

    Args:
        rows: this rank's rows of the weight and of the bias.
    """

    def __init__(self, full: nn.Linear, tensor: TensorGroup, rows: Tensor) -> None:
        super().__init__(full.in_features, len(rows), bias=False, device="meta")
        self.tensor, self.weight = tensor, _shard_parameter(full.weight[rows])
        if full.bias is not None:
            self.bias = _shard_parameter(full.bias[rows])

    def forward(self, input: Tensor) -> Tensor:
        return _ColumnFunction.apply(input, self.weight, self.bias, self.tensor)  # pyright: ignore[reportReturnType]


class RowLinear(nn.Linear):
    """A linear layer sharded by inputs: [B, L, inputs of this rank] -> [B, S, E]. The bias is added after the sum."""

    def __init__(self, full: nn.Linear, tensor: TensorGroup) -> None:
        super().__init__(full.in_features // tensor.degree, full.out_features, bias=False, device="meta")
        self.tensor, self.weight = tensor, _shard_parameter(tensor.shard(full.weight.T).T)
        self.bias = full.bias

    def forward(self, input: Tensor) -> Tensor:
        summed = _ReduceScatter.apply(F.linear(input, self.weight), self.tensor)
        return summed if self.bias is None else summed + self.bias  # pyright: ignore[reportReturnType, reportOperatorIssue]


def _shard_parameter(rows: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(rows.detach().clone(memory_format=torch.contiguous_format))
    parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's gradient norm sums these over ranks
    return parameter


def shard_layer_(layer: Layer, tensor: TensorGroup) -> Layer:
    """Keep only this rank's heads and shard of the MLP, in place."""
    if tensor.degree == 1:
        return layer
    attention, mlp = layer.attention, layer.mlp
    rows = torch.arange(attention.qkv.out_features, device=attention.qkv.weight.device)
    heads = rows.view(-1, attention.head_dim).split(attention.head_counts)
    attention.qkv = ColumnLinear(attention.qkv, tensor, torch.cat([tensor.shard(part).flatten() for part in heads]))
    num_heads, num_kv_heads, _ = (count // tensor.degree for count in attention.head_counts)
    attention.head_counts = (num_heads, num_kv_heads, num_kv_heads)
    attention.out = RowLinear(attention.out, tensor)
    rows = torch.arange(mlp.up.out_features, device=rows.device)
    gate_and_up = rows.chunk(2 if mlp.gated else 1)
    mlp.up = ColumnLinear(mlp.up, tensor, torch.cat([tensor.shard(part) for part in gate_and_up]))
    mlp.down = RowLinear(mlp.down, tensor)
    return layer


def sum_replicated_gradients_(module: nn.Module, tensor: TensorGroup) -> None:
    """Sum the gradients of unsharded parameters over tensor ranks, in fp32: each rank saw only some of the tokens."""
    if tensor.degree == 1:
        return

    def all_reduce(gradient: Tensor) -> Tensor:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=tensor.group)
        return total.to(gradient.dtype)

    for parameter in module.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.register_hook(all_reduce)
