"""AdamW, its parameter groups and its learning rate schedule, as `deepspeed.initialize` takes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conf.schema import EngineConfig, OptimizerConfig


def learning_rate_factor(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """step (from 0) -> factor on lr: linear warm-up to 1, then decay to min_lr_ratio at the last step."""
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
    """AdamW whose step does nothing while `overflow` is set, which tells DeepSpeed that the step was not applied."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        return None if self.overflow else super().step(closure)


def optimizer_arguments(
    model: nn.Module, engine: EngineConfig, config: OptimizerConfig, num_steps: int | None
) -> dict[str, Any]:
    """AdamW and its schedule, as arguments for `deepspeed.initialize`; none for forward passes only.

    Norms, biases (one dimension) and embeddings have no weight decay.

    Args:
        num_steps: the length of the schedule; None for forward passes only.
    """
    if num_steps is None:
        return {}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, not_decayed = [], []
    for parameter in model.parameters():
        (not_decayed if parameter.dim() < 2 or id(parameter) in embeddings else decayed).append(parameter)
    # fp32 on stage 0 is the one case in which DeepSpeed does not skip steps itself; ZeRO accepts only classes it knows
    kind = SkippingAdamW if engine.dtype == "fp32" and engine.zero_stage == 0 else torch.optim.AdamW
    optimizer = kind(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=torch.cuda.is_available() or engine.offload_optimizer,  # torch's fused AdamW serves on the host too
    )
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=learning_rate_factor(config, num_steps))
    return {"optimizer": optimizer, "lr_scheduler": schedule}
