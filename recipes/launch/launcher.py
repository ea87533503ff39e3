"""How many ranks a run has and what they plan, and its start: on new ranks, or on those of another launcher.

The parent must not import DeepSpeed, which takes seconds, nor use a GPU's memory, so only ranks import what needs them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from conf.degrees import accumulation_steps, resolve_config, resolve_degrees
from conf.schema import Config, ConfigError
from recipes.checkpoint.manifest import Documents, check_same_run, newest_readable
from recipes.launch.environment import ranks_are_started, ranks_given
from recipes.launch.host_memory import usable_memory_bytes
from recipes.launch.processes import launch
from recipes.launch.worker import Task, run_rank
from recipes.planning.cluster import parse_cluster
from recipes.planning.plan import Plan
from recipes.planning.throughput import GPUS
from recipes.run.errors import Preempted, RunFailed
from recipes.run.run_dir import SUMMARY_FILE

DEFAULT_CPU_RANKS = 4
EXPLAINED_GPUS_PER_HOST = 8  # with explain_gpu


def count_ranks(config: Config) -> int:
    """The number of ranks that a launcher has started, or that `launch` would start on this machine.

    Raises:
        ConfigError: if the configuration does not fit them.
    """
    num_gpus = torch.cuda.device_count()
    num_ranks = ranks_given(config) or num_gpus or DEFAULT_CPU_RANKS
    if num_gpus and num_ranks > num_gpus and not ranks_are_started() and not config.explain_gpu:
        raise ConfigError(
            f"launch.num_ranks={num_ranks} is more than the GPUs here: use launch.num_ranks={num_gpus} or fewer, "
            "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    accumulation_steps(config, resolve_degrees(config, num_ranks))
    if config.cluster is not None:
        parse_cluster(config.cluster)
    # on GPUs a plan takes memory, and the automatic choice of a kernel cannot fail
    if not ranks_are_started() and (not num_gpus or config.attention.kernel != "auto"):
        make_plan(config, num_ranks)
    return num_ranks


def make_plan(config: Config, num_ranks: int) -> Plan:
    """The plan for `num_ranks` ranks like this one, or like explain_gpu; on a GPU machine it initialises CUDA.

    Raises:
        ConfigError: if the configuration does not fit the ranks or the device.
    """
    if config.explain_gpu:
        gpu, ranks_per_host = GPUS[config.explain_gpu], min(num_ranks, EXPLAINED_GPUS_PER_HOST)
        plan = Plan(
            config, num_ranks, "cuda", gpu.device_name, gpu.capability, ranks_per_host, int(gpu.memory_gib * 2**30)
        )
        return dataclasses.replace(plan, host_memory_bytes=int(plan.cluster.host_memory_gib * 2**30))
    ranks_per_host = _ranks_per_host(num_ranks)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = gpu.total_memory, usable_memory_bytes()
        return Plan(config, num_ranks, "cuda", gpu.name, (gpu.major, gpu.minor), ranks_per_host, *memory)
    return Plan(config, num_ranks, "cpu", "CPU", None, ranks_per_host, usable_memory_bytes() // ranks_per_host)


def _ranks_per_host(num_ranks: int) -> int:
    """Of a launcher that does not say, as many as a host has GPUs."""
    at_most = min(num_ranks, torch.cuda.device_count() or num_ranks)
    return int(os.environ.get("LOCAL_WORLD_SIZE", at_most))


def shared_plan(config: Config) -> Plan:
    """Rank 0's plan, resolved, for all ranks, because hosts may differ in GPUs. Every rank must call it.

    Raises:
        ConfigError: on every rank, if the configuration does not fit rank 0's device.
    """
    import deepspeed.comm as dist

    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            shared = [make_plan(config, dist.get_world_size())]
        except ConfigError as error:
            shared = [error]
    dist.broadcast_object_list(shared, src=0)
    plan = shared[0]
    if isinstance(plan, ConfigError):
        raise plan
    plan.resolve_config()
    return plan


def result_if_finished(config: Config, num_ranks: int, run_dir: Path, documents: Documents = None) -> float | None:
    """The validation loss if the run in the run dir has done all its steps; None if there are steps to do.

    Args:
        documents: that the run reads; None: unknown.

    Raises:
        ConfigError: if the newest checkpoint belongs to another run. With attention=auto only the ranks can check that.
    """
    newest = newest_readable(run_dir)
    if newest is None:
        return None
    folder, manifest = newest
    if config.attention.method != "auto":
        resolved = copy.deepcopy(config)
        resolve_config(resolved, resolve_degrees(config, num_ranks, _ranks_per_host(num_ranks)), num_ranks)
        check_same_run(folder, manifest, resolved, documents)
    if manifest.step < config.num_steps:
        return None
    if os.environ.get("RANK", "0") == "0":
        print(f"all {manifest.step} steps of {run_dir} are done: to train again, use another hydra.run.dir")
    path = run_dir / SUMMARY_FILE
    loss = json.loads(path.read_text(encoding="utf-8"))["validation_loss"] if path.exists() else None
    return float("nan") if loss is None else loss


def start(task: Task, num_ranks: int, run_dir: Path) -> float:
    """Launch ranks and run the task on them, or run it as a rank of an external launcher.

    Raises:
        RunFailed: as `launch`; in an external launcher's ranks, if this rank failed. If all ranks raise it, rank 0 has
            printed it.
        Preempted: as `launch`; in an external launcher's ranks, once rank 0 has closed its files.
    """
    if not ranks_are_started():
        return launch(task, num_ranks, run_dir)
    try:
        return run_rank(task, run_dir, has_parent=False)
    except (RunFailed, Preempted) as error:
        if error.of_all_ranks:
            import deepspeed.comm as dist

            if dist.get_rank() == 0 and isinstance(error, RunFailed):
                print(f"error: {error}", file=sys.stderr, flush=True)
            dist.barrier()  # once any rank exits, the launcher ends the others
        raise
