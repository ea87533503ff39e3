"""Resharding: a checkpoint's fp32 weights and Adam moments, for another number of ranks or another ZeRO stage.

DeepSpeed 0.19.8's universal checkpoint cannot turn stage 3 into stages 1 and 2 or back, and on stage 3 each group of
parameters advances one shared step count. So shards are joined tensor by tensor from memory-mapped files and set
through DeepSpeed's interface for single parameters.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
mapped = functools.partial(torch.load, map_location="cpu", mmap=True)


class ConsolidatedState:
    """The full tensors of a checkpoint of ZeRO 1 to 3; maps its files and reads a tensor when asked for it.

    Verify the checksums first, and construct it inside `manager.only_known_classes`.
    """

    def __init__(self, folder: Path, zero_stage: int) -> None:
        prefix = "zero_pp_rank_0_" if zero_stage == 3 else ""
        self.model_states: dict[str, Any] = mapped(folder / f"{prefix}mp_rank_00_model_states.pt")
        num_ranks = self.model_states["dp_world_size"]
        self._shapes = {name: shape for group in self.model_states["param_shapes"] for name, shape in group.items()}
        self.names = list(self._shapes)  # of parameters that share a tensor only the first
        module = self.model_states["module"]
        self.buffers: dict[str, Tensor] = {name: module[name] for name in self.model_states["buffer_names"]}
        # by parameter name, one entry per rank: flat tensors by kind, and the parameter's start and size in them
        self._parts: dict[str, list[tuple[dict[str, Tensor], int, int]]] = {name: [] for name in self._shapes}
        for rank in range(num_ranks):
            (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            self.optimizer_states: dict[str, Any] = mapped(path)["optimizer_state_dict"]
            if zero_stage == 3:
                masters, base = self.optimizer_states["fp32_flat_groups"], self.optimizer_states["optimizer_state_dict"]
                all_slices = [_stage_3_slices(group, num_ranks) for group in self.model_states["param_shapes"]]
            else:
                masters = self.optimizer_states["single_partition_of_fp32_groups"]
                base = self.optimizer_states["base_optimizer_state"]
                all_slices = [
                    {name: (at.start, at.numel) for name, at in group.items()}
                    for group in self.optimizer_states["param_slice_mappings"]
                ]
            # Adam's; 0 if fp16 has skipped all steps so far
            self.num_updates = int(base["state"][0]["step"]) if base["state"] else 0
            for index, (master, slices) in enumerate(zip(masters, all_slices, strict=True)):
                flat = {MASTER: master, **base["state"].get(index, {})}
                for name, (start, numel) in slices.items():
                    self._parts[name].append((flat, start, numel))

    def weight(self, name: str) -> Tensor:
        """A buffer, or a parameter's fp32 master weight."""
        return self.buffers[name] if name in self.buffers else self.tensor(name, MASTER)

    def tensor(self, name: str, kind: str) -> Tensor:
        """A parameter's fp32 master weight or one of its moments, unsharded."""
        shape = self._shapes[name]
        flat = torch.cat([flat[kind][start : start + numel] for flat, start, numel in self._parts[name]])
        return flat[: math.prod(shape)].view(shape)  # stage 3 pads


def _stage_3_slices(shapes: Mapping[str, torch.Size], num_ranks: int) -> dict[str, tuple[int, int]]:
    """Start and size by name. Each rank holds an equal part of each parameter, in order; the last is padded."""
    numels = [math.ceil(math.prod(shape) / num_ranks) for shape in shapes.values()]
    starts = itertools.accumulate(numels, initial=0)
    return dict(zip(shapes, zip(starts, numels, strict=False), strict=True))


@torch.no_grad()
def load_into_engine(states: ConsolidatedState, engine: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Load the states into a new DeepSpeed engine of ZeRO 1 to 3 with these parameters. Every rank must call it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    flats = [flat for group in optimizer.param_groups for flat in group["params"]]
    if stage == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    if states.num_updates:
        for flat in flats:
            step = torch.tensor(float(states.num_updates), device=flat.device)
            moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            optimizer.state[flat].update(step=step, **moments)
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions small parameters, whose full values every rank holds
        for name in states.names:
            _set_own_part(states, name, parameters[name])
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer._lazy_init_hp_params_optimizer_state()  # links parameters to their moments, as a first step would
        for name in states.names:
            safe_set_full_fp32_param(parameters[name], states.tensor(name, MASTER))
            for kind in MOMENTS if states.num_updates else ():
                safe_set_full_optimizer_state(parameters[name], states.tensor(name, kind), kind)
        optimizer.update_lp_params()
    engine.lr_scheduler.load_state_dict(states.model_states["lr_scheduler"])
    for group, rate in zip(optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, count, states.model_states[count])
    if engine.fp16_enabled():
        optimizer.loss_scaler = states.optimizer_states["loss_scaler"]


def _set_own_part(states: ConsolidatedState, name: str, parameter: Any) -> None:
    """On stage 3, where DeepSpeed's setters of full values fail if the ranks do not divide the parameter."""
    numel = parameter.ds_tensor.numel()

    def own_part(kind: str) -> Tensor:
        full = states.tensor(name, kind).flatten()
        padded = torch.nn.functional.pad(full, (0, numel * dist.get_world_size() - full.numel()))
        return padded[numel * dist.get_rank() :][:numel]

    master = own_part(MASTER)
    safe_set_local_fp32_param(parameter, master)
    parameter.ds_tensor.copy_(master)
    for kind in MOMENTS if states.num_updates else ():
        safe_set_local_optimizer_state(parameter, own_part(kind), kind)
