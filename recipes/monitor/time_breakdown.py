"""Where the time of an engine's steps goes, and how much of it is communication that no compute hides."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator

import torch

from data.shard import Step, TokenBatch
from recipes.engine.base import Engine
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.monitor.device_metrics import StepClock
from recipes.monitor.trace_analysis import step_breakdown
from recipes.planning.plan import Plan
from ring_attention.trace import profiler_range
from ring_attention.transport import messages_stay_local

MAX_MICRO_BATCHES = 4  # enough to measure; a full batch may take a minute
REPETITIONS = 3
NUM_PASSES = 2 * (1 + REPETITIONS)  # with and without attention's messages; the first of each warms up
NUM_PROFILED = 2  # the first is not recorded
LONG_STEP_S = 60.0
MAX_SHARE = 0.02  # of the time of all steps
SHORT_S = 30.0  # always allowed: trials of a few steps are there to look at


class BreakdownStopped(Exception):
    """The measurement was told to stop, on all ranks alike."""


def breakdown_cost(plan: Plan) -> float:
    """About how many of the run's steps `measure_time_breakdown` takes."""
    num_profiled, num_few = _num_micro_batches(plan)
    num_passes = NUM_PASSES if plan.degrees.sequence > 1 else 0
    return (NUM_PROFILED * num_profiled + num_passes * num_few) / plan.accumulation_steps


def breakdown_too_long(plan: Plan, engine: Engine, step_times_s: list[float]) -> str:
    """Why measuring would take too long beside these steps, the same on all ranks; empty if not. One collective."""
    own = {"step_s": statistics.median(step_times_s), "run_s": sum(step_times_s)}
    extremes = engine.extremes_over_ranks(own)
    step_s, run_s = extremes["step_s"][1], extremes["run_s"][0]
    cost_s = breakdown_cost(plan) * step_s
    if step_s >= LONG_STEP_S:
        return f"a step takes {step_s:.0f} s, and {LONG_STEP_S:.0f} s or more are too long to repeat"
    if cost_s > max(SHORT_S, MAX_SHARE * run_s):
        return f"it would take about {cost_s:.0f} s, more than {MAX_SHARE:.0%} of the {run_s:.0f} s of steps"
    return ""


def _num_micro_batches(plan: Plan) -> tuple[int, int]:
    """Of a step under the profiler, and of one of the passes."""
    num_few = min(plan.accumulation_steps, MAX_MICRO_BATCHES)
    # full steps where a step ends with an update or a pipeline's bubble
    return plan.accumulation_steps if plan.trains or plan.degrees.pipeline > 1 else num_few, num_few


def measure_time_breakdown(
    plan: Plan,
    engine: Engine,
    steps: Callable[[int], Iterator[Step]],
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | None]:
    """Run a few more steps, under a profiler and with attention's messages off. Every rank must call it.

    The weights are garbage afterwards, so the run must be over.

    Args:
        steps: yields this rank's steps of the given number of micro-batches.
        must_stop: asked every one or two steps, outside of what is timed; the same on all ranks.

    Raises:
        BreakdownStopped: on every rank, if `must_stop`.

    Returns:
        parts/PART_pct: this rank's share of a step's time for each of PARTS.
        parts/exposed_communication_ms: per step, of the slowest rank. Where ranks share sequences: how much longer a
            step takes than one in which attention's messages stay on their rank. Otherwise: the time in which only
            communication runs.
    """
    num_micro_batches = plan.accumulation_steps
    num_profiled, num_few = _num_micro_batches(plan)
    batches = steps(num_profiled)

    def batch() -> list[TokenBatch]:
        with profiler_range("data"):
            return next(batches).micro_batches

    def few_micro_batches() -> list[TokenBatch]:
        if must_stop():
            raise BreakdownStopped
        return batch()[:num_few]

    if must_stop():
        raise BreakdownStopped
    run_step = engine.train_step if plan.trains else engine.mean_loss
    with torch.autograd.set_detect_anomaly(False):  # garbage may be NaN
        times_s = step_breakdown(lambda: run_step(batch()), num_steps=1)
        exposed_s = times_s["exchange"] * num_micro_batches / num_profiled
        if plan.degrees.sequence > 1:
            assert isinstance(engine, TrainingEngine)
            few_s = _exposed_attention_communication_s(plan, engine, few_micro_batches)
            exposed_s = few_s * num_micro_batches / num_few
    step_s = sum(times_s.values())
    shares: dict[str, float | None] = {f"parts/{part}_pct": 100 * time_s / step_s for part, time_s in times_s.items()}
    return {**shares, "parts/exposed_communication_ms": 1e3 * engine.max_over_ranks(exposed_s)}


def _exposed_attention_communication_s(
    plan: Plan, engine: TrainingEngine, batch: Callable[[], list[TokenBatch]]
) -> float:
    """How much longer the passes of a batch take than with attention's messages off: a difference of medians."""
    if plan.trains:
        engine.deepspeed.set_gradient_accumulation_boundary(False)  # no update: fp16 would skip one of garbage
    passes = engine.accumulate if plan.trains else engine.mean_loss
    clock = StepClock()
    times_s: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1 + REPETITIONS):  # the first one warms up
        for is_silent in (False, True) if number % 2 else (True, False):
            micro_batches = batch()
            with messages_stay_local() if is_silent else contextlib.nullcontext():
                clock.restart()
                passes(micro_batches)
                clock.tick()
            times_s[is_silent].append(engine.max_over_ranks(clock.take()[0]))
    return max(0.0, statistics.median(times_s[False][1:]) - statistics.median(times_s[True][1:]))
