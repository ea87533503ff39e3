"""Sweeps with fake jobs: which trials run, what failures and interruptions leave, and the report."""

# ruff: noqa: E501 - a message is one line here, as it is on the console

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from conf.schema import KERNELS, ConfigError, SweepConfig
from recipes.run.errors import RunFailed
from recipes.run.lock import locked
from recipes.sweep import report
from recipes.sweep.runner import one_line, run_sweep
from recipes.sweep.search_space import read_space
from ring_attention.transport import TRANSPORTS
from tests.errors import names, refused, some_line_names
from tests.unit.test_schema import CONF, compose

GRID = ["+sweep=search", "sweep.sampler=grid", "optimizer.lr=1e-3,2e-3", "model.num_layers=range(1,3)"]
SEARCH = ["+sweep=search", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "sweep.num_trials=4"]


@dataclass
class Jobs:
    """Fakes Hydra's launcher. `result` returns what a run measures for its learning rate and layers, or raises."""

    folder: Path
    result: Callable[[float, int], float] = lambda lr, layers: lr * 1e3 + layers
    started: list[dict[str, str]] = field(default_factory=list)
    checked: list[list[str]] = field(default_factory=list)
    objective: str = "validation_loss"

    def run(self, overrides: list[str], number: int) -> JobReturn:
        typed = dict(override.split("=", 1) for override in overrides)
        assert typed["hydra.sweep.subdir"] == str(number)
        self.started.append(typed)
        run_dir = self.folder / str(number)
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text("{}\n")
        try:
            value = self.result(float(typed.get("optimizer.lr", 0)), int(typed.get("model.num_layers", 0)))
        except ConfigError as error:
            return JobReturn(status=JobStatus.FAILED, _return_value=error)
        summary = {
            self.objective: value if value == value else None,
            "tokens_per_s": 1000 * value,
            "parts/gemm_pct": 5.0,
        }
        (run_dir / "summary.json").write_text(json.dumps({n: v for n, v in summary.items() if v == v}))
        return JobReturn(status=JobStatus.COMPLETED, _return_value=None)

    def sweep(self, *typed: str) -> dict[str, Any]:
        """Run the sweep and return its sweep.json."""
        arguments = [*typed, f"hydra.sweep.dir={self.folder}"]
        overrides = OverridesParser.create().parse_overrides([text for text in typed if not text.startswith("hydra.")])
        common = [text for text, parsed in zip(typed, overrides, strict=True) if not parsed.is_sweep_override()]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            master = hydra.compose("config", [*common, arguments[-1]], return_hydra_config=True)
        settings = OmegaConf.to_object(master.sweep)
        assert isinstance(settings, SweepConfig)
        run_sweep(master, settings, overrides, self.checked.append, self.run)
        return json.loads((self.folder / "sweep.json").read_text())


@pytest.fixture
def jobs(tmp_path) -> Jobs:
    return Jobs(tmp_path / "lr sweep")


def test_a_grid_runs_in_hydras_order_and_its_report_has_the_best_first(jobs, capsys):
    content = jobs.sweep(*GRID, "+experiment=ra_sp")
    tried = [(job["optimizer.lr"], job["model.num_layers"]) for job in jobs.started]
    assert tried == [("0.001", "1"), ("0.001", "2"), ("0.002", "1"), ("0.002", "2")]
    assert all(job["+experiment"] == "ra_sp" and job["+sweep"] == "search" for job in jobs.started)
    assert [row["trial"] for row in content["trials"]] == [1, 2, 3, 4]
    assert [row["validation_loss"] for row in content["trials"]] == [2, 3, 3, 4]
    assert content["trials"][0]["overrides"] == {"optimizer.lr": 0.001, "model.num_layers": 1}
    assert content["trials"][0]["tokens_per_s"] == 2000
    assert "parts/gemm_pct" not in content["trials"][0]
    with (jobs.folder / "sweep.csv").open() as file:
        assert [row["optimizer.lr"] for row in csv.DictReader(file)] == ["0.001", "0.001", "0.002", "0.002"]
    assert (jobs.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "model.num_layers" in (jobs.folder / "sweep.svg").read_text()
    out = capsys.readouterr().out
    some_line_names(out.splitlines(), "3/4", "optimizer.lr=0.002 model.num_layers=1")
    some_line_names(out.splitlines(), "3/4", "validation_loss 3", "3,000 tok/s", "best 2", "trial 1", "00:00")
    some_line_names(out.splitlines(), "best", "trial 1", "validation_loss 2", jobs.folder / "1")
    assert "python train.py +sweep=search +experiment=ra_sp optimizer.lr=0.001 model.num_layers=1\n" in out


def test_each_combination_runs_once_if_there_are_fewer_than_trials(jobs, capsys):
    jobs.sweep("+sweep=search", "optimizer.lr=1e-3,2e-3", "model.num_layers=range(1,3)", "sweep.num_trials=9")
    tried = [(job["optimizer.lr"], job["model.num_layers"]) for job in jobs.started]
    assert tried == [("0.001", "1"), ("0.001", "2"), ("0.002", "1"), ("0.002", "2")]
    some_line_names(capsys.readouterr().out.splitlines(), "4 trials", "all combinations")
    assert jobs.checked == [["+sweep=search", "sweep.num_trials=9", "optimizer.lr=0.001", "model.num_layers=1"]]


def test_a_failed_trial_is_reported_and_the_sweep_continues(jobs, capsys):
    def result(lr: float, layers: int) -> float:
        if (lr, layers) == (1e-3, 1):
            raise ConfigError("one layer is too few: use two\nor three")
        if (lr, layers) == (1e-3, 2):
            raise RuntimeError("job lost")
        return float("nan") if layers == 1 else 1.5

    jobs.result = result
    content = jobs.sweep(*GRID)
    assert [(row["trial"], row["state"]) for row in content["trials"]] == [
        (4, "done"),
        *((n, "failed") for n in (1, 2, 3)),
    ]
    errors = [row.get("error") for row in content["trials"]]
    assert content["trials"][1]["error_in_full"] == "one layer is too few: use two\nor three"
    assert errors[:3] == [None, "one layer is too few: use two", "RuntimeError: job lost"]
    names(errors[3], "validation_loss", "finite")
    out, err = capsys.readouterr()
    some_line_names(out.splitlines(), "1/4", "FAILED", "one layer is too few: use two", "0 s", "00:00")
    some_line_names(out.splitlines(), "RuntimeError: job lost")
    assert err.startswith("Traceback")  # only of unexpected errors
    assert "too few" not in err


def test_a_sweep_fails_if_all_its_trials_fail(jobs, capsys):
    jobs.objective = "something_else"
    with refused(RunFailed, "4 trials", "validation_loss"):
        jobs.sweep(*GRID)
    assert "trial  optimizer.lr  model.num_layers" in capsys.readouterr().out  # the table's columns


@pytest.mark.slow
@pytest.mark.parametrize("typed", [GRID, SEARCH], ids=["grid", "search"])
def test_an_interrupted_sweep_runs_what_is_missing(jobs, capsys, typed):
    def interrupted_in_the_third(lr: float, layers: int) -> float:
        if len(jobs.started) == 3:
            raise KeyboardInterrupt
        return lr

    jobs.result = interrupted_in_the_third
    with pytest.raises(KeyboardInterrupt):
        jobs.sweep(*typed)
    names(capsys.readouterr().out, f"hydra.sweep.dir='{jobs.folder}'")
    content = jobs.sweep(*typed)
    assert [job["hydra.sweep.subdir"] for job in jobs.started] == ["1", "2", "3", "3", "4"]
    settings = [tuple(job.get(name) for name in ("optimizer.lr", "model.num_layers")) for job in jobs.started]
    assert settings[2] == settings[3]
    assert len(set(settings)) == 4  # no settings run twice
    assert [row["state"] for row in content["trials"]] == ["done"] * 4
    assert [path.name for path in (jobs.folder / "3.interrupted-1").iterdir()] == ["metrics.jsonl"]
    some_line_names(capsys.readouterr().out.splitlines(), "interrupted", 3)
    jobs.sweep(*typed)
    assert len(jobs.started) == 5
    if typed is SEARCH:  # the same sweep with more trials
        jobs.sweep(*typed, "sweep.num_trials=6")
        assert [job["hydra.sweep.subdir"] for job in jobs.started[5:]] == ["5", "6"]


@pytest.mark.slow
def test_a_job_that_succeeded_after_its_sweep_was_killed_does_not_run_again(jobs):
    """SLURM jobs outlive the sweep that submitted them."""

    def killed_after_the_second(lr: float, layers: int) -> float:
        if len(jobs.started) == 2:
            (jobs.folder / "2" / "summary.json").write_text('{"validation_loss": 0.25}')
            raise KeyboardInterrupt
        return 1.0

    jobs.result = killed_after_the_second
    with pytest.raises(KeyboardInterrupt):
        jobs.sweep(*GRID)
    content = jobs.sweep(*GRID)
    assert len(jobs.started) == 4
    assert (content["trials"][0]["trial"], content["trials"][0]["validation_loss"]) == (2, 0.25)


@pytest.mark.slow
def test_another_sweep_in_the_folder_is_refused(jobs):
    jobs.sweep(*GRID)
    for changed, before in (
        ("optimizer.lr=1e-3,5e-3", "1e-3,2e-3"),
        ("sweep.objective=tokens_per_s", "validation_loss"),
        ("num_steps=7", "300"),
        ("attention=ring,ulysses", "not set"),
    ):
        field_name, _, now = changed.partition("=")
        with refused(ConfigError, jobs.folder, field_name, before, now, "hydra.sweep.dir"):
            jobs.sweep(*GRID, changed)
    with locked(jobs.folder), refused(ConfigError, jobs.folder, "process", "hydra.sweep.dir"):
        jobs.sweep(*GRID)
    assert len(jobs.started) == 4


@pytest.mark.slow
def test_throughput_is_maximized(jobs):
    jobs.objective = "tokens_per_s"
    content = jobs.sweep(*SEARCH, "sweep.objective=tokens_per_s", "sweep.num_trials=15", "recipe=forward")
    rates = [float(row["overrides"]["optimizer.lr"]) for row in content["trials"]]
    assert rates == sorted(rates, reverse=True)
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert len(set(rates)) == 15
    assert sum(rate > 1e-3 for rate in rates) > 9  # half of them by chance; Optuna learns


@pytest.mark.slow
def test_trials_run_in_parallel(jobs):
    both = threading.Barrier(2, timeout=20)  # breaks unless two jobs run at once

    def result(lr: float, layers: int) -> float:
        both.wait()
        return lr

    jobs.result = result
    content = jobs.sweep(*GRID, "sweep.num_parallel=2")
    assert [row["state"] for row in content["trials"]] == ["done"] * 4


def test_an_error_in_a_thread_ends_the_sweep(jobs, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "write_files", full_disk)  # trials are recorded by threads
    with pytest.raises(OSError, match="no space left"):
        jobs.sweep(*SEARCH, "sweep.num_parallel=2", "sweep.num_trials=50")
    time.sleep(0.5)
    assert len(jobs.started) <= 4


def test_explain_starts_no_trial(jobs, capsys):
    with pytest.raises(FileNotFoundError):
        jobs.sweep(*GRID, "explain=true")
    some_line_names(capsys.readouterr().out.splitlines(), "4 trials", "minimize", "validation_loss")
    assert not jobs.folder.exists()


def test_explain_refuses_the_folder_of_another_sweep(jobs):
    jobs.sweep(*GRID)
    jobs.sweep(*GRID, "explain=true")
    with refused(ConfigError, jobs.folder, "num_steps", "300", "7", "hydra.sweep.dir"):
        jobs.sweep(*GRID, "num_steps=7", "explain=true")
    assert len(jobs.started) == 4


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["+sweep=search"], ["optimizer.lr=tag"]),
        ([*SEARCH, "sweep.sampler=grid"], ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "infinitely many"]),
        ([*SEARCH, "recipe=forward"], ["recipe=forward", "sweep.objective=validation_loss", "sweep.objective=tokens_per_s"]),
        ([*SEARCH, "recipe=compare"], ["recipe=compare", "sweep.objective=validation_loss", "recipe=pretrain"]),
        (["+sweep=search", "optimizer.lr=interval(2,1)"], ["optimizer.lr=interval(2,1)", "ascending"]),
        (["+sweep=search", "optimizer.lr=tag(log,interval(0,1))"], ["optimizer.lr=tag(log,interval(0,1))", "above 0"]),
        (["+sweep=search", "num_steps=range(3,3)"], ["num_steps=range(3,3)"]),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_run_is_refused_before_any_trial(jobs, typed, parts):
    with refused(ConfigError, *parts):
        jobs.sweep(*typed)
    assert not jobs.folder.exists()


@pytest.mark.parametrize(
    ("typed", "distribution"),
    [
        ("attention=ring,ulysses", CategoricalDistribution(["ring", "ulysses"])),
        ("optimizer.lr=choice(1e-3,3e-3)", CategoricalDistribution([0.001, 0.003])),
        ("num_steps=range(10,50,10)", IntDistribution(10, 40, step=10)),
        ("optimizer.lr=range(0.1,0.5,0.1)", CategoricalDistribution([0.1, 0.2, 0.30000000000000004, 0.4])),
        ("num_steps=int(interval(1,8))", IntDistribution(1, 8)),
        ("num_steps=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("optimizer.lr=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
    ],
)
def test_hydras_grammar_becomes_an_optuna_distribution(typed: str, distribution: BaseDistribution):
    name = typed.partition("=")[0]
    overrides = OverridesParser.create().parse_overrides([f"{name}=0,1", typed, "seed=3"])  # the last of a field counts
    space = read_space(overrides, "tpe")
    assert space.swept == {name: distribution}
    assert space.overrides({name: "value"}) == ["seed=3", f"{name}=value"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("a=1 is wrong: use 2"), "a=1 is wrong: use 2"),
        (
            RunFailed('rank 1 failed:\nTraceback (most recent call last):\n  File "x"\n    f()\nValueError: no\nthe other ranks were ended; its log: y'),
            "rank 1 failed: ValueError: no",
        ),
        (RunFailed("rank 0 ran out of memory\nCUDA out of memory. Tried\n   ranks  1"), "rank 0 ran out of memory"),
        (RunFailed("rank 0 was ended by SIGKILL\nthe other ranks were ended; its log: y"), "rank 0 was ended by SIGKILL"),
        (RuntimeError("Job (task=0) failed with trace:\n-----\nTraceback (most recent call last):\nKeyError: 'x'\n\nYou can check"), "Job (task=0) failed with trace: KeyError: 'x'"),
        (KeyError(), "KeyError"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_one_line(error: Exception, line: str):
    assert one_line(error) == line


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_value_of_a_predefined_sweep_is_legal(path):
    """Combinations may still be illegal: their trials fail."""
    params = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params", default={})
    for name, values in params.items():
        [override] = OverridesParser.create().parse_overrides([f"{name}={values}"])
        swept = override.value()
        for value in [swept.start] if isinstance(swept, IntervalSweep) else override.sweep_string_iterator():
            config = compose(f"+sweep={path.stem}", f"{name}={value}")
            assert config.sweep.sampler == ("grid" if path.stem in ("throughput", "kernels") else "tpe")
    assert f"+sweep={path.stem}" in path.read_text().splitlines()[1]


def test_the_kernel_sweep_has_all_kernels_and_transports():
    params = OmegaConf.load(CONF / "sweep" / "kernels.yaml").hydra.sweeper.params
    assert params == {
        "attention.kernel": f"choice({', '.join(KERNELS)})",
        "attention.transport": f"choice({', '.join(TRANSPORTS)})",
    }
