"""The time breakdown of an engine's steps: the share of each part, and the communication that no compute hides.

Recipes measure it after their own steps.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from data.batch import TokenBatch
from recipes.engine.base import Engine
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.trace_analysis import step_breakdown, synchronize
from recipes.planning.plan import Plan
from ring_attention.trace import profiler_range
from ring_attention.transport import messages_stay_local

MAX_MICRO_BATCHES = 4  # enough to measure; a full batch may take a minute
REPETITIONS = 3


@dataclass(frozen=True)
class TimeBreakdown:
    """Where this rank's time goes; the exposed communication is the slowest rank's.

    Args:
        shares: the fraction of a step's wall time for each of PARTS; they sum to 1.
        exposed_communication_ms: per step. Where ranks share sequences: how much longer a step takes than one in which
            attention's messages stay on their rank. Otherwise: the time in which only communication runs.
    """

    shares: dict[str, float]
    exposed_communication_ms: float

    @property
    def metrics(self) -> dict[str, float | None]:
        """For logs."""
        shares: dict[str, float | None] = {f"parts/{part}_pct": 100 * self.shares[part] for part in PARTS}
        return {**shares, "parts/exposed_communication_ms": self.exposed_communication_ms}

    def __str__(self) -> str:
        shares = ", ".join(f"{part} {100 * self.shares[part]:.1f} %" for part in PARTS)
        exposed = f"{self.exposed_communication_ms:.2f} ms" if self.exposed_communication_ms else "too short to measure"
        return f"time of a step: {shares}; exposed communication {exposed}"


def measure_time_breakdown(
    plan: Plan, engine: Engine, steps: Callable[[int], Iterator[list[TokenBatch]]]
) -> TimeBreakdown:
    """Run a few more steps, under a profiler and with attention's messages off. Every rank must call it.

    The weights are garbage afterwards, so the run must be over.

    Args:
        steps: yields this rank's steps of the given number of micro-batches.
    """
    num_micro_batches = plan.accumulation_steps
    num_few = min(num_micro_batches, MAX_MICRO_BATCHES)
    # full steps where a step ends with an update or a pipeline's bubble
    num_profiled = num_micro_batches if plan.trains or plan.degrees.pipeline > 1 else num_few
    batches = steps(num_profiled)

    def batch() -> list[TokenBatch]:
        with profiler_range("data"):
            return next(batches)

    run_step = engine.train_step if plan.trains else engine.mean_loss
    with torch.autograd.set_detect_anomaly(False):  # garbage may be NaN
        breakdown = step_breakdown(lambda: run_step(batch()), num_steps=1)
        exposed_s = breakdown.shares["exchange"] * breakdown.step_time_s * num_micro_batches / num_profiled
        if plan.degrees.sequence > 1:
            assert isinstance(engine, TrainingEngine)
            few_s = _exposed_attention_communication_s(plan, engine, lambda: batch()[:num_few])
            exposed_s = few_s * num_micro_batches / num_few
        return TimeBreakdown(breakdown.shares, 1e3 * engine.max_over_ranks(exposed_s))


def _exposed_attention_communication_s(
    plan: Plan, engine: TrainingEngine, batch: Callable[[], list[TokenBatch]]
) -> float:
    """How much longer a batch takes than with attention's messages off: a difference of medians."""
    if plan.trains:
        engine.deepspeed.set_gradient_accumulation_boundary(False)  # no update: fp16 would skip one of garbage
    times_s: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1 + REPETITIONS):  # the first one warms up
        for is_silent in (False, True) if number % 2 else (True, False):
            with messages_stay_local() if is_silent else contextlib.nullcontext():
                times_s[is_silent].append(engine.max_over_ranks(_model_time_s(plan, engine, batch())))
    return max(0.0, statistics.median(times_s[False][1:]) - statistics.median(times_s[True][1:]))


def _model_time_s(plan: Plan, engine: TrainingEngine, micro_batches: Sequence[TokenBatch]) -> float:
    """The time of the forward passes and, if the recipe trains, the backward passes."""
    synchronize()
    started = time.perf_counter()
    passes = engine.accumulate if plan.trains else engine.mean_loss
    passes(micro_batches)
    synchronize()
    return time.perf_counter() - started
