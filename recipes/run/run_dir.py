"""What runs left in their folders: settings, numbers over steps, results. What is broken is told, and the rest read.

Below `page`, which shows it. Imports nothing slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conf.schema import flatten

METRICS_FILE, SUMMARY_FILE, CONFIG_FILE = "metrics.jsonl", "summary.json", "config.yaml"
LOGS_DIR, STALL_FILE = "logs", "stall.txt"
PREEMPTED_FILE = "preempted"  # there once a checkpoint is saved because of a signal: what scripts/slurm.sbatch asks
COMPARISON_FILE, RESULTS_FILE, SWEEP_FILE = "comparison.json", "results.jsonl", "sweep.json"
FILES = (METRICS_FILE, SUMMARY_FILE, CONFIG_FILE, COMPARISON_FILE, RESULTS_FILE)  # a folder with one of them is a run's

# what runs of one experiment may differ in without being different
NOT_COMPARED = (
    "checkpoint.",
    "compare.",
    "launch.",
    "logging.",
    "sweep.",
    "breakdown",
    "explain",
    "memory_snapshot",
    "profile",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run, or one of forward passes.

    Args:
        name: unique among those read together.
        settings: by dotted name, such as optimizer.lr; empty if they cannot be read.
        rows: a logged step each, in order; None where a number was not finite.
        summary: of the run as a whole, such as the parts of a step's time.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    rows: list[Row]
    summary: dict[str, float | None]

    def column(self, name: str) -> list[float | None]:
        """The numbers of this name, one for each row; None where it was not logged."""
        return [row.get(name) for row in self.rows]


@dataclass(frozen=True)
class Comparison:
    """A run of recipe=compare: `content` is its comparison.json."""

    name: str
    folder: Path
    content: dict[str, Any]


@dataclass(frozen=True)
class LoadedRuns:
    """All that was read; `problems` are sentences that name the file or folder."""

    runs: list[Run] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    swept: set[str] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        return not self.comparisons and not any(run.rows for run in self.runs)

    @property
    def differing_settings(self) -> list[str]:
        """Names of settings that are not the same in all runs; unreadable runs do not count.

        Those that a sweep ranged over come first, else in the config's own order.
        """
        readable = [run.settings for run in self.runs if run.settings]
        names = dict.fromkeys(name for settings in readable for name in settings if not name.startswith(NOT_COMPARED))
        differing = [name for name in names if len({repr(settings.get(name)) for settings in readable}) > 1]
        return sorted(differing, key=lambda name: name not in self.swept)


def load_runs(given: Iterable[Path]) -> LoadedRuns:
    """Runs, comparisons and sweeps (folders of them) below the given folders."""
    found = LoadedRuns()
    folders: list[Path] = []
    for folder in given:
        below = list(run_folders(folder))
        if not folder.is_dir():
            found.problems.append(f"{folder} is no folder: give a run dir, such as outputs/DATE/TIME, or a sweep's")
        elif not below:
            found.problems.append(f"{folder} has no run in it: there is none of {', '.join(FILES)}")
        folders += below
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for sweep in dict.fromkeys(folder for run in folders for folder in (run, run.parent)):
        _read_sweep(sweep / SWEEP_FILE, found)
    common = Path(os.path.commonpath([folder.resolve().parent for folder in folders])) if folders else Path()
    for folder in folders:
        name = str(folder.resolve().relative_to(common))
        if (folder / COMPARISON_FILE).exists() or (folder / RESULTS_FILE).exists():
            _read_comparison(name, folder, found)
        else:
            _read_run(name, folder, found)
    return found


def run_folders(folder: Path) -> Iterator[Path]:
    """Folders of runs, `folder` itself or below it, in the order of their names, numbers by size."""
    if not folder.is_dir():
        return
    children = sorted(
        (child for child in folder.iterdir() if child.is_dir() and not _is_no_run(child.name)),
        key=lambda path: (not path.name.isdigit(), path.name.zfill(9)),
    )
    if _is_run(folder) and not any(_is_run(child) for child in children):  # a sweep may write files of such names
        yield folder
    else:
        for child in children:
            yield from run_folders(child)


def _is_no_run(name: str) -> bool:
    """What lies beside and in runs: first tries of trials that were run again, and wandb's files."""
    return ".interrupted-" in name or name == "wandb"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _read_sweep(path: Path, found: LoadedRuns) -> None:
    """What a sweep ranged over, and which of its trials failed."""
    if not path.exists():
        return
    content = _read_json(path, found.problems)
    found.swept.update(content.get("space", {}))
    for trial in content.get("trials", []):
        if trial.get("state") == "failed":
            found.problems.append(f"{path.parent}: trial {trial.get('trial')} failed: {trial.get('error')}")


def _read_run(name: str, folder: Path, found: LoadedRuns) -> None:
    settings = flatten(_read_settings(folder / CONFIG_FILE, found.problems))
    summary = _read_json(folder / SUMMARY_FILE, found.problems) if (folder / SUMMARY_FILE).exists() else {}
    rows = _read_rows(folder / METRICS_FILE, found.problems)
    found.runs.append(Run(name, folder, settings, rows, summary))


def _read_comparison(name: str, folder: Path, found: LoadedRuns) -> None:
    path = folder / COMPARISON_FILE
    if not path.exists():
        found.problems.append(f"{path} is not there: the comparison has not ended; the same command goes on with it")
        return
    content = _read_json(path, found.problems)
    missing = [key for key in ("recipe", "model", "baseline", "notes", "rows") if key not in content]
    if not content:
        return
    if missing:
        found.problems.append(f"{path} has no {', '.join(missing)}: left out")
        return
    found.comparisons.append(Comparison(name, folder, content))


def _read_rows(path: Path, problems: list[str]) -> list[Row]:
    """The lines of a metrics file by their steps; of a step that was logged twice, the later."""
    if not path.exists():
        problems.append(f"{path} is not there: no step was logged")
        return []
    rows: dict[int, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            problems.append(f"{path}: line {number} is cut off or no log of a step: left out")
            continue
        rows[row["step"]] = {key: value for key, value in row.items() if isinstance(value, int | float | None)}
    if not rows:
        problems.append(f"{path} has no logged step yet")
    return [rows[step] for step in sorted(rows)]


def _read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_bytes(), yaml.CSafeLoader)
    except FileNotFoundError:
        problems.append(f"{path} is not there: the run's settings are not shown")
        return {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problems.append(f"{path} is no YAML{where}: the run's settings are not shown")
        return {}
    if not isinstance(settings, dict):
        problems.append(f"{path} is no configuration: the run's settings are not shown")
        return {}
    return settings


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        problems.append(f"{path} is cut off or no JSON (line {error.lineno}): left out")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} is not what a run writes: left out")
        return {}
    return content
