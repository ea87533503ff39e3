"""What runs write to their folders: names of files, and reading them back. Broken files are reported, the rest is read.

Imports nothing slow.
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
PREEMPTED_FILE = "preempted"  # exists once a checkpoint is saved because of a signal; scripts/slurm.sbatch looks for it
COMPARISON_FILE, RESULTS_FILE, SWEEP_FILE = "comparison.json", "results.jsonl", "sweep.json"
FILES = (METRICS_FILE, SUMMARY_FILE, CONFIG_FILE, COMPARISON_FILE, RESULTS_FILE)  # a run dir has at least one of them

# prefixes of settings that do not make runs of one experiment different
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
    """One run of recipe=pretrain or recipe=forward.

    Args:
        name: unique among the runs that were loaded together.
        settings: by dotted name, such as optimizer.lr. Empty if they cannot be read.
        rows: one per logged step, in order. None where a number was not finite.
        summary: metrics of the whole run, such as the parts of a step's time.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    rows: list[Row]
    summary: dict[str, float | None]

    def column(self, name: str) -> list[float | None]:
        """One value per row, None where the metric was not logged."""
        return [row.get(name) for row in self.rows]


@dataclass(frozen=True)
class Comparison:
    """A run of recipe=compare. `content` is its comparison.json."""

    name: str
    folder: Path
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
        names = dict.fromkeys(name for settings in readable for name in settings if not name.startswith(NOT_COMPARED))
        differing = [name for name in names if len({repr(settings.get(name)) for settings in readable}) > 1]
        return sorted(differing, key=lambda name: name not in self.swept)


def load_runs(given: Iterable[Path]) -> LoadedRuns:
    """All runs and comparisons in the given folders: run dirs, or folders that contain them, such as a sweep's."""
    loaded = LoadedRuns()
    folders: list[Path] = []
    for folder in given:
        found = list(run_folders(folder))
        if not folder.is_dir():
            loaded.problems.append(
                f"{folder} is not a folder: give a run dir, such as outputs/DATE/TIME, or a sweep's folder"
            )
        elif not found:
            loaded.problems.append(f"{folder} contains no run: none of {', '.join(FILES)} is in it")
        folders += found
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for sweep in dict.fromkeys(folder for run in folders for folder in (run, run.parent)):
        _read_sweep(sweep / SWEEP_FILE, loaded)
    common = Path(os.path.commonpath([folder.resolve().parent for folder in folders])) if folders else Path()
    for folder in folders:
        name = str(folder.resolve().relative_to(common))
        if (folder / COMPARISON_FILE).exists() or (folder / RESULTS_FILE).exists():
            _read_comparison(name, folder, loaded)
        else:
            _read_run(name, folder, loaded)
    return loaded


def run_folders(folder: Path) -> Iterator[Path]:
    """The run dirs at or below `folder`, sorted by name, numbers by value."""
    if not folder.is_dir():
        return
    children = sorted(
        (child for child in folder.iterdir() if child.is_dir() and not _is_ignored(child.name)),
        key=lambda path: (not path.name.isdigit(), path.name.zfill(9)),
    )
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


def _is_ignored(name: str) -> bool:
    """Whether a folder holds a trial's interrupted attempt, or wandb's files."""
    return ".interrupted-" in name or name == "wandb"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _read_sweep(path: Path, loaded: LoadedRuns) -> None:
    """The swept settings and the failed trials of a sweep."""
    if not path.exists():
        return
    content = _read_json(path, loaded.problems)
    loaded.swept.update(content.get("space", {}))
    for trial in content.get("trials", []):
        if trial.get("state") == "failed":
            loaded.problems.append(f"{path.parent}: trial {trial.get('trial')} failed: {trial.get('error')}")


def _read_run(name: str, folder: Path, loaded: LoadedRuns) -> None:
    settings = flatten(_read_settings(folder / CONFIG_FILE, loaded.problems))
    summary = _read_json(folder / SUMMARY_FILE, loaded.problems) if (folder / SUMMARY_FILE).exists() else {}
    rows = _read_rows(folder / METRICS_FILE, loaded.problems)
    loaded.runs.append(Run(name, folder, settings, rows, summary))


def _read_comparison(name: str, folder: Path, loaded: LoadedRuns) -> None:
    path = folder / COMPARISON_FILE
    if not path.exists():
        loaded.problems.append(f"{path} is missing: the comparison has not ended. The same command resumes it")
        return
    content = _read_json(path, loaded.problems)
    missing = [key for key in ("recipe", "model", "baseline", "notes", "rows") if key not in content]
    if content and missing:
        loaded.problems.append(f"{path} has no {', '.join(missing)}: skipped")
    elif content:
        loaded.comparisons.append(Comparison(name, folder, content))


def _read_rows(path: Path, problems: list[str]) -> list[Row]:
    """The rows of a metrics file by step. If a step was logged twice, the later row counts."""
    if not path.exists():
        problems.append(f"{path} is missing: no step was logged")
        return []
    rows: dict[int, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = {key: value for key, value in row.items() if isinstance(value, int | float | None)}
        else:
            problems.append(f"{path}: line {number} is cut off or not the log of a step: skipped")
    if not rows:
        problems.append(f"{path} has no logged step yet")
    return [rows[step] for step in sorted(rows)]


def _read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_bytes(), yaml.CSafeLoader)
        problem = "is not a configuration"
    except FileNotFoundError:
        settings, problem = None, "is missing"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        settings, problem = None, "is not valid YAML" + ("" if mark is None else f" (line {mark.line + 1})")
    if isinstance(settings, dict):
        return settings
    problems.append(f"{path} {problem}: the run's settings are not shown")
    return {}


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        problem = "is not what a run writes"
    except json.JSONDecodeError as error:
        content, problem = None, f"is cut off or not valid JSON (line {error.lineno})"
    if isinstance(content, dict):
        return content
    problems.append(f"{path} {problem}: skipped")
    return {}
