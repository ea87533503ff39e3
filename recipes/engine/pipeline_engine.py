"""Tensor x pipeline parallelism through DeepSpeed's PipelineModule: the baseline that ring attention is compared with.

1F1B for training, micro-batches that fill the pipeline for a forward pass alone. The same model from the same seed as
`recipes.model.transformer`, the same loss rule and the same calls as `recipes.engine.deepspeed_engine.TrainingEngine`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from conf.schema import Config, Degrees, ModelConfig
from data.batch import TokenBatch
from recipes.engine.deepspeed_engine import (
    StepResult,
    deepspeed_config,
    destroy,
    extremes_over_ranks,
    loss_scaling,
    max_over_ranks,
    optimizer_arguments,
)
from recipes.engine.tensor_parallel import TensorRanks, cut_layer_, share_gradients_
from recipes.model.ops import cross_entropy_sum, make_norm
from recipes.model.transformer import Layer, make_embedding, make_head, make_layer, rotary_cos_sin
from ring_attention.trace import report_status


class _Embedding(nn.Module):
    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.embedding = make_embedding(config, seed)

    @property
    def weight(self) -> Tensor:
        """Under this name, for a tied head."""
        return self.embedding.weight

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.embedding(tokens_BS)


@functools.lru_cache(maxsize=1)
def _rotary(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of positions 0 to `length`: all layers of a stage and all micro-batches have the same."""
    return rotary_cos_sin(torch.arange(length, device=device).unsqueeze(0), head_dim, theta)


class _TensorLayer(nn.Module):
    """A layer on tensor ranks, whose attention sees `length` tokens."""

    def __init__(
        self, config: ModelConfig, attention: nn.Module, seed: int, index: int, ranks: TensorRanks, length: int
    ) -> None:
        super().__init__()
        self.layer: Layer = cut_layer_(make_layer(config, attention, seed, index), ranks)
        self.length, self.head_dim, self.theta = length, config.head_dim, config.rope_theta

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.layer(x_BSE, *_rotary(self.length, self.head_dim, self.theta, x_BSE.device))


class _FinalNorm(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.final_norm = make_norm(config)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.final_norm(x_BSE)


class _Head(nn.Module):
    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.head = make_head(config, seed)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.head(x_BSE)


def _tied_head(embedding: _Embedding, x_BSE: Tensor) -> Tensor:
    return F.linear(x_BSE, embedding.weight)


def _layer_specs(config: Config, attention: nn.Module, ranks: TensorRanks, length: int) -> list[LayerSpec]:
    model, seed = config.model, config.seed
    embedding: dict[str, Any] = {"config": model, "seed": seed}
    layers = [
        LayerSpec(_TensorLayer, model, attention, seed, index, ranks, length) for index in range(model.num_layers)
    ]
    if model.tied_head:
        first = TiedLayerSpec("embedding", _Embedding, **embedding)
        last = TiedLayerSpec("embedding", _Embedding, forward_fn=_tied_head, **embedding)
    else:
        first, last = LayerSpec(_Embedding, **embedding), LayerSpec(_Head, model, seed)
    return [first, *layers, LayerSpec(_FinalNorm, model), last]


class PipelinedEngine:
    """The model over tensor and pipeline ranks, under DeepSpeed. Every rank must construct it and make the same calls.

    Args:
        attention: what each rank computes for its heads over whole sequences.
        length: tokens of a sequence, padding for the tensor ranks included.
        num_steps: of the schedule; None makes no optimizer, for forward passes alone.
    """

    def __init__(
        self, config: Config, degrees: Degrees, attention: nn.Module, length: int, num_steps: int | None
    ) -> None:
        self.config = config.engine
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        topology = PipeModelDataParallelTopology(degrees.pipeline, degrees.tensor, degrees.data)
        coordinates = topology.get_coord(dist.get_rank())
        self.data_rank, self.data_degree, self._tensor_rank = coordinates.data, degrees.data, coordinates.model
        sharded = config.parallelism.sequence_sharded_norms and degrees.tensor > 1
        self._ranks = TensorRanks(degrees.tensor, coordinates.model, sharded)
        with self.device:
            self.model = PipelineModule(
                _layer_specs(config, attention, self._ranks, length),
                topology=topology,
                loss_fn=self._scaled_loss,
                partition_method="type:_TensorLayer",
            )
        self._ranks.group = self.model.mpu().get_slice_parallel_group()
        share_gradients_(self.model, self._ranks)
        settings = deepspeed_config(config.engine, sum(parameter.numel() for parameter in self.model.parameters()))
        # tensor ranks hold different tokens, or the same ones whole: there is nothing to cut on the way
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        del settings["seq_parallel_communication_data_type"]
        self.deepspeed: Any = deepspeed.initialize(
            model=self.model,
            dist_init_required=False,
            **optimizer_arguments(self.model, settings, config.optimizer, num_steps),
        )[0]
        self._loss_factor: Tensor | float = 1.0
        self._shape: torch.Size | None = None
        self.client_state: dict[str, Any] = {}  # what a checkpoint needs beside what DeepSpeed puts there

    @property
    def sequence_rank(self) -> int:
        """Which part of a sequence's tokens this rank takes."""
        return self._tensor_rank if self._ranks.sequence_sharded else 0

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.deepspeed.get_lr()[0]

    def train_step(self, micro_batches: Sequence[TokenBatch], wish: bool = False) -> StepResult:
        """Forward and backward of one step's micro-batches, and the update; `wish` is this rank's, to end."""
        report_status("part", "micro-batches through the pipeline, and the optimizer")
        mean_loss, num_stop_requests = self._run(micro_batches, self.deepspeed.train_batch, wish)
        return StepResult(
            mean_loss, self.deepspeed.get_global_grad_norm(), num_stop_requests, self.deepspeed.was_step_applied()
        )

    def ranks_of_bad_loss(self) -> list[int]:
        """None: the last stage has all of the loss."""
        return []

    def mean_loss(self, micro_batches: Iterable[TokenBatch]) -> Tensor:
        """Mean token loss in nats over all ranks' micro-batches, a scalar; every rank must bring equally many."""
        micro_batches = list(micro_batches)
        evaluate = functools.partial(self.deepspeed.eval_batch, num_micro_batches=len(micro_batches))
        return self._run(micro_batches, evaluate)[0]

    @property
    def loss_scaling(self) -> dict[str, float | None]:
        """For logs; empty unless in fp16."""
        return loss_scaling(self.deepspeed, self.config.dtype)

    def extremes_over_ranks(self, values: dict[str, float]) -> dict[str, tuple[float, float]]:
        """(smallest, largest) of all ranks' values, by name, in one collective."""
        return extremes_over_ranks(values, self.device)

    def max_over_ranks(self, value: float) -> float:
        """The largest of all ranks' values."""
        return max_over_ranks(value, self.device)

    def close(self) -> None:
        """Give back what a later engine needs, and the process groups that PipelineModule makes anew each time."""
        destroy(self.deepspeed)
        grid = self.model.mpu()
        for group in (
            self.model.world_group,
            grid.ds_model_proc_group,
            grid.dp_proc_group,
            grid.pp_proc_group,
            grid.slice_proc_group,
        ):
            dist.destroy_process_group(group)

    def _run(self, micro_batches: Sequence[TokenBatch], run: Any, wish: bool = False) -> tuple[Tensor, Tensor]:
        shape = micro_batches[0].tokens_BS.shape
        if shape != self._shape:  # validation brings other micro-batches than training, and DeepSpeed keeps its buffers
            self.deepspeed.reset_activation_shape()
            self._shape = shape
        num_valid = torch.stack([batch.num_valid() for batch in micro_batches]).sum()
        num_valid, num_stop_requests = self._sum_over_ranks(
            torch.stack([num_valid, num_valid.new_full((), float(wish))])
        )
        # every stage has counted its tokens, and without sequence-sharded norms every tensor rank all of them
        copies = dist.get_world_size() // self.data_degree
        if self._ranks.sequence_sharded:
            copies //= self._ranks.degree
        num_valid = (num_valid / copies).clamp(min=1)
        # DeepSpeed takes the mean over micro-batches and data ranks
        self._loss_factor = (len(micro_batches) * self.data_degree / num_valid).float()
        loss = run(iter([(batch.tokens_BS, batch.labels_BS) for batch in micro_batches]))
        if self._ranks.sequence_sharded:
            dist.all_reduce(loss, group=self._ranks.group)
        return loss, num_stop_requests

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def _scaled_loss(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        return cross_entropy_sum(logits_BSV, labels_BS) * self._loss_factor
