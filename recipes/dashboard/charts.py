"""Plotly charts of runs and comparisons. The page adds the colors of its light and dark themes."""

from __future__ import annotations

from typing import Any, NamedTuple

from plotly.colors import qualitative

from conf.schema import LOSS_TASK
from recipes.evaluation.heatmap import DEPTH_LABEL, MAX_NUMBERS, grid_of
from recipes.evaluation.report import retrieval
from recipes.monitor.metric_registry import METRICS, PARTS, Metric
from recipes.run.run_dir import Comparison, Row, Run

COLORS = qualitative.T10  # distinct on white and on black
DASHES = ("solid", "dash", "dot", "dashdot")  # the first ten runs are solid, the next ten dashed, ...
MAX_MARKERS = 60  # a line with more points has no markers
MAX_RUNS_PER_HOVER_BOX = 6
NAME_AXIS = {"type": "category", "dtick": 1, "autorange": "reversed"}  # names of jobs are 0, 1, ...
LOG_AXIS = {"type": "log", "nticks": 3, "tickformat": ",.6~g"}  # three: plotly adds 2 and 5 between powers of 10
LEGEND_ABOVE = {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


class Chart(NamedTuple):
    """A plot and its title. `traces` and `layout` are plotly's JSON."""

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
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
    charts = [
        _step_chart(metric, prefixes, runs)
        for metric in METRICS
        if metric.section == section
        for prefixes in (("train", "forward"), ("validation",))
    ]
    if section == "Communication":
        shares = {run.name: [run.summary.get(f"parts/{part}_pct") for part in PARTS] for run, *_ in runs}
        charts += [_exposed_communication_chart(runs), _parts_chart(shares)]
    return [chart for chart in charts if chart.traces]


def _step_chart(metric: Metric, prefixes: tuple[str, ...], runs: list[StyledRun]) -> Chart:
    """A line over steps for each run that has logged the metric."""
    traces = []
    for number, (run, label, color, dash) in enumerate(runs):
        for prefix in prefixes:
            values = run.column(f"{prefix}/{metric.name}")
            num_known = sum(value is not None for value in values)
            if not num_known:
                continue
            trace = {
                "type": "scatter",
                "x": run.column("step"),
                "y": values,
                "name": label,
                "mode": "lines+markers" if num_known <= MAX_MARKERS else "lines",
                "line": {"color": color, "dash": dash, "width": 2},
                "marker": {"size": 5},
                "connectgaps": True,  # not every logged step has a validation
                "meta": {"run": number},
                "hovertemplate": "%{y:.5~g}<extra>%{fullData.name}</extra>",
            }
            traces.append(trace)
    layout = {
        "xaxis": _axis("step"),
        "yaxis": _axis(metric.unit or metric.title, **(LOG_AXIS if metric.log_scale else {})),
        "hovermode": "x unified" if len(runs) <= MAX_RUNS_PER_HOVER_BOX else "closest",
        "showlegend": False,
    }
    title = f"validation {metric.title}" if "validation" in prefixes else metric.title
    return Chart(title, traces, layout, is_over_steps=True)


def _axis(title: str, **settings: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 8}, **settings}  # without standoff it lies on the labels


def _exposed_communication_chart(runs: list[StyledRun]) -> Chart:
    """A bar for each run that has measured it."""
    hover = "%{x:.5~g}<extra>%{y}</extra>"
    traces = [
        _bars([value], [run.name], color, name=label, meta={"run": number}, hovertemplate=hover)
        for number, (run, label, color, _) in enumerate(runs)
        if (value := run.summary.get("parts/exposed_communication_ms")) is not None
    ]
    layout = {"xaxis": _axis("ms"), "yaxis": NAME_AXIS, "showlegend": False}
    return Chart("exposed communication per step", traces, layout, num_bars=len(runs))


def _bars(lengths: list[Any], names: list[str], color: str | list[str], **settings: Any) -> dict[str, Any]:
    return {"type": "bar", "orientation": "h", "x": lengths, "y": names, "marker": {"color": color}, **settings}


def _parts_chart(shares_by_name: dict[str, list[float | None]]) -> Chart:
    """Stacked bars of the time of a step by part. The parts have the same colors in all charts."""
    known = {name: shares for name, shares in shares_by_name.items() if None not in shares}
    hover = "%{x:.1f} %<extra>%{fullData.name}</extra>"
    traces = [
        _bars([*shares], [*known], color, name=part, hovertemplate=hover)
        for part, color, shares in zip(PARTS, COLORS, zip(*known.values(), strict=True), strict=False)
    ]
    layout = {
        "barmode": "stack",
        "xaxis": _axis("% of a step", range=[0, 100]),
        "yaxis": NAME_AXIS,
        "legend": LEGEND_ABOVE,
    }
    return Chart("time of a step by part", traces, layout, num_bars=len(known))


def evaluation_charts(runs: list[StyledRun]) -> list[Chart]:
    """The loss by position of all runs that were evaluated, and a heat map of accuracy for each task and run."""
    losses = _loss_by_position_chart(runs)
    asked = [retrieval(one.run.evaluated) for one in runs]
    maps = [
        _heat_map(number, runs[number].run.name, task, own)
        for task in dict.fromkeys(row["task"] for rows in asked for row in rows)  # the runs beside each other
        for number, rows in enumerate(asked)
        if (own := [row for row in rows if row["task"] == task])
    ]
    return [*([losses] if losses.traces else []), *maps]


def _loss_by_position_chart(runs: list[StyledRun]) -> Chart:
    """A line for each run, source and length over the buckets of positions; dotted with documents cut short."""
    traces: list[dict[str, Any]] = []
    for number, (run, _, color, dash) in enumerate(runs):
        for row in run.evaluated:
            if row["task"] != LOSS_TASK:
                continue
            cut = [] if row["context"] is None else [("loss_of_context", f", cut after {row['context']:,}", "dot")]
            for name, suffix, style in [("loss", "", dash), *cut]:
                trace = {
                    "type": "scatter",
                    "x": [bucket["stop"] for bucket in row["buckets"]],
                    "y": [bucket[name] for bucket in row["buckets"]],
                    "name": f"{run.name}, {row['source']}{suffix}",
                    "mode": "lines+markers",
                    "line": {"color": color, "dash": style, "width": 2},
                    "meta": {"run": number},
                    "hovertemplate": "%{y:.5~g} before %{x:,}<extra>%{fullData.name}</extra>",
                }
                traces.append(trace)
    ends = sorted({end for trace in traces for end in trace["x"]})
    layout = {
        "xaxis": _axis("end of the bucket of positions, tokens", **LOG_AXIS | {"tickvals": ends}),
        "yaxis": _axis("nats/token"),
        "showlegend": 1 < len(traces) <= MAX_RUNS_PER_HOVER_BOX,  # names say which line is of which source, and cut
        "legend": LEGEND_ABOVE,
    }
    return Chart("loss by position in the document", traces, layout)


def _heat_map(number: int, name: str, task: str, cells: list[Row]) -> Chart:
    lengths, depths, accuracies = grid_of(cells)
    trace = {
        "type": "heatmap",
        "x": [f"{length:,}" for length in lengths],
        "y": ["any" if depth is None else f"{depth:.2f}" for depth in depths],
        "z": accuracies,
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "accuracy"}, "tickformat": ".0%", "thickness": 12},
        "text": [["" if value is None else f"{100 * value:.0f}" for value in row] for row in accuracies],
        "texttemplate": "%{text}" if max(len(lengths), len(depths)) <= MAX_NUMBERS else "",
        "xgap": 1,
        "ygap": 1,
        "meta": {"run": number},
        "hovertemplate": "accuracy %{z:.1%} of %{x} tokens, depth %{y}<extra></extra>",
    }
    category = {"type": "category"}
    layout = {"xaxis": _axis("tokens", **category), "yaxis": _axis(DEPTH_LABEL, **category, autorange="reversed")}
    return Chart(f"{name}: {task}", [trace], layout)


def method_of(row: dict[str, Any]) -> str:
    """The method of an entry. Entries of a scaling are called "METHOD on N"."""
    return row["entry"].partition(" on ")[0]


def comparison_charts(comparison: Comparison, colors: dict[str, str]) -> list[Chart]:
    """Throughput, and the time of a step by part. `colors` are by method."""
    rows = [row for row in comparison.content["rows"] if "error" not in row]
    is_scaling = len({row["num_ranks"] for row in rows}) > 1
    throughput = _scaling_chart(rows, colors) if is_scaling else _throughput_chart(rows, colors)
    parts = _parts_chart({row["entry"]: [row["shares_pct"].get(part) for part in PARTS] for row in rows})
    return [chart for chart in (throughput, parts) if chart.traces]


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
    bars = _bars(
        [row["tokens_per_s"] for row in rows],
        [f"{row['entry']}<br>{row['grid']}" for row in rows],
        [colors[method_of(row)] for row in rows],
        error_x=_spread(rows),
        hovertemplate="%{x:,.0f} tokens/s<extra></extra>",
    )
    layout = {"xaxis": _axis("tokens/s, all ranks"), "yaxis": NAME_AXIS, "showlegend": False}
    title = "throughput: median, slowest and fastest step"
    return Chart(title, [bars] if rows else [], layout, num_bars=2 * len(rows))


def _scaling_chart(rows: list[dict[str, Any]], colors: dict[str, str]) -> Chart:
    """A line of throughput over the number of ranks for each method."""
    traces = []
    for method in dict.fromkeys(map(method_of, rows)):
        own = [row for row in rows if method_of(row) == method]
        trace = {
            "type": "scatter",
            "x": [row["num_ranks"] for row in own],
            "y": [row["tokens_per_s"] for row in own],
            "error_y": _spread(own),
            "name": method,
            "mode": "lines+markers",
            "line": {"color": colors[method]},
            "hovertemplate": "%{y:,.0f} tokens/s on %{x} ranks<extra>%{fullData.name}</extra>",
        }
        traces.append(trace)
    ranks = sorted({row["num_ranks"] for row in rows})
    layout = {
        "xaxis": _axis("ranks", type="log", tickvals=ranks, ticktext=[str(n) for n in ranks]),
        "yaxis": _axis("tokens/s, all ranks", type="log"),
        "legend": LEGEND_ABOVE,
    }
    return Chart("throughput over ranks", traces, layout)
