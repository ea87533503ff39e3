"""FLOPs of a model, and the throughput of steps: tokens/s, TPOT, FLOP/s, MFU. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from conf.schema import ModelConfig
from recipes.planning.memory import layer_matmul_parameters

# TFLOP/s, dense bf16 and fp16, from the vendor's data sheets; by the start of the device's name, the longest that fits
_PEAK_TFLOPS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA B200": 2250.0,
}


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The data sheet's peak of one device; None if unknown, as for CPUs, other GPUs, parts of a GPU (MIG) and fp32."""
    known = [prefix for prefix in _PEAK_TFLOPS if device_name.startswith(prefix)]
    if dtype == "fp32" or " MIG " in device_name or not known:
        return None
    return _PEAK_TFLOPS[max(known, key=len)]


class Throughput(NamedTuple):
    """The throughput of steps. Tokens are those of the global batch.

    Args:
        tokens_per_s_per_rank: divided by all ranks, also those that share a sequence.
        tpot_ms: the ring attention paper's time per output token: step time over sequence length.
        model_tflops_per_rank: what the model needs, causal attention counted once, without recomputed or masked work.
        mfu_pct: model FLOPs utilisation: `model_tflops_per_rank` over the data sheet's dense peak; None if unknown.
    """

    tokens_per_s: float
    tokens_per_s_per_rank: float
    tpot_ms: float
    model_tflops_per_rank: float
    mfu_pct: float | None


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a forward pass per token: 2 per weight, and causal attention once. Backward costs twice that."""
    matmul = 2 * (model.num_layers * layer_matmul_parameters(model) + model.vocab_size * model.hidden_size)
    return matmul + model.num_layers * attention_flops_per_token(model, sequence_length)


def attention_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one layer's causal attention per token: two products with (L + 1) / 2 keys on average."""
    return 4 * model.num_heads * model.head_dim * (sequence_length + 1) / 2
