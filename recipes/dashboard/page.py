"""The page: tables and interactive plots of any number of runs in one HTML file that needs nothing from outside.

Between `runs`, which reads, and `dashboard`, which writes the file. `charts` makes the plots; `page.html` lays them out
and gives them what all share: one legend, one axis of steps, tokens or time, light and dark.
"""

from __future__ import annotations

import datetime
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from recipes.dashboard.charts import COLORS, DASHES, Shown, comparison_charts, method_of, section_charts
from recipes.monitor.metric_registry import SECTIONS
from recipes.run.run_dir import Comparison, LoadedRuns, Run

MOST_SETTINGS_IN_NAME = 3
AXES = {"step": "step", "train/tokens_seen": "tokens", "elapsed_s": "time since the start (s)"}


def render(found: LoadedRuns, reload_s: int | None = None) -> str:
    """The page as HTML.

    Args:
        reload_s: after which a browser loads it again; None is never.
    """
    differing = found.differing_settings
    shown = [
        Shown(run, _name(run, differing), COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)])
        for number, run in enumerate(found.runs)
    ]
    sections = [(name, section_charts(name, shown)) for name in SECTIONS]
    methods = dict.fromkeys(method_of(row) for comparison in found.comparisons for row in comparison.content["rows"])
    colors = {method: COLORS[number % len(COLORS)] for number, method in enumerate(methods)}
    logged = [run for run in found.runs if run.rows]
    axes = {
        key: label
        for key, label in AXES.items()
        if logged and all(any(value is not None for value in run.column(key)) for run in logged)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "breakable": _breakable}
    return environment.get_template("page.html").render(
        title=", ".join(filter(None, [counted(found.runs, "run"), counted(found.comparisons, "comparison")])),
        plotly_js=get_plotlyjs(),
        reload_s=reload_s,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        problems=found.problems,
        runs=shown,
        table=_table(shown, differing),
        sections=[(name, charts) for name, charts in sections if charts],
        comparisons=[
            (comparison, _comparison_table(comparison), comparison_charts(comparison, colors))
            for comparison in found.comparisons
        ],
        axes=axes,
        positions=[{key: one.run.column(key) for key in axes} for one in shown],
    )


def counted(things: Sequence[Any], name: str) -> str:
    """Such as "1 run", "2 runs"; "" for none."""
    return "" if not things else f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _name(run: Run, differing: list[str]) -> str:
    """The run's, with the first settings that make it differ."""
    settings = [
        f"{name.rpartition('.')[2]}={_number(run.settings[name])}" for name in differing if name in run.settings
    ]
    return " ".join([run.name, *settings[:MOST_SETTINGS_IN_NAME]])


def _number(value: Any) -> str:
    """For people: three or four digits that mean something."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _breakable(heading: str) -> Markup:
    """A dotted name may break at its dots and underscores: a column is as wide as its numbers."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(heading))))


# what the table of runs says of each
FINAL: tuple[tuple[str, Callable[[Run], float | None]], ...] = (
    ("last step", lambda run: _last(run, "step")),
    ("loss", lambda run: _last(run, "train/loss", "forward/loss")),
    ("validation loss", lambda run: _last(run, "validation/loss")),
    ("best validation loss", lambda run: min(_known(run, "validation/loss"), default=None)),
    ("tokens/s", lambda run: _of_the_whole(run, "tokens_per_s")),
    ("tokens/s per rank", lambda run: _of_the_whole(run, "tokens_per_s_per_rank")),
    ("TPOT ms", lambda run: _of_the_whole(run, "tpot_ms")),
    ("TFLOP/s per rank", lambda run: _of_the_whole(run, "model_tflops_per_rank")),
    ("MFU %", lambda run: _of_the_whole(run, "mfu_pct")),
    ("peak GiB", lambda run: max(_known(run, "train/peak_memory_gib", "forward/peak_memory_gib"), default=None)),
    ("exposed ms", lambda run: run.summary.get("parts/exposed_communication_ms")),
)


def _known(run: Run, *names: str) -> list[float]:
    return [value for name in names for value in run.column(name) if value is not None]


def _last(run: Run, *names: str) -> float | None:
    return next(iter(reversed(_known(run, *names))), None)


def _of_the_whole(run: Run, name: str) -> float | None:
    """As the run concluded; until then the median of what it logged, without the first step, which warms up."""
    if (concluded := run.summary.get(name)) is not None:
        return concluded
    values = _known(run, f"train/{name}", f"forward/{name}")
    return statistics.median(values[1:] or values) if values else None


class Table(NamedTuple):
    """Cells are text or numbers; columns that are empty throughout are left out."""

    columns: list[str]
    rows: list[list[Any]]


def _table(shown: list[Shown], differing: list[str]) -> Table:
    """A run's settings that are not the same everywhere, and its numbers at the end."""
    columns = [(name, [one.run.settings.get(name) for one in shown]) for name in differing]
    columns += [(name, [number(one.run) for one in shown]) for name, number in FINAL]
    return _without_empty(columns)


def _without_empty(columns: list[tuple[str, list[Any]]]) -> Table:
    kept = [(name, cells) for name, cells in columns if any(cell is not None for cell in cells)]
    num_rows = len(columns[0][1])
    return Table([name for name, _ in kept], [[cells[row] for _, cells in kept] for row in range(num_rows)])


def _comparison_table(comparison: Comparison) -> Table:
    """The paper's table: a row for each method, those that failed too."""
    rows = comparison.content["rows"]
    baseline = comparison.content["baseline"]

    def column(key: str) -> list[Any]:
        return [row.get(key) for row in rows]

    spread = [
        None if "error" in row else f"{row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f}" for row in rows
    ]
    return _without_empty(
        [
            ("method", column("entry")),
            ("grid", column("grid")),
            ("L", column("sequence_length")),
            ("batch", column("sequences_per_step")),
            ("micro-batch", column("micro_batch_size")),
            ("TPS", column("tokens_per_s")),
            ("min - max", spread),
            ("TPS per rank", column("tokens_per_s_per_rank")),
            ("TPOT ms", column("tpot_ms")),
            (f"vs {baseline} %", [None if value is None else f"{value:+.1f}" for value in column("change_pct")]),
            ("TFLOP/s per rank", column("model_tflops_per_rank")),
            ("MFU %", column("mfu_pct")),
            ("peak GiB", column("peak_memory_gib")),
            ("exposed ms", column("exposed_communication_ms")),
            ("step ms", column("step_time_ms")),
            ("loss", column("first_loss")),
            ("failed", [(error or "").splitlines()[0] if error else None for error in column("error")]),
        ]
    )
