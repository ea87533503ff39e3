"""The table of a comparison, its figure and its wandb run, from its results alone. Needs no ranks."""

from __future__ import annotations

import collections
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb

from conf.schema import Config
from recipes.benchmark.rounds import ROOFLINE
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.reporter import start_wandb, wandb_hints
from recipes.run.run_dir import COMPARISON_FILE, Row, replace_file
from recipes.run.text_table import text_table

CPU_WARNING = "ON THE CPU ranks share cores and memory: these ratios say nothing about GPUs or about the paper's result"
LEGEND = """TPS: tokens per second of all ranks. TPOT: step time / sequence length, as in the paper; compare it at equal
batches only. micro: sequences per micro-batch. exposed: communication time that no compute hides. Where ranks share
sequences, it is how much longer a step takes than one whose messages stay on their rank. Otherwise, and in the
breakdown's "exchange", it is the time when only communication runs, waiting for slower ranks included."""
ROOFLINE_LEGEND = f"""{ROOFLINE}: a layer's matrix products and attention, repeated on each rank by itself; no method
with these kernels is faster."""


def measurement_header(header: Row, number: int, total: int, num_rounds: int) -> str:
    """The start of the line of a measurement, the `number`th of `total`. `measurement_line` completes it."""
    phase = f"round {header['round']}/{num_rounds}" if header["round"] else "micro-batch trial"
    return f"measurement {number}/{total} | {phase} | {header['entry']}, micro-batch {header['micro_batch_size']} | "


def measurement_line(row: Row) -> str:
    """The result of a measurement."""
    if "error" in row:
        return f"FAILED: {row['error']}"
    mfu = "" if row["mfu_pct"] is None else f" | MFU {row['mfu_pct']:.1f}%"
    reason = row.get("transport_reason")
    transport = f" | transport {row['transport']}: {reason}" if reason else ""
    return (
        f"{row['tokens_per_s']:,.0f} tok/s | {row['tokens_per_s_per_rank']:,.0f} tok/s/rank | "
        f"TPOT {row['tpot_ms']:.4f} ms{mfu} | steps {', '.join(f'{s:.3f}' for s in row['step_times_s'])} s{transport}"
    )


def summarize(results: list[Row], entries: list[str], baseline: str) -> list[Row]:
    """A row for each measured entry: medians over the steps of all rounds, and their spread. Failed ones have `error`.

    `change_pct` is relative to `baseline`, and None if that has no throughput.
    """
    rows = [row for name in entries if (row := _summary(name, [row for row in results if row["entry"] == name]))]
    speeds = {row["entry"]: row["tokens_per_s"] for row in _measured(rows)}
    for row in _measured(rows):
        for field, reference, offset in (("change_pct", baseline, 100), ("roofline_pct", ROOFLINE, 0)):
            ratio = row["tokens_per_s"] / speeds[reference] if reference in speeds else None
            row[field] = ratio and 100 * ratio - offset  # multiplied last: exactly 0 % from itself
    return rows


def _summary(entry: str, own: list[Row]) -> Row | None:
    rounds = [row for row in own if row["round"] and "step_times_s" in row]
    errors = [row["error"] for row in own if "error" in row]
    if not rounds:
        return {"entry": entry, "error": errors[-1]} if errors else None
    last = rounds[-1]
    size, tokens = last["micro_batch_size"], last["tokens_per_step"]
    rounds = [row for row in rounds if row["micro_batch_size"] == size]  # larger ones may have failed after some rounds
    speeds = sorted(tokens / seconds for row in rounds for seconds in row["step_times_s"])
    tokens_per_s = statistics.median(speeds)
    speedup = tokens_per_s / last["tokens_per_s"]  # over the last round, whose FLOP rates are known
    parts = next((row["parts"] for row in reversed(own) if "parts" in row and row["micro_batch_size"] == size), {})
    grid = " x ".join(f"{degree} {name}" for name, degree in last["degrees"].items() if degree > 1)
    return {
        "entry": entry,
        "grid": grid or ("1 rank" if last["degrees"] else "each rank alone"),
        **{name: last[name] for name in ("num_ranks", "micro_batch_size", "sequences_per_step", "sequence_length")},
        **{name: last[name] for name in ("kernel", "device")},
        "transport": last.get("transport"),  # the roofline has none
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_min": speeds[0],
        "tokens_per_s_max": speeds[-1],
        "tokens_per_s_per_rank": tokens_per_s / last["num_ranks"],
        "tpot_ms": 1e3 * tokens / tokens_per_s / last["sequence_length"],
        "model_tflops_per_rank": last["model_tflops_per_rank"] * speedup,
        "mfu_pct": last["mfu_pct"] and last["mfu_pct"] * speedup,
        "peak_memory_gib": last["peak_memory_gib"] and max(row["peak_memory_gib"] for row in rounds),
        "exposed_communication_ms": parts.get("parts/exposed_communication_ms"),
        "step_time_ms": 1e3 * tokens / tokens_per_s,
        "shares_pct": {part: parts[f"parts/{part}_pct"] for part in PARTS if f"parts/{part}_pct" in parts},
        "first_loss": last["losses"][0],
        "num_steps": len(speeds),
        "tried": {row["micro_batch_size"]: row.get("tokens_per_s") for row in own if not row["round"]},
        "errors": errors,
    }


def table(rows: list[Row], baseline: str) -> list[str]:
    """The rows as lines of text, below a line of what all have in common, without columns that have no value."""
    columns = {
        "grid": "{grid}",
        "L": "{sequence_length:,}",
        "batch": "{sequences_per_step}",
        "micro": "{micro_batch_size}",
        "TPS, median (min - max)": "{tokens_per_s:,.0f} ({tokens_per_s_min:,.0f} - {tokens_per_s_max:,.0f})",
        "TPS/rank": "{tokens_per_s_per_rank:,.0f}",
        "TPOT ms": "{tpot_ms:.4f}",
        f"vs {baseline}": "{change_pct:+.1f} %",
        "of roofline": "{roofline_pct:.1f} %",
        "TFLOP/s/rank": "{model_tflops_per_rank:.3g}",
        "MFU": "{mfu_pct:.1f} %",
        "peak GiB": "{peak_memory_gib:.1f}",
        "exposed ms": "{exposed_communication_ms:.2f}",
        "of step ms": "{step_time_ms:.1f}",
        "loss": "{first_loss:.4f}",
        "kernel": "{kernel}",
        "transport": "{transport:s}",
    }

    def cell(form: str, row: Row) -> str:
        try:
            return form.format_map(row)
        except TypeError:  # the value is None
            return "n/a"

    cells = {name: [cell(form, row) for row in _measured(rows)] for name, form in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {"n/a"}}
    can_be_common = [name for name in ("L", "batch", "kernel", "transport") if name in cells]
    common = [f"{name} {cells.pop(name)[0]}" for name in can_be_common if len(set(cells[name])) == 1]
    measured = iter(zip(*cells.values(), strict=True))
    body = [[f"FAILED: {_cause(row['error'])}"] if "error" in row else next(measured) for row in rows]
    lines = [[row["entry"], *own] for row, own in zip(rows, body, strict=True)]
    return ([", ".join(common)] if common else []) + text_table([["method", *cells], *lines])


def agreement(rows: list[Row]) -> str | None:
    """How much the first losses differ between rows of equal length and batch, which compute the same."""
    losses = collections.defaultdict(list)
    for row in rows:
        if row.get("first_loss") is not None:
            losses[row["sequence_length"], row["sequences_per_step"]].append(row["first_loss"])
    differences = [100 * (max(alike) / min(alike) - 1) for alike in losses.values() if len(alike) > 1]
    return f"the first losses on equal batches differ by {max(differences):.2g} % at most" if differences else None


def shares_table(rows: list[Row]) -> list[str]:
    """The time breakdown of a step, for the rows that have one."""
    profiled = [row for row in rows if row.get("shares_pct")]
    lines = [[row["entry"], *(f"{row['shares_pct'][part]:.1f}" for part in PARTS)] for row in profiled]
    return text_table([["time of a step, %", *PARTS], *lines]) if lines else []


def _cause(error: str) -> str:
    """One line of a RunFailed: the rank, and the last line of its traceback, before the one that names its log."""
    first, *more = error.splitlines()
    return f"{first} {more[-2]}" if first.endswith(":") and len(more) > 1 else first


def report(config: Config, entries: dict[str, Config], notes: list[str], results: list[Row], run_dir: Path) -> None:
    """Print the table, write RUN_DIR/comparison.{json,png,svg}, and log to wandb."""
    baseline = config.compare.baseline if config.compare.baseline in entries else next(iter(entries))
    rows = summarize(results, [*entries], baseline)
    on_cpu = any(CPU_WARNING in note for note in notes)
    _print_tables(rows, baseline, on_cpu)
    content = {
        "recipe": config.compare.recipe,
        "model": next(iter(entries.values())).model.name,
        "baseline": baseline,
        "notes": notes,
        "rows": rows,
        "configs": {name: asdict(entry) for name, entry in entries.items()},
        "measurements": results,
    }
    path = run_dir / COMPARISON_FILE
    replace_file(path, json.dumps(content, indent=1) + "\n")
    lengths = ", ".join(f"{length:,}" for length in sorted({row["sequence_length"] for row in _measured(rows)}))
    title = f"{content['model']}, {config.compare.recipe}, L = {lengths}" + (f"\n{CPU_WARNING}" if on_cpu else "")
    figures = draw(rows, title, run_dir)
    print(f"all numbers: {path}", *(f"figure:      {figure}" for figure in figures), sep="\n", flush=True)
    _log_to_wandb(config, content["configs"], rows, figures[0], run_dir)


def _log_to_wandb(config: Config, configs: dict[str, Any], rows: list[Row], figure: Path, run_dir: Path) -> None:
    run = start_wandb(config.logging, run_dir, configs, print)
    columns = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict | list))
    rows_table = wandb.Table([*columns], [[row.get(name) for name in columns] for row in rows])
    named = {f"{row['entry']}/{name}": value for row in rows for name, value in row.items()}
    numbers = {name: value for name, value in named.items() if isinstance(value, int | float)}
    run.log({"comparison": rows_table, "figure": wandb.Image(str(figure)), **numbers})
    print(*wandb_hints(run), sep="\n", flush=True)
    run.finish()


def _print_tables(rows: list[Row], baseline: str, on_cpu: bool) -> None:
    lines, shares = ["", *table(rows, baseline)], shares_table(rows)
    lines += ["", *shares] if shares else []
    for row in _measured(rows):
        if row["errors"]:
            lines.append(f"{row['entry']}: some measurements failed, the last with: {_cause(row['errors'][-1])}")
    lines += ["", *filter(None, [agreement(rows)]), LEGEND]
    lines += [ROOFLINE_LEGEND] if any(row["entry"] == ROOFLINE for row in rows) else []
    lines += [f"!!! {CPU_WARNING}"] if on_cpu else []
    print(*lines, sep="\n", flush=True)


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def draw(rows: list[Row], title: str, run_dir: Path) -> list[Path]:
    """The throughput, with its spread, as bars or over the number of ranks if that differs; the figure's paths."""
    from matplotlib.figure import Figure  # takes a second

    rows = _measured(rows)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    throughput = "tokens/s, all ranks: median, smallest and largest step"
    if len({row["num_ranks"] for row in rows}) > 1:
        _draw_scaling(axes, rows)
        axes.set(xlabel="ranks", ylabel=throughput)
    else:
        speeds = [row["tokens_per_s"] for row in rows]
        axes.barh([f"{row['entry']}\n{row['grid']}" for row in rows], speeds, xerr=_spread(rows), capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel=throughput)
    axes.set_title(title, wrap=True)
    paths = [run_dir / f"comparison.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw_scaling(axes: Any, rows: list[Row]) -> None:
    """A line per method, and the ideal: the FLOP rate, as sequences may grow, per rank of the entry of fewest ranks."""
    series = collections.defaultdict(list)
    for row in rows:
        series[row["entry"].partition(" on ")[0]].append(row)
    for name, own in series.items():
        ranks, speeds = [row["num_ranks"] for row in own], [row["tokens_per_s"] for row in own]
        axes.errorbar(ranks, speeds, _spread(own), marker="o", capsize=3, label=name)
    rows = sorted(rows, key=lambda row: row["num_ranks"])
    tflops, label = rows[0]["model_tflops_per_rank"], f"ideal: operations/s per rank of {rows[0]['entry']}"
    ideal = {row["num_ranks"]: row["tokens_per_s"] * tflops / row["model_tflops_per_rank"] for row in rows}
    axes.plot([*ideal], [*ideal.values()], linestyle="--", color="gray", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([*ideal], [*map(str, ideal)])
    axes.legend()


def _spread(rows: list[Row]) -> list[list[float]]:
    """Distances from the median to the slowest and to the fastest step, as matplotlib wants error bars."""
    return [
        [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows],
        [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows],
    ]
