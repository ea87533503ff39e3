"""`-m`: several runs, each with its own run dir and wandb run, in one wandb group.

With +sweep=NAME they are trials, which may fail and be interrupted. tests/unit/test_sweep.py needs no ranks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.cli.program import REPOSITORY, Finished

ONE_RANK = ["launch.num_ranks=1", "data.sequence_length=64", "data.validation_sequences=1", "num_steps=2"]


CALLBACK = """
from hydra.experimental.callback import Callback

class Results(Callback):
    def on_job_end(self, config, job_return, **_):
        with open({path!r}, "a") as file:
            print(job_return.return_value, file=file)
"""


@pytest.mark.slow
def test_jobs_share_a_wandb_group_and_the_sweeper_gets_their_final_validation_losses(program):
    results = program.folder / "results.jsonl"
    (program.folder / "sweep_callback.py").write_text(CALLBACK.format(path=str(results)))
    callback = "+hydra.callbacks.results._target_=sweep_callback.Results"
    arguments = ["+experiment=ra_sp", *ONE_RANK, "optimizer.lr=1e-3,3e-3", callback]
    result = program.run("-m", *arguments, name="sweep", wandb=True, PYTHONPATH=str(program.folder))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert len(re.findall("^done: 2 steps", result.stdout, re.MULTILINE)) == 2
    given = [json.loads(line) for line in results.read_text().splitlines()]
    logged = [(result.run_dir / job / "metrics.jsonl").read_text().splitlines()[-1] for job in ("0", "1")]
    assert given == [json.loads(line)["validation/loss"] for line in logged]
    configs = [OmegaConf.load(result.run_dir / job / "config.yaml") for job in ("0", "1")]
    assert [config.optimizer.lr for config in configs] == [1e-3, 3e-3]
    assert {config.logging.group for config in configs} == {"sweep-sweep"}
    for job in ("0", "1"):
        assert len(list((result.run_dir / job / "wandb").glob("offline-run-*"))) == 1


def test_a_bad_job_is_reported_does_not_stop_others_and_fails_the_sweep(program):
    result = program.run("-m", *ONE_RANK, "parallelism.ring_degree=2,1", name="sweep")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: parallelism.ring_degree=2 does not divide the 1 ranks")
    assert lines[-1] == "error: job 0 of the sweep failed: see its message above"
    assert "Traceback" not in result.stderr
    assert not (result.run_dir / "0" / "logs").exists()
    assert (result.run_dir / "1" / "metrics.jsonl").exists()


TINY = [*ONE_RANK, "breakdown=false"]


def read_trials(result: Finished) -> list[dict[str, Any]]:
    return json.loads((result.run_dir / "sweep.json").read_text())["trials"]


@pytest.mark.slow
def test_a_killed_sweep_resumes_with_what_is_missing(program):
    """It is killed in its second trial. The third and the fourth cannot run."""
    grid = ["sweep.sampler=grid", "parallelism.ring_degree=1,2", "optimizer.lr=1e-3,3e-3"]
    arguments = ["-m", "+sweep=search", *TINY, *grid]
    with program.started(*arguments, name="sweep") as sweep:
        sweep.until(lambda: (sweep.run_dir / "2" / "logs").exists())  # seconds before its first step
        first = (sweep.run_dir / "1" / "metrics.jsonl").read_bytes()
        sweep.family()
        sweep.process.send_signal(signal.SIGKILL)
        sweep.process.wait()
        sweep.assert_nothing_is_left()
    result = program.run(*arguments, name="sweep")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.findall(r"^trial (\d)/4 starts", result.stdout, re.MULTILINE) == ["2", "3", "4"]
    assert (result.run_dir / "1" / "metrics.jsonl").read_bytes() == first
    assert (result.run_dir / "2.interrupted-1").is_dir()
    assert [(row["trial"], row["state"]) for row in read_trials(result)[2:]] == [(3, "failed"), (4, "failed")]
    best, other = read_trials(result)[:2]
    assert best["validation_loss"] < other["validation_loss"]
    for row in (best, other):
        run_dir = Path(row["run_dir"])
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["step"], last["validation/loss"]) == (2, row["validation_loss"])
        assert OmegaConf.load(run_dir / "config.yaml").optimizer.lr == float(row["overrides"]["optimizer.lr"])
        assert OmegaConf.load(run_dir / "config.yaml").logging.group == "sweep-sweep"
    reason = "parallelism.ring_degree=2 does not divide the 1 ranks: use 1, such as parallelism.ring_degree=1,"
    line = rf"trial 3/4 FAILED after \d+ s \| {re.escape(reason)} or another launch.num_ranks \| best"
    assert re.search(line, result.stdout)
    assert f"best: trial {best['trial']}, validation_loss" in result.stdout
    assert (result.run_dir / "sweep.png").exists()


def test_a_sweep_fails_if_all_its_trials_fail(program):
    result = program.run(
        "-m", "+sweep=search", *TINY, "sweep.sampler=grid", "parallelism.ring_degree=2,3", name="sweep"
    )
    assert result.exit_code == 1
    assert result.stderr == "error: all 2 trials failed\n"
    assert [row["state"] for row in read_trials(result)] == ["failed", "failed"]
    assert not (result.run_dir / "1" / "logs").exists()


@pytest.mark.slow
def test_a_submitit_job_with_two_tasks_is_a_run_of_two_ranks(program):
    """With its local executor. Tasks are ranks, as with srun."""
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "sweep.num_parallel=2"]
    degrees = ["sweep.sampler=grid", "parallelism.ring_degree=2,3"]
    result = program.run("-m", "+sweep=search", *TINY[1:], *degrees, *launcher, name="sweep")
    assert (result.exit_code, result.stderr) == (0, "")
    done, failed = read_trials(result)
    assert (done["trial"], failed["trial"]) == (1, 2)
    assert failed["error"].startswith("parallelism.ring_degree=3 does not divide the 2 ranks: use 1 or 2, such as")
    assert sorted(path.name for path in (result.run_dir / "1" / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    [log] = [
        path for path in (result.run_dir / ".submitit").glob("*/*_0_log.out") if "done: 2 steps" in path.read_text()
    ]
    assert "ranks  1 data x 2 ring, on CPU" in log.read_text()
    assert "starting" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lr_batch", "throughput"])
def test_a_run_that_the_wandb_agent_starts_belongs_to_its_sweep(program, name):
    """The agent's own functions build the command."""
    from wandb.sdk.launch.sweeps import utils as wandb_agent  # takes a second to import

    definition = yaml.safe_load((REPOSITORY / "wandb_sweeps" / f"{name}.yaml").read_text())
    parameters = definition["parameters"].items()
    drawn = {field: {"value": space["values"][0] if "values" in space else space["min"]} for field, space in parameters}
    variables = {
        **wandb_agent.create_sweep_command_args({"args": drawn}),
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [definition["program"]],
    }
    parts = wandb_agent.create_sweep_command(definition["command"])
    env, interpreter, script, *arguments = [
        word for part in parts for word in (variables[part[2:-1]] if part.startswith("${") else [part])
    ]
    assert script == "train.py"
    (program.folder / "config-run7.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **drawn}))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep3",
        "WANDB_RUN_ID": "run7",
        "WANDB_SWEEP_PARAM_PATH": str(program.folder / "config-run7.yaml"),
    }
    small = [*ONE_RANK, "data.sequence_length=64", "engine.train_batch_size=2"]
    result = program.run(*arguments, *small, launcher=[env, interpreter], **environment)
    assert (result.exit_code, result.stderr) == (0, "")
    config = OmegaConf.load(result.run_dir / "config.yaml")
    first = next(iter(drawn))
    assert OmegaConf.select(config, first) == drawn[first]["value"]
    [run] = (result.run_dir / "wandb").glob("offline-run-*-run7")
    leet = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(run)]
    shown = subprocess.run(leet, env=program.environment(), capture_output=True, text=True, check=True).stdout
    inspected = json.loads(shown)
    assert isinstance(inspected["summary"][definition["metric"]["name"]], float)
    assert inspected["config"][first] == drawn[first]["value"]
