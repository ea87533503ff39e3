"""FLOPs of a model, and the throughput of steps: tokens/s, TPOT, FLOP/s, MFU. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig
from recipes.planning.memory import layer_matmul_parameters

# TFLOP/s, dense bf16 and fp16, from the vendor's data sheets; by the start of the device's name
_PEAK_TFLOPS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA B200": 2250.0,
}


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The data sheet's peak of one device; None if unknown, as for CPUs, other GPUs and fp32."""
    if dtype == "fp32":
        return None
    return next((peak for prefix, peak in _PEAK_TFLOPS.items() if device_name.startswith(prefix)), None)


@dataclass(frozen=True)
class Throughput:
    """The throughput of steps of `step_time_s`. Tokens are those of the global batch, FLOPs those of a whole step."""

    step_time_s: float
    tokens_per_step: int
    sequence_length: int
    num_ranks: int
    flops_per_token: float
    peak_tflops: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_time_s

    @property
    def tokens_per_s_per_rank(self) -> float:
        """Divided by all ranks, also those that share a sequence."""
        return self.tokens_per_s / self.num_ranks

    @property
    def tpot_ms(self) -> float:
        """The ring attention paper's time per output token: step time over sequence length."""
        return 1e3 * self.step_time_s / self.sequence_length

    @property
    def model_tflops_per_rank(self) -> float:
        """FLOPs that the model needs, causal attention counted once, without recomputation or masked work."""
        return self.tokens_per_s_per_rank * self.flops_per_token / 1e12

    @property
    def mfu_pct(self) -> float | None:
        """Model FLOPs utilisation: `model_tflops_per_rank` over the data sheet's dense peak."""
        return None if self.peak_tflops is None else 100 * self.model_tflops_per_rank / self.peak_tflops

    @property
    def numbers(self) -> dict[str, float | None]:
        """By name, for logs."""
        names = ("tokens_per_s", "tokens_per_s_per_rank", "tpot_ms", "model_tflops_per_rank", "mfu_pct")
        return {name: getattr(self, name) for name in names}


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a forward pass per token: 2 per weight, and causal attention once. Backward costs twice that."""
    matmul = 2 * (model.num_layers * layer_matmul_parameters(model) + model.vocab_size * model.hidden_size)
    return matmul + model.num_layers * attention_flops_per_token(model, sequence_length)


def attention_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one layer's causal attention per token: two products with (L + 1) / 2 keys on average."""
    return 4 * model.num_heads * model.head_dim * (sequence_length + 1) / 2
