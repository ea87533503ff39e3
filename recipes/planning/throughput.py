"""Throughput of steps, as arithmetic: tokens/s, TPOT, FLOP/s and MFU."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig
from recipes.planning.memory import layer_matmul_parameters

# Dense bf16/fp16 peak, TFLOP/s, from the vendor's data sheets; matched against the start of the device's name.
_PEAK_TFLOPS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA B200": 2250.0,
}


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The datasheet peak of one device, or None where it is not known (the CPU, other GPUs, fp32)."""
    if dtype == "fp32":
        return None
    return next((peak for prefix, peak in _PEAK_TFLOPS.items() if device_name.startswith(prefix)), None)


@dataclass(frozen=True)
class Throughput:
    """Of steps of `step_time_s`; tokens are those of the global batch, operations those that a step does for each."""

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
        """Divided by ALL ranks: those of one ring share a sequence."""
        return self.tokens_per_s / self.num_ranks

    @property
    def tpot_ms(self) -> float:
        """Time per output token as the ring attention paper has it: step time over sequence length."""
        return 1e3 * self.step_time_s / self.sequence_length

    @property
    def model_tflops_per_rank(self) -> float:
        """What the model needs, causal attention counted once; not what kernels do twice or in vain."""
        return self.tokens_per_s_per_rank * self.flops_per_token / 1e12

    @property
    def mfu_pct(self) -> float | None:
        """Model FLOP utilisation against the data sheet's dense peak."""
        return None if self.peak_tflops is None else 100 * self.model_tflops_per_rank / self.peak_tflops

    @property
    def numbers(self) -> dict[str, float | None]:
        """By name, for logs."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_rank": self.tokens_per_s_per_rank,
            "tpot_ms": self.tpot_ms,
            "model_tflops_per_rank": self.model_tflops_per_rank,
            "mfu_pct": self.mfu_pct,
        }


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of a forward pass per token, causal attention counted once.

    Matrix products cost 2 per weight. Backward costs twice the forward.
    """
    matmul = 2 * (model.num_layers * layer_matmul_parameters(model) + model.vocab_size * model.hidden_size)
    return matmul + model.num_layers * attention_flops_per_token(model, sequence_length)


def attention_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Those of one layer's causal attention: a query attends to (L + 1) / 2 keys on average, at 4 per head and
    dimension (two products of 2).
    """
    return 4 * model.num_heads * model.head_dim * (sequence_length + 1) / 2
