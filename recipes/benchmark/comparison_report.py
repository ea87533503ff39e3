"""The table of a comparison, its figure and its wandb run, from the results of its turns. Needs no ranks."""

from __future__ import annotations

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
from recipes.run.run_dir import COMPARISON_FILE

CPU_WARNING = (
    "ON THE CPU, where ranks share cores and memory: these ratios say nothing of GPUs, nor of the paper's result."
)

PARTS_NOTE = (
    f"{ROOFLINE}: a layer's matrix products and attention on each rank by itself, over and over; of parts: the\n"
    "share of that speed, which no method with these kernels exceeds."
)

LOGGED = ("tokens_per_s", "tokens_per_s_per_rank", "tpot_ms", "change_pct", "mfu_pct", "peak_memory_gib")


def measurement_header(turn: dict[str, Any], number: int, num_turns: int, num_rounds: int) -> str:
    """What is said when a turn begins, without a new line: `measurement_line` follows.

    Args:
        number: of the turn, from 1, of so many as there are if none fails.
    """
    where = f"round {turn['round']}/{num_rounds}" if turn["round"] else "trying"
    return f"turn {number}/{num_turns} | {where} | {turn['entry']}, micro-batch {turn['micro_batch_size']} | "


def measurement_line(row: dict[str, Any]) -> str:
    """What became of a turn."""
    if "error" in row:
        return f"FAILED: {row['error']}"
    mfu = "" if row["mfu_pct"] is None else f" | MFU {row['mfu_pct']:.1f}%"
    return (
        f"{row['tokens_per_s']:,.0f} tok/s | {row['tokens_per_s_per_rank']:,.0f} tok/s/rank | "
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
        size = last["micro_batch_size"]  # others may have failed after some rounds
        rounds = [row for row in rounds if row["micro_batch_size"] == size]
        tokens = last["tokens_per_step"]
        speeds = sorted(tokens / seconds for row in rounds for seconds in row["step_times_s"])
        tokens_per_s = statistics.median(speeds)
        faster = tokens_per_s / last["tokens_per_s"]  # than the last round, whose operations per second are known
        parts = next((row["parts"] for row in reversed(own) if "parts" in row and row["micro_batch_size"] == size), {})
        rows.append(
            {
                "entry": entry,
                "grid": " x ".join(f"{n} {name}" for name, n in last["degrees"].items() if n > 1)
                or ("each rank alone" if entry == ROOFLINE else "1 rank"),
                "num_ranks": last["num_ranks"],
                "micro_batch_size": size,
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
                "kernel": last["kernel"],
                "device": last["device"],
                "tried": {row["micro_batch_size"]: row.get("tokens_per_s") for row in own if not row["round"]},
                "errors": errors,
            }
        )
    base = next((row["tokens_per_s"] for row in rows if row["entry"] == baseline and "error" not in row), None)
    alone = next((row["tokens_per_s"] for row in rows if row["entry"] == ROOFLINE and "error" not in row), None)
    for row in rows:
        if "error" not in row:
            row["change_pct"] = None if base is None else 100 * (row["tokens_per_s"] / base - 1)
            row["of_parts_pct"] = None if alone is None else 100 * row["tokens_per_s"] / alone
    return rows


def table(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    """The rows as lines of text, under a line of what all have in common; columns that nobody has are left out."""
    measured = [row for row in rows if "error" not in row]
    columns: list[tuple[str, list[str]]] = [
        ("grid", [row["grid"] for row in measured]),
        ("L", [f"{row['sequence_length']:,}" for row in measured]),
        ("batch", [str(row["sequences_per_step"]) for row in measured]),
        ("micro", [str(row["micro_batch_size"]) for row in measured]),
        (
            "TPS, median (min - max)",
            [
                f"{row['tokens_per_s']:,.0f} ({row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f})"
                for row in measured
            ],
        ),
        ("TPS/rank", [f"{row['tokens_per_s_per_rank']:,.0f}" for row in measured]),
        ("TPOT ms", [f"{row['tpot_ms']:.4f}" for row in measured]),
        (f"vs {baseline}", [_or_na(row["change_pct"], "{:+.1f} %") for row in measured]),
        ("of parts", [_or_na(row["of_parts_pct"], "{:.1f} %") for row in measured]),
        ("TFLOP/s/rank", [f"{row['model_tflops_per_rank']:.3g}" for row in measured]),
        ("MFU", [_or_na(row["mfu_pct"], "{:.1f} %") for row in measured]),
        ("peak GiB", [_or_na(row["peak_memory_gib"], "{:.1f}") for row in measured]),
        ("exposed ms", [_or_na(row["exposed_communication_ms"], "{:.2f}") for row in measured]),
        ("of step ms", [f"{row['step_time_ms']:.1f}" for row in measured]),
        ("loss", [_or_na(row["first_loss"], "{:.4f}") for row in measured]),
    ]
    alike = [column for column in columns if column[0] in ("L", "batch") and len(set(column[1])) == 1]
    shown = [column for column in columns if set(column[1]) != {"n/a"} and column not in alike]
    common = [f"{name} {cells[0]}" for name, cells in alike]
    lines = [["method", *(name for name, _ in shown)]]
    cells_of = iter(zip(*(cells for _, cells in shown), strict=True))
    for row in rows:
        failed = [f"FAILED: {_cause(row['error'])}"] if "error" in row else None
        lines.append([row["entry"], *(failed or next(cells_of))])
    widths = [max(len(line[n]) for line in lines if len(line) == len(lines[0])) for n in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    return ([", ".join(common)] if common else []) + text


def agreement(rows: list[dict[str, Any]]) -> str | None:
    """How far the first losses of rows with equal length and batch are apart, which compute the same; None of one."""
    losses: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row.get("first_loss") is not None:
            losses.setdefault((row["sequence_length"], row["sequences_per_step"]), []).append(row["first_loss"])
    apart = [max(alike) / min(alike) - 1 for alike in losses.values() if len(alike) > 1]
    return f"the first losses on equal batches differ by {100 * max(apart):.2g} % at most" if apart else None


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
    print("", *table(rows, baseline), sep="\n")
    if shares := shares_table(rows):
        print("", *shares, sep="\n")
    for row in rows:
        if row.get("errors") and "error" not in row:
            print(f"{row['entry']}: some turns failed, the last with: {_cause(row['errors'][-1])}")
    kernels = {
        row["kernel"]: [other["entry"] for other in rows if other.get("kernel") == row["kernel"]]
        for row in rows
        if "kernel" in row
    }
    on_cpu = any(CPU_WARNING in note for note in notes)
    print(
        "",
        *([line] if (line := agreement(rows)) else []),
        "TPS: tokens per second of all ranks. TPOT: step time / sequence length, as the paper has it, to be compared",
        "at one batch only. micro: sequences per micro-batch. exposed: communication that nothing hides; where ranks",
        "share sequences, what a step takes longer than one whose messages stay on their rank, else, and as exchange",
        "in the parts, when communication runs and nothing else does, on the rank where that is longest: waiting for",
        "slower ranks counts.",
        *([PARTS_NOTE] if any(row["entry"] == ROOFLINE for row in rows) else []),
        *(f"block kernel {block}: {', '.join(names)}" for block, names in kernels.items()),
        *([f"!!! {CPU_WARNING}"] if on_cpu else []),
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
    path = run_dir / COMPARISON_FILE
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"all numbers: {path}", flush=True)
    lengths = {row["sequence_length"] for row in rows if "error" not in row}
    ends = dict.fromkeys((min(lengths), max(lengths))) if lengths else ()
    title = f"{first.model.name}, {config.compare.recipe}, L = {' to '.join(f'{length:,}' for length in ends)}"
    figures = draw(config, rows, f"{title}\n{CPU_WARNING}" if on_cpu else title, run_dir)
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
    print(*wandb_hints(run), sep="\n", flush=True)
    run.finish()


def draw(config: Config, rows: list[dict[str, Any]], title: str, run_dir: Path) -> list[Path]:
    """Throughput as bars with their spread; or over the number of ranks, beside the first entry's speed per rank.

    That speed is in operations: where sequences grow with the ranks, so do the operations of a token.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "error" not in row]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    speeds = [row["tokens_per_s"] for row in rows]
    spread = [
        [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows],
        [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows],
    ]
    if config.compare.plot == "scaling" and rows:
        series: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            series.setdefault(row["entry"].partition(" on ")[0], []).append(index)
        for name, own in series.items():
            errors = [[side[index] for index in own] for side in spread]
            axes.errorbar(
                [rows[n]["num_ranks"] for n in own], [speeds[n] for n in own], errors, marker="o", capsize=3, label=name
            )
        least = min(rows, key=lambda row: row["num_ranks"])
        ideal = {
            row["num_ranks"]: row["tokens_per_s"] * least["model_tflops_per_rank"] / row["model_tflops_per_rank"]
            for row in rows
        }
        ranks = sorted(ideal)
        label = f"{least['entry']}: its operations/s on each rank"
        axes.plot(ranks, [ideal[n] for n in ranks], linestyle="--", color="gray", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="ranks", ylabel="tokens/s, all ranks: median, smallest and largest step")
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.legend()
    else:
        axes.barh([f"{row['entry']}\n{row['grid']}" for row in rows], speeds, xerr=spread, capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel="tokens/s, all ranks: median, smallest and largest step")
    axes.set_title(title, wrap=True)
    paths = [run_dir / f"comparison.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths
