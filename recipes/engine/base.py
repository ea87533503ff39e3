"""What both engines share: the calls that recipes make, the result of a step, and DeepSpeed's settings."""

from __future__ import annotations

import collections
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from torch import Tensor, nn

from conf.schema import Config
from data.shard import TokenBatch
from recipes.engine.optimizer import optimizer_arguments
from recipes.planning.memory import bucket_size, has_sharded_sums, sums_nothing
from ring_attention.sequence_attention import SequenceAttention


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all ranks.

    If any gradient is non-finite, no rank applies the update: parameters, optimizer and schedule stay as they were.

    Args:
        loss: mean token loss in nats, a scalar on the device: reading it waits for the step.
        grad_norm: before clipping.
        num_stop_requests: how many ranks passed `stop_requested`, a scalar on the device.
        applied: whether the update was applied.
    """

    loss: Tensor
    grad_norm: float | Tensor
    num_stop_requests: Tensor
    applied: bool


def deepspeed_config(config: Config, num_parameters: int, num_ranks: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`."""
    engine, trains = config.engine, config.recipe == "pretrain"
    # without an optimizer only stage 3 has anything to shard
    zero_stage = engine.zero_stage if trains or engine.zero_stage == 3 else 0
    bucket = bucket_size(num_parameters)
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload_optimizer and trains:
        zero["offload_optimizer"] = on_host
    if engine.offload_parameters:
        zero["offload_param"] = on_host
    settings = {
        "train_micro_batch_size_per_gpu": engine.micro_batch_size,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps,
        "gradient_clipping": engine.gradient_clipping,
        "bf16": {"enabled": engine.dtype == "bf16"},
        "fp16": {"enabled": engine.dtype == "fp16"},
        "zero_optimization": zero,
        # the ranks of a sequence hold partial gradients: sum them in fp32, as DeepSpeed's own sequence parallelism does
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        # torch's fused AdamW is as fast on the CPU as DeepSpeed's, which must be compiled
        "zero_force_ds_cpu_optimizer": False,
    }
    if zero_stage > 0:  # on stage 0 DeepSpeed accumulates in the model's dtype and refuses another
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if trains and has_sharded_sums(config):
        zero["stage"] = 2  # DeepSpeed's stage 1 has fp32 sums of all gradients on every rank
        if num_ranks == engine.gradient_accumulation_steps == 1:  # nothing to sum
            settings["data_types"] = {"grad_accum_dtype": engine.dtype}
            if sums_nothing(config, num_ranks):  # without buckets
                zero |= {"stage": 1, "overlap_comm": False, "contiguous_gradients": False}
    return settings


def extremes_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, tuple[float, float]]:
    """(smallest, largest) over all ranks of each value, in one collective. Every rank must pass the same names."""
    own = torch.tensor([*values.values()], dtype=torch.float64)
    extremes = torch.stack([-own, own]).to(device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    smallest, largest = extremes.tolist()
    return {name: (-low, high) for name, low, high in zip(values, smallest, largest, strict=True)}


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest value over all ranks. Every rank must call it."""
    return extremes_over_ranks({"value": value}, device)["value"][1]


def transport_over_ranks(attention: SequenceAttention) -> tuple[str | None, str]:
    """What carries the messages of all ranks' rings, None without a ring, and why it is not what was chosen, or "".

    Every rank must call it, after a first call of its attention.
    """
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (attention.transport_used, attention.transport_reason))
    counts = collections.Counter(used for used, _ in of_ranks)
    reason = next((reason for _, reason in of_ranks if reason), "")
    if len(counts) == 1:
        return of_ranks[0][0], reason
    return ", ".join(f"{used} on {number} ranks" for used, number in counts.items()), reason


class Engine(ABC):
    """A model under DeepSpeed. Every rank must construct it and make the same calls in the same order.

    Args:
        sequence_rank: which shard of a sequence's tokens this rank takes.
    """

    model: nn.Module
    notes: Sequence[str] = ()  # for people: what runs slower than it could, and why
    deepspeed: Any
    attention: SequenceAttention | None = None  # over the ranks that share this rank's sequence

    def __init__(self, config: Config, sequence_rank: int, data_rank: int, data_degree: int) -> None:
        self.config, self.sequence_rank = config, sequence_rank
        self.data_rank, self.data_degree = data_rank, data_degree
        has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
        self.client_state: dict[str, Any] = {}  # what a checkpoint needs in addition to DeepSpeed's own states

    @abstractmethod
    def train_step(self, micro_batches: Sequence[TokenBatch], stop_requested: bool = False) -> StepResult:
        """Forward and backward passes of one step's micro-batches, and the update.

        Args:
            stop_requested: whether this rank asks the run to stop. The message of the loss carries it to all ranks.
        """

    @abstractmethod
    def mean_loss(self, micro_batches: Iterable[TokenBatch]) -> Tensor:
        """Mean token loss in nats over all ranks' micro-batches, a scalar. Every rank must pass equally many."""

    def ranks_with_nonfinite_loss(self) -> list[int]:
        """The ranks whose own tokens had a non-finite loss in the last step; empty if the engine cannot tell."""
        return []

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.deepspeed.get_lr()[0]

    @property
    def loss_scaling(self) -> dict[str, float | None]:
        """For logs, in fp16 only: the loss scale, and how many steps were skipped because gradients overflowed."""
        if self.config.engine.dtype != "fp16":
            return {}
        return {"loss_scale": float(self.deepspeed.optimizer.cur_scale), "skipped_steps": self.deepspeed.skipped_steps}

    def extremes_over_ranks(self, values: dict[str, float]) -> dict[str, tuple[float, float]]:
        """(smallest, largest) over all ranks of each value, in one collective."""
        return extremes_over_ranks(values, self.device)

    def max_over_ranks(self, value: float) -> float:
        """The largest value over all ranks."""
        return max_over_ranks(value, self.device)

    def close(self) -> None:
        """Free all memory that the engine holds, so that another can be built.

        DeepSpeed 0.19.8 leaves hooks in autograd's graph that hold the engine or its optimizer, where the garbage
        collector does not see them. On stage 3 it also keeps the model in caches.
        """
        optimizer, parameters = self.deepspeed.optimizer, list(self.deepspeed.module.parameters())
        self.deepspeed.destroy()
        for holder in (optimizer, self.deepspeed, *parameters):
            if holder is not None:  # forward passes in fp32 have no optimizer
                vars(holder).clear()
        for parameter in parameters:
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)

    def _start_deepspeed(self, mpu: Any = None, **settings: Any) -> None:
        """Put the model under DeepSpeed, with `settings` in addition to `deepspeed_config`."""
        # ZeRO-3 may have cut parameters while they were loaded
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        self.deepspeed = deepspeed.initialize(
            model=self.model,
            config=deepspeed_config(self.config, num_parameters, dist.get_world_size()) | settings,
            mpu=mpu,
            dist_init_required=False,
            **optimizer_arguments(self.model, self.config),
        )[0]

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """In place where the tensor is on the device already."""
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor
