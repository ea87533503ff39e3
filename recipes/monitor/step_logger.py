"""What the recipes log of their steps: the first, the last and every `logging.every_n_steps`th."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from data.batch import TokenBatch
from recipes.engine.base import Engine
from recipes.monitor.reporter import Reporter
from recipes.monitor.step_timer import StepTimer, speed_metrics, with_prefix
from recipes.monitor.time_breakdown import measure_time_breakdown
from recipes.planning.plan import Plan
from recipes.planning.throughput import Throughput
from ring_attention.trace import report_status


class StepLogger(StepTimer):
    """Times steps and reports them. Every rank must make the same calls.

    Args:
        prefix: of the metrics' names, such as train.
        reporter: rank 0's; None on all others.
    """

    def __init__(self, plan: Plan, engine: Engine, prefix: str, reporter: Reporter | None) -> None:
        super().__init__(plan.has_ring)
        self._plan, self._engine, self._prefix, self._reporter = plan, engine, prefix, reporter
        self._step_times_s: list[float] = []

    def say(self, *lines: str) -> None:
        """Print on rank 0's console."""
        if self._reporter:
            self._reporter.say(*lines)

    def is_due(self, step: int) -> bool:
        config = self._plan.config
        return step in (1, config.num_steps) or step % config.logging.every_n_steps == 0

    def step_metrics(self, step: int, numbers: dict[str, float | None]) -> dict[str, float | None]:
        """Print the line of a step; returns its numbers and its speed, by their logged names. Waits for the device."""
        times_s, over_ranks = self.take(self._engine.extremes_over_ranks)
        self._step_times_s += times_s
        throughput = self._plan.throughput(statistics.median(times_s))
        speed = speed_metrics(throughput, times_s, self._plan.config.num_steps - step)
        metrics = with_prefix(self._prefix, {**numbers, **speed, **over_ranks})
        if self._reporter:
            self._reporter.say(self._reporter.step_line(step, metrics))
        return metrics

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Write metrics to the file and to wandb. The time since the step belongs to no step."""
        if self._reporter:
            self._reporter.log(step, metrics)
        self.restart()

    def median_throughput(self) -> Throughput:
        """Of the steps so far, without the first, which warms up."""
        return self._plan.throughput(statistics.median(self._step_times_s[1:] or self._step_times_s))

    def breakdown(self, batches: Callable[[int], Iterator[list[TokenBatch]]]) -> None:
        """Measure and report where a step's time goes."""
        report_status("part", "measuring where the time of a step goes")
        self.say("measuring where the time of a step goes ...")
        parts = measure_time_breakdown(self._plan, self._engine, batches)
        if self._reporter:
            self._reporter.say(str(parts))
            self._reporter.write_summary(parts.metrics)
