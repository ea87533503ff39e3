"""Plotly charts of runs and comparisons. The page adds the colors of its light and dark themes."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.utils import PlotlyJSONEncoder

from recipes.monitor.metric_registry import METRICS, PARTS, SUMMARY_METRICS, Metric
from recipes.run.run_dir import Comparison, Run

COLORS = qualitative.T10  # distinct on white and on black
DASHES = ("solid", "dash", "dot", "dashdot")  # the first ten runs are solid, the next ten dashed, ...
MAX_MARKERS = 60  # a line with more points has no markers
MAX_RUNS_PER_HOVER_BOX = 6
NAME_AXIS = {"type": "category", "dtick": 1, "autorange": "reversed"}  # names of jobs are 0, 1, ...
LEGEND_ABOVE = {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


class Chart(NamedTuple):
    """A plot and its title. `figure` is plotly's JSON."""

    title: str
    figure: dict[str, Any]
    is_over_steps: bool = False
    num_bars: int = 0


class StyledRun(NamedTuple):
    """A run with its label and style, which are the same in all charts."""

    run: Run
    label: str
    color: str
    dash: str


def section_charts(section: str, runs: list[StyledRun]) -> list[Chart]:
    """The charts of one of `metric_registry.SECTIONS`, for metrics that any of the runs has logged."""
    charts = []
    for metric in METRICS:
        if metric.section == section:
            training = [prefix for prefix in metric.prefixes if prefix != "validation"]
            charts.append(_step_chart(metric, metric.title, training, runs))
            if "validation" in metric.prefixes:
                charts.append(_step_chart(metric, f"validation {metric.title}", ["validation"], runs))
    charts += [
        _summary_chart(metric, runs) for metric in SUMMARY_METRICS if metric.section == section and metric.unit != "%"
    ]
    if section == "Communication":
        charts.append(
            _parts_chart({run.name: [run.summary.get(f"parts/{part}_pct") for part in PARTS] for run, *_ in runs})
        )
    return [chart for chart in charts if chart is not None]


def _step_chart(metric: Metric, title: str, prefixes: list[str], runs: list[StyledRun]) -> Chart | None:
    """A line over steps for each run, or None if none has logged the metric."""
    figure, drawn = go.Figure(), []
    for number, (run, label, color, dash) in enumerate(runs):
        for name in (f"{prefix}/{metric.name}" for prefix in prefixes):
            values = run.column(name)
            known = [value for value in values if value is not None]
            if known:
                drawn += known
                figure.add_scatter(
                    x=run.column("step"),
                    y=values,
                    name=label,
                    mode="lines+markers" if len(known) <= MAX_MARKERS else "lines",
                    line={"color": color, "dash": dash, "width": 2},
                    marker={"size": 5},
                    connectgaps=True,  # not every logged step has a validation
                    meta={"run": number},
                    hovertemplate="%{y:.5~g}<extra>%{fullData.name}</extra>",
                )
    if not drawn:
        return None
    figure.update_layout(
        xaxis={"title": "step"},
        yaxis={"title": metric.unit or metric.title} | (log_axis(drawn) if metric.log_scale else {}),
        hovermode="x unified" if len(runs) <= MAX_RUNS_PER_HOVER_BOX else "closest",
        showlegend=False,
    )
    return Chart(title, _plain(figure), is_over_steps=True)


def log_axis(values: list[float]) -> dict[str, Any]:
    """A logarithmic axis. A long one has ticks at 1, 2 and 5, because plotly labels only 1 in full."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= 3 * min(positive):
        return {"type": "log"}
    decades = range(math.floor(math.log10(min(positive))) - 1, math.ceil(math.log10(max(positive))) + 1)
    steps = (1, 2, 5) if len(decades) < 6 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _summary_chart(metric: Metric, runs: list[StyledRun]) -> Chart | None:
    """A bar for each run, or None if none has the metric in its summary."""
    [name] = metric.logged_names
    figure = go.Figure()
    for number, (run, label, color, _) in enumerate(runs):
        if run.summary.get(name) is not None:
            figure.add_bar(
                x=[run.summary[name]],
                y=[run.name],
                name=label,
                orientation="h",
                marker={"color": color},
                meta={"run": number},
                hovertemplate="%{x:.5~g}<extra>%{y}</extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": metric.unit}, yaxis=NAME_AXIS, showlegend=False)
    return Chart(metric.title, _plain(figure), num_bars=len(runs))


def _parts_chart(shares_by_name: dict[str, list[float | None]]) -> Chart | None:
    """Stacked bars of the time of a step by part. The parts have the same colors in all charts."""
    rows = [(name, shares) for name, shares in shares_by_name.items() if None not in shares]
    if not rows:
        return None
    figure = go.Figure()
    for number, part in enumerate(PARTS):
        figure.add_bar(
            x=[shares[number] for _, shares in rows],
            y=[name for name, _ in rows],
            name=part,
            orientation="h",
            marker={"color": COLORS[number]},
            hovertemplate="%{x:.1f} %<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        barmode="stack", xaxis={"title": "% of a step", "range": [0, 100]}, yaxis=NAME_AXIS, legend=LEGEND_ABOVE
    )
    return Chart("time of a step by part", _plain(figure), num_bars=len(rows))


def method_of(row: dict[str, Any]) -> str:
    """The method of an entry. Entries of a scaling are called "METHOD on N"."""
    return row["entry"].partition(" on ")[0]


def comparison_charts(comparison: Comparison, colors: dict[str, str]) -> list[Chart]:
    """Throughput, and the time of a step by part.

    Args:
        colors: by method.
    """
    rows = [row for row in comparison.content["rows"] if "error" not in row]
    if not rows:
        return []
    is_scaling = len({row["num_ranks"] for row in rows}) > 1
    throughput = _scaling_chart(rows, colors) if is_scaling else _throughput_chart(rows, colors)
    parts = _parts_chart({row["entry"]: [row["shares_pct"].get(part) for part in PARTS] for row in rows})
    return [throughput, *([parts] if parts else [])]


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Error bars from the slowest step to the fastest."""
    return {
        "type": "data",
        "symmetric": False,
        "color": "gray",
        "array": [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows],
        "arrayminus": [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows],
    }


def _throughput_chart(rows: list[dict[str, Any]], colors: dict[str, str]) -> Chart:
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
    figure.update_layout(xaxis={"title": "tokens/s, all ranks"}, yaxis=NAME_AXIS, showlegend=False)
    return Chart("throughput: median, slowest and fastest step", _plain(figure), num_bars=2 * len(rows))


def _scaling_chart(rows: list[dict[str, Any]], colors: dict[str, str]) -> Chart:
    """A line of throughput over the number of ranks for each method."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(method_of(row), []).append(row)
    figure = go.Figure()
    for name, points in series.items():
        figure.add_scatter(
            x=[row["num_ranks"] for row in points],
            y=[row["tokens_per_s"] for row in points],
            error_y=_spread(points),
            name=name,
            mode="lines+markers",
            line={"color": colors[name]},
            hovertemplate="%{y:,.0f} tokens/s on %{x} ranks<extra>%{fullData.name}</extra>",
        )
    ranks = sorted({row["num_ranks"] for row in rows})
    figure.update_layout(
        xaxis={"title": "ranks", "type": "log", "tickvals": ranks, "ticktext": [str(n) for n in ranks]},
        yaxis={"title": "tokens/s, all ranks", "type": "log"},
        legend=LEGEND_ABOVE,
    )
    return Chart("throughput over ranks", _plain(figure))


def _plain(figure: go.Figure) -> dict[str, Any]:
    """The figure as JSON, without the colors of plotly's theme."""
    figure.update_layout(template="none")
    return json.loads(json.dumps(figure.to_plotly_json(), cls=PlotlyJSONEncoder))
