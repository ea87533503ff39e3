"""What runs write to their folders: names of files, and reading them back. Broken files are reported and skipped."""

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
PREEMPTED_FILE = "preempted"  # exists once a checkpoint is saved because of a signal; scripts/slurm.sbatch looks for it
COMPARISON_FILE, RESULTS_FILE, SWEEP_FILE = "comparison.json", "results.jsonl", "sweep.json"
EVALUATION_FILE = "evaluation.json"
FILES = (
    METRICS_FILE,
    SUMMARY_FILE,
    CONFIG_FILE,
    COMPARISON_FILE,
    RESULTS_FILE,
    EVALUATION_FILE,
)  # a run dir has at least one of them

# prefixes of settings that do not change what a run computes, nor how
BOOKKEEPING = (
    *("calibrate.", "checkpoint.", "compare.", "generate.", "logging.", "max_length.", "plan.", "sweep."),
    *("breakdown", "cluster", "explain", "memory_snapshot", "profile"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of recipe=pretrain, forward or evaluate."""

    name: str  # unique among the runs that were loaded together
    folder: Path
    settings: dict[str, Any]  # by dotted name, such as optimizer.lr; empty if they cannot be read
    rows: list[Row]  # one per logged step, in order; None where a number was not finite
    summary: dict[str, float | None]  # metrics of the whole run, such as the parts of a step's time
    evaluated: list[Row] = field(default_factory=list)  # the cells of an evaluation, as in evaluation.json

    def column(self, name: str) -> list[float | None]:
        """One value per row, None where the metric was not logged."""
        return [row.get(name) for row in self.rows]


@dataclass(frozen=True)
class Comparison:
    """A run of recipe=compare. `content` is its comparison.json."""

    name: str
    content: dict[str, Any]


@dataclass(frozen=True)
class LoadedRuns:
    """Everything that was read. Each of `problems` names a file or folder."""

    runs: list[Run] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    swept: set[str] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        return not self.comparisons and not any(run.rows for run in self.runs)

    @property
    def differing_settings(self) -> list[str]:
        """Settings that are not the same in all readable runs: swept ones first, then in the order of the config."""
        readable = [run.settings for run in self.runs if run.settings]
        names = dict.fromkeys(name for settings in readable for name in settings)
        compared = [name for name in names if not name.startswith((*BOOKKEEPING, "launch."))]
        differing = [name for name in compared if len({repr(settings.get(name)) for settings in readable}) > 1]
        return sorted(differing, key=lambda name: name not in self.swept)


def load_runs(given: Iterable[Path]) -> LoadedRuns:
    """All runs and comparisons in the given folders: run dirs, or folders that contain them, such as a sweep's."""
    loaded = LoadedRuns()
    folders: list[Path] = []
    for folder in given:
        found = list(run_folders(folder))
        if not found:
            what = "contains no run" if folder.is_dir() else "is not a folder"
            loaded.problems.append(f"{folder} {what}: give a run dir, such as outputs/DATE/TIME, or a sweep's folder")
        folders += found
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for sweep in dict.fromkeys(folder for run in folders for folder in (run, run.parent)):
        _read_sweep(sweep, loaded)
    common = Path(os.path.commonpath([folder.resolve().parent for folder in folders])) if folders else Path()
    for folder in folders:
        name = str(folder.resolve().relative_to(common))
        if (folder / COMPARISON_FILE).exists() or (folder / RESULTS_FILE).exists():
            _read_comparison(name, folder / COMPARISON_FILE, loaded)
        else:
            settings = flatten(_read_object(folder / CONFIG_FILE, loaded.problems, "the run's settings are not shown"))
            has_summary = (folder / SUMMARY_FILE).exists()  # once its steps are done
            summary = _read_object(folder / SUMMARY_FILE, loaded.problems) if has_summary else {}
            has_cells = (folder / EVALUATION_FILE).exists()
            evaluation = _read_object(folder / EVALUATION_FILE, loaded.problems) if has_cells else {}
            rows = _read_rows(folder / METRICS_FILE, loaded.problems)
            loaded.runs.append(Run(name, folder, settings, rows, summary, evaluation.get("cells", [])))
    return loaded


def run_folders(folder: Path) -> Iterator[Path]:
    """The run dirs at or below `folder`, sorted by name, numbers by value."""
    if not folder.is_dir():
        return
    # without wandb's files and trials' interrupted attempts
    named = [child for child in folder.iterdir() if child.name != "wandb" and ".interrupted-" not in child.name]
    children = [child for child in named if child.is_dir()]
    children.sort(key=lambda path: (not path.name.isdigit(), path.name.zfill(9)))
    if _is_run(folder) and not any(_is_run(child) for child in children):  # sweeps may write files of these names
        yield folder
    else:
        for child in children:
            yield from run_folders(child)


def replace_file(path: Path, text: str) -> None:
    """Write the file atomically: readers see the old text or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_json_lines(path: Path) -> Iterator[tuple[str, Row | None]]:
    """Each line of the file with its end, and the object in it; None if a crash has cut the line off or damaged it."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        yield line, row if isinstance(row, dict) else None


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _read_sweep(folder: Path, loaded: LoadedRuns) -> None:
    """The swept settings and the failed trials, if it is a sweep's folder."""
    content = _read_object(folder / SWEEP_FILE, loaded.problems) if (folder / SWEEP_FILE).exists() else {}
    loaded.swept.update(content.get("space", {}))
    for trial in content.get("trials", []):
        if trial.get("state") == "failed":
            loaded.problems.append(f"{folder}: trial {trial.get('trial')} failed: {trial.get('error')}")


def _read_comparison(name: str, path: Path, loaded: LoadedRuns) -> None:
    content = _read_object(path, loaded.problems, "skipped; the same command resumes an unfinished comparison")
    missing = [key for key in ("recipe", "model", "baseline", "notes", "rows") if key not in content]
    if content and missing:
        loaded.problems.append(f"{path} has no {', '.join(missing)}: skipped")
    elif content:
        loaded.comparisons.append(Comparison(name, content))


def _read_rows(path: Path, problems: list[str]) -> list[Row]:
    """The rows of a metrics file by step. If a step was logged twice, the later row counts."""
    rows: dict[int, Row] = {}
    for number, (_, row) in enumerate(read_json_lines(path) if path.exists() else (), 1):
        if row and isinstance(row.get("step"), int):
            rows[row["step"]] = {key: value for key, value in row.items() if isinstance(value, int | float | None)}
        else:
            problems.append(f"{path}: line {number} is cut off or not the log of a step: skipped")
    if not rows:
        problems.append(f"{path} has no logged step yet")
    return [rows[step] for step in sorted(rows)]


def _read_object(path: Path, problems: list[str], consequence: str = "skipped") -> dict[str, Any]:
    """The object in a JSON or YAML file; if there is none, {} and a problem."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        content = yaml.load(text, yaml.CSafeLoader) if path.suffix == ".yaml" else json.loads(text)
        if isinstance(content, dict):
            return content
        problem = "is not what a run writes"
    except FileNotFoundError:
        problem = "is missing"
    except (json.JSONDecodeError, yaml.YAMLError):
        problem = f"is cut off or not valid {path.suffix[1:].upper()}"
    problems.append(f"{path} {problem}: {consequence}")
    return {}
