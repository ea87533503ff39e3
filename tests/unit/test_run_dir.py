"""Reading run dirs, and the problems that are reported for broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.run.run_dir import LoadedRuns, load_runs
from tests.errors import names

CONFIG = "optimizer:\n  lr: {lr}\ndata:\n  files: null\nseed: 0\n"


def write_run(folder: Path, lr: float = 1e-3, num_rows: int = 2, **files: str) -> Path:
    """A run dir. `files` replace the texts of its files: metrics, config, summary."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "train/loss": 1 / step, "elapsed_s": step / 2} for step in range(1, num_rows + 1)]
    texts = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "config.yaml": CONFIG.format(lr=lr),
        "summary.json": '{"parts/gemm_pct": 40.0}',
    }
    names = {"metrics": "metrics.jsonl", "config": "config.yaml", "summary": "summary.json"}
    for name, text in (texts | {names[key]: text for key, text in files.items()}).items():
        (folder / name).write_text(text)
    return folder


def comparison(**replaced: Any) -> str:
    content = {"recipe": "forward", "model": "tiny", "baseline": "a", "notes": [], "rows": []}
    return json.dumps(content | replaced)


def assert_problems(loaded: LoadedRuns, *expected: tuple[object, ...]) -> None:
    """One problem for each, in this order, with the path first and these parts."""
    assert len(loaded.problems) == len(expected), loaded.problems
    for problem, (path, *parts) in zip(loaded.problems, expected, strict=True):
        assert problem.startswith(str(path))
        names(problem, path, *parts)


def test_a_run_has_its_settings_rows_and_summary(tmp_path):
    loaded = load_runs([write_run(tmp_path / "run")])
    assert loaded.problems == []
    [run] = loaded.runs
    assert run.name == "run"
    assert run.settings == {"optimizer.lr": 1e-3, "data.files": None, "seed": 0}
    assert run.column("train/loss") == [1.0, 0.5]
    assert run.column("validation/loss") == [None, None]
    assert run.summary == {"parts/gemm_pct": 40.0}


def test_a_sweep_is_its_jobs_in_order_with_their_differing_settings(tmp_path):
    for job in (10, 2, 0):
        write_run(tmp_path / "sweep" / str(job), lr=job + 1)
    (tmp_path / "sweep" / "results.jsonl").write_text("{}\n")  # written by the sweep
    loaded = load_runs([tmp_path / "sweep"])
    assert [run.name for run in loaded.runs] == ["0", "2", "10"]
    assert loaded.differing_settings == ["optimizer.lr"]
    assert loaded.problems == []


def test_a_sweeps_file_names_the_swept_settings_and_failed_trials(tmp_path):
    config = "attention:\n  method: ring\nlogging:\n  group: {lr}\nengine:\n  batch: {lr}\noptimizer:\n  lr: {lr}\n"
    for job in (1, 2):
        write_run(tmp_path / "sweep" / str(job), config=config.format(lr=job))
    write_run(tmp_path / "sweep" / "2.interrupted-1", lr=7)
    trials = [{"trial": 1, "state": "done"}, {"trial": 3, "state": "failed", "error": "too large"}]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"space": {"optimizer.lr": "1,2"}, "trials": trials}))
    loaded = load_runs([tmp_path / "sweep"])
    assert [run.name for run in loaded.runs] == ["1", "2"]
    assert loaded.differing_settings == ["optimizer.lr", "engine.batch"]  # swept ones first, logging never
    assert_problems(loaded, (tmp_path / "sweep", "trial 3", "too large"))


def test_runs_of_several_folders_have_unique_names_and_are_read_once(tmp_path):
    one, other = write_run(tmp_path / "one" / "0"), write_run(tmp_path / "other" / "0")
    loaded = load_runs([one, other, tmp_path / "one"])
    assert [run.name for run in loaded.runs] == ["one/0", "other/0"]
    assert load_runs([one]).differing_settings == []


def test_folders_without_a_run_are_problems_and_others_are_read(tmp_path):
    (tmp_path / "empty").mkdir()
    good = write_run(tmp_path / "good")
    loaded = load_runs([tmp_path / "nowhere", tmp_path / "empty", good])
    assert len(loaded.runs) == 1
    assert_problems(
        loaded, (tmp_path / "nowhere", "folder", "outputs/DATE/TIME"), (tmp_path / "empty", "outputs/DATE/TIME")
    )


def test_a_line_that_is_cut_off_is_skipped_and_reported(tmp_path):
    complete = json.dumps({"step": 1, "train/loss": 2.0})
    folder = write_run(tmp_path / "run", metrics=f'{complete}\n[1]\n{{"step": 2, "train/lo')
    loaded = load_runs([folder])
    assert [row["step"] for row in loaded.runs[0].rows] == [1]
    assert_problems(loaded, *((folder / "metrics.jsonl", f"line {number}") for number in (2, 3)))


def test_if_a_step_was_logged_twice_the_later_row_counts(tmp_path):
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}, {"step": 1, "train/loss": None}]
    folder = write_run(tmp_path / "run", metrics="".join(json.dumps(line) + "\n" for line in lines))
    assert load_runs([folder]).runs[0].column("train/loss") == [None, 2.0]


def test_broken_settings_are_problems_and_readable_ones_are_compared(tmp_path):
    broken = write_run(tmp_path / "0", config="optimizer:\n  lr: [1e-3\nseed: 0\n")
    other = write_run(tmp_path / "1", config="just words")
    gone = write_run(tmp_path / "2")
    (gone / "config.yaml").unlink()
    write_run(tmp_path / "3", lr=1)
    write_run(tmp_path / "4", lr=2)
    loaded = load_runs([tmp_path])
    assert [bool(run.settings) for run in loaded.runs] == [False, False, False, True, True]
    assert all(run.rows for run in loaded.runs)
    assert loaded.differing_settings == ["optimizer.lr"]
    assert_problems(
        loaded,
        (broken / "config.yaml", "YAML", "settings"),
        (other / "config.yaml", "settings"),
        (gone / "config.yaml", "missing", "settings"),
    )


def test_a_run_without_a_step_is_a_problem(tmp_path):
    begun = write_run(tmp_path / "0", metrics="")
    failed = write_run(tmp_path / "1", summary="[")
    (failed / "metrics.jsonl").unlink()
    loaded = load_runs([tmp_path])
    assert loaded.is_empty
    assert_problems(
        loaded,
        (begun / "metrics.jsonl", "no logged step"),
        (failed / "summary.json", "JSON"),
        (failed / "metrics.jsonl", "no logged step"),
    )


def read_comparison(folder: Path, text: str | None) -> LoadedRuns:
    folder.mkdir()
    (folder / "results.jsonl").write_text("{}\n")
    if text is not None:
        (folder / "comparison.json").write_text(text)
    return load_runs([folder])


def test_a_comparison_is_not_a_run_and_its_problems_are_reported(tmp_path):
    loaded = read_comparison(tmp_path / "good", comparison())
    assert (len(loaded.comparisons), loaded.runs, loaded.problems, loaded.is_empty) == (1, [], [], False)
    cases = {
        None: ("missing", "same command"),
        comparison()[:-5]: ("JSON", "same command"),
        "3": ("same command",),
        '{"recipe": 1, "model": 2, "notes": 3}': ("baseline", "rows"),
    }
    for number, (text, parts) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        loaded = read_comparison(folder, text)
        assert loaded.comparisons == []
        assert_problems(loaded, (folder / "comparison.json", *parts))
