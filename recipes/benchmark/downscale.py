"""Cuts a workload to the hardware there is, and says every cut. Pure arithmetic on configurations.

On GPUs shapes and length stay, and the batch is cut so that a step takes a few seconds: throughput hardly depends on
it. A pipeline is the exception, so it keeps enough micro-batches for a small bubble. On the CPU everything is cut: that
shows that the command works, and no more.
"""

from __future__ import annotations

import math

from conf.schema import Config, Degrees
from recipes.planning.plan import CPU_TFLOPS
from recipes.planning.throughput import forward_flops_per_token

GPU_TFLOPS = 500.0  # attained, per GPU
PIPELINE_MICRO_BATCHES = 16  # per stage beside the first: a bubble of 1/17
CPU_PIPELINE_MICRO_BATCHES = 4
CPU_LENGTH, CPU_HIDDEN_SIZE, CPU_HEADS = 2500, 128, 16  # the length at most


def downscale_to_cpu(config: Config, longest: int) -> None:
    """Sizes that a laptop does in a minute; still enough heads for the paper's 16 ranks.

    Args:
        longest: of the lengths that are compared, which keep their proportions.
    """
    model = config.model
    model.mlp_size = model.mlp_size * CPU_HIDDEN_SIZE // model.hidden_size
    model.num_kv_heads = max(1, CPU_HEADS * model.num_kv_heads // model.num_heads)
    model.num_heads = CPU_HEADS
    model.hidden_size, model.head_dim = CPU_HIDDEN_SIZE, CPU_HIDDEN_SIZE // CPU_HEADS
    cut = min(longest // 8, CPU_LENGTH) / longest
    config.data.sequence_length = max(1, round(config.data.sequence_length * cut))
    config.data.validation_sequences = 1
    config.compare.micro_batch_sizes = config.compare.micro_batch_sizes[:1]
    if config.engine.dtype == "fp16":
        config.engine.dtype = "bf16"


def smallest_batch(entries: list[tuple[Config, Degrees]], on_gpu: bool) -> int:
    """Sequences per step that every micro-batch size of every entry divides, enough to keep pipelines full."""
    least = 1
    for entry, degrees in entries:
        micro_batches = 1
        if degrees.pipeline > 1:
            micro_batches = (PIPELINE_MICRO_BATCHES if on_gpu else CPU_PIPELINE_MICRO_BATCHES) * (degrees.pipeline - 1)
        least = math.lcm(least, degrees.data * micro_batches * math.lcm(*entry.compare.micro_batch_sizes))
    return least


def common_batch(entries: list[tuple[Config, Degrees]], own: int | None, on_gpu: bool) -> int:
    """Sequences per step for entries of equal length, alike for all: about compare.step_time_s of them.

    Args:
        own: the workload's; more only where the micro-batches need it.
    """
    config = entries[0][0]
    length, num_ranks = config.data.sequence_length, math.prod(entries[0][1])
    operations = (3 if config.recipe == "pretrain" else 1) * length * forward_flops_per_token(config.model, length)
    tflops = GPU_TFLOPS * num_ranks if on_gpu else CPU_TFLOPS
    affordable = 2 ** max(0, math.floor(math.log2(config.compare.step_time_s * tflops * 1e12 / operations)))
    least = smallest_batch(entries, on_gpu)
    return math.ceil(min(affordable, own or affordable) / least) * least


def changes(before: Config, after: Config) -> list[str]:
    """What differs, a line each, such as "model.num_heads 16 -> 4"."""
    lines = []
    for group in ("model", "data", "engine", "compare"):
        for name, old in vars(getattr(before, group)).items():
            new = getattr(getattr(after, group), name)
            if new != old:
                lines.append(f"{group}.{name} {old} -> {new}")
    return lines
