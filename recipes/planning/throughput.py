"""FLOPs of a model, and the throughput of steps: tokens/s, TPOT, FLOP/s, MFU. Pure arithmetic."""

from __future__ import annotations

import copy
from typing import NamedTuple

from conf.schema import ModelConfig
from recipes.planning.memory import layer_matmul_parameters


class Gpu(NamedTuple):
    """A kind of GPU.

    Args:
        device_name: how its name in CUDA starts.
        peak_tflops: dense bf16 and fp16, from the vendor's data sheet.
        memory_gib: as CUDA reports it, which is less than the data sheet's.
        capability: its CUDA compute capability.
    """

    device_name: str
    peak_tflops: float
    memory_gib: float
    capability: tuple[int, int]


# by the names that explain_gpu takes
GPUS = {
    "h200": Gpu("NVIDIA H200", 989.4, 139.8, (9, 0)),
    "h200_nvl": Gpu("NVIDIA H200 NVL", 835.5, 139.8, (9, 0)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989.4, 79.2, (9, 0)),
    "h100_nvl": Gpu("NVIDIA H100 NVL", 835.5, 93.1, (9, 0)),
    "h100_pcie": Gpu("NVIDIA H100 PCIe", 756.0, 79.2, (9, 0)),
    "a100_80gb": Gpu("NVIDIA A100", 312.0, 79.2, (8, 0)),
    "a100_40gb": Gpu("NVIDIA A100", 312.0, 39.4, (8, 0)),
    "l40s": Gpu("NVIDIA L40S", 362.0, 44.4, (8, 9)),
    "b200": Gpu("NVIDIA B200", 2250.0, 178.3, (10, 0)),
}
# of forecasts: also a CPU of two cores, which ranks share
DEVICES = {**GPUS, "cpu": Gpu("CPU", 0.03, 2.0, (0, 0))}


def kind_of(device_name: str, memory_gib: float) -> str | None:
    """The name in `DEVICES` of a device, of kinds with one name that with the nearest memory; None if it is unknown."""
    known = [kind for kind, gpu in DEVICES.items() if device_name.startswith(gpu.device_name)]
    if " MIG " in device_name or not known:
        return None
    return max(known, key=lambda kind: (len(DEVICES[kind].device_name), -abs(DEVICES[kind].memory_gib - memory_gib)))


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The data sheet's peak of one device; None if unknown, as for CPUs, other GPUs, parts of a GPU (MIG) and fp32."""
    known = [gpu for gpu in GPUS.values() if device_name.startswith(gpu.device_name)]
    if dtype == "fp32" or " MIG " in device_name or not known:
        return None
    return max(known, key=lambda gpu: len(gpu.device_name)).peak_tflops


class Throughput(NamedTuple):
    """The throughput of steps. Tokens are those of the global batch.

    Args:
        tokens_per_s: without padding.
        tokens_per_s_per_rank: divided by all ranks, also those that share a sequence.
        tpot_ms: the ring attention paper's time per output token: step time over sequence length.
        model_tflops_per_rank: what the model needs, causal attention within each document counted once, without
            recomputed or masked work.
        mfu_pct: model FLOPs utilisation: `model_tflops_per_rank` over the data sheet's dense peak; None if unknown.
    """

    tokens_per_s: float
    tokens_per_s_per_rank: float
    tpot_ms: float
    model_tflops_per_rank: float
    mfu_pct: float | None


class Work(NamedTuple):
    """What steps compute, on all ranks.

    Args:
        tokens: without padding.
        flops: what the model needs for them: causal attention within each document counted once.
    """

    tokens: int
    flops: float


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a forward pass per token: 2 per weight, and causal attention once.

    Of experts, those that a token goes to; of windowed layers, the keys within the window.
    """
    num_full = model.num_layers - model.num_window_layers
    return (
        matmul_flops_per_token(model)
        + num_full * attention_flops_per_token(model, sequence_length)
        + model.num_window_layers * attention_flops_per_token(model, sequence_length, model.window)
    )


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a step per token. The backward pass costs twice the forward pass; frozen weights need no gradient."""
    flops = 3 * forward_flops_per_token(model, sequence_length)
    return flops if model.num_trained is None else flops - matmul_flops_per_token(model)


def matmul_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of the matrix products of a forward pass per token, without attention."""
    one_token = copy.copy(model)  # `replace` would check it as if it were typed
    one_token.num_experts = model.experts_per_token
    return 2 * (model.num_layers * layer_matmul_parameters(one_token) + model.vocab_size * model.hidden_size)


def attention_flops_per_token(model: ModelConfig, sequence_length: int, window: int | None = None) -> float:
    """FLOPs of one layer's causal attention per token: two products with its keys, (L + 1) / 2 on average.

    Args:
        window: the most keys that a token sees; None for all.
    """
    seen = min(window or sequence_length, sequence_length)  # by the last token
    keys = seen - seen * (seen - 1) / 2 / sequence_length
    return 4 * model.num_heads * model.head_dim * keys
