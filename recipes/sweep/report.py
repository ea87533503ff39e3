"""What people see and keep of a sweep: the table, sweep.json and sweep.csv, the figure. From Optuna's study alone.

Below `sweep`, which runs the trials.
"""

from __future__ import annotations

import csv
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.trial import FrozenTrial, TrialState

from recipes.sweep.search_space import SearchSpace, shown

STATES = {TrialState.COMPLETE: "done", TrialState.FAIL: "failed", TrialState.RUNNING: "unfinished"}


def report(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> None:
    """Print the table and the best trial, and write all files."""
    rows = write_files(study, objective, space, folder)
    print("", *table(rows, objective), "", sep="\n")
    if rows[0]["state"] == "done":
        best = rows[0]
        print(
            f"best: trial {best['trial']}, {objective} {best[objective]:.6g}; its run: {best['run_dir']}",
            f"again, alone:  {best['command']}",
            sep="\n",
        )
        for path in draw(study, objective, space, folder):
            print(f"figure:        {path}")
    print(f"all numbers:   {folder / 'sweep.json'}, {folder / 'sweep.csv'}", flush=True)


def write_files(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> list[dict[str, Any]]:
    """The rows to sweep.json and sweep.csv, whole or not at all; gives them back."""
    rows = summarize(study, objective, space, folder)
    whole = {"objective": objective, "direction": study.direction.name.lower(), "space": space.texts, "trials": rows}
    new = folder / "sweep.new"
    new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    new.replace(folder / "sweep.json")
    flat = [{**row, **row["overrides"]} for row in rows]
    names = dict.fromkeys(name for row in flat for name in row if name not in ("overrides", "error_in_full"))
    with new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)
    new.replace(folder / "sweep.csv")
    return rows


def summarize(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> list[dict[str, Any]]:
    """A row for each trial that began, the best first, those without a result last."""

    def rank(trial: FrozenTrial) -> tuple[bool, float, int]:
        worth = 0.0 if trial.value is None else trial.value
        return (
            trial.state != TrialState.COMPLETE,
            -worth if study.direction == optuna.study.StudyDirection.MAXIMIZE else worth,
            trial.number,
        )

    rows = []
    for trial in sorted(study.get_trials(states=[*STATES]), key=rank):
        values = {name: trial.params[name] for name in space.swept if name in trial.params}
        rows.append(
            {
                "trial": trial.number + 1,
                "state": STATES[trial.state],
                "overrides": values,
                objective: trial.value,
                **{name: value for name, value in trial.user_attrs.items() if value == value and name != objective},
                "command": shlex.join(["python", "train.py", *_alone(space, values)]),
                **({"run_dir": str(run_dir)} if (run_dir := folder / str(trial.number + 1)).exists() else {}),
            }
        )
    return rows


def _alone(space: SearchSpace, values: dict[str, Any]) -> list[str]:
    """The overrides of a trial as a run of its own."""
    if len(values) < len(space.swept):  # interrupted before all were chosen
        return []
    return [override for override in space.overrides(values) if not override.lstrip("+").startswith("sweep.")]


def table(rows: list[dict[str, Any]], objective: str) -> list[str]:
    """The rows as lines of text."""
    swept = list(dict.fromkeys(name for row in rows for name in row["overrides"]))
    measured = list(dict.fromkeys([objective, "tokens_per_s"]))
    lines = [["trial", *swept, *measured, "time", "state"]]
    for row in rows:
        numbers = [f"{row[name]:,.6g}" if row.get(name) is not None else "-" for name in measured]
        if (speed := row.get("tokens_per_s")) is not None:
            numbers[measured.index("tokens_per_s")] = f"{speed:,.0f}"
        took = f"{row['duration_s']:.0f} s" if "duration_s" in row else "-"
        state = f"{row['state']}: {row['error']}" if "error" in row else row["state"]
        lines.append([str(row["trial"]), *(shown(row["overrides"].get(n, "-")) for n in swept), *numbers, took, state])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def draw(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> list[Path]:
    """Optuna's parallel coordinates: a line per trial that ended well, through its settings, coloured by its worth."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Attempting to set identical")  # all trials have one value of a field
        axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=objective)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(7 + 2 * len(space.swept), 5)
    dark_is_best = {"minimize": "viridis", "maximize": "viridis_r"}[study.direction.name.lower()]
    axes.collections[0].set_cmap(dark_is_best)  # its own ends in white
    axes.set_title(f"{folder.name}: {objective}")
    paths = [folder / f"sweep.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return paths
