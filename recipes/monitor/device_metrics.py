"""Numbers about a run: throughput, step times, memory. No printing (`report`), no communication."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from typing import Any

import torch

from ring_attention.transport import symmetric_buffer_bytes


class StepClock:
    """Durations of steps without making the host wait for the device: events on CUDA, the wall clock on the CPU."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """A step starts here; what passed since the last tick (a validation, say) belongs to none."""
        self._start = timestamp()

    def tick(self) -> None:
        """A step ends here, and the next one starts."""
        end = timestamp()
        self._spans.append((self._start, end))
        self._start = end

    def take(self) -> list[float]:
        """Seconds of each step since the last call; waits for the device."""
        spans, self._spans = self._spans, []
        return durations_s(spans)


def timestamp() -> Any:
    """Now: an event in the current stream on CUDA, the wall clock on the CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def durations_s(spans: list[tuple[Any, Any]]) -> list[float]:
    """Seconds from each first `timestamp` to its second; waits for the device."""
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


def reset_peak_memory() -> None:
    """Free what nobody holds; what `peak_memory_gib` says on a GPU is then of what comes from here on."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """This rank's peak so far: what it reserved on a GPU, symmetric_buffers too; on the CPU the process's resident set."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_reserved() + symmetric_buffer_bytes()) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_memory_in_use_gib() -> float:
    """This rank's peak without what the allocator's cache held besides, symmetric_buffers too; on the CPU `peak_memory_gib`."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() + symmetric_buffer_bytes()) / 2**30
    return peak_memory_gib()


def allocator_stats() -> dict[str, float]:
    """Of this rank's GPU: the peak of memory in use, and how often its cache had to be freed. Nothing on the CPU."""
    if not torch.cuda.is_available():
        return {}
    of_cuda = torch.cuda.memory_stats()
    return {
        "peak_active_memory_gib": of_cuda["active_bytes.all.peak"] / 2**30,
        "allocation_retries": of_cuda["num_alloc_retries"],
    }
