"""`-m`: one run after the other, each with a run dir and a wandb run of its own, all in one wandb group."""

from __future__ import annotations

import json
import re

from omegaconf import OmegaConf

ONE_RANK = ["launch.num_ranks=1", "data.sequence_length=64", "data.validation_sequences=1", "num_steps=2"]


CALLBACK = """
from hydra.experimental.callback import Callback

class Results(Callback):
    def on_job_end(self, config, job_return, **_):
        with open({path!r}, "a") as file:
            print(job_return.return_value, file=file)
"""


def test_jobs_are_runs_of_one_wandb_group_and_the_sweeper_gets_their_final_validation_losses(program):
    results = program.folder / "results.jsonl"
    (program.folder / "sweep_callback.py").write_text(CALLBACK.format(path=str(results)))
    callback = "+hydra.callbacks.results._target_=sweep_callback.Results"
    arguments = ["+experiment=ra_sp", *ONE_RANK, "optimizer.lr=1e-3,3e-3", callback]
    result = program.run("-m", *arguments, name="sweep", PYTHONPATH=str(program.folder))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert len(re.findall("^done: 2 steps", result.stdout, re.MULTILINE)) == 2
    given = [json.loads(line) for line in results.read_text().splitlines()]
    kept = [(result.run_dir / job / "metrics.jsonl").read_text().splitlines()[-1] for job in ("0", "1")]
    assert given == [json.loads(line)["validation/loss"] for line in kept]
    configs = [OmegaConf.load(result.run_dir / job / "config.yaml") for job in ("0", "1")]
    assert [config.optimizer.lr for config in configs] == [1e-3, 3e-3]
    assert {config.logging.group for config in configs} == {"sweep-sweep"}
    for job in ("0", "1"):
        assert len(list((result.run_dir / job / "wandb").glob("offline-run-*"))) == 1


def test_a_bad_job_is_told_does_not_stop_the_others_and_fails_the_sweep(program):
    result = program.run("-m", *ONE_RANK, "parallelism.ring_degree=2,1", name="sweep")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: parallelism.ring_degree=2 does not divide the 1 ranks")
    assert lines[-1] == "error: job 0 of the sweep failed: see its message above"
    assert "Traceback" not in result.stderr
    assert not (result.run_dir / "0" / "logs").exists()
    assert (result.run_dir / "1" / "metrics.jsonl").exists()
