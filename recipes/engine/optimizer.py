"""AdamW, its parameter groups and its learning rate schedule, as `deepspeed.initialize` takes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from conf.schema import Config, OptimizerConfig


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


def optimizer_arguments(model: nn.Module, config: Config) -> dict[str, Any]:
    """AdamW and its schedule, as arguments for `deepspeed.initialize`; none if the recipe does not train.

    Norms, biases (one dimension) and embeddings have no weight decay.
    """
    if config.recipe != "pretrain":
        return {}
    engine, settings = config.engine, config.optimizer
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, not_decayed = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_dims = len(getattr(parameter, "ds_shape", parameter.shape))  # of parameters that ZeRO-3 has cut
            (not_decayed if num_dims < 2 or id(parameter) in embeddings else decayed).append(parameter)
    # fp32 on stage 0 is the one case in which DeepSpeed does not skip steps itself; ZeRO accepts only classes it knows
    kind = SkippingAdamW if engine.dtype == "fp32" and engine.zero_stage == 0 else torch.optim.AdamW
    optimizer = kind(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=torch.cuda.is_available() or engine.offload_optimizer,  # torch's fused AdamW serves on the host too
    )
    factor = learning_rate_factor(settings, config.num_steps)
    return {"optimizer": optimizer, "lr_scheduler": functools.partial(LambdaLR, lr_lambda=factor)}
