"""Every number that a run logs: its name, its unit, and where pages show it. Imports nothing slow: pages start at once.

docs/metrics.md has the formulas. Tests hold that page, this table and what a run logs together. Used by `runs` and
`page` (the dashboard without an account) and `workspace` (wandb's).
"""

from __future__ import annotations

from dataclasses import dataclass

SECTIONS = ("Throughput", "Learning", "Memory", "Communication")
PARTS = ("attention", "merge", "exchange", "gemm", "optimizer", "data", "other", "idle")  # of a step's time


@dataclass(frozen=True)
class Metric:
    """One number over the steps of a run.

    Args:
        name: as logged, behind "PREFIX/".
        section: where it is shown; "" is nowhere, for what is an axis or says something only while a run is under way.
        prefixes: who logs it.
        only: what it takes to be logged; "" is nothing.
        log_scale: whether it spans decades.
    """

    name: str
    title: str
    unit: str
    section: str
    prefixes: tuple[str, ...] = ("train", "forward")
    only: str = ""
    log_scale: bool = False

    @property
    def logged_names(self) -> list[str]:
        return [f"{prefix}/{self.name}" if prefix else self.name for prefix in self.prefixes]

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


TRAINS, TRAINS_AND_VALIDATES = ("train",), ("train", "validation")

METRICS = (
    Metric("tokens_per_s", "throughput, all ranks", "tokens/s", "Throughput"),
    Metric("tokens_per_s_per_rank", "throughput per rank", "tokens/s", "Throughput"),
    Metric("tpot_ms", "TPOT: step time / length", "ms", "Throughput", log_scale=True),
    Metric("model_tflops_per_rank", "model operations per rank", "TFLOP/s", "Throughput"),
    Metric("mfu_pct", "model FLOP utilisation", "%", "Throughput", only="a GPU whose peak is known"),
    Metric("step_time_p50_s", "step time, median", "s", "Throughput", log_scale=True),
    Metric("step_time_p95_s", "step time, 95th percentile", "s", "Throughput", log_scale=True),
    Metric("step_time_max_s", "step time, slowest", "s", "Throughput", log_scale=True),
    Metric("data_wait_ms", "wait for data per step", "ms", "Throughput"),
    Metric("loss", "loss", "nats/token", "Learning", ("train", "validation", "forward")),
    Metric("perplexity", "perplexity", "", "Learning", TRAINS_AND_VALIDATES, log_scale=True),
    Metric("grad_norm", "gradient norm before clipping", "", "Learning", TRAINS, log_scale=True),
    Metric("learning_rate", "learning rate", "", "Learning", TRAINS),
    Metric("loss_scale", "loss scale", "", "Learning", TRAINS, only="fp16", log_scale=True),
    Metric("skipped_steps", "skipped steps so far", "steps", "Learning", TRAINS, only="fp16"),
    Metric("peak_memory_gib", "peak memory, most of all ranks", "GiB", "Memory"),
    Metric("peak_active_memory_gib", "peak active memory, most of all ranks", "GiB", "Memory", only="a GPU"),
    Metric("allocation_retries", "allocation retries so far", "retries", "Memory", only="a GPU"),
    Metric("exchange_wait_max_ms", "wait for the ring, longest of all ranks", "ms", "Communication", only="a ring"),
    Metric("exchange_wait_min_ms", "wait for the ring, shortest of all ranks", "ms", "Communication", only="a ring"),
    Metric("rank_spread_ms", "step time, slowest minus fastest rank", "ms", "Communication", log_scale=True),
    Metric("tokens_seen", "tokens seen", "tokens", "", TRAINS),
    Metric("data_cursor", "position in the corpus", "tokens", "", TRAINS),
    Metric("eta_s", "time left", "s", ""),
    Metric("step", "step", "", "", ("",)),
    Metric("elapsed_s", "time since the start", "s", "", ("",)),
)
"""Over steps; charts stand in this order."""

SUMMARY_METRICS = (
    Metric("validation_loss", "validation loss at the end", "nats/token", "", ("",), only="recipe=pretrain"),
    Metric("tokens_per_s", "median throughput, all ranks", "tokens/s", "", ("",)),
    Metric("tokens_per_s_per_rank", "median throughput per rank", "tokens/s", "", ("",)),
    Metric("tpot_ms", "median TPOT", "ms", "", ("",)),
    Metric("model_tflops_per_rank", "median model operations per rank", "TFLOP/s", "", ("",)),
    Metric("mfu_pct", "median model FLOP utilisation", "%", "", ("",), only="a GPU whose peak is known"),
    *(Metric(f"{part}_pct", f"time of a step: {part}", "%", "Communication", ("parts",)) for part in PARTS),
    Metric("exposed_communication_ms", "exposed communication per step", "ms", "Communication", ("parts",)),
)
"""Once, at the end: summary.json."""


def minutes(seconds: float) -> str:
    """Such as 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
