"""What a recipe's steps take and what they wait for, from one log to the next.

Between `metrics`, which measures on one rank, and the recipes. Nothing here makes the host wait for the device but
`StepTimer.take`, and all that goes over the ranks then is one small collective.
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

Extremes = Callable[[dict[str, float]], dict[str, tuple[float, float]]]  # `engine.extremes_over_ranks`


class StepTimer:
    """Used in turns: `data` around fetching a batch, `step` around working on it, and where a step is logged, `take`.

    Args:
        has_ring: whether ranks pass keys and values on, so that there is something to wait for.
    """

    def __init__(self, has_ring: bool) -> None:
        self._has_ring = has_ring
        self._clock = StepClock()
        self._data_wait_s = 0.0
        self._waits: list[Any] = []  # marks: where a wait for the ring begins, where it ends, and so on

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around what makes the batch of the next step."""
        started = time.perf_counter()
        with profiler_range("data"):
            yield
        self._data_wait_s += time.perf_counter() - started

    @contextlib.contextmanager
    def step(self, is_logged: bool) -> Iterator[None]:
        """Around a step; the waits for the ring of one that is logged are measured."""
        with (
            observed_range("exchange wait", lambda: self._waits.append(device_metrics.timestamp()))
            if is_logged and self._has_ring
            else contextlib.nullcontext()
        ):
            yield
        self._clock.tick()

    def restart(self) -> None:
        """The next step starts here: what passed since the last one, a validation say, belongs to none."""
        self._clock.restart()

    def take(self, extremes_over_ranks: Extremes) -> tuple[list[float], dict[str, float]]:
        """(seconds of each step on this rank, numbers for logs) since the last call. Every rank must call it.

        Waits for the device. The numbers are of all ranks.
        """
        times_s = self._clock.take()
        own = {
            "step_time_ms": 1e3 * statistics.mean(times_s),
            "data_wait_ms": 1e3 * self._data_wait_s / len(times_s),
            "peak_memory_gib": device_metrics.peak_memory_gib(),
            **device_metrics.allocator_stats(),
        }
        if self._has_ring:
            waits = zip(self._waits[::2], self._waits[1::2], strict=True)
            own["exchange_wait_ms"] = 1e3 * sum(device_metrics.durations_s(list(waits)))
        self._data_wait_s, self._waits = 0.0, []
        extremes = extremes_over_ranks(own)
        fastest_ms, slowest_ms = extremes.pop("step_time_ms")
        numbers = {"rank_spread_ms": slowest_ms - fastest_ms}
        if self._has_ring:
            numbers["exchange_wait_min_ms"], numbers["exchange_wait_max_ms"] = extremes.pop("exchange_wait_ms")
        return times_s, numbers | {name: largest for name, (_, largest) in extremes.items()}


def speed_metrics(throughput: Throughput, times_s: list[float], num_steps_left: int) -> dict[str, float | None]:
    """Throughput and times of the steps since the last log, for logs."""
    return {
        **throughput.numbers,
        "step_time_p50_s": percentile(times_s, 50),
        "step_time_p95_s": percentile(times_s, 95),
        "step_time_max_s": max(times_s),
        "eta_s": throughput.step_time_s * num_steps_left,
    }


def with_prefix(prefix: str, numbers: dict[str, float | None]) -> dict[str, float | None]:
    """The numbers as PREFIX/NAME, which is how logs have them."""
    return {f"{prefix}/{name}": number for name, number in numbers.items()}
