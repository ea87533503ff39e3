"""Downscales a workload to the hardware, and lists every change. Pure arithmetic on configurations.

On GPUs only the batch shrinks, since throughput hardly depends on it; a pipeline still gets enough micro-batches for a
small bubble. On the CPU everything shrinks: such a comparison only shows that the command works.
"""

from __future__ import annotations

import dataclasses
import math

from conf.schema import Config, Degrees, flatten
from recipes.planning.throughput import forward_flops_per_token

GPU_TFLOPS = 500.0  # attained, per GPU
CPU_TFLOPS = 0.02  # attained by two cores, which all ranks share
PIPELINE_MICRO_BATCHES = 16  # per stage after the first: a bubble of 1/17
CPU_PIPELINE_MICRO_BATCHES = 4
CPU_MAX_LENGTH, CPU_HIDDEN_SIZE, CPU_HEADS = 2500, 128, 16


def downscale_to_cpu(config: Config, longest: int) -> None:
    """Shrink the model and the length, in place, to what a laptop computes in a minute; 16 heads allow 16 ranks.

    All lengths that are compared, of which `longest` is one, shrink by the same factor.
    """
    model = config.model
    model.mlp_size = model.mlp_size * CPU_HIDDEN_SIZE // model.hidden_size
    model.num_kv_heads = max(1, CPU_HEADS * model.num_kv_heads // model.num_heads)
    model.num_heads, model.head_dim, model.hidden_size = CPU_HEADS, CPU_HIDDEN_SIZE // CPU_HEADS, CPU_HIDDEN_SIZE
    factor = min(longest // 8, CPU_MAX_LENGTH) / longest
    config.data.sequence_length = max(1, round(config.data.sequence_length * factor))
    config.data.validation_sequences = 1
    config.compare.micro_batch_sizes = config.compare.micro_batch_sizes[:1]
    if config.engine.dtype == "fp16":
        config.engine.dtype = "bf16"


def smallest_batch(entries: list[tuple[Config, Degrees]], on_gpu: bool) -> int:
    """Sequences per step that every micro-batch size of every entry divides and that keep pipelines full."""
    per_stage, batch = PIPELINE_MICRO_BATCHES if on_gpu else CPU_PIPELINE_MICRO_BATCHES, 1
    for entry, degrees in entries:
        micro_batches = max(1, per_stage * (degrees.pipeline - 1))
        batch = math.lcm(batch, degrees.data * micro_batches * math.lcm(*entry.compare.micro_batch_sizes))
    return batch


def common_batch(entries: list[tuple[Config, Degrees]], configured: int | None, on_gpu: bool) -> int:
    """Sequences per step for entries of equal length: about compare.step_time_s of work.

    It exceeds `configured`, the workload's batch, only if the micro-batches need it.
    """
    config, degrees = entries[0]
    length, num_ranks = config.data.sequence_length, math.prod(degrees)
    operations = (3 if config.recipe == "pretrain" else 1) * length * forward_flops_per_token(config.model, length)
    tflops = GPU_TFLOPS * num_ranks if on_gpu else CPU_TFLOPS
    affordable = 2 ** max(0, math.floor(math.log2(config.compare.step_time_s * tflops * 1e12 / operations)))
    smallest = smallest_batch(entries, on_gpu)
    return math.ceil(min(affordable, configured or affordable) / smallest) * smallest


def changes(before: Config, after: Config) -> list[str]:
    """The fields that differ, such as "model.num_heads 16 -> 4"."""
    old, new = flatten(dataclasses.asdict(before)), flatten(dataclasses.asdict(after))
    return [f"{name} {old[name]} -> {value}" for name, value in new.items() if value != old[name]]
