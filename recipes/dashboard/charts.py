"""Plots of runs and of comparisons, plotly's, without the colours of a page.

Below `page`, which lays them out and gives them what suits light and dark.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.utils import PlotlyJSONEncoder

from recipes.monitor.metric_registry import METRICS, PARTS, SUMMARY_METRICS, Metric
from recipes.run.run_dir import Comparison, Run

COLORS = qualitative.T10  # can be told apart on white and on black
DASHES = ("solid", "dash", "dot", "dashdot")  # for the next ten runs, and so on
FEW_POINTS = 60  # that are drawn as such
FEW_RUNS = 6  # whose numbers fit one hover box
NAMES = {"type": "category", "dtick": 1, "autorange": "reversed"}  # of bars: jobs are called 0, 1
ABOVE = {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"}  # a plot, for its legend


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


def section_charts(section: str, shown: list[Shown]) -> list[Chart]:
    """Of one of `catalog.SECTIONS`, what any of the runs has logged."""
    charts = []
    for metric in METRICS:
        if metric.section == section:
            training = [prefix for prefix in metric.prefixes if prefix != "validation"]
            charts.append(_over_steps(metric, metric.title, training, shown))
            if "validation" in metric.prefixes:
                charts.append(_over_steps(metric, f"validation {metric.title}", ["validation"], shown))
    charts += [
        _at_the_end(metric, shown) for metric in SUMMARY_METRICS if metric.section == section and metric.unit != "%"
    ]
    if section == "Communication":
        charts.append(
            _shares({one.run.name: [one.run.summary.get(f"parts/{part}_pct") for part in PARTS] for one in shown})
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
        yaxis={"title": metric.unit or metric.title} | (decades(drawn) if metric.log_scale else {}),
        hovermode="x unified" if len(shown) <= FEW_RUNS else "closest",
        showlegend=False,
    )
    return Chart(title, _plain(figure), is_over_steps=True)


def decades(values: list[float]) -> dict[str, Any]:
    """A logarithmic axis; a long one has ticks at 1, 2 and 5, as plotly writes only 1 in full."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= 3 * min(positive):
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
        if one.run.summary.get(name) is not None:
            figure.add_bar(
                x=[one.run.summary[name]],
                y=[one.run.name],
                name=one.name,
                orientation="h",
                marker={"color": one.color},
                meta={"run": number},
                hovertemplate="%{x:.5~g}<extra>%{y}</extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": metric.unit}, yaxis=NAMES, showlegend=False)
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
        yaxis=NAMES,
        legend=ABOVE,
    )
    return Chart("where the time of a step goes", _plain(figure), num_bars=len(rows))


def method_of(row: dict[str, Any]) -> str:
    """Of an entry: those of a scaling are called "METHOD on N"."""
    return row["entry"].partition(" on ")[0]


def comparison_charts(comparison: Comparison, colors: dict[str, str]) -> list[Chart]:
    """Throughput, and where the time goes.

    Args:
    colors: by method.
    """
    rows = [row for row in comparison.content["rows"] if "error" not in row]
    scales = len({row["num_ranks"] for row in rows}) > 1
    charts = [
        (_scaling(rows, colors) if scales else _bars(rows, colors)) if rows else None,
        _shares({row["entry"]: [row["shares_pct"].get(part) for part in PARTS] for row in rows}),
    ]
    return [chart for chart in charts if chart is not None]


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Error bars from the slowest step to the fastest."""
    return {
        "type": "data",
        "symmetric": False,
        "color": "gray",
        "array": [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows],
        "arrayminus": [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows],
    }


def _bars(rows: list[dict[str, Any]], colors: dict[str, str]) -> Chart:
    figure = go.Figure()
    for row in rows:
        figure.add_bar(
            x=[row["tokens_per_s"]],
            y=[f"{row['entry']}<br>{row['grid']}"],
            error_x=_spread([row]),
            orientation="h",
            marker={"color": colors[method_of(row)]},
            hovertemplate="%{x:,.0f} tokens/s<extra>" + row["entry"] + "</extra>",
        )
    figure.update_layout(
        xaxis={"title": "tokens/s, all ranks"},
        yaxis=NAMES,
        showlegend=False,
    )
    return Chart("throughput: median, slowest and fastest step", _plain(figure), num_bars=2 * len(rows))


def _scaling(rows: list[dict[str, Any]], colors: dict[str, str]) -> Chart:
    """Throughput over the number of ranks."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(method_of(row), []).append(row)
    figure = go.Figure()
    for name, own in series.items():
        figure.add_scatter(
            x=[row["num_ranks"] for row in own],
            y=[row["tokens_per_s"] for row in own],
            error_y=_spread(own),
            name=name,
            mode="lines+markers",
            line={"color": colors[name]},
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
