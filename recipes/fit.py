"""Cuts a workload to the hardware there is, and says every cut. Pure arithmetic on configurations.

On GPUs shapes and length stay, and the batch is cut so that a step takes a few seconds: throughput hardly depends on
it. A pipeline is the exception, so it keeps enough micro-batches for a small bubble. On the CPU everything is cut: that
shows that the command works, and no more.
"""

from __future__ import annotations

import math

from conf.schema import Config
from recipes.plan import forward_flops_per_token

GPU_TFLOPS, CPU_TFLOPS = 500.0, 0.02  # attained, per GPU; by the whole machine
PIPELINE_MICRO_BATCHES = 16  # per stage beside the first: a bubble of 1/17
CPU_LENGTH, CPU_HIDDEN_SIZE, CPU_HEADS = 2500, 128, 16  # the length at most


def cut_to_cpu(config: Config) -> None:
    """Sizes that a laptop does in a minute; still enough heads for the paper's 16 ranks."""
    model = config.model
    model.mlp_size = model.mlp_size * CPU_HIDDEN_SIZE // model.hidden_size
    model.num_heads = model.num_kv_heads = CPU_HEADS
    model.hidden_size, model.head_dim = CPU_HIDDEN_SIZE, CPU_HIDDEN_SIZE // CPU_HEADS
    config.data.sequence_length = min(config.data.sequence_length // 8, CPU_LENGTH)
    config.data.validation_sequences = 1
    if config.engine.dtype == "fp16":
        config.engine.dtype = "bf16"


def cut_batch(config: Config, data_degree: int, pipeline_degree: int, num_ranks: int, on_gpu: bool) -> None:
    """Sequences per step: about compare.step_time_s of them, a number that all micro-batch sizes divide."""
    trains = 3 if config.recipe == "pretrain" else 1
    length = config.data.sequence_length
    operations = trains * length * forward_flops_per_token(config.model, length)
    tflops = GPU_TFLOPS * num_ranks if on_gpu else CPU_TFLOPS
    affordable = config.compare.step_time_s * tflops * 1e12 / operations
    batch = 2 ** max(0, math.floor(math.log2(affordable)))
    least = data_degree * math.lcm(*config.compare.micro_batch_sizes)
    if pipeline_degree > 1:
        least *= PIPELINE_MICRO_BATCHES * (pipeline_degree - 1)
    batch = math.ceil(max(batch, least) / least) * least
    config.engine.train_batch_size = min(batch, config.engine.train_batch_size or batch)


def changes(before: Config, after: Config) -> list[str]:
    """What differs, a line each, such as "model.num_heads 16 -> 4"."""
    lines = []
    for group in ("model", "data", "engine"):
        for name, old in vars(getattr(before, group)).items():
            new = getattr(getattr(after, group), name)
            if new != old:
                lines.append(f"{group}.{name} {old} -> {new}")
    return lines
