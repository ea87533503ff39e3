"""The main job: next-token training of the transformer with its attention spread over the ring. Reads top to bottom."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from conf.schema import Config
from data.pack import Corpus
from data.shard import Sharder
from data.source import open_documents
from recipes import metrics
from recipes.engine import TrainingEngine
from recipes.plan import Plan
from recipes.report import Reporter
from recipes.transformer import Transformer
from ring_attention import LocalAttention, RingAttention
from ring_attention.groups import ParallelGroups


def build_attention(config: Config, groups: ParallelGroups) -> nn.Module:
    """The configured attention module on this rank's ring. A new method is one entry here."""
    group = groups.get_sequence_parallel_group()
    if config.attention.method == "local":
        return LocalAttention(config.attention.block, group)
    return RingAttention(
        config.attention.block, group, layout=config.attention.layout, transport=config.attention.transport
    )


def pretrain(config: Config, plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Train and return the final validation loss in nats per token. Every rank must call it.

    Args:
        reporter: rank 0's; None on all others.
    """
    torch.use_deterministic_algorithms(config.engine.deterministic)
    torch.autograd.set_detect_anomaly(config.engine.detect_anomaly, check_nan=True)
    groups = ParallelGroups(plan.data_degree, plan.ring_degree)
    if reporter:
        reporter.say(*plan.banner(run_dir), "", "building the model and the engine ...")
    engine = TrainingEngine(
        lambda: Transformer(config.model, build_attention(config, groups)),
        groups,
        config.engine,
        config.optimizer,
        config.num_steps,
        config.seed,
    )

    corpus = Corpus(open_documents(config.data), config.data.sequence_length, config.data.validation_sequences)
    sharder = Sharder(
        plan.layout, groups.ring_rank, groups.data_rank, groups.data_degree, config.engine.micro_batch_size
    )
    steps = sharder.steps(corpus.training(cursor=0), config.engine.gradient_accumulation_steps)
    first_batch = next(steps)

    def validate() -> float:
        return engine.evaluate(sharder.validation(corpus.validation()))

    peak_tflops = metrics.peak_tflops(plan.device_name, config.engine.dtype)
    clock = metrics.StepClock()
    step_times_s: list[float] = []  # without the first step, which warms up
    first_step_s = float("nan")
    first_loss = last_loss = validation_loss = float("nan")
    with _profiler(config, run_dir, groups.get_sequence_data_parallel_rank()) as profiler_step:
        for step in range(1, config.num_steps + 1):
            micro_batches = first_batch if step == 1 or config.data.overfit_one_batch else next(steps)
            learning_rate = engine.learning_rate
            result = engine.train_step(micro_batches)
            clock.tick()
            profiler_step()
            if reporter:
                reporter.advance()

            logs = step == 1 or step % config.logging.every_n_steps == 0 or step == config.num_steps
            validates = step == config.num_steps or (
                config.logging.validate_every_n_steps and step % config.logging.validate_every_n_steps == 0
            )
            if logs or validates:
                recent_s = clock.take()
                if step == 1:
                    [first_step_s] = recent_s
                else:
                    step_times_s += recent_s
                values: dict[str, float | None] = {}
                if logs:
                    peak_memory_gib = engine.max_over_ranks(metrics.peak_memory_gib())
                    last_loss = result.loss.item()
                    first_loss = last_loss if step == 1 else first_loss
                    throughput = metrics.Throughput(
                        statistics.median(recent_s),
                        plan.tokens_per_step,
                        config.data.sequence_length,
                        plan.num_ranks,
                        3 * plan.forward_flops,
                        peak_tflops,
                    )
                    values |= {
                        "train/loss": last_loss,
                        "train/grad_norm": float(result.grad_norm),
                        "train/learning_rate": learning_rate,
                        "train/tokens_seen": step * plan.tokens_per_step,
                        "train/tokens_per_s": throughput.tokens_per_s,
                        "train/tokens_per_s_per_rank": throughput.tokens_per_s_per_rank,
                        "train/tpot_ms": throughput.tpot_ms,
                        "train/mfu_pct": throughput.mfu_pct,
                        "train/step_time_p50_s": metrics.percentile(recent_s, 50),
                        "train/step_time_p95_s": metrics.percentile(recent_s, 95),
                        "train/peak_memory_gib": peak_memory_gib,
                        "train/eta_s": throughput.step_time_s * (config.num_steps - step),
                    }
                    if reporter:
                        reporter.say(reporter.training_line(step, values))
                if validates:
                    if reporter and step == config.num_steps:
                        reporter.say("validating ...")
                    validation_loss = validate()
                    values["validation/loss"] = validation_loss
                    if reporter:
                        reporter.say(f"step {step}: validation loss {validation_loss:.4f}")
                if reporter:
                    reporter.log(step, values)
                clock.restart()

    if reporter:
        tokens_per_s = plan.tokens_per_step / statistics.median(step_times_s or [first_step_s])
        reporter.say(
            "",
            f"done: {config.num_steps} steps, loss {first_loss:.4f} -> {last_loss:.4f}, "
            f"validation loss {validation_loss:.4f}",
            f"median throughput: {tokens_per_s:,.0f} tok/s, {tokens_per_s / plan.num_ranks:,.0f} tok/s/rank",
            *reporter.how_to_look(),
        )
    return validation_loss


@contextlib.contextmanager
def _profiler(config: Config, run_dir: Path, global_rank: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; profile=true makes steps 3 and 4 a trace for Perfetto, on every rank."""
    if not config.profile:
        yield lambda: None
        return
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"rank_{global_rank}.json")),
    ) as profiler:
        yield profiler.step
