"""Step times and memory of this rank's device. No communication, no printing."""

from __future__ import annotations

import gc
import math
import resource
import time
from typing import Any

import torch

from ring_attention.transport import symmetric_buffer_bytes


class StepClock:
    """Durations of steps: CUDA events on a GPU, so that the host need not wait; the wall clock on the CPU."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Start a step now. The time since the last tick counts for no step."""
        self._start = timestamp()

    def tick(self) -> None:
        """End a step and start the next one."""
        end = timestamp()
        self._spans.append((self._start, end))
        self._start = end

    def take(self) -> list[float]:
        """Seconds of each step since the last call. Waits for the device."""
        spans, self._spans = self._spans, []
        return durations_s(spans)


def timestamp() -> Any:
    """Now: an event in the current CUDA stream, or the wall clock on the CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def durations_s(spans: list[tuple[Any, Any]]) -> list[float]:
    """Seconds between the two timestamps of each span. Waits for the device."""
    if not torch.cuda.is_available():
        return [stop - start for start, stop in spans]
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in spans]


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; infinity where a float overflows."""
    return math.inf if loss > 700 else math.exp(loss)


def reset_peak_memory() -> None:
    """Release cached GPU memory and start a new measurement of its peak."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib(in_use: bool = False) -> float:
    """The peak of GPU memory (`in_use`: without cached memory) and symmetric buffers; on CPUs, of resident memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() if in_use else torch.cuda.max_memory_reserved()
        return (peak + symmetric_buffer_bytes()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def allocator_stats() -> dict[str, float]:
    """Peak of memory in use, and how often the allocator had to free its cache. Empty on the CPU."""
    if not torch.cuda.is_available():
        return {}
    stats = torch.cuda.memory_stats()
    return {
        "peak_active_memory_gib": stats["active_bytes.all.peak"] / 2**30,
        "allocation_retries": stats["num_alloc_retries"],
    }
