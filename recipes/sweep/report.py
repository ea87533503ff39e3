"""The results of a sweep, from its Optuna study: a table, sweep.json, sweep.csv and a figure."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pandas
from optuna.study import StudyDirection
from optuna.trial import TrialState

from recipes.run.run_dir import SWEEP_FILE, replace_file
from recipes.run.text_table import text_table
from recipes.sweep.search_space import SearchSpace, format_value

STATES = {TrialState.COMPLETE: "done", TrialState.FAIL: "failed", TrialState.RUNNING: "unfinished"}


def report(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> None:
    """Print the table and the best trial, and write all files."""
    rows = write_files(study, objective, space, folder)
    print("", *table(rows, objective), "", sep="\n")
    best = rows[0]
    if best["state"] == "done":
        print(f"best: trial {best['trial']}, {objective} {best[objective]:.6g}; its run: {best['run_dir']}")
        print(f"run it again:  {best['command']}")
        for path in draw(study, objective, space, folder):
            print(f"figure:        {path}")
    print(f"all numbers:   {folder / SWEEP_FILE}, {folder / 'sweep.csv'}", flush=True)


def write_files(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> list[dict[str, Any]]:
    """Write sweep.json and sweep.csv, and return their rows, by trial: the best first, those without a result last."""
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    rows = []
    for trial in sorted(
        study.get_trials(states=[*STATES]),
        key=lambda trial: (trial.state != TrialState.COMPLETE, sign * (trial.value or 0), trial.number),
    ):
        values = {name: trial.params[name] for name in space.swept if name in trial.params}
        overrides = [text for text in space.overrides(values) if not text.lstrip("+").startswith("sweep.")]
        run_dir = folder / str(trial.number + 1)
        rows.append(
            {
                "trial": trial.number + 1,
                "state": STATES[trial.state],
                "overrides": values,
                objective: trial.value,
                **{name: value for name, value in trial.user_attrs.items() if value == value and name != objective},
                "command": shlex.join(["python", "train.py", *overrides]),
                **({"run_dir": str(run_dir)} if run_dir.exists() else {}),
            }
        )
    content = {"objective": objective, "direction": study.direction.name.lower(), "space": space.texts, "trials": rows}
    replace_file(folder / SWEEP_FILE, json.dumps(content, indent=1) + "\n")
    flat = pandas.DataFrame([{**row, **row["overrides"]} for row in rows])
    flat = flat.drop(columns=["overrides", "error_in_full"], errors="ignore")
    replace_file(folder / "sweep.csv", flat.to_csv(index=False))
    return rows


def table(rows: list[dict[str, Any]], objective: str) -> list[str]:
    """The rows as lines of text."""
    swept = dict.fromkeys(name for row in rows for name in row["overrides"])
    measured = {objective: ",.6g", "tokens_per_s": ",.0f"}
    lines = [["trial", *swept, *measured, "time", "state"]]
    for row in rows:
        values = [format_value(row["overrides"].get(name, "-")) for name in swept]
        numbers = [f"{row[name]:{spec}}" if row.get(name) is not None else "-" for name, spec in measured.items()]
        duration = f"{row['duration_s']:.0f} s" if "duration_s" in row else "-"
        state = f"{row['state']}: {row['error']}" if "error" in row else row["state"]
        lines.append([str(row["trial"]), *values, *numbers, duration, state])
    return text_table(lines)


def draw(study: optuna.Study, objective: str, space: SearchSpace, folder: Path) -> list[Path]:
    """Optuna's parallel-coordinate plot: a line per successful trial through its settings, colored by its objective."""
    matplotlib.use("Agg")
    with warnings.catch_warnings(action="ignore"):  # experimental; all trials may have the same value of a field
        axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=objective)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(7 + 2 * len(space.swept), 5)
    dark_is_best = "viridis_r" if study.direction == StudyDirection.MAXIMIZE else "viridis"
    axes.collections[0].set_cmap(dark_is_best)  # Optuna's own colors end in white
    axes.set_title(f"{folder.name}: {objective}")
    paths = [folder / f"sweep.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return paths
