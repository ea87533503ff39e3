"""Forward passes alone, as in reading a prompt: measured as in the ring attention paper: tokens/s and TPOT."""

from __future__ import annotations

from pathlib import Path

from data.report import left_out
from data.shared_stream import SharedStream
from recipes.engine.build import build_engine, build_feed, open_shared_corpus
from recipes.monitor.device_metrics import reset_peak_memory
from recipes.monitor.profiling import profiler
from recipes.monitor.reporter import Reporter
from recipes.monitor.step_logger import StepLogger
from recipes.planning.explain import banner
from recipes.planning.plan import Plan


def forward(plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Run `num_steps` batches and return the median tokens/s. Every rank must call it; `reporter` is rank 0's alone."""
    config = plan.config
    if reporter:
        reporter.say(*banner(plan, run_dir), "", "building the model ...")
    engine = build_engine(plan)
    reset_peak_memory()  # building takes more: weights are made in fp32
    corpus = open_shared_corpus(plan, engine)
    feed = build_feed(plan, engine, corpus)
    batches = feed.steps()

    logger = StepLogger(plan, engine, "forward", reporter)  # its first step starts here
    with profiler(config, run_dir) as profiler_step:
        for step in range(1, config.num_steps + 1):
            with logger.data():
                batch = next(batches)
            with logger.step(logger.is_due(step), batch.lengths):
                loss = engine.mean_loss(batch.micro_batches)
            profiler_step()
            if logger.is_due(step):
                logger.write(step, logger.step_metrics(step, {"loss": loss.item()}))
    batches.close()
    if config.breakdown:
        logger.breakdown(feed.steps)

    throughput = logger.median_throughput()
    if reporter:
        reporter.write_summary(throughput._asdict())
        skipped = left_out(corpus.names[0], corpus.counts) if isinstance(corpus, SharedStream) else []
        reporter.say("", f"done: {config.num_steps} steps", *skipped, *reporter.summary(throughput))
    return throughput.tokens_per_s
