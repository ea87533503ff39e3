"""Tensor x pipeline parallelism through DeepSpeed's PipelineModule: the baseline for ring attention.

Training follows the 1F1B schedule. Forward passes fill the pipeline with micro-batches. The model has the same seed and
the same weights as `recipes.model.transformer`; the loss rule is the same as `TrainingEngine`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from conf.schema import Config, Degrees, ModelConfig
from data.shard import TokenBatch
from recipes.engine.base import Engine, StepResult
from recipes.engine.tensor_parallel import TensorGroup, shard_layer_, sum_replicated_gradients_
from recipes.model.ops import cross_entropy_sum, make_norm
from recipes.model.transformer import Layer, make_embedding, make_head, make_layer, rotary_cos_sin
from ring_attention.trace import report_status


class _Named(nn.Module):
    """A module under the name that it has in `Transformer`, so that parameter names are the same."""

    def __init__(self, name: str, make: Callable[..., nn.Module], *arguments: Any) -> None:
        super().__init__()
        self.add_module(name, make(*arguments))

    def forward(self, x: Tensor) -> Tensor:
        [module] = self.children()
        return module(x)


@functools.lru_cache(maxsize=1)
def _rotary(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 to `length`, shared by all layers of a stage and all micro-batches."""
    return rotary_cos_sin(torch.arange(length, device=device).unsqueeze(0), head_dim, theta)


class _TensorLayer(nn.Module):
    """A layer sharded over tensor ranks, whose attention sees `length` tokens."""

    def __init__(
        self, config: ModelConfig, attention: nn.Module, seed: int, index: int, tensor: TensorGroup, length: int
    ) -> None:
        super().__init__()
        self.layer: Layer = shard_layer_(make_layer(config, attention, seed, index), tensor)
        self.length, self.head_dim, self.theta = length, config.head_dim, config.rope_theta

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.layer(x_BSE, *_rotary(self.length, self.head_dim, self.theta, x_BSE.device))


def _tied_head(embedding: _Named, x_BSE: Tensor) -> Tensor:
    return F.linear(x_BSE, embedding.get_parameter("embedding.weight"))


def _layer_specs(config: Config, attention: nn.Module, tensor: TensorGroup, length: int) -> list[LayerSpec]:
    model, seed = config.model, config.seed
    embedding: Any = (_Named, "embedding", make_embedding, model, seed)
    layers = [
        LayerSpec(_TensorLayer, model, attention, seed, index, tensor, length) for index in range(model.num_layers)
    ]
    if model.tied_head:
        tied = functools.partial(TiedLayerSpec, "embedding", *embedding, tied_weight_attr="embedding.weight")
        first, last = tied(), tied(forward_fn=_tied_head)
    else:
        first, last = LayerSpec(*embedding), LayerSpec(_Named, "head", make_head, model, seed)
    return [first, *layers, LayerSpec(_Named, "final_norm", make_norm, model), last]


class PipelinedEngine(Engine):
    """The model over data, tensor and pipeline ranks.

    Args:
        attention: each rank's attention over full sequences, for its own heads.
        length: tokens of a sequence, with the padding for tensor ranks.
    """

    def __init__(self, config: Config, degrees: Degrees, attention: nn.Module, length: int) -> None:
        topology = PipeModelDataParallelTopology(degrees.pipeline, degrees.tensor, degrees.data)
        coordinates = topology.get_coord(dist.get_rank())
        super().__init__(config, coordinates.model, coordinates.data, degrees.data)
        self._pipeline_degree, self._tensor = degrees.pipeline, TensorGroup(degrees.tensor, coordinates.model)
        with self.device:
            self.model = model = PipelineModule(
                _layer_specs(config, attention, self._tensor, length),
                topology=topology,
                loss_fn=self._scaled_loss,
                partition_method="type:_TensorLayer",
            )
        self._grid = model.mpu()
        self._tensor.group = self._grid.get_slice_parallel_group()
        sum_replicated_gradients_(model, self._tensor)
        # DeepSpeed need not partition activations between stages: tensor ranks hold different tokens
        pipeline = {"pipe_partitioned": False, "grad_partitioned": False}
        self._start_deepspeed(pipeline=pipeline)
        self._loss_factor: Tensor | float = 1.0
        self._shape: torch.Size | None = None

    def train_step(self, micro_batches: Sequence[TokenBatch], stop_requested: bool = False) -> StepResult:
        report_status("part", "micro-batches through the pipeline, and the optimizer")
        loss, num_stop_requests = self._run(micro_batches, self.deepspeed.train_batch, stop_requested)
        grad_norm = self.deepspeed.get_global_grad_norm()
        return StepResult(loss, grad_norm, num_stop_requests, self.deepspeed.was_step_applied())

    def mean_loss(self, micro_batches: Iterable[TokenBatch]) -> Tensor:
        micro_batches = list(micro_batches)
        evaluate = functools.partial(self.deepspeed.eval_batch, num_micro_batches=len(micro_batches))
        return self._run(micro_batches, evaluate)[0]

    def close(self) -> None:
        """Free all memory, and the process groups that each PipelineModule makes anew. Every rank must call it."""
        super().close()
        grid = self._grid
        of_grid = grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group
        for group in (self.model.world_group, *of_grid):
            dist.destroy_process_group(group)

    def _run(
        self, micro_batches: Sequence[TokenBatch], run: Callable[..., Tensor], stop_requested: bool = False
    ) -> tuple[Tensor, Tensor]:
        shape = micro_batches[0].tokens_BS.shape
        if shape != self._shape:  # validation may have other micro-batches than training; DeepSpeed keeps its buffers
            self.deepspeed.reset_activation_shape()
            self._shape = shape
        num_valid = torch.stack([batch.num_valid() for batch in micro_batches]).sum()
        num_valid, num_stop_requests = self._sum_over_ranks(
            torch.stack([num_valid, num_valid.new_full((), float(stop_requested))])
        )
        num_valid = (num_valid / self._pipeline_degree).clamp(min=1)  # every stage counted the same tokens
        # DeepSpeed's pipeline engine averages losses over micro-batches and data ranks; ours are sums
        self._loss_factor = (self.data_degree * len(micro_batches) / num_valid).float()
        loss = run(iter([(batch.tokens_BS, batch.labels_BS) for batch in micro_batches]))
        if self._tensor.degree > 1:
            dist.all_reduce(loss, group=self._tensor.group)
        return loss, num_stop_requests

    def _scaled_loss(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        return cross_entropy_sum(logits_BSV, labels_BS) * self._loss_factor
