"""Tables of docs/results/forecast.md: forecasts beside what was measured, and how far off they are."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from conf.schema import Degrees
from docs.tools.check_forecast import (
    GRAPHS,
    HOST_BOUND,
    attention_table,
    beside,
    distinct_pairs,
    errors,
    forecast_s,
    other_half_of_files,
    step_table,
)
from docs.tools.markdown import load, table
from docs.tools.measured_steps import MeasuredStep, cluster_of, measured_steps, model_of, of_setting, tried_steps
from docs.tools.tables_speed import STEP_COLUMNS, cells_of_step
from recipes.planning.attention_time import AttentionTime
from recipes.planning.cluster import Cluster
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.speeds import FITTED
from ring_attention import CAUSAL
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout
from ring_attention.pass_graph import become_graphs
from tests.tools.long_step import composed, predicted_again

SIMULATED_LENGTH = 65_536
BESIDE = "forward, ms | forecast, ms | error | with backward, ms | forecast, ms | error"
# a GPU that plays one rank of a ring has its messages at once
NO_MESSAGES = Cluster("h200", 1, 64, 139.8, 1e9, 1e9, latency_us=0, host_memory_gib=2000)


def forecast_errors() -> str:
    """Of rows that were fitted, of others, and of other splits."""
    steps, forecasts = _forecasts(measured_steps)
    tried, of_tried = _forecasts(tried_steps)
    body = []
    for name, chosen in (("even rows: fitted", range(0, len(steps), 2)), ("odd rows: tested", range(1, len(steps), 2))):
        body.append([name, len(chosen), errors(steps, forecasts, chosen)])
    body.append(["all rows", len(steps), errors(steps, forecasts, range(len(steps)))])
    body.append(["micro-batches not chosen: tested", len(tried), errors(tried, of_tried, range(len(tried)))])
    for first, name in enumerate(("every second file", "the other files")):
        others, found = other_half_of_files(steps, first)
        body.append([f"constants of {name}: tested on the rest", len(others), found])
    cells = (
        [name, count, f"{e.median:.1%}", f"{e.worst:.1%}", f"{e.ordered} of {e.pairs} ({e.ordered / e.pairs:.1%})"]
        for name, count, e in body
    )
    return table("rows | number | median error | worst error | pairs in the right order", cells)


def forecast_wrong_pairs() -> str:
    """Pairs of all rows whose order the forecast has wrong."""
    body = []
    for steps, forecasts in map(_forecasts, (measured_steps, tried_steps)):
        for a, b, is_ordered in distinct_pairs(steps, forecasts, range(len(steps))):
            if not is_ordered:
                ratios = [f"{seconds[a] / seconds[b]:.3f}" for seconds in ([s.seconds for s in steps], forecasts)]
                body.append([steps[a].group, _short(steps[a]), _short(steps[b]), *ratios])
    return table("file | one | the other | measured ratio | forecast ratio", body)


def forecast_steps() -> str:
    return step_table(*_forecasts(measured_steps))


def forecast_tried() -> str:
    return step_table(*_forecasts(tried_steps))


def forecast_attention() -> str:
    return attention_table(FITTED)


def forecast_simulated() -> str:
    """One rank of a ring on one GPU, by today's program: where steps are short, the host is what is measured."""
    body = []
    for row in load("ring_host_H200.json")["rows"]:
        degree, measured = row["ring_degree"], row["after"]
        attention = _rank_of_a_ring(degree, SIMULATED_LENGTH, NO_MESSAGES)
        body.append([f"ring of {degree}", *beside(attention, measured["forward_ms"], measured["both_ms"])])
    return table(f"65,536 tokens | {BESIDE}", body)


def forecast_graphs() -> str:
    """Rings whose passes are CUDA graphs: of two with their messages, and one rank of larger ones."""
    result, body = load(GRAPHS), []
    for row in result["links"]:
        length, ms = row["length"], [statistics.median(row["ms"][f"{part} graph"]) for part in ("fwd", "both")]
        attention = _rank_of_a_ring(2, length, cluster_of("NVIDIA H200"), has_graphs=True)
        body.append([f"{length:,}", 2, "fitted" if length <= HOST_BOUND else "", *beside(attention, *ms)])
    for row in result["simulated"]:
        degree, measured = row["ring_degree"], row["graph"]
        if become_graphs(KERNELS["flash_attn_4"], SIMULATED_LENGTH // degree, are_packed=False):
            attention = _rank_of_a_ring(degree, SIMULATED_LENGTH, NO_MESSAGES, has_graphs=True)
            cells = beside(attention, measured["forward_ms"], measured["both_ms"])
            body.append([f"{SIMULATED_LENGTH:,}", f"{degree}, simulated", "", *cells])
    return table(f"tokens | ring of | host | {BESIDE}", body)


def forecast_packed(names: dict[str, str]) -> str:
    """Packed documents on GPUs that exchange messages, by today's program."""
    return table(f"documents | method | {BESIDE}", packed_rows(names))


def packed_rows(names: dict[str, str]) -> list[list[Any]]:
    """Documents, method, and measured and forecast ms and error of both measurements."""
    body = []
    for mix, name in names.items():
        result = load(name)
        rows = {row["name"]: row for row in result["rows"]}
        for candidate in ("ring, zigzag", "ring, balanced", "ulysses"):
            row, attention = rows[candidate], of_documents(result, *candidate.split(", "))
            measured = row["forward"]["ms"], row["forward_backward"]["ms"]
            body.append([mix, candidate, *beside(attention, *measured)])
    return body


def of_documents(result: dict[str, Any], method: str, layout_name: str = "zigzag") -> AttentionTime:
    """The attention of one candidate of a result of recipe=bench_attention with several documents."""
    num_ranks, length = result["num_ranks"], result["config"]["data"]["sequence_length"]
    ends = tuple(itertools.accumulate(result["documents"], initial=0))
    ring, ulysses = (1, num_ranks) if method == "ulysses" else (num_ranks, 1)
    model = model_of(result["config"]["model"])
    layout = Layout(layout_name, ring, length, ulysses, documents=ends if layout_name == "balanced" else None)
    kernel = KERNELS["flash_attn_4"]
    return AttentionTime(
        *(model, method, Degrees(1, ring, ulysses), layout, 1, 2, kernel.name, kernel.split),
        speed=ClusterSpeed(cluster_of(result["device"])),
        mask=CAUSAL.packed(ends),
        is_alone=True,
    )


def whole_8b() -> str:
    """Steps of a whole model: the first of a run, and the fastest of two, beside the forecast."""
    body, name = [], "whole_8b_2xH200.json"
    for row in load(name):
        is_first, config = "num_steps" not in row["setting"], composed(row["setting"])
        settings = [
            f"{config.data.sequence_length:,}",
            config.engine.recompute,
            "the first" if is_first else "the second",
        ]
        forecast = forecast_s(of_setting(name, row["setting"], row, "flash_attn_4", is_first), FITTED)
        peak_gib = predicted_again(row)["predicted_gib"]
        body.append([*settings, *cells_of_step(row), f"{forecast:.0f}", f"{peak_gib:.1f}"])
    return table(f"tokens | recompute | step | {STEP_COLUMNS} | forecast, s | predicted peak, GiB", body)


def _rank_of_a_ring(degree: int, length: int, cluster: Cluster, has_graphs: bool = False) -> AttentionTime:
    fields = {"name": "attention", "num_layers": 1, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    kernel, layout = KERNELS["flash_attn_4"], Layout("zigzag", degree, length, 1)
    return AttentionTime(
        *(model_of(fields), "ring", Degrees(1, degree, 1), layout, 1, 2, kernel.name, kernel.split),
        speed=ClusterSpeed(cluster),
        has_graphs=has_graphs,
        is_alone=True,
    )


@functools.cache
def _forecasts(source: Callable[[], list[MeasuredStep]]) -> tuple[Sequence[MeasuredStep], Sequence[float]]:
    steps = source()
    return steps, [forecast_s(step, FITTED) for step in steps]


def _short(step: MeasuredStep) -> str:
    """Without what all settings of long steps share."""
    words = [word for word in step.name.split() if not word.startswith(("model", "data.", "launch.", "num_steps"))]
    return " ".join(words)
