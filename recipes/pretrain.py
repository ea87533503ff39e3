"""The main recipe: next-token training of the transformer, its attention spread over the ring. Reads top to bottom."""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path

import torch

from conf.stages import length_at
from data.report import left_out
from data.shared_stream import SharedStream
from recipes.checkpoint.manager import Checkpoints
from recipes.checkpoint.manifest import Manifest, is_resharded
from recipes.engine.build import build_engine, build_feed, open_shared_corpus
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.evaluation.cells import planned_cells
from recipes.evaluation.measurement import Measurement
from recipes.evaluation.report import training_metrics
from recipes.launch.stopping import BadSteps, StopRequest
from recipes.monitor.device_metrics import perplexity
from recipes.monitor.profiling import profiler
from recipes.monitor.reporter import Reporter
from recipes.monitor.step_logger import StepLogger
from recipes.planning.explain import banner
from recipes.planning.plan import Plan
from recipes.run.errors import Preempted
from ring_attention.trace import report_status


def pretrain(plan: Plan, run_dir: Path, reporter: Reporter | None, resumed: Manifest | None = None) -> float:
    """Train, from the `resumed` checkpoint if given, and return the final validation loss in nats per token.

    Every rank must call it; `reporter` is rank 0's, and None on all others.

    Raises:
        Preempted: on every rank, after a checkpoint, if a signal asked one of them to stop.
        RunFailed: on every rank, if a loss is not finite (`BadSteps`).
    """
    # build
    config = plan.config
    torch.autograd.set_detect_anomaly(config.engine.detect_anomaly)
    if reporter:
        reporter.say(*banner(plan, run_dir), "", f"{'loading' if config.model.path else 'building'} the model ...")
    report_status("part", "building the model and the engine")
    engine = build_engine(plan)
    logger = StepLogger(plan, engine, "train", reporter)
    for note in engine.notes:
        logger.say(note)
    report_status("part", "preparing checkpoints")  # with LoRA all of the base model's files are read
    checkpoints = Checkpoints(config, run_dir, engine)
    bad_steps = BadSteps(plan, engine, run_dir)

    # load
    if resumed:
        if is_resharded(resumed, config):
            logger.say("resharding the checkpoint for these ranks ...")
        report_status("part", "reading the checkpoint")
        checkpoints.load(resumed)
    report_status("part", "reading data")
    corpus = open_shared_corpus(plan, engine)
    checkpoints.documents = None if isinstance(corpus, SharedStream) else corpus.digests()
    feed = build_feed(plan, engine, corpus)
    first_step = resumed.step + 1 if resumed else 1
    steps = feed.steps(last_read=resumed.last_read if resumed else None, first_step=first_step)
    first = next(steps)
    batches = itertools.repeat(first) if config.data.overfit_one_batch else itertools.chain([first], steps)

    measure: Measurement | None = None
    if config.evaluate.every_n_steps:
        assert isinstance(engine, TrainingEngine)
        measure = Measurement(plan, engine, planned_cells(config), corpus.validation())

    def validate(step: int) -> dict[str, float | None]:
        report_status("part", f"validation after step {step}")
        logger.say("validating ...")
        by_source = {name: engine.mean_loss(batches).item() for name, batches in feed.validation().items()}
        if isinstance(corpus, SharedStream):
            for line in left_out(corpus.names[0], corpus.counts):
                logger.say(line)
        loss = sum(feed.weights[name] * loss for name, loss in by_source.items())
        if len(by_source) == 1:
            by_source = {}
        details = ", ".join(f"{name} {loss:.4f}" for name, loss in by_source.items())
        logger.say(f"step {step}: validation loss {loss:.4f}{f' ({details})' if details else ''}")
        of_sources = {f"validation/loss/{name}": loss for name, loss in by_source.items()}
        return {"validation/loss": loss, "validation/perplexity": perplexity(loss), **of_sources}

    def evaluate(step: int, measure: Measurement) -> dict[str, float | None]:
        logger.say("evaluating ...")
        rows = []
        for cell in planned_cells(config):
            if stop_request and stop_request.is_on_any_rank(engine):  # it may last longer than the run may yet
                logger.say(f"step {step}: no evaluation: a signal asked the run to stop")
                return {}
            report_status("part", f"evaluation after step {step}: {cell}")
            rows.append(cell.named() | measure(cell))
        metrics = training_metrics(rows, feed.weights)
        numbers = (f"{name.removeprefix('evaluation/')} {value:.4f}" for name, value in metrics.items())
        logger.say(f"step {step}: evaluation: {', '.join(numbers)}")
        return metrics

    def save(step: int, preempted: bool = False) -> None:
        report_status("part", f"checkpoint of step {step}")
        started = time.perf_counter()
        last = None if config.data.overfit_one_batch else batch.last
        elapsed_s, wandb_run_id = (reporter.elapsed_s, reporter.wandb_run_id) if reporter else (0.0, "")
        checkpoints.save(step, last, elapsed_s, wandb_run_id, metrics, preempted)
        logger.say(f"step {step}: checkpoint in {time.perf_counter() - started:.2f} s")

    # train
    stop_request = StopRequest() if checkpoints.are_enabled else None
    losses: list[float] = []  # of logged steps
    validated: dict[str, float | None] = {}
    logger.restart()  # reading the checkpoint and the data belongs to no step
    with profiler(config, run_dir) as profiler_step:
        for step in range(first_step, config.num_steps + 1):
            length = length_at(config.data, step)
            if step > first_step and length != length_at(config.data, step - 1):
                logger.say(f"from step {step} on: sequences of {length:,} tokens")
                report_status("stage", str(length))
            report_status("step", str(step))
            report_status("part", "data")
            with logger.data():
                batch = next(batches)
            learning_rate = engine.learning_rate
            with logger.step(logger.is_due(step), batch.lengths):
                is_asked_to_stop = stop_request is not None and stop_request.is_received
                result = engine.train_step(batch.micro_batches, is_asked_to_stop)
            skipped = bad_steps.check(step, result, batch)
            report_status("step")
            report_status("part", f"between steps {step} and {step + 1}")
            profiler_step()
            if skipped:
                logger.say(skipped)

            metrics: dict[str, float | None] = {}
            if logger.is_due(step):
                losses.append(result.loss.item())
                numbers = {
                    "loss": losses[-1],
                    "perplexity": perplexity(losses[-1]),
                    "grad_norm": float(result.grad_norm),
                    "learning_rate": learning_rate,
                    **engine.loss_scaling,
                    "tokens_seen": plan.tokens_of_steps(1, step),
                    "data_epoch": batch.last.cursor.epoch,
                    "data_sequence": batch.last.cursor.pack,
                }
                metrics |= logger.step_metrics(step, numbers)
            is_last = step == config.num_steps
            if is_last or _is_multiple(step, config.logging.validate_every_n_steps):
                validated = validate(step)
                metrics |= validated
            if measure and (is_last or _is_multiple(step, config.evaluate.every_n_steps)):
                metrics |= evaluate(step, measure)
            if metrics:
                logger.write(step, metrics)

            preempted = stop_request is not None and stop_request.is_agreed(result.num_stop_requests) and not is_last
            is_due = checkpoints.are_enabled and _is_multiple(step, config.checkpoint.every_n_steps)
            is_due |= checkpoints.is_best(step, metrics)
            # the last checkpoint follows the summary: a run that has it is finished
            if preempted or (is_due and not is_last):
                save(step, preempted)
                logger.restart()
            if preempted:
                logger.say(f"preempted after step {step}: the same command with hydra.run.dir={run_dir} resumes")
                raise Preempted(of_all_ranks=True)

    steps.close()

    # conclude
    throughput, validation_loss = logger.median_throughput(), validated["validation/loss"]
    assert validation_loss is not None
    if reporter:
        best = {"best_checkpoint": str(checkpoints.best.relative_to(run_dir))} if checkpoints.best else {}
        reporter.write_summary({"validation_loss": validation_loss, **throughput._asdict(), **best})
    if checkpoints.are_enabled:
        save(config.num_steps)
    if config.breakdown:
        must_stop = functools.partial(stop_request.is_on_any_rank, engine) if stop_request else lambda: False
        logger.breakdown(functools.partial(feed.steps, first_step=config.num_steps), must_stop)
    if reporter:
        since = f", {config.num_steps - resumed.step} of them since the checkpoint" if resumed else ""
        reporter.say(
            "",
            f"done: {config.num_steps} steps{since}, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
            f"validation loss {validation_loss:.4f}",
            *([f"best checkpoint:       {checkpoints.best}"] if checkpoints.best else []),
            *reporter.summary(throughput),
        )
    return validation_loss


def _is_multiple(step: int, interval: int) -> bool:
    """Whether something due every `interval` steps is due; 0 is never."""
    return interval > 0 and step % interval == 0
