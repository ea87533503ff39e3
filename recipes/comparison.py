"""The table of a comparison, its figure and its wandb run, from the results of its turns. Needs no ranks."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb

from conf.schema import Config
from recipes.metrics import PARTS
from recipes.report import how_to_look_at_wandb, start_wandb

CPU_WARNING = [
    "!!! ON THE CPU: sizes are cut until a laptop runs them, and ranks share its cores and memory.",
    "!!! What follows shows that the command works. Its ratios say nothing of GPUs, nor of the paper's result.",
]

LOGGED = ("tokens_per_s", "tokens_per_s_per_rank", "tpot_ms", "change_pct", "mfu_pct", "peak_memory_gib")


def turn_line(row: dict[str, Any], num_rounds: int) -> str:
    """One turn, for people."""
    where = f"round {row['round']}/{num_rounds}" if row["round"] else "trying"
    head = f"{where} | {row['entry']}, micro-batch {row['micro_batch_size']}"
    if "error" in row:
        return f"{head} | FAILED: {row['error']}"
    mfu = "" if row["mfu_pct"] is None else f" | MFU {row['mfu_pct']:.1f}%"
    return (
        f"{head} | {row['tokens_per_s']:,.0f} tok/s | {row['tokens_per_s_per_rank']:,.0f} tok/s/rank | "
        f"TPOT {row['tpot_ms']:.4f} ms{mfu} | steps {', '.join(f'{s:.3f}' for s in row['step_times_s'])} s"
    )


def summarize(results: list[dict[str, Any]], entries: list[str], baseline: str) -> list[dict[str, Any]]:
    """A row for each entry that had a turn: medians over all steps of all rounds, and their spread.

    Args:
        baseline: the entry that `change_pct` is against; None there if it has no throughput.
    """
    rows = []
    for entry in entries:
        own = [row for row in results if row["entry"] == entry]
        rounds = [row for row in own if row["round"] and "step_times_s" in row]
        errors = [row["error"] for row in own if "error" in row]
        if not rounds:
            if errors:
                rows.append({"entry": entry, "error": errors[-1]})
            continue
        last = rounds[-1]
        rounds = [
            row for row in rounds if row["micro_batch_size"] == last["micro_batch_size"]
        ]  # a size may have failed
        tokens = last["tokens_per_step"]
        speeds = sorted(tokens / seconds for row in rounds for seconds in row["step_times_s"])
        tokens_per_s = statistics.median(speeds)
        faster = tokens_per_s / last["tokens_per_s"]  # than the last round, whose operations per second are known
        parts = next((row["parts"] for row in reversed(own) if "parts" in row), {})
        rows.append(
            {
                "entry": entry,
                "grid": " x ".join(f"{n} {name}" for name, n in last["degrees"].items() if n > 1) or "1 rank",
                "num_ranks": last["num_ranks"],
                "micro_batch_size": last["micro_batch_size"],
                "sequences_per_step": last["sequences_per_step"],
                "sequence_length": last["sequence_length"],
                "tokens_per_s": tokens_per_s,
                "tokens_per_s_min": speeds[0],
                "tokens_per_s_max": speeds[-1],
                "tokens_per_s_per_rank": tokens_per_s / last["num_ranks"],
                "tpot_ms": 1e3 * tokens / tokens_per_s / last["sequence_length"],
                "model_tflops_per_rank": last["model_tflops_per_rank"] * faster,
                "mfu_pct": last["mfu_pct"] and last["mfu_pct"] * faster,
                "peak_memory_gib": last["peak_memory_gib"] and max(row["peak_memory_gib"] for row in rounds),
                "exposed_communication_ms": parts.get("parts/exposed_communication_ms"),
                "step_time_ms": 1e3 * tokens / tokens_per_s,
                "shares_pct": {part: parts[f"parts/{part}_pct"] for part in PARTS if f"parts/{part}_pct" in parts},
                "first_loss": last["losses"][0],
                "num_steps": len(speeds),
                "block": last["block"],
                "device": last["device"],
                "tried": {row["micro_batch_size"]: row.get("tokens_per_s") for row in own if not row["round"]},
                "errors": errors,
            }
        )
    base = next((row["tokens_per_s"] for row in rows if row["entry"] == baseline and "error" not in row), None)
    for row in rows:
        if "error" not in row:
            row["change_pct"] = None if base is None else 100 * (row["tokens_per_s"] / base - 1)
    return rows


def table(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    """The rows as lines of text."""
    header = ["method", "grid", "micro", "TPS, median (min - max)", "TPS/rank", "TPOT ms", f"vs {baseline}"]
    header += ["TFLOP/s/rank", "MFU", "peak GiB", "exposed ms", "of step ms", "loss"]
    cells = [header]
    for row in rows:
        if "error" in row:
            cells.append([row["entry"], f"FAILED: {_cause(row['error'])}"])
            continue
        cells.append(
            [
                row["entry"],
                row["grid"],
                str(row["micro_batch_size"]),
                f"{row['tokens_per_s']:,.0f} ({row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f})",
                f"{row['tokens_per_s_per_rank']:,.0f}",
                f"{row['tpot_ms']:.4f}",
                _or_na(row["change_pct"], "{:+.1f} %"),
                f"{row['model_tflops_per_rank']:.3g}",
                _or_na(row["mfu_pct"], "{:.1f} %"),
                _or_na(row["peak_memory_gib"], "{:.1f}"),
                _or_na(row["exposed_communication_ms"], "{:.2f}"),
                f"{row['step_time_ms']:.1f}",
                _or_na(row["first_loss"], "{:.4f}"),
            ]
        )
    widths = [max(len(line[n]) for line in cells if len(line) == len(header)) for n in range(len(header))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip() for line in cells]


def _cause(error: str) -> str:
    """One line of what RunFailed says: which rank, and the last line of its error, which is before that of the log."""
    first, *more = error.splitlines()
    return f"{first} {more[-2]}" if first.endswith(":") and len(more) > 1 else first


def _or_na(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def shares_table(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time of a step goes, by method; those that were not measured are left out."""
    lines = [f"{'time of a step, %':<20}" + "".join(f"{part:>11}" for part in PARTS)]
    for row in rows:
        if row.get("shares_pct"):
            lines.append(f"{row['entry']:<20}" + "".join(f"{row['shares_pct'][part]:>11.1f}" for part in PARTS))
    return lines if len(lines) > 1 else []


def report(
    config: Config, entries: dict[str, Config], notes: list[str], results: list[dict[str, Any]], run_dir: Path
) -> None:
    """Print the table, write RUN_DIR/comparison.{json,png,svg}, log to wandb."""
    baseline = config.compare.baseline if config.compare.baseline in entries else next(iter(entries))
    rows = summarize(results, list(entries), baseline)
    print("", *table(rows, baseline), "", *shares_table(rows), sep="\n")
    for row in rows:
        if row.get("errors") and "error" not in row:
            print(f"{row['entry']}: some turns failed, the last with: {_cause(row['errors'][-1])}")
    kernels = {
        row["block"]: [other["entry"] for other in rows if other.get("block") == row["block"]]
        for row in rows
        if "block" in row
    }
    print(
        "",
        "TPS: tokens per second of all ranks; TPOT: step time / sequence length, as the paper has it; micro: sequences",
        "per micro-batch; exposed: where ranks share sequences, what a step takes longer than one in which attention's",
        "messages move nothing, else, as exchange above, the time when communication runs and nothing else does",
        *(f"block kernel {block}: {', '.join(names)}" for block, names in kernels.items()),
        sep="\n",
        flush=True,
    )
    first = next(iter(entries.values()))
    whole = {
        "recipe": config.compare.recipe,
        "model": first.model.name,
        "baseline": baseline,
        "notes": notes,
        "rows": rows,
        "configs": {name: asdict(entry) for name, entry in entries.items()},
        "turns": results,
    }
    path = run_dir / "comparison.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"all numbers: {path}", flush=True)
    figures = draw(config, rows, f"{first.model.name}, {config.compare.recipe}", notes, run_dir)
    print(*(f"figure:      {figure}" for figure in figures), sep="\n", flush=True)
    run = start_wandb(config.logging, run_dir, whole["configs"], lambda line: print(line, flush=True))
    scalar = (str, int, float, type(None))
    shown = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, scalar))
    run.log(
        {
            "comparison": wandb.Table([*shown], [[row.get(name) for name in shown] for row in rows]),
            "figure": wandb.Image(str(figures[0])),
            **{f"{row['entry']}/{name}": row[name] for row in rows for name in LOGGED if row.get(name) is not None},
        }
    )
    print(*how_to_look_at_wandb(run), sep="\n", flush=True)
    run.finish()


def draw(config: Config, rows: list[dict[str, Any]], title: str, notes: list[str], run_dir: Path) -> list[Path]:
    """Throughput as bars with their spread, or over the number of ranks beside what perfect scaling would give."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "error" not in row]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if config.compare.plot == "scaling" and rows:
        series: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            series.setdefault(row["entry"].partition(" on ")[0], []).append(row)
        for name, points in series.items():
            ranks = [row["num_ranks"] for row in points]
            axes.plot(ranks, [row["tokens_per_s"] for row in points], marker="o", label=name)
        least = min(rows, key=lambda row: row["num_ranks"])
        ranks = sorted({row["num_ranks"] for row in rows})
        ideal = [least["tokens_per_s"] / least["num_ranks"] * n for n in ranks]
        axes.plot(ranks, ideal, linestyle="--", color="gray", label=f"{least['entry']}, times ranks")
        axes.set(xlabel="ranks", ylabel="tokens/s", xticks=ranks, ylim=(0, None))
        axes.legend()
    else:
        names = [f"{row['entry']}\n{row['grid']}" for row in rows]
        speeds = [row["tokens_per_s"] for row in rows]
        spread = [
            [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows],
            [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows],
        ]
        axes.barh(names, speeds, xerr=spread, capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel="tokens/s, all ranks: median, smallest and largest step")
    on_cpu = "\nON THE CPU, CUT TO FIT: says nothing of GPUs" if CPU_WARNING[0] in notes else ""
    axes.set_title(title + on_cpu)
    paths = [run_dir / f"comparison.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths
