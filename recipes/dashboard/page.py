"""The dashboard's page: tables and interactive plots of any number of runs, in one self-contained HTML file.

`charts` makes the plots. `page.html` arranges them and adds what they share: a legend, an x axis of steps, tokens or
time, and light and dark colors.
"""

from __future__ import annotations

import datetime
import itertools
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from recipes.dashboard.charts import COLORS, DASHES, StyledRun, comparison_charts, method_of, section_charts
from recipes.monitor.metric_registry import SECTIONS
from recipes.run.run_dir import Comparison, LoadedRuns, Run

MAX_SETTINGS_IN_NAME = 3
AXES = {"step": "step", "train/tokens_seen": "tokens", "elapsed_s": "time since the start (s)"}


class Table(NamedTuple):
    """Cells are text or numbers; None is an empty cell."""

    columns: list[str]
    rows: list[list[Any]]


def render(loaded: LoadedRuns, reload_s: int | None = None) -> str:
    """The page as HTML.

    Args:
        reload_s: interval at which browsers reload the page; None: never.
    """
    differing = loaded.differing_settings
    styles = itertools.cycle((color, dash) for dash in DASHES for color in COLORS)
    runs = [
        StyledRun(run, _label(run, differing), color, dash)
        for run, (color, dash) in zip(loaded.runs, styles, strict=False)
    ]
    sections = [(name, section_charts(name, runs)) for name in SECTIONS]
    methods = dict.fromkeys(method_of(row) for comparison in loaded.comparisons for row in comparison.content["rows"])
    colors = dict(zip(methods, itertools.cycle(COLORS), strict=False))
    with_rows = [run for run in loaded.runs if run.rows]
    axes = {
        metric: label
        for metric, label in AXES.items()
        if with_rows and all(_logged_values(run, metric) for run in with_rows)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _format_number, "breakable": _breakable}
    return environment.get_template("page.html").render(
        title=describe_contents(loaded),
        plotly_js=get_plotlyjs(),
        reload_s=reload_s,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
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
    settings = [
        f"{name.rpartition('.')[2]}={_format_number(run.settings[name])}" for name in differing if name in run.settings
    ]
    return " ".join([run.name, *settings[:MAX_SETTINGS_IN_NAME]])


def _format_number(value: Any) -> str:
    """A number with about four digits; anything else as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _breakable(heading: str) -> Markup:
    """Lets the browser break a long name at dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(heading))))


def _runs_table(runs: list[Run], differing: list[str]) -> Table:
    """The settings in which the runs differ, and their final numbers."""
    rows = [{name: run.settings.get(name) for name in differing} | _results(run) for run in runs]
    return _without_empty_columns({name: [row[name] for row in rows] for name in rows[0]}) if rows else Table([], [])


def _results(run: Run) -> dict[str, float | None]:
    losses = _logged_values(run, "train/loss", "forward/loss")
    validation_losses = _logged_values(run, "validation/loss")
    return {
        "last step": run.rows[-1]["step"] if run.rows else None,
        "loss": losses[-1] if losses else None,
        "validation loss": validation_losses[-1] if validation_losses else None,
        "best validation loss": min(validation_losses, default=None),
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


def _without_empty_columns(columns: dict[str, list[Any]]) -> Table:
    filled = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    num_rows = len(next(iter(columns.values())))
    return Table([*filled], [[cells[row] for cells in filled.values()] for row in range(num_rows)])


def _comparison_table(comparison: Comparison) -> Table:
    """The paper's table: a row for each method, including failed ones."""
    rows, baseline = comparison.content["rows"], comparison.content["baseline"]
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
        f"vs {baseline} %": "change",
        "TFLOP/s per rank": "model_tflops_per_rank",
        "MFU %": "mfu_pct",
        "peak GiB": "peak_memory_gib",
        "exposed ms": "exposed_communication_ms",
        "step ms": "step_time_ms",
        "loss": "first_loss",
        "failed": "reason",
    }
    formatted = []
    for row in rows:
        texts: dict[str, str] = {}
        if "error" in row:
            texts["reason"] = row["error"].splitlines()[0]
        else:
            texts["min_max"] = f"{row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f}"
        if row.get("change_pct") is not None:
            texts["change"] = f"{row['change_pct']:+.1f}"
        formatted.append(row | texts)
    return _without_empty_columns({title: [row.get(key) for row in formatted] for title, key in columns.items()})
