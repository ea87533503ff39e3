"""Numbers about a run: throughput, step times, memory. No printing (`report`), no communication."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from ring_attention.exchange import mailbox_bytes

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


class StepClock:
    """Durations of steps without making the host wait for the device: events on CUDA, the wall clock on the CPU."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """A step starts here; what passed since the last tick (a validation, say) belongs to none."""
        self._start = mark()

    def tick(self) -> None:
        """A step ends here, and the next one starts."""
        end = mark()
        self._spans.append((self._start, end))
        self._start = end

    def take(self) -> list[float]:
        """Seconds of each step since the last call; waits for the device."""
        spans, self._spans = self._spans, []
        return durations_s(spans)


def mark() -> Any:
    """Now: an event in the current stream on CUDA, the wall clock on the CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def durations_s(spans: list[tuple[Any, Any]]) -> list[float]:
    """Seconds from each first `mark` to its second; waits for the device."""
    if not torch.cuda.is_available():
        return [stop - start for start, stop in spans]
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in spans]


def perplexity(loss: float) -> float:
    """Of a mean loss in nats per token: how many tokens one would have to guess among."""
    return math.inf if loss > 700 else math.exp(loss)  # a float holds no more


def percentile(values: list[float], percent: int) -> float:
    """By linear interpolation between the values."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def restart_peak_memory() -> None:
    """Free what nobody holds; what `peak_memory_gib` says on a GPU is then of what comes from here on."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """This rank's peak so far: what it reserved on a GPU, mailboxes too; on the CPU the process's resident set."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_reserved() + mailbox_bytes()) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_memory_in_use_gib() -> float:
    """This rank's peak without what the allocator's cache held besides, mailboxes too; on the CPU `peak_memory_gib`."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() + mailbox_bytes()) / 2**30
    return peak_memory_gib()


def allocator() -> dict[str, float]:
    """Of this rank's GPU: the peak of memory in use, and how often its cache had to be freed. Nothing on the CPU."""
    if not torch.cuda.is_available():
        return {}
    of_cuda = torch.cuda.memory_stats()
    return {
        "peak_active_memory_gib": of_cuda["active_bytes.all.peak"] / 2**30,
        "allocation_retries": of_cuda["num_alloc_retries"],
    }
