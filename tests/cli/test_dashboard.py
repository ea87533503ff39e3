"""`python -m recipes.dashboard` from the command line: a real run, a watched run, and mistakes."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema import ConfigError
from recipes.dashboard.__main__ import main
from recipes.monitor.metric_registry import METRICS, SUMMARY_METRICS
from tests.cli.program import ENDS_WITHIN_S, REPOSITORY, Program, clean_environment, logged_names
from tests.errors import is_named, names, refused
from tests.unit.test_run_dir import write_run

COMMAND = [sys.executable, "-m", "recipes.dashboard"]


def dashboard(program: Program, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    environment = program.environment(wandb=True)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100)


def test_the_page_of_a_real_run_has_all_its_metrics(program, main_run):
    output = program.folder / "page.html"
    result = dashboard(program, main_run.run_dir, "--output", output)
    assert (result.returncode, result.stderr) == (0, "")
    names(result.stdout, output, "1 run", "step 6")
    shown = set(re.findall("<h3>(.*?)</h3>", output.read_text()))
    prefixes = {"train", "validation"}
    assert {
        metric.title
        for metric in METRICS
        if metric.section and prefixes & {*metric.prefixes} and metric.requires in ("", "a ring")
    } <= shown
    assert {"validation loss", "validation perplexity", "time of a step by part"} <= shown


def test_a_run_logs_its_metrics_of_the_registry(main_run):
    logged = {name for line in main_run.metrics for name in line}
    assert logged == logged_names("train", "validation", conditions=("a ring",))
    always = {name for metric in SUMMARY_METRICS if "GPU" not in metric.requires for name in metric.logged_names}
    assert set(main_run.summary) == always
    last = main_run.metrics[-1]
    assert 0 < last["train/exchange_wait_min_ms"] <= last["train/exchange_wait_max_ms"]
    assert last["train/exchange_wait_max_ms"] < 1e3 * last["train/step_time_max_s"]
    assert 0 <= last["train/rank_spread_ms"] < 1e3 * last["train/step_time_max_s"]
    assert 0 < last["train/data_wait_ms"] < 1e3 * last["train/step_time_max_s"]


@pytest.mark.slow
def test_a_watched_page_is_updated_until_ctrl_c(program):
    run_dir = write_run(program.folder / "run", num_rows=1, metrics="")
    page, output = run_dir / "dashboard.html", program.folder / "output"

    def wait_for(*parts: object) -> None:
        deadline = time.monotonic() + ENDS_WITHIN_S
        while not all(is_named(output.read_text(), str(part)) for part in parts):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)

    with output.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, str(run_dir), "--watch"], cwd=REPOSITORY, env=program.environment(), stdout=file, stderr=file
        )
    try:
        wait_for(run_dir, "Ctrl-C", run_dir / "metrics.jsonl")
        assert not page.exists()
        for step in (1, 2):
            with (run_dir / "metrics.jsonl").open("a") as metrics:
                metrics.write(f'{{"step": {step}, "train/loss": 1.5}}\n')
            wait_for(page, "1 run", f"step {step}")
            assert 'http-equiv="refresh"' in page.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(ENDS_WITHIN_S) == 0
    finally:
        process.kill()
    assert "Traceback" not in output.read_text()
    assert 'http-equiv="refresh"' not in page.read_text()
    assert list(run_dir.glob("*.part")) + list(run_dir.glob(".*.part")) == []


MISTAKES = {
    "no run": ([], ["python -m recipes.dashboard outputs/DATE/TIME"]),
    "a folder that is not there": (["{folder}/gone"], ["{folder}/gone", "outputs/DATE/TIME"]),
    "an output that cannot be written": (
        ["{folder}/run", "--output", "{folder}/no/page.html"],
        ["--output {folder}/no/page.html", "folder {folder}/no"],
    ),
    "wandb without a login": (["--wandb", "someone/something"], ["wandb login", "WANDB_API_KEY"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_message(program, case):
    write_run(program.folder / "run")
    arguments, parts = MISTAKES[case]
    result = dashboard(program, *(argument.format(folder=program.folder) for argument in arguments))
    assert result.returncode == 1
    assert bool(result.stdout) == ("--wandb" in arguments)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error") == 1
    assert "Traceback" not in result.stderr
    names(result.stderr, *(part.format(folder=program.folder) for part in parts))


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(ConfigError, "plotly", "jinja2", 'pip install -e ".[dashboard]" -c constraints.txt'):
        main(["outputs"])


def test_broken_files_are_warnings_and_the_rest_is_shown(program):
    write_run(program.folder / "sweep" / "0")
    broken = write_run(program.folder / "sweep" / "1", metrics='{"st')
    result = dashboard(program, program.folder / "sweep")
    assert result.returncode == 0
    cut_off, without_steps = result.stderr.splitlines()
    names(cut_off, "warning", broken / "metrics.jsonl", "line 1")
    names(without_steps, "warning", broken / "metrics.jsonl")
    assert (program.folder / "sweep" / "dashboard.html").exists()


def test_it_imports_nothing_slow(program):
    slow = "{'torch', 'deepspeed', 'wandb'}"
    code = f"import sys; from recipes.dashboard import __main__, page; print({slow} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    environment = clean_environment(Path(program.folder))
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "set()\n", result.stderr
