"""DeepSpeed's engine around the model: precision, ZeRO, the optimizer, and the one loss rule of the project.

The loss is the sum of token losses over the number of valid tokens of the WHOLE global batch: all data ranks, all
micro-batches. DeepSpeed divides gradients on its way, by amounts that depend on the ZeRO stage (`loss_multiplier`).
Two of DeepSpeed's routes to sequence parallelism are not used, because sequence ranks drift apart silently under them:
`mesh_param` and the config keys `sequence_parallel_size` + `data_parallel_size`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from conf.schema import EngineConfig, OptimizerConfig
from data.batch import TokenBatch
from recipes.planning.memory import bucket_size
from ring_attention.groups import ParallelGroups
from ring_attention.trace import profiler_range, report_status
from ring_attention.transport import release_symmetric_buffers

MASTERS_OF = "masters_of"  # in checkpoints of stage 0: the names of the master weights, group by group


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over all ranks: mean token loss, gradient norm before clipping, ranks that wish to end.

    Loss and wishes are device tensors: reading one waits for the step. Where gradients are not finite, as they are not
    with such a loss, nothing is `applied` on any rank: parameters, optimizer and schedule are as before.
    """

    loss: Tensor
    grad_norm: float | Tensor
    num_stop_requests: Tensor
    applied: bool


def loss_multiplier(zero_stage: int, data_degree: int, sequence_degree: int, accumulation_steps: int) -> int:
    """What the locally summed, globally normalised loss is multiplied by, so that DeepSpeed leaves the plain sum.

    Measured with DeepSpeed 0.19.8 and a sequence-parallel mpu: `backward` divides by the accumulation steps; the
    reduction divides the sum over all ranks by data_degree on stages 0, 1, 2, and by all ranks on stage 3.
    """
    return accumulation_steps * data_degree * (sequence_degree if zero_stage == 3 else 1)


def learning_rate_factor(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """step (from 0) -> factor of lr: linear warm-up that ends at 1, then the decay to min_lr_ratio at the last step."""

    warmup_steps = round(config.warmup_fraction * num_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if config.decay == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
        shape = (1 + math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else 1 - progress
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape

    return factor


class SkippingAdamW(torch.optim.AdamW):
    """Does nothing in a step that has an `overflow`, which is where DeepSpeed looks whether a step was applied."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        return None if self.overflow else super().step(closure)


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
    is_on_host: bool = False,
) -> torch.optim.AdamW:
    """AdamW whose weight decay spares norms, biases (one dimension) and embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, spared = [], []
    for parameter in model.parameters():
        (spared if parameter.dim() < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return kind(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=torch.cuda.is_available() or is_on_host,
    )


def deepspeed_config(config: EngineConfig, num_parameters: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`."""
    bucket = bucket_size(num_parameters)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": config.dtype == "bf16"},
        "fp16": {"enabled": config.dtype == "fp16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        # partial gradients of a sequence's ranks are summed in fp32, as DeepSpeed's own sequence parallelism does
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "steps_per_print": 2**31,
        # the optimizer is torch's, whose fused AdamW is no slower on the CPU than DeepSpeed's, which must be compiled
        "zero_force_ds_cpu_optimizer": False,
    }
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = on_host
    if config.offload_parameters:
        settings["zero_optimization"]["offload_param"] = on_host
    if config.zero_stage > 0:  # on stage 0 DeepSpeed accumulates in the model's dtype and refuses another
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def optimizer_arguments(
    model: nn.Module, settings: dict[str, Any], config: OptimizerConfig, num_steps: int | None
) -> dict[str, Any]:
    """For `deepspeed.initialize`: its `config`, and where there are steps to train, the optimizer and its schedule."""
    if num_steps is None:
        zero = {name: value for name, value in settings["zero_optimization"].items() if name != "offload_optimizer"}
        settings = {**settings, "zero_optimization": zero}
        if zero["stage"] < 3:  # there is nothing to cut up but weights, which stage 3 does
            settings["zero_optimization"] = {"stage": 0}
            settings.pop("data_types", None)
        return {"config": settings}
    factor = learning_rate_factor(config, num_steps)
    is_half = settings["bf16"]["enabled"] or settings["fp16"]["enabled"]
    # all others skip steps by themselves, and ZeRO takes only classes that it knows
    kind = torch.optim.AdamW if is_half or settings["zero_optimization"]["stage"] else SkippingAdamW
    return {
        "config": settings,
        "optimizer": make_optimizer(model, config, kind, "offload_optimizer" in settings["zero_optimization"]),
        "lr_scheduler": lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factor),
    }


def _undo_dummy_step(wrapper: FP16_UnfusedOptimizer) -> None:
    """Half precision on stage 0: DeepSpeed 0.19.8 takes a step with zero gradients to allocate Adam's state.

    It counts as step 1 of the bias correction and decays the master weights: after 3 steps parameters were 19 % off.
    """
    wrapper.optimizer.state.clear()
    for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, parameter in zip(masters, parameters, strict=True):
            master.data.copy_(parameter.data)


def extremes_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, tuple[float, float]]:
    """(smallest, largest) of all ranks' values, in one collective. Every rank must call it, with the same names."""
    own = torch.tensor([*values.values()], dtype=torch.float64)
    extremes = torch.stack([-own, own]).to(device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    smallest, largest = extremes.tolist()
    return {name: (-low, high) for name, low, high in zip(values, smallest, largest, strict=True)}


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of all ranks' values. Every rank must call it."""
    return extremes_over_ranks({"value": value}, device)["value"][1]


def loss_scaling(engine: Any, dtype: str) -> dict[str, float | None]:
    """Of fp16, for logs: the loss scale, and the steps that were skipped so far, for gradients too large for it."""
    if dtype != "fp16":
        return {}
    return {"loss_scale": float(engine.optimizer.cur_scale), "skipped_steps": engine.skipped_steps}


def destroy(engine: Any) -> None:
    """End a DeepSpeed engine and let go of all that it holds.

    DeepSpeed 0.19.8 leaves hooks in autograd's graph that hold the engine or its optimizer, where no garbage collector
    sees them, and on stage 3 the model in caches: the memory of all engines of a process would stay.
    """
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    engine.destroy()
    for holder in (optimizer, engine, *parameters):
        if holder is not None:  # nothing to train in fp32 has no optimizer
            vars(holder).clear()
    for parameter in parameters:
        parameter.grad, parameter.data = None, parameter.data.new_empty(0)


class TrainingEngine:
    """The model under DeepSpeed. Every rank must construct it and make the same calls in the same order.

    Args:
        build_model: makes the model, with the same weights on all ranks, where torch allocates by default.
        groups: the process groups, given to DeepSpeed as its mpu.
        sequence_rank: which part of a sequence's tokens this rank takes.
        num_steps: of the schedule; None makes no optimizer, for forward passes alone.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        groups: ParallelGroups,
        sequence_rank: int,
        engine_config: EngineConfig,
        optimizer_config: OptimizerConfig,
        num_steps: int | None,
    ) -> None:
        self.config, self.groups, self.sequence_rank = engine_config, groups, sequence_rank
        self.data_rank, self.data_degree = groups.data_rank, groups.data_degree
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        with self.device:
            self.model = build_model()
        settings = deepspeed_config(engine_config, sum(parameter.numel() for parameter in self.model.parameters()))
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model,
            mpu=groups,
            dist_init_required=False,
            **optimizer_arguments(self.model, settings, optimizer_config, num_steps),
        )
        if isinstance(self.deepspeed.optimizer, FP16_UnfusedOptimizer):
            _undo_dummy_step(self.deepspeed.optimizer)
        self._loss_multiplier = loss_multiplier(
            engine_config.zero_stage,
            groups.data_degree,
            groups.sequence_degree,
            engine_config.gradient_accumulation_steps,
        )

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.deepspeed.get_lr()[0]

    def accumulate(self, micro_batches: Sequence[TokenBatch], wish: bool = False) -> tuple[Tensor, Tensor]:
        """Forward and backward of one step's micro-batches; returns the loss over the whole global batch.

        After it the engine holds the reduced gradients; `update` applies them. The second result is how many ranks
        have called it with a `wish`: one message has both.
        """
        assert len(micro_batches) <= self.config.gradient_accumulation_steps
        self.deepspeed.train()
        num_valid = self._sum_over_ranks(torch.stack([batch.num_valid() for batch in micro_batches]).sum())
        loss_sum = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            report_status("part", "forward")
            local_sum = self._loss_sum(micro_batch)
            loss_sum += local_sum.detach()
            report_status("part", "backward")
            # a batch without a single valid token has loss and gradient 0
            self.deepspeed.backward(local_sum * (self._loss_multiplier / num_valid.clamp(min=1)))
            if micro_batch is not micro_batches[-1]:
                self.deepspeed.step()  # counts the micro-batch; DeepSpeed updates at the boundary only
        report_status("part", "sum of the loss over ranks")
        self._own_loss = loss_sum
        # filled on the device: to copy a number there would make the host wait
        loss_sum, num_stop_requests = self._sum_over_ranks(torch.stack([loss_sum, loss_sum.new_full((), float(wish))]))
        return loss_sum / num_valid.clamp(min=1), num_stop_requests

    def update(self) -> float | Tensor:
        """Clip, step the optimizer and the schedule; returns the gradient norm before clipping."""
        report_status("part", "optimizer")
        grad_norm = None
        if self.config.zero_stage == 0 and self.config.dtype == "fp32":
            # the one case in which DeepSpeed keeps no norm; gradients are whole on every rank
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
            # nor does it look whether they are finite
            optimizer: Any = self.deepspeed.optimizer
            optimizer.overflow = not grad_norm.isfinite().item()
        with profiler_range("optimizer"):
            self.deepspeed.step()
        if grad_norm is None:
            grad_norm = self.deepspeed.get_global_grad_norm()
        assert grad_norm is not None
        return grad_norm

    def train_step(self, micro_batches: Sequence[TokenBatch], wish: bool = False) -> StepResult:
        """One optimizer step; `wish` says that this rank wishes to end: see `StepResult`."""
        assert len(micro_batches) == self.config.gradient_accumulation_steps
        loss, num_stop_requests = self.accumulate(micro_batches, wish)
        grad_norm = self.update()
        return StepResult(loss, grad_norm, num_stop_requests, self.deepspeed.was_step_applied())

    def ranks_of_bad_loss(self) -> list[int]:
        """Those whose own part of the last step's loss is not finite. Every rank must call it."""
        bad = torch.zeros(dist.get_world_size(), device=self.device)
        bad[dist.get_rank()] = ~self._own_loss.isfinite()
        dist.all_reduce(bad)
        return bad.nonzero().flatten().tolist()

    @torch.no_grad()
    def mean_loss(self, micro_batches: Iterable[TokenBatch]) -> Tensor:
        """Mean token loss in nats over all ranks' micro-batches, a scalar; every rank must bring equally many."""
        self.deepspeed.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches:
            totals[0] += self._loss_sum(micro_batch)
            totals[1] += micro_batch.num_valid().to(self.device, non_blocking=True)
        loss_sum, num_valid = self._sum_over_ranks(totals)
        return loss_sum / num_valid.clamp(min=1)

    @property
    def client_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside what DeepSpeed puts there: on stage 0 whose the master weights are."""
        if not isinstance(self.deepspeed.optimizer, FP16_UnfusedOptimizer):
            return {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {MASTERS_OF: [[names[p] for p in group] for group in self.deepspeed.optimizer.fp16_groups]}

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
        """Give back the memory, which a later engine needs. Every rank must call it."""
        destroy(self.deepspeed)
        release_symmetric_buffers()

    def _loss_sum(self, micro_batch: TokenBatch) -> Tensor:
        with profiler_range("data"):
            inputs = [
                tensor.to(self.device, non_blocking=True)
                for tensor in (micro_batch.tokens_BS, micro_batch.positions_1S, micro_batch.labels_BS)
            ]
        return self.deepspeed(*inputs)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor, group=self.groups.get_sequence_data_parallel_group())
        return tensor
