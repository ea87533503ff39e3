"""The main job: next-token training of the transformer with its attention spread over the ring. Reads top to bottom."""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path

import torch

from data.pack import open_corpus
from recipes.checkpoint.manager import Checkpoints, StopRequest, TrainingData
from recipes.checkpoint.manifest import Manifest, is_resharded
from recipes.engine.build import build_engine, build_sharder
from recipes.launch.bad_steps import BadSteps
from recipes.monitor.device_metrics import perplexity
from recipes.monitor.profiling import profiler
from recipes.monitor.reporter import Reporter
from recipes.monitor.step_timer import StepTimer, speed_metrics, with_prefix
from recipes.monitor.time_breakdown import measure_time_breakdown
from recipes.planning.explain import banner
from recipes.planning.plan import Plan
from recipes.run.errors import Preempted
from ring_attention.trace import report_status


def pretrain(plan: Plan, run_dir: Path, reporter: Reporter | None, resumed: Manifest | None = None) -> float:
    """Train and return the final validation loss in nats per token. Every rank must call it.

    Args:
        reporter: rank 0's; None on all others.
        resumed: the checkpoint to go on from.

    Raises:
        Preempted: on every rank, after a checkpoint, if a signal told one of them to end.
        RunFailed: on every rank, if the loss is not finite (`bad_steps`).
    """
    config = plan.config
    torch.autograd.set_detect_anomaly(config.engine.detect_anomaly)
    if reporter:
        reporter.say(*banner(plan, run_dir), "", "building the model and the engine ...")
    report_status("part", "building the model and the engine")
    engine = build_engine(plan)
    checkpoints = Checkpoints(config, run_dir, engine)
    if resumed:
        if reporter and is_resharded(resumed, config):
            reporter.say("putting weights and moments together for these ranks ...")
        report_status("part", "reading the checkpoint")
        checkpoints.load(resumed)
    report_status("part", "reading data")
    corpus = open_corpus(config.data)
    sharder = build_sharder(plan, engine)
    data = TrainingData(corpus, resumed)
    steps = sharder.steps(data, plan.accumulation_steps)
    first_step, first_batch = resumed.step + 1 if resumed else 1, next(steps)

    def save(step: int, preempted: bool = False) -> None:
        report_status("part", f"checkpoint of step {step}")
        started = time.perf_counter()
        cursor = 0 if config.data.overfit_one_batch else step * plan.data_tokens_per_step
        elapsed_s, wandb_run_id = (reporter.elapsed_s, reporter.wandb_run_id) if reporter else (0.0, "")
        checkpoints.save(step, cursor, data.last_sha256, elapsed_s, wandb_run_id, preempted)
        if reporter:
            reporter.say(f"step {step}: checkpoint in {time.perf_counter() - started:.2f} s")

    watch, bad_steps = StepTimer(plan.has_ring), BadSteps(plan, engine, run_dir)
    losses: list[float] = []  # of the logged steps
    step_times_s: list[float] = []
    validation_loss = float("nan")
    end = StopRequest() if checkpoints.are_kept else None
    with profiler(config, run_dir) as profiler_step:
        for step in range(first_step, config.num_steps + 1):
            is_last = step == config.num_steps
            is_logged = step == 1 or is_last or step % config.logging.every_n_steps == 0
            report_status("step", str(step))
            report_status("part", "data")
            with watch.data():
                micro_batches = first_batch if step == first_step or config.data.overfit_one_batch else next(steps)
            learning_rate = engine.learning_rate
            with watch.step(is_logged):
                result = engine.train_step(micro_batches, stop_requested=end is not None and end.wanted)
            skipped = bad_steps.check(step, result, data)
            report_status("step")
            report_status("part", f"between steps {step} and {step + 1}")
            profiler_step()
            if reporter:
                reporter.advance()
                if skipped:
                    reporter.say(skipped)

            values: dict[str, float | None] = {}
            if is_logged:
                recent_s, of_all_ranks = watch.take(engine.extremes_over_ranks)
                step_times_s += recent_s
                throughput = plan.throughput(statistics.median(recent_s))
                losses.append(result.loss.item())
                values |= with_prefix(
                    "train",
                    {
                        "loss": losses[-1],
                        "perplexity": perplexity(losses[-1]),
                        "grad_norm": float(result.grad_norm),
                        "learning_rate": learning_rate,
                        **engine.loss_scaling,
                        "tokens_seen": step * plan.tokens_per_step,
                        "data_cursor": step * plan.data_tokens_per_step,
                        **speed_metrics(throughput, recent_s, config.num_steps - step),
                        **of_all_ranks,
                    },
                )
                if reporter:
                    reporter.say(reporter.step_line(step, values))
            if is_last or _is_multiple(step, config.logging.validate_every_n_steps):
                report_status("part", f"validation after step {step}")
                if reporter:
                    reporter.say("validating ...")
                validation_loss = engine.mean_loss(sharder.validation(corpus.validation())).item()
                values |= with_prefix(
                    "validation", {"loss": validation_loss, "perplexity": perplexity(validation_loss)}
                )
                if reporter:
                    reporter.say(f"step {step}: validation loss {validation_loss:.4f}")
            if values:
                if reporter:
                    reporter.log(step, values)
                watch.restart()
            # the last checkpoint comes when the summary is written, so that a run that has it has ended
            preempted = end is not None and end.agreed(result.num_stop_requests) and not is_last
            if preempted or (checkpoints.are_due(step) and not is_last):
                save(step, preempted)
                watch.restart()
            if preempted:
                if reporter:
                    reporter.say(
                        f"told to end after step {step}: the same command with hydra.run.dir={run_dir} goes on"
                    )
                raise Preempted(of_all_ranks=True)

    # the first step warms up
    throughput = plan.throughput(statistics.median(step_times_s[1:] or step_times_s))
    if reporter:
        reporter.write_summary({"validation_loss": validation_loss, **throughput.numbers})
    if checkpoints.are_kept:
        save(config.num_steps)
    if config.breakdown:
        report_status("part", "measuring where the time of a step goes")
        if reporter:
            reporter.say("measuring where the time of a step goes ...")
        parts = measure_time_breakdown(plan, engine, functools.partial(sharder.steps, corpus.training(cursor=0)))
        if reporter:
            reporter.say(str(parts))
            reporter.write_summary(parts.metrics)

    if reporter:
        since = f", {config.num_steps - resumed.step} of them since the checkpoint" if resumed else ""
        reporter.say(
            "",
            f"done: {config.num_steps} steps{since}, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
            f"validation loss {validation_loss:.4f}",
            *reporter.summary(throughput),
        )
    return validation_loss


def _is_multiple(step: int, interval: int) -> bool:
    """Whether something due every `interval` steps is due; 0 is never."""
    return interval > 0 and step % interval == 0
