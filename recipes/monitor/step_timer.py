"""The times of a recipe's steps, and what steps wait for, from one log to the next.

Only `StepTimer.take` makes the host wait for the device, and it needs one small collective.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from recipes.monitor import device_metrics
from recipes.monitor.device_metrics import StepClock, percentile
from recipes.planning.throughput import Throughput
from ring_attention.trace import observed_range, profiler_range

Extremes = Callable[[dict[str, float]], dict[str, tuple[float, float]]]  # see the engine's extremes_over_ranks


class StepTimer:
    """For each step call `data` around fetching the batch and `step` around its work; for a logged one then `take`.

    Args:
        has_ring: whether ranks pass keys and values around a ring, so that they may wait for messages.
    """

    def __init__(self, has_ring: bool) -> None:
        self._has_ring = has_ring
        self._clock = StepClock()
        self._data_wait_s = 0.0
        self._ring_waits: list[Any] = []  # timestamps: start and end of each wait, alternating

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around fetching the batch of the next step."""
        started = time.perf_counter()
        with profiler_range("data"):
            yield
        self._data_wait_s += time.perf_counter() - started

    @contextlib.contextmanager
    def step(self, is_logged: bool) -> Iterator[None]:
        """Around a step. Waits for the ring are measured if it is logged."""
        with (
            observed_range("exchange wait", lambda: self._ring_waits.append(device_metrics.timestamp()))
            if is_logged and self._has_ring
            else contextlib.nullcontext()
        ):
            yield
        self._clock.tick()

    def restart(self) -> None:
        """Start the next step now, so that a validation since the last one counts for no step."""
        self._clock.restart()

    def take(self, extremes_over_ranks: Extremes) -> tuple[list[float], dict[str, float]]:
        """The steps since the last call. Waits for the device. All ranks must call it.

        Returns:
            The seconds of each step on this rank, and metrics over all ranks.
        """
        times_s = self._clock.take()
        local = {
            "step_time_ms": 1e3 * statistics.mean(times_s),
            "data_wait_ms": 1e3 * self._data_wait_s / len(times_s),
            "peak_memory_gib": device_metrics.peak_memory_gib(),
            **device_metrics.allocator_stats(),
        }
        if self._has_ring:
            waits = zip(self._ring_waits[::2], self._ring_waits[1::2], strict=True)
            local["exchange_wait_ms"] = 1e3 * sum(device_metrics.durations_s(list(waits)))
        self._data_wait_s, self._ring_waits = 0.0, []
        extremes = extremes_over_ranks(local)
        fastest_ms, slowest_ms = extremes.pop("step_time_ms")
        metrics = {"rank_spread_ms": slowest_ms - fastest_ms}
        if self._has_ring:
            metrics["exchange_wait_min_ms"], metrics["exchange_wait_max_ms"] = extremes.pop("exchange_wait_ms")
        return times_s, metrics | {name: largest for name, (_, largest) in extremes.items()}


def speed_metrics(throughput: Throughput, times_s: list[float], num_steps_left: int) -> dict[str, float | None]:
    """Throughput and step times since the last log."""
    return {
        **throughput._asdict(),
        "step_time_p50_s": percentile(times_s, 50),
        "step_time_p95_s": percentile(times_s, 95),
        "step_time_max_s": max(times_s),
        "eta_s": statistics.median(times_s) * num_steps_left,
    }


def with_prefix(prefix: str, metrics: dict[str, float | None]) -> dict[str, float | None]:
    """The metrics with their logged names, PREFIX/NAME."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
