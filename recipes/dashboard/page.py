"""The dashboard's page: tables and interactive plots of any number of runs, in one self-contained HTML file.

`charts` makes the plots. `page.html` arranges them and adds what they share: a legend, an x axis of steps, tokens or
time, and light and dark colors.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from recipes.dashboard.charts import (
    COLORS,
    DASHES,
    StyledRun,
    comparison_charts,
    evaluation_charts,
    method_of,
    section_charts,
)
from recipes.evaluation.report import retrieval
from recipes.monitor.metric_registry import SECTIONS
from recipes.run.run_dir import Comparison, LoadedRuns, Run

MAX_SETTINGS_IN_NAME = 3
AXES = {"step": "step", "train/tokens_seen": "tokens", "elapsed_s": "time since the start (s)"}

Table = list[dict[str, Any]]  # rows with the same columns; cells are text, numbers, or None if empty


def render(loaded: LoadedRuns, reload_s: int | None = None) -> str:
    """The page as HTML. Browsers reload it every `reload_s` seconds; None: never."""
    differing = loaded.differing_settings
    styles = itertools.cycle(itertools.product(DASHES, COLORS))
    runs = [
        StyledRun(run, _label(run, differing), color, dash)
        for run, (dash, color) in zip(loaded.runs, styles, strict=False)
    ]
    methods = dict.fromkeys(method_of(row) for comparison in loaded.comparisons for row in comparison.content["rows"])
    colors = dict(zip(methods, itertools.cycle(COLORS), strict=False))
    sections = [*((name, section_charts(name, runs)) for name in SECTIONS), ("Evaluation", evaluation_charts(runs))]
    axes = {
        metric: label
        for metric, label in AXES.items()
        if any(chart.is_over_steps for _, charts in sections for chart in charts)
        and all(_logged_values(run, metric) for run in loaded.runs if run.rows)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _format_number
    return environment.get_template("page.html").render(
        title=describe_contents(loaded),
        plotly_js=get_plotlyjs(),
        reload_s=reload_s,
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        problems=loaded.problems,
        runs=runs,
        table=_runs_table(loaded.runs, differing),
        sections=[(name, charts) for name, charts in sections if charts],
        comparisons=[
            (comparison, _comparison_table(comparison), comparison_charts(comparison, colors))
            for comparison in loaded.comparisons
        ],
        axes=axes,
        positions=[{metric: run.column(metric) for metric in axes} for run in loaded.runs],
    )


def describe_contents(loaded: LoadedRuns) -> str:
    """Such as "2 runs, 1 comparison"."""
    counts = ((len(loaded.runs), "run"), (len(loaded.comparisons), "comparison"))
    return ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count)


def _label(run: Run, differing: list[str]) -> str:
    """The run's name, and the first settings in which it differs from others."""
    names = [name for name in differing if name in run.settings][:MAX_SETTINGS_IN_NAME]
    return " ".join([run.name, *(f"{name.rpartition('.')[2]}={_format_number(run.settings[name])}" for name in names)])


def _format_number(value: Any) -> str:
    """A number with about four digits; anything else as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _runs_table(runs: list[Run], differing: list[str]) -> Table:
    """The settings in which the runs differ, and their final numbers."""
    return _without_empty_columns(
        [{name: run.settings.get(name) for name in differing} | _results(run) for run in runs]
    )


def _results(run: Run) -> dict[str, float | None]:
    losses = _logged_values(run, "train/loss", "forward/loss")
    validation_losses = _logged_values(run, "validation/loss")
    accuracies = [100 * row["accuracy"] for row in retrieval(run.evaluated)]
    return {
        "last step": run.rows[-1]["step"] if run.rows else None,
        "loss": losses[-1] if losses else None,
        "validation loss": validation_losses[-1] if validation_losses else None,
        "best validation loss": min(validation_losses, default=None),
        "accuracy %": statistics.fmean(accuracies) if accuracies else None,
        "tokens/s": _median(run, "tokens_per_s"),
        "tokens/s per rank": _median(run, "tokens_per_s_per_rank"),
        "TPOT ms": _median(run, "tpot_ms"),
        "TFLOP/s per rank": _median(run, "model_tflops_per_rank"),
        "MFU %": _median(run, "mfu_pct"),
        "peak GiB": max(_logged_values(run, "train/peak_memory_gib", "forward/peak_memory_gib"), default=None),
        "exposed ms": run.summary.get("parts/exposed_communication_ms"),
    }


def _logged_values(run: Run, *names: str) -> list[float]:
    return [value for name in names for value in run.column(name) if value is not None]


def _median(run: Run, name: str) -> float | None:
    """The median of the run's summary. Until the run ends, that of the logged values except the first: a warm-up."""
    if (final := run.summary.get(name)) is not None:
        return final
    values = _logged_values(run, f"train/{name}", f"forward/{name}")
    return statistics.median(values[1:] or values) if values else None


def _without_empty_columns(table: Table) -> Table:
    filled = {name for row in table for name, cell in row.items() if cell is not None}
    return [{name: cell for name, cell in row.items() if name in filled} for row in table]


def _comparison_table(comparison: Comparison) -> Table:
    """The paper's table: a row for each method, including failed ones."""
    columns = {
        "method": "entry",
        "grid": "grid",
        "L": "sequence_length",
        "batch": "sequences_per_step",
        "micro-batch": "micro_batch_size",
        "TPS": "tokens_per_s",
        "min - max": "min_max",
        "TPS per rank": "tokens_per_s_per_rank",
        "TPOT ms": "tpot_ms",
        f"vs {comparison.content['baseline']} %": "change",
        "TFLOP/s per rank": "model_tflops_per_rank",
        "MFU %": "mfu_pct",
        "peak GiB": "peak_memory_gib",
        "exposed ms": "exposed_communication_ms",
        "step ms": "step_time_ms",
        "loss": "first_loss",
        "failed": "reason",
    }
    table = []
    for row in comparison.content["rows"]:
        if "error" in row:
            texts = {"reason": row["error"].splitlines()[0]}
        else:
            texts = {"min_max": f"{row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f}"}
        if row.get("change_pct") is not None:
            texts["change"] = f"{row['change_pct']:+.1f}"
        table.append({title: (row | texts).get(key) for title, key in columns.items()})
    return _without_empty_columns(table)
