"""Times a recipe's steps, and reports the first, the last and every `logging.every_n_steps`th of them.

Only a logged step makes the host wait for the device, and it needs one small collective.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from conf.stages import length_at
from data.shard import Step
from recipes.engine.base import Engine, transport_over_ranks
from recipes.monitor import device_metrics
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.reporter import Reporter
from recipes.monitor.time_breakdown import BreakdownStopped, breakdown_too_long, measure_time_breakdown
from recipes.planning.plan import Plan
from recipes.planning.throughput import Throughput, Work
from ring_attention.trace import observed_range, profiler_range, report_status


class StepLogger:
    """For each step call `data` around fetching the batch and `step` around its work; for a due one `step_metrics`.

    Every rank must make the same calls.

    Args:
        prefix: of the metrics' names, such as train.
        reporter: rank 0's; None on all others.
    """

    def __init__(self, plan: Plan, engine: Engine, prefix: str, reporter: Reporter | None) -> None:
        self._plan, self._engine, self._prefix, self._reporter = plan, engine, prefix, reporter
        self._clock = device_metrics.StepClock()
        self._step_times_s: list[float] = []
        self._work: list[Work] = []  # of all steps so far
        self._lengths: list[int] = []  # of the sequences of timed steps
        self._data_wait_s = 0.0
        self._ring_waits: list[Any] = []  # timestamps: start and end of each wait, alternating
        self._transport_is_reported = False

    def say(self, *lines: str) -> None:
        """Print on rank 0's console."""
        if self._reporter:
            self._reporter.say(*lines)

    def is_due(self, step: int) -> bool:
        config = self._plan.config
        return step in (1, config.num_steps) or step % config.logging.every_n_steps == 0

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around fetching the batch of the next step."""
        started = time.perf_counter()
        with profiler_range("data"):
            yield
        self._data_wait_s += time.perf_counter() - started

    @contextlib.contextmanager
    def step(self, is_due: bool, lengths: Iterable[int]) -> Iterator[None]:
        """Around a step. If it is due, its waits for the ring are measured.

        Args:
            lengths: of the step's documents on all ranks.
        """
        self._work.append(self._plan.work(lengths))

        def note_time() -> None:
            self._ring_waits.append(device_metrics.timestamp())

        has_waits = is_due and self._plan.has_ring
        with observed_range("exchange wait", note_time) if has_waits else contextlib.nullcontext():
            yield
        self._clock.tick()
        if self._reporter:
            self._reporter.advance()

    def restart(self) -> None:
        """Start the next step now, so that a validation since the last one counts for no step."""
        self._clock.restart()

    def step_metrics(self, step: int, numbers: dict[str, float | None]) -> dict[str, float | None]:
        """Print the line of a step; returns its numbers and its speed, by their logged names. Waits for the device."""
        times_s = self._clock.take()
        self._step_times_s += times_s
        step_time_s, work, plan = statistics.median(times_s), self._work[-len(times_s) :], self._plan
        first = step - len(times_s) + 1
        lengths = [length_at(plan.config.data, number) for number in range(first, step + 1)]
        self._lengths += lengths
        num_tokens = sum(one.tokens for one in work)
        metrics = {
            **numbers,
            **plan.throughput(times_s, work, lengths)._asdict(),
            "padding_pct": 100 * (1 - num_tokens / plan.tokens_of_steps(first, step)),
            "step_time_p50_s": step_time_s,
            "step_time_p95_s": float(np.percentile(times_s, 95)),
            "step_time_max_s": max(times_s),
            "eta_s": step_time_s * plan.steps_left(step),
            **self._metrics_over_ranks(times_s),
        }
        if self._reporter:
            self._reporter.say(self._reporter.step_line(step, metrics))
        return {f"{self._prefix}/{name}": value for name, value in metrics.items()}

    def _metrics_over_ranks(self, times_s: list[float]) -> dict[str, float]:
        """Waits and memory since the last call. One collective."""
        local = {
            "step_time_ms": 1e3 * statistics.mean(times_s),
            "data_wait_ms": 1e3 * self._data_wait_s / len(times_s),
            "peak_memory_gib": device_metrics.peak_memory_gib(),
            **device_metrics.allocator_stats(),
        }
        if self._plan.has_ring:
            waits = zip(self._ring_waits[::2], self._ring_waits[1::2], strict=True)
            local["exchange_wait_ms"] = 1e3 * sum(device_metrics.durations_s(list(waits)))
        self._data_wait_s, self._ring_waits = 0.0, []
        extremes = self._engine.extremes_over_ranks(local)
        fastest_ms, slowest_ms = extremes.pop("step_time_ms")
        metrics = {"rank_spread_ms": slowest_ms - fastest_ms}
        if self._plan.has_ring:
            metrics["exchange_wait_min_ms"], metrics["exchange_wait_max_ms"] = extremes.pop("exchange_wait_ms")
            self._report_transport()
        return metrics | {name: largest for name, (_, largest) in extremes.items()}

    def _report_transport(self) -> None:
        """Once, when the ring has sent: what carries its messages, which the banner could not know. One collective."""
        if self._engine.attention is None or self._transport_is_reported:
            return
        self._transport_is_reported = True
        used, reason = transport_over_ranks(self._engine.attention)
        if self._reporter and used:
            if reason:
                self._reporter.say(f"transport {used} instead of {self._plan.transport} alone: {reason}")
            self._reporter.log_transport(used, reason)

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Write metrics to the file and to wandb. The time since the step belongs to no step."""
        if self._reporter:
            self._reporter.log(step, metrics)
        self.restart()

    def median_throughput(self) -> Throughput:
        """Of the steps so far, without the first, which warms up."""
        skip = 1 if len(self._step_times_s) > 1 else 0
        return self._plan.throughput(self._step_times_s[skip:], self._work[skip:], self._lengths[skip:])

    def breakdown(
        self, batches: Callable[[int], Iterator[Step]], must_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Measure and report where a step's time goes, if that takes little of the run's time.

        The run is over, so a failure is one line and no error. Arguments are those of `measure_time_breakdown`.
        """
        if too_long := breakdown_too_long(self._plan, self._engine, self._step_times_s):
            self.say(f"no time breakdown: {too_long}")
            return
        report_status("part", "measuring where the time of a step goes")
        self.say("measuring where the time of a step goes ...")
        try:
            metrics = measure_time_breakdown(self._plan, self._engine, batches, must_stop)
            if self._reporter:
                self._reporter.write_summary(metrics)
        except BreakdownStopped:
            self.say("no time breakdown: a signal asked the run to stop")
            return
        except Exception as error:
            traceback.print_exc()  # to the rank's log
            reason = next(iter(str(error).strip().splitlines()), "")
            self.say(f"no time breakdown, though the run is complete: {type(error).__name__}: {reason}")
            return
        if self._reporter:
            shares = ", ".join(f"{part} {metrics[f'parts/{part}_pct']:.1f} %" for part in PARTS)
            exposed_ms = metrics["parts/exposed_communication_ms"]
            exposed = f"{exposed_ms:.2f} ms" if exposed_ms else "too short to measure"
            self._reporter.say(f"time of a step: {shares}; exposed communication {exposed}")
