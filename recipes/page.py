"""The page: tables and interactive plots of any number of runs in one HTML file that needs nothing from outside.

Between `runs`, which reads, and `dashboard`, which writes the file. Plots are plotly's; `page.html` lays them out and
gives them what all share: one legend, one axis of steps, tokens or time, light and dark.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.colors import qualitative
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from recipes.catalog import CONCLUSIONS, METRICS, PARTS, SECTIONS, Metric
from recipes.runs import Comparison, Found, Run

COLORS = qualitative.T10  # can be told apart on white and on black
DASHES = ("solid", "dash", "dot", "dashdot")  # for the next ten runs, and so on
FEW_POINTS = 60  # that are drawn as such
FEW_RUNS = 6  # whose numbers fit one hover box
ABOVE = {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"}  # a plot, for its legend
MOST_SETTINGS_IN_NAME = 3
AXES = {"step": "step", "train/tokens_seen": "tokens", "elapsed_s": "time since the start (s)"}


class Chart(NamedTuple):
    """A plot with its heading; `figure` is plotly's JSON."""

    title: str
    figure: dict[str, Any]
    is_over_steps: bool = False
    num_bars: int = 0


class Shown(NamedTuple):
    """A run as the page names and colours it throughout."""

    run: Run
    name: str
    color: str
    dash: str


def render(found: Found, reload_s: int | None = None) -> str:
    """The page as HTML.

    Args:
        reload_s: after which a browser loads it again; None is never.
    """
    differing = found.differing_settings
    shown = [
        Shown(run, _name(run, differing), COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)])
        for number, run in enumerate(found.runs)
    ]
    sections = [(name, _charts(name, shown)) for name in SECTIONS]
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
            (comparison, _comparison_table(comparison), _comparison_charts(comparison))
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


# what the table of runs says at the end of each, over its logged steps
FINAL: tuple[tuple[str, Callable[[Run], float | None]], ...] = (
    ("last step", lambda run: _last(run, "step")),
    ("loss", lambda run: _last(run, "train/loss", "forward/loss")),
    ("validation loss", lambda run: _last(run, "validation/loss")),
    ("best validation loss", lambda run: min(_known(run, "validation/loss"), default=None)),
    ("tokens/s", lambda run: _median(run, "tokens_per_s")),
    ("tokens/s per rank", lambda run: _median(run, "tokens_per_s_per_rank")),
    ("TPOT ms", lambda run: _median(run, "tpot_ms")),
    ("TFLOP/s per rank", lambda run: _median(run, "model_tflops_per_rank")),
    ("MFU %", lambda run: _median(run, "mfu_pct")),
    ("step s", lambda run: _median(run, "step_time_p50_s")),
    ("peak GiB", lambda run: max(_known(run, "train/peak_memory_gib", "forward/peak_memory_gib"), default=None)),
    ("exposed ms", lambda run: run.conclusions.get("parts/exposed_communication_ms")),
)


def _known(run: Run, *names: str) -> list[float]:
    return [value for name in names for value in run.column(name) if value is not None]


def _last(run: Run, *names: str) -> float | None:
    return next(iter(reversed(_known(run, *names))), None)


def _median(run: Run, name: str) -> float | None:
    """Without the first logged step, which warms up."""
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
    return Table([name for name, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)])


def _charts(section: str, shown: list[Shown]) -> list[Chart]:
    charts = []
    for metric in METRICS:
        if metric.section == section:
            training = [prefix for prefix in metric.prefixes if prefix != "validation"]
            charts.append(_over_steps(metric, metric.title, training, shown))
            if "validation" in metric.prefixes:
                charts.append(_over_steps(metric, f"validation {metric.title}", ["validation"], shown))
    charts += [_at_the_end(metric, shown) for metric in CONCLUSIONS if metric.section == section and metric.unit != "%"]
    if section == "Communication":
        charts.append(
            _shares({one.run.name: [one.run.conclusions.get(f"parts/{part}_pct") for part in PARTS] for one in shown})
        )
    return [chart for chart in charts if chart is not None]


def _over_steps(metric: Metric, title: str, prefixes: list[str], shown: list[Shown]) -> Chart | None:
    figure, drawn = go.Figure(), []
    for number, one in enumerate(shown):
        for name in (f"{prefix}/{metric.name}" for prefix in prefixes):
            values = one.run.column(name)
            known = [value for value in values if value is not None]
            if known:
                drawn += known
                figure.add_scatter(
                    x=one.run.column("step"),
                    y=values,
                    name=one.name,
                    mode="lines+markers" if len(known) <= FEW_POINTS else "lines",
                    line={"color": one.color, "dash": one.dash, "width": 2},
                    marker={"size": 5},
                    connectgaps=True,  # a validation is not of every logged step
                    meta={"run": number},
                    hovertemplate="%{y:.5~g}<extra>%{fullData.name}</extra>",
                )
    if not drawn:
        return None
    figure.update_layout(
        xaxis={"title": "step"},
        yaxis={"title": metric.unit or metric.title} | (_decades(drawn) if metric.log_scale else {}),
        hovermode="x unified" if len(shown) <= FEW_RUNS else "closest",
        showlegend=False,
    )
    return Chart(title, _plain(figure), is_over_steps=True)


def _decades(values: list[float]) -> dict[str, Any]:
    """A logarithmic axis; one of more than a decade has ticks at 1, 2 and 5, as plotly writes only 1 in full."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= 10 * min(positive):
        return {"type": "log"}
    decades = range(math.floor(math.log10(min(positive))) - 1, math.ceil(math.log10(max(positive))) + 1)
    steps = (1, 2, 5) if len(decades) < 6 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _at_the_end(metric: Metric, shown: list[Shown]) -> Chart | None:
    """A bar for each run."""
    [name] = metric.logged_names
    figure = go.Figure()
    for number, one in enumerate(shown):
        if one.run.conclusions.get(name) is not None:
            figure.add_bar(
                x=[one.run.conclusions[name]],
                y=[one.run.name],
                name=one.name,
                orientation="h",
                marker={"color": one.color},
                meta={"run": number},
                hovertemplate="%{x:.5~g}<extra>%{y}</extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": metric.unit}, yaxis={"autorange": "reversed"}, showlegend=False)
    return Chart(metric.title, _plain(figure), num_bars=len(shown))


def _shares(measured: dict[str, list[float | None]]) -> Chart | None:
    """Stacked bars of where the time of a step goes, by name; parts have the same colours everywhere."""
    rows = [(name, values) for name, values in measured.items() if None not in values]
    if not rows:
        return None
    figure = go.Figure()
    for number, part in enumerate(PARTS):
        figure.add_bar(
            x=[values[number] for _, values in rows],
            y=[name for name, _ in rows],
            name=part,
            orientation="h",
            marker={"color": COLORS[number]},
            hovertemplate="%{x:.1f} %<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        barmode="stack",
        xaxis={"title": "% of a step", "range": [0, 100]},
        yaxis={"autorange": "reversed"},
        legend=ABOVE,
    )
    return Chart("where the time of a step goes", _plain(figure), num_bars=len(rows))


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


def _comparison_charts(comparison: Comparison) -> list[Chart]:
    rows = [row for row in comparison.content["rows"] if "error" not in row]
    scales = len({row["num_ranks"] for row in rows}) > 1
    charts = [
        (_scaling(rows) if scales else _bars(rows)) if rows else None,
        _shares({row["entry"]: [row["shares_pct"].get(part) for part in PARTS] for row in rows}),
    ]
    return [chart for chart in charts if chart is not None]


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Error bars from the slowest step to the fastest."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows],
        "arrayminus": [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows],
    }


def _bars(rows: list[dict[str, Any]]) -> Chart:
    figure = go.Figure()
    for number, row in enumerate(rows):
        figure.add_bar(
            x=[row["tokens_per_s"]],
            y=[f"{row['entry']}<br>{row['grid']}"],
            error_x=_spread([row]),
            orientation="h",
            marker={"color": COLORS[number % len(COLORS)]},
            hovertemplate="%{x:,.0f} tokens/s<extra>" + row["entry"] + "</extra>",
        )
    figure.update_layout(
        xaxis={"title": "tokens/s, all ranks: median, slowest and fastest step"},
        yaxis={"autorange": "reversed"},
        showlegend=False,
    )
    return Chart("throughput", _plain(figure), num_bars=2 * len(rows))


def _scaling(rows: list[dict[str, Any]]) -> Chart:
    """Throughput over the number of ranks: entries are called "METHOD on N"."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["entry"].partition(" on ")[0], []).append(row)
    figure = go.Figure()
    for number, (name, own) in enumerate(series.items()):
        figure.add_scatter(
            x=[row["num_ranks"] for row in own],
            y=[row["tokens_per_s"] for row in own],
            error_y=_spread(own),
            name=name,
            mode="lines+markers",
            line={"color": COLORS[number % len(COLORS)]},
            hovertemplate="%{y:,.0f} tokens/s on %{x} ranks<extra>%{fullData.name}</extra>",
        )
    ranks = sorted({row["num_ranks"] for row in rows})
    figure.update_layout(
        xaxis={"title": "ranks", "type": "log", "tickvals": ranks, "ticktext": [str(n) for n in ranks]},
        yaxis={"title": "tokens/s, all ranks", "type": "log"},
        legend=ABOVE,
    )
    return Chart("throughput over ranks", _plain(figure))


def _plain(figure: go.Figure) -> dict[str, Any]:
    """Without plotly's own colours, which the page gives to suit light and dark."""
    figure.update_layout(template="none")
    return json.loads(json.dumps(figure.to_plotly_json(), cls=PlotlyJSONEncoder))
