"""Reading run dirs: what is found in them, and what a broken one says while the rest is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.run.run_dir import LoadedRuns, load_runs

CONFIG = "optimizer:\n  lr: {lr}\ndata:\n  files: null\nseed: 0\n"


def write_run(folder: Path, lr: float = 1e-3, num_rows: int = 2, **files: str) -> Path:
    """A run dir; `files` are texts that take the place of its files' (metrics, config, summary)."""
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
    whole = {"recipe": "forward", "model": "tiny", "baseline": "a", "notes": [], "rows": []}
    return json.dumps(whole | replaced)


def test_a_run_has_its_settings_its_steps_and_its_end(tmp_path):
    found = load_runs([write_run(tmp_path / "run")])
    assert found.problems == []
    [run] = found.runs
    assert run.name == "run"
    assert run.settings == {"optimizer.lr": 1e-3, "data.files": None, "seed": 0}
    assert run.column("train/loss") == [1.0, 0.5]
    assert run.column("validation/loss") == [None, None]
    assert run.summary == {"parts/gemm_pct": 40.0}


def test_a_sweep_is_its_jobs_in_their_order_and_what_differs_is_known(tmp_path):
    for job in (10, 2, 0):
        write_run(tmp_path / "sweep" / str(job), lr=job + 1)
    (tmp_path / "sweep" / "results.jsonl").write_text("{}\n")  # of the sweep's own
    found = load_runs([tmp_path / "sweep"])
    assert [run.name for run in found.runs] == ["0", "2", "10"]
    assert found.differing_settings == ["optimizer.lr"]
    assert found.problems == []


def test_a_sweeps_own_account_says_what_it_ranged_over_and_what_failed(tmp_path):
    config = "attention:\n  method: ring\nlogging:\n  group: {lr}\nengine:\n  batch: {lr}\noptimizer:\n  lr: {lr}\n"
    for job in (1, 2):
        write_run(tmp_path / "sweep" / str(job), config=config.format(lr=job))
    write_run(tmp_path / "sweep" / "2.interrupted-1", lr=7)
    trials = [{"trial": 1, "state": "done"}, {"trial": 3, "state": "failed", "error": "too large"}]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"space": {"optimizer.lr": "1,2"}, "trials": trials}))
    found = load_runs([tmp_path / "sweep"])
    assert [run.name for run in found.runs] == ["1", "2"]
    assert found.differing_settings == ["optimizer.lr", "engine.batch"]  # what was swept first, groups of wandb never
    assert found.problems == [f"{tmp_path / 'sweep'}: trial 3 failed: too large"]


def test_runs_of_several_folders_have_names_that_differ_and_are_read_once(tmp_path):
    one, other = write_run(tmp_path / "one" / "0"), write_run(tmp_path / "other" / "0")
    found = load_runs([one, other, tmp_path / "one"])
    assert [run.name for run in found.runs] == ["one/0", "other/0"]
    assert load_runs([one]).differing_settings == []


def test_folders_without_a_run_are_named_and_the_others_read(tmp_path):
    (tmp_path / "empty").mkdir()
    good = write_run(tmp_path / "good")
    found = load_runs([tmp_path / "nowhere", tmp_path / "empty", good])
    assert len(found.runs) == 1
    assert found.problems == [
        f"{tmp_path}/nowhere is no folder: give a run dir, such as outputs/DATE/TIME, or a sweep's",
        f"{tmp_path}/empty has no run in it: there is none of metrics.jsonl, summary.json, config.yaml, "
        "comparison.json, results.jsonl",
    ]


def test_a_line_that_is_cut_off_is_left_out_and_told(tmp_path):
    whole = json.dumps({"step": 1, "train/loss": 2.0})
    folder = write_run(tmp_path / "run", metrics=f'{whole}\n[1]\n{{"step": 2, "train/lo')
    found = load_runs([folder])
    assert [row["step"] for row in found.runs[0].rows] == [1]
    rule = "is cut off or no log of a step: left out"
    assert found.problems == [f"{folder}/metrics.jsonl: line {number} {rule}" for number in (2, 3)]


def test_of_a_step_that_was_logged_twice_the_later_counts(tmp_path):
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}, {"step": 1, "train/loss": None}]
    folder = write_run(tmp_path / "run", metrics="".join(json.dumps(line) + "\n" for line in lines))
    assert load_runs([folder]).runs[0].column("train/loss") == [None, 2.0]


def test_broken_settings_are_named_and_the_runs_of_readable_ones_compared(tmp_path):
    broken = write_run(tmp_path / "0", config="optimizer:\n  lr: [1e-3\nseed: 0\n")
    other = write_run(tmp_path / "1", config="just words")
    gone = write_run(tmp_path / "2")
    (gone / "config.yaml").unlink()
    write_run(tmp_path / "3", lr=1)
    write_run(tmp_path / "4", lr=2)
    found = load_runs([tmp_path])
    assert [bool(run.settings) for run in found.runs] == [False, False, False, True, True]
    assert all(run.rows for run in found.runs)
    assert found.differing_settings == ["optimizer.lr"]
    assert found.problems == [
        f"{broken}/config.yaml is no YAML, line 3: the run's settings are not shown",
        f"{other}/config.yaml is no configuration: the run's settings are not shown",
        f"{gone}/config.yaml is not there: the run's settings are not shown",
    ]


def test_a_run_without_a_step_is_told(tmp_path):
    begun = write_run(tmp_path / "0", metrics="")
    failed = write_run(tmp_path / "1", summary="[")
    (failed / "metrics.jsonl").unlink()
    found = load_runs([tmp_path])
    assert found.is_empty
    assert found.problems == [
        f"{begun}/metrics.jsonl has no logged step yet",
        f"{failed}/summary.json is cut off or no JSON (line 1): left out",
        f"{failed}/metrics.jsonl is not there: no step was logged",
    ]


def read_comparison(folder: Path, text: str | None) -> LoadedRuns:
    folder.mkdir()
    (folder / "results.jsonl").write_text("{}\n")
    if text is not None:
        (folder / "comparison.json").write_text(text)
    return load_runs([folder])


def test_a_comparison_is_no_run_and_what_is_wrong_with_one_is_told(tmp_path):
    found = read_comparison(tmp_path / "good", comparison())
    assert (len(found.comparisons), found.runs, found.problems, found.is_empty) == (1, [], [], False)
    cases = {
        None: "/comparison.json is not there: the comparison has not ended; the same command goes on with it",
        comparison()[:-5]: "/comparison.json is cut off or no JSON (line 1): left out",
        "3": "/comparison.json is not what a run writes: left out",
        '{"recipe": 1, "model": 2, "notes": 3}': "/comparison.json has no baseline, rows: left out",
    }
    for number, (text, problem) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        found = read_comparison(folder, text)
        assert (found.comparisons, found.problems) == ([], [f"{folder}{problem}"])
