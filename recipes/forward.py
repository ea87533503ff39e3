"""Forward passes alone, as when a prompt is read: the measure of the ring attention paper, TPS and TPOT."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path

from data.pack import open_corpus
from recipes.engine.build import build_engine, build_sharder
from recipes.monitor.device_metrics import reset_peak_memory
from recipes.monitor.profiling import profiler
from recipes.monitor.reporter import Reporter
from recipes.monitor.step_timer import StepTimer, speed_metrics, with_prefix
from recipes.monitor.time_breakdown import measure_time_breakdown
from recipes.planning.explain import banner
from recipes.planning.plan import Plan


def forward(plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Run `num_steps` batches through the model and return the median tokens/s. Every rank must call it.

    Args:
        reporter: rank 0's; None on all others.
    """
    config = plan.config
    if reporter:
        reporter.say(*banner(plan, run_dir), "", "building the model ...")
    engine = build_engine(plan, forward_only=True)
    reset_peak_memory()  # building took more: weights are made in fp32
    corpus = open_corpus(config.data)
    sharder = build_sharder(plan, engine)
    steps = sharder.steps(corpus.training(cursor=0), plan.accumulation_steps)

    watch = StepTimer(plan.has_ring)
    step_times_s: list[float] = []
    with profiler(config, run_dir) as profiler_step:
        for step in range(1, config.num_steps + 1):
            is_logged = step == 1 or step == config.num_steps or step % config.logging.every_n_steps == 0
            with watch.data():
                micro_batches = next(steps)
            with watch.step(is_logged):
                loss = engine.mean_loss(micro_batches)
            profiler_step()
            if reporter:
                reporter.advance()
            if is_logged:
                recent_s, of_all_ranks = watch.take(engine.extremes_over_ranks)
                step_times_s += recent_s
                throughput = plan.throughput(statistics.median(recent_s))
                numbers = {
                    "loss": loss.item(),
                    **speed_metrics(throughput, recent_s, config.num_steps - step),
                    **of_all_ranks,
                }
                values = with_prefix("forward", numbers)
                if reporter:
                    reporter.say(reporter.step_line(step, values))
                if reporter:
                    reporter.log(step, values)
                watch.restart()
    if config.breakdown:
        if reporter:
            reporter.say("measuring where the time of a step goes ...")
        parts = measure_time_breakdown(plan, engine, functools.partial(sharder.steps, corpus.training(cursor=0)))
        if reporter:
            reporter.say(str(parts))
            reporter.write_summary(parts.metrics)

    throughput = plan.throughput(statistics.median(step_times_s[1:] or step_times_s))  # the first step warms up
    if reporter:
        reporter.write_summary(throughput.numbers)
        reporter.say("", f"done: {config.num_steps} steps", *reporter.summary(throughput))
    return throughput.tokens_per_s
