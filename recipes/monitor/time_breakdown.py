"""Where the time of a step goes, through an engine: the share of each part, and the communication that nothing hides.

Between `breakdown`, which reads profiles, and the recipes, which measure once their own steps are done.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from data.batch import TokenBatch
from recipes.engine.build import Engine
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.trace_analysis import step_breakdown
from recipes.planning.plan import Plan
from ring_attention.trace import profiler_range
from ring_attention.transport import messages_stay_local

MOST_MICRO_BATCHES = 4  # where more are more of the same: a whole batch may take a minute
REPETITIONS = 3


@dataclass(frozen=True)
class TimeBreakdown:
    """Of this rank, but for the exposed communication, which is that of the slowest.

    Args:
        shares: of a step's wall time, by name of `catalog.PARTS`; they sum to 1.
        exposed_communication_ms: of a step. Where ranks share sequences, of attention's messages: what a step takes
            longer than one in which they stay on their rank. Else when communication runs and nothing else does.
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
        exposed = self.exposed_communication_ms
        said = f"{exposed:.2f} ms" if exposed else "less than its measure can tell"
        return f"time of a step: {shares}; exposed communication {said}"


def measure_time_breakdown(
    plan: Plan, engine: Engine, steps: Callable[[int], Iterator[list[TokenBatch]]]
) -> TimeBreakdown:
    """A few steps more, under a profiler and with attention's messages off. Every rank must call it.

    What is trained then is garbage: the run must be over.

    Args:
        steps: this rank's steps of so many micro-batches.
    """
    whole = plan.accumulation_steps
    few = min(whole, MOST_MICRO_BATCHES)
    # a training step ends with an update, a pipeline's with a bubble
    profiled = whole if plan.trains or plan.degrees.pipeline > 1 else few
    batches = steps(profiled)

    def batch() -> list[TokenBatch]:
        with profiler_range("data"):
            return next(batches)

    def step() -> None:
        if plan.trains:
            engine.train_step(batch())
        else:
            engine.mean_loss(batch())

    with torch.autograd.set_detect_anomaly(False):  # garbage may be NaN
        breakdown = step_breakdown(step, num_steps=1)
        exposed_s = breakdown.exposed_communication_s * whole / profiled
        if plan.degrees.sequence > 1:
            exposed_s = _exposed_by_attention_s(plan, engine, lambda: batch()[:few]) * whole / few
        return TimeBreakdown(breakdown.shares, 1e3 * engine.max_over_ranks(exposed_s))


def _exposed_by_attention_s(plan: Plan, engine: Engine, batch: Callable[[], list[TokenBatch]]) -> float:
    """What a batch's passes take longer than with attention's messages off; the first of each kind warm up."""
    assert isinstance(engine, TrainingEngine)
    if plan.trains:
        engine.deepspeed.set_gradient_accumulation_boundary(False)  # no update: fp16 skips one of garbage
    times_s: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1 + REPETITIONS):
        for silent in (False, True) if number % 2 else (True, False):
            with messages_stay_local() if silent else contextlib.nullcontext():
                times_s[silent].append(engine.max_over_ranks(_passes_s(plan, engine, batch())))
    whole_s, silent_s = (statistics.median(times_s[silent][1:]) for silent in (False, True))
    return max(0.0, whole_s - silent_s)


def _passes_s(plan: Plan, engine: TrainingEngine, micro_batches: Sequence[TokenBatch]) -> float:
    """Seconds of passes through the model."""
    _synchronize()
    started = time.perf_counter()
    if plan.trains:
        engine.accumulate(micro_batches)
    else:
        engine.mean_loss(micro_batches)
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
