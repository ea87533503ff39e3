"""Every number that a run logs; docs/metrics.md has the formulas. Imports nothing slow, so that pages start at once.

Tests keep this table, that page and what a run logs consistent.
"""

from __future__ import annotations

from dataclasses import dataclass

SECTIONS = ("Throughput", "Learning", "Memory", "Communication")
PARTS = ("attention", "merge", "exchange", "gemm", "optimizer", "data", "other", "idle")  # of a step's time


@dataclass(frozen=True)
class Metric:
    """One number of a run."""

    name: str  # as logged, after "PREFIX/"
    title: str
    unit: str
    section: str  # of the dashboard; "" for metrics that have no chart
    prefixes: tuple[str, ...] = ("train", "forward")  # of the recipes and phases that log it
    requires: str = ""  # the condition under which it is logged; "" for always
    log_scale: bool = False  # whether its chart has a logarithmic axis

    @property
    def logged_names(self) -> list[str]:
        return [f"{prefix}/{self.name}" if prefix else self.name for prefix in self.prefixes]


TRAIN, EVALUATION = ("train",), ("evaluation",)  # the latter while training

# Logged over steps. Charts have this order.
METRICS = (
    Metric("tokens_per_s", "throughput, all ranks", "tokens/s", "Throughput"),
    Metric("tokens_per_s_per_rank", "throughput per rank", "tokens/s", "Throughput"),
    Metric("tpot_ms", "TPOT: step time / length", "ms", "Throughput", log_scale=True),
    Metric("model_tflops_per_rank", "model FLOP/s per rank", "TFLOP/s", "Throughput"),
    Metric("mfu_pct", "model FLOP utilization", "%", "Throughput", requires="a GPU whose peak is known"),
    Metric("step_time_p50_s", "step time, median", "s", "Throughput", log_scale=True),
    Metric("step_time_p95_s", "step time, 95th percentile", "s", "Throughput", log_scale=True),
    Metric("step_time_max_s", "step time, maximum", "s", "Throughput", log_scale=True),
    Metric("data_wait_ms", "wait for data per step", "ms", "Throughput"),
    Metric("loss", "loss", "nats/token", "Learning", ("train", "validation", "forward", "evaluation")),
    Metric("perplexity", "perplexity", "", "Learning", ("train", "validation"), log_scale=True),
    Metric("accuracy", "accuracy of retrieval", "", "Learning", EVALUATION, requires="retrieval tasks"),
    Metric(
        "answer_loss", "loss of retrieval's answers", "nats/token", "Learning", EVALUATION, requires="retrieval tasks"
    ),
    Metric("grad_norm", "gradient norm before clipping", "", "Learning", TRAIN, log_scale=True),
    Metric("learning_rate", "learning rate", "", "Learning", TRAIN),
    Metric("loss_scale", "loss scale", "", "Learning", TRAIN, requires="fp16", log_scale=True),
    Metric("skipped_steps", "skipped steps, total", "steps", "Learning", TRAIN, requires="fp16"),
    Metric("peak_memory_gib", "peak memory, maximum over ranks", "GiB", "Memory"),
    Metric("peak_active_memory_gib", "peak active memory, maximum over ranks", "GiB", "Memory", requires="a GPU"),
    Metric("allocation_retries", "allocation retries, total", "retries", "Memory", requires="a GPU"),
    Metric("exchange_wait_max_ms", "wait for the ring, maximum over ranks", "ms", "Communication", requires="a ring"),
    Metric("exchange_wait_min_ms", "wait for the ring, minimum over ranks", "ms", "Communication", requires="a ring"),
    Metric("rank_spread_ms", "step time, slowest minus fastest rank", "ms", "Communication", log_scale=True),
    Metric("tokens_seen", "tokens seen", "tokens", "", TRAIN),
    Metric("data_epoch", "epoch of the data, from 0", "epochs", "", TRAIN),
    Metric("data_sequence", "next sequence of the epoch", "sequences", "", TRAIN),
    Metric("padding_pct", "padding", "%", ""),
    Metric("eta_s", "remaining time", "s", ""),
    Metric("step", "step", "", "", ("",)),
    Metric("elapsed_s", "time since the start", "s", "", ("",)),
)

# Written once, at the end of a run: RUN_DIR/summary.json.
SUMMARY_METRICS = (
    Metric("validation_loss", "final validation loss", "nats/token", "", ("",), requires="recipe=pretrain"),
    Metric("tokens_per_s", "median throughput, all ranks", "tokens/s", "", ("",)),
    Metric("tokens_per_s_per_rank", "median throughput per rank", "tokens/s", "", ("",)),
    Metric("tpot_ms", "median TPOT", "ms", "", ("",)),
    Metric("model_tflops_per_rank", "median model FLOP/s per rank", "TFLOP/s", "", ("",)),
    Metric("mfu_pct", "median model FLOP utilization", "%", "", ("",), requires="a GPU whose peak is known"),
    *(Metric(f"{part}_pct", f"time of a step: {part}", "%", "Communication", ("parts",)) for part in PARTS),
    Metric("exposed_communication_ms", "exposed communication per step", "ms", "Communication", ("parts",)),
)
