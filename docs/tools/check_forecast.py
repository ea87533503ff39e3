"""Forecasts beside measured steps: errors, and whether methods come in the right order. `tables_forecast` has the page.

    python -m docs.tools.check_forecast           the tables
    python -m docs.tools.check_forecast --fit     fits `recipes.planning.speeds.Constants` on even rows, then the table

Rows are numbered in the order of `measured_steps`. The fit sees even rows alone. The second table has micro-batches
that comparisons tried and did not choose, the third attention without a model: no fit sees these. Speeds of kernels by
themselves are in `recipes.planning.speeds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from conf.schema import AttentionConfig, Config, DataConfig, Degrees
from docs.tools.markdown import RESULTS, load, table
from docs.tools.measured_steps import MeasuredStep, cluster_of, kernel_of, measured_steps, model_of, tried_steps
from recipes.planning.attention_time import AttentionTime
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.pass_graphs import has_graphs
from recipes.planning.speeds import FITTED, Constants
from recipes.planning.step_time import StepTime
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout

DISTINCT = 1.03  # the ratio of two times from which their order counts
CANDIDATES = {"one device": "local", "ring": "ring", "ulysses": "ulysses", "all_gather": "all_gather"}  # their methods
PRIOR = 0.3  # standard deviation of a constant's logarithm around its start, where rows have one of ERROR
ERROR = 0.03
# of the program that measured attention alone
OLDER_HOST = {"call_ms": 0.4, "ring_step_ms": 0.4, "backward_issue": 2.0}
GRAPHS = "pass_graphs_2xH200.json"
HOST_BOUND = 4096  # tokens of a ring of two up to which its graphs take what the host takes


class Errors(NamedTuple):
    """Of forecasts, relative to what was measured.

    Args:
        ordered, pairs: pairs of one file that differ by more than `DISTINCT`, and how many come in the right order.
    """

    median: float
    worst: float
    ordered: int
    pairs: int

    def __str__(self) -> str:
        order = f"{self.ordered} of {self.pairs} pairs in the right order"
        return f"median error {self.median:.1%}, worst {self.worst:.1%}, {order}"


def forecast_s(step: MeasuredStep, constants: Constants) -> float:
    """The forecast for a measured step."""
    forecast = StepTime(step.config, step.degrees, step.method, step.kernel, step.cluster, constants=constants)
    seconds, engine = forecast.parts.total, forecast.engine
    if step.is_first:
        seconds += constants.first_step_s + constants.pinned_s_per_gib * forecast.offloaded_bytes / 2**30
    if step.reduced_once and step.config.recipe == "pretrain":
        seconds -= (engine.num_reductions - 1) * engine.reduction_s
    return seconds


def errors(steps: Sequence[MeasuredStep], forecasts: Sequence[float], chosen: Sequence[int]) -> Errors:
    """Of the rows `chosen`; pairs of which both are chosen."""
    relative = [abs(forecasts[row] / steps[row].seconds - 1) for row in chosen]
    pairs = [is_ordered for *_, is_ordered in distinct_pairs(steps, forecasts, chosen)]
    return Errors(statistics.median(relative), max(relative), sum(pairs), len(pairs))


def distinct_pairs(
    steps: Sequence[MeasuredStep], forecasts: Sequence[float], chosen: Sequence[int]
) -> Iterator[tuple[int, int, bool]]:
    """Pairs of rows of one file that differ by more than `DISTINCT`, and whether forecasts have their order."""
    for a, b in itertools.combinations(chosen, 2):
        if steps[a].group == steps[b].group and _differ(steps[a].seconds, steps[b].seconds):
            yield a, b, (steps[a].seconds < steps[b].seconds) == (forecasts[a] < forecasts[b])


def _differ(a: float, b: float) -> bool:
    return max(a, b) / min(a, b) > DISTINCT


def fit(steps: Sequence[MeasuredStep], start: Constants, rounds: int = 8) -> Constants:
    """Constants that minimize the squared logarithms of errors, by Gauss-Newton; those that no row needs stay."""
    names = [spec.name for spec in dataclasses.fields(start)]
    origin = np.log([getattr(start, name) for name in names])
    measured = np.log([step.seconds for step in steps])

    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = Constants(**dict(zip(names, np.exp(logs).tolist(), strict=True)))
        rows = np.log([forecast_s(step, constants) for step in steps]) - measured
        return np.concatenate([rows / ERROR, (logs - origin) / PRIOR])

    logs = origin
    for _ in range(rounds):
        here = residuals(logs)
        slopes = np.stack([(residuals(logs + 0.02 * unit) - here) / 0.02 for unit in np.eye(len(names))], axis=1)
        logs = logs - np.clip(np.linalg.lstsq(slopes, here)[0], -0.3, 0.3)
    return Constants(**dict(zip(names, np.exp(logs).tolist(), strict=True)))


def other_half_of_files(steps: Sequence[MeasuredStep], first: int) -> tuple[list[int], Errors]:
    """A harder test: constants of every other file from `first` on, and their errors on the rows of the others."""
    files = list(dict.fromkeys(step.group for step in steps))
    constants = fit([step for step in steps if step.group in files[first::2]], Constants())
    others = [row for row, step in enumerate(steps) if step.group not in files[first::2]]
    return others, errors(steps, [forecast_s(step, constants) for step in steps], others)


def step_table(steps: Sequence[MeasuredStep], forecasts: Sequence[float]) -> str:
    """Each step beside its forecast."""
    body = [
        [row, step.group, step.name, f"{step.seconds:.3f}", f"{forecast:.3f}", f"{forecast / step.seconds - 1:+.1%}"]
        for row, (step, forecast) in enumerate(zip(steps, forecasts, strict=True))
    ]
    return table("row | file | step | measured, s | forecast, s | error", body)


def attention_rows(constants: Constants) -> list[list[str]]:
    """Attention without a model: file, candidate, and measured and forecast ms and error of both measurements."""
    rows = []
    for path in sorted(RESULTS.glob("attention_*.json")):
        result = load(path.name)
        for row in result["rows"]:
            if row["name"] in CANDIDATES:
                attention = attention_of(result, CANDIDATES[row["name"]], constants)
                measured = row["forward"]["ms"], row["forward_backward"]["ms"]
                rows.append([path.name, row["name"], *beside(attention, *measured)])
    return rows


def beside(attention: AttentionTime, forward_ms: float, both_ms: float) -> list[str]:
    """Measured ms, forecast ms and error of a forward pass, and the same of both passes."""
    forward, backward = (1e3 * attention.pass_seconds(is_backward).total for is_backward in (False, True))
    pairs = (forward_ms, forward), (both_ms, forward + backward)
    return [cell for ms, forecast in pairs for cell in (f"{ms:.2f}", f"{forecast:.2f}", f"{forecast / ms - 1:+.1%}")]


def graph_ms() -> float:
    """`Constants.graph_ms` of rings of two: what both passes take beyond two calls, where the host sets the time."""
    calls_ms = FITTED.call_ms * (1 + FITTED.backward_issue)
    rows = [row for row in load(GRAPHS)["links"] if row["length"] <= HOST_BOUND]
    return statistics.mean((statistics.median(row["ms"]["both graph"]) - calls_ms) / 2 for row in rows)


def attention_table(constants: Constants) -> str:
    """Attention without a model beside its forecast."""
    header = "file | attention alone | forward, ms | forecast, ms | error | with backward, ms | forecast, ms | error"
    return table(header, attention_rows(constants))


def attention_of(result: dict[str, Any], method: str, constants: Constants) -> AttentionTime:
    """The attention of one candidate of a result of recipe=bench_attention.

    The host's constants are `OLDER_HOST`, except of a ring whose passes are graphs. Results that are older than graphs
    say nothing about documents.
    """
    config, num_ranks = result["config"], result["num_ranks"]
    ring = num_ranks if method in ("ring", "all_gather") else 1
    ulysses = num_ranks if method == "ulysses" else 1
    model = model_of(config["model"])
    kernel, layout = kernel_of(model), Layout("zigzag", ring, config["data"]["sequence_length"], ulysses)
    rows, degrees = config["engine"]["micro_batch_size"], Degrees(1, ring, ulysses)
    transport = AttentionConfig(transport=config["attention"]["transport"])
    settings = Config(attention=transport, data=DataConfig(document_mask=False)), degrees, method, kernel
    are_graphs = "documents" in result and has_graphs(*settings, num_ranks, rows * layout.local_length)
    host = {} if are_graphs else OLDER_HOST
    return AttentionTime(
        model,
        method,
        degrees,
        layout,
        rows,
        2,
        kernel,
        KERNELS[kernel].split,
        ClusterSpeed(cluster_of(result["device"]), dataclasses.replace(constants, **host)),
        has_graphs=are_graphs,
        is_alone=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecasts beside measured steps.")
    parser.add_argument("--fit", action="store_true", help="fit the constants on even rows first")
    steps = measured_steps()
    even, odd = range(0, len(steps), 2), range(1, len(steps), 2)
    constants = FITTED
    if parser.parse_args().fit:
        constants = fit([steps[row] for row in even], Constants())
        print(", ".join(f"{name}={value:.4g}" for name, value in dataclasses.asdict(constants).items()), end="\n\n")
    forecasts = [forecast_s(step, constants) for step in steps]
    print(step_table(steps, forecasts), end="\n\n")
    tried = tried_steps()
    of_tried = [forecast_s(step, constants) for step in tried]
    print(step_table(tried, of_tried), end="\n\n")
    for name, chosen in (("even rows, fitted", even), ("odd rows", odd), ("all rows", range(len(steps)))):
        print(f"{name} ({len(chosen)}): {errors(steps, forecasts, chosen)}")
    print(f"micro-batches not chosen, one round each ({len(tried)}): {errors(tried, of_tried, range(len(tried)))}")
    print("\n" + attention_table(constants))


if __name__ == "__main__":
    main()
