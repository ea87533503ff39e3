"""A run interrupted by SIGTERM, kill -9 and a broken checkpoint is bit-identical to an uninterrupted one."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes.export import export
from tests.cli.program import ENDS_WITHIN_S, PLAIN, SMALL, Finished, Program, wandb_history
from tests.errors import names, some_line_names

JOB = [
    *SMALL,
    "+experiment=ra_sp",
    "engine.dtype=fp32",
    "num_steps=40",
    "logging.every_n_steps=5",
    "checkpoint.every_n_steps=10",
    "checkpoint.keep=3",
    "breakdown=false",
]
# the metrics that do not depend on the clock
COMPUTED = (
    *("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/data_epoch", "train/data_sequence"),
    "validation/loss",
)


def computed(finished: Finished) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in COMPUTED} for row in finished.metrics]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    output = run_dir.parent / f"{run_dir.name}.safetensors"
    export(run_dir, output)
    return load_file(output)


def interrupted(program: Program, at: str, number: signal.Signals, *more: str) -> Finished:
    """The job, sent a signal when it prints a line; checks that no process is left."""
    with program.started(*JOB, *more, name="interrupted", wandb=True) as running:
        running.until(lambda: re.search(at, running.stdout))
        running.family()
        running.process.send_signal(number)
        finished = running.finish(ENDS_WITHIN_S)
        running.assert_nothing_is_left()
        return finished


@pytest.mark.slow
def test_an_interrupted_run_is_bit_identical_to_an_uninterrupted_one(program: Program):
    with program.started(*JOB, name="reference") as uninterrupted:  # in parallel
        preempted = interrupted(program, "step +5/", signal.SIGTERM)
        assert (preempted.exit_code, preempted.stderr) == (143, "")
        told = preempted.stdout.splitlines()[-1]
        names(told, "preempted", f"hydra.run.dir={preempted.run_dir}")
        [last] = map(int, re.findall(r"step (\d+)", told))
        assert checkpoints(preempted.run_dir)[-1] == f"step_{last:08d}"
        assert (preempted.run_dir / "checkpoints" / "latest").read_text() == f"step_{last:08d}"
        assert (preempted.run_dir / "logs" / "preempted").read_text() == f"step_{last:08d}\n"

        killed = interrupted(program, "step +35/", signal.SIGKILL, "launch.timeout_s=300")
        some_line_names(killed.stdout.splitlines(), "resuming", f"step {last}")
        assert "step_00000030" in checkpoints(killed.run_dir)
        assert killed.metrics[-1]["step"] == 35
        assert not (killed.run_dir / "logs" / "preempted").exists()  # from the previous start

        broken = killed.run_dir / "checkpoints" / "step_00000030" / "mp_rank_00_model_states.pt"
        broken.write_bytes(broken.read_bytes()[:-1])
        resumed = program.run(*JOB, name="interrupted", wandb=True)
        assert resumed.exit_code == 0, resumed.stderr
        told = resumed.stdout.splitlines()
        some_line_names(told, "step_00000030", "broken")
        some_line_names(told, "resuming", "step 20")
        some_line_names(told, "done", "40 steps", 20)
        steps = ["step_00000020", "step_00000030", "step_00000030.broken", "step_00000040"]
        assert checkpoints(resumed.run_dir) == ["latest", *steps]
        reference = uninterrupted.finish()

    assert reference.exit_code == 0, reference.stderr
    assert [row["step"] for row in reference.metrics] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert computed(resumed) == computed(reference)
    elapsed_s = [row["elapsed_s"] for row in resumed.metrics]
    assert elapsed_s == sorted(elapsed_s)
    assert resumed.summary["validation_loss"] == reference.summary["validation_loss"]
    expected, found = weights(reference.run_dir), weights(resumed.run_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # one wandb run, whose newest folder has all steps: `wandb sync` replaces earlier folders of the same id by it
    folders = sorted((resumed.run_dir / "wandb").glob("offline-run-*"))
    parts = [path.name.rpartition("-")[2] for path in folders]
    assert len(parts) == 3
    assert len(set(parts)) == 1
    assert resumed.stdout.endswith(f"wandb sync {folders[-1]}\n")
    rows = wandb_history(folders[-1], home=program.folder)
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (row["step"], row["train/loss"]) for row in resumed.metrics
    ]
    manifest = json.loads((resumed.run_dir / "checkpoints" / "step_00000040" / "manifest.json").read_text())
    assert manifest["wandb_run_id"] == parts[0]


@pytest.mark.slow
def test_a_run_whose_files_have_moved_resumes_as_if_they_had_not(program: Program):
    folder, elsewhere = program.folder / "texts", program.folder / "elsewhere"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"{number} and more words of a document. " * (number + 5))

    def run(texts: Path, num_steps: int, name: str = "moved") -> Finished:
        data = ["data=text_files", f"data.files={texts}/*.txt", "data.sequence_length=64"]
        return program.run(*PLAIN, *data, f"num_steps={num_steps}", name=name)

    whole = run(folder, 4, "whole")
    run(folder, 2)
    folder.rename(elsewhere)
    resumed = run(elsewhere, 4)
    assert resumed.exit_code == 0, resumed.stderr
    some_line_names(resumed.stdout.splitlines(), "resuming", "step 2")
    assert computed(resumed)[2:] == computed(whole)[2:]
    expected, found = weights(whole.run_dir), weights(resumed.run_dir)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    (elsewhere / "20.txt").write_text("one more")
    refused = run(elsewhere, 6)
    assert refused.exit_code == 1
    names(refused.stderr, "step_00000004", "text_files", "hydra.run.dir")
    assert refused.stdout == ""  # no ranks were started


@pytest.mark.slow
def test_other_ranks_and_another_stage_resume_with_an_equal_batch(program: Program):
    preempted = interrupted(program, "step +5/", signal.SIGTERM, "parallelism.data_degree=2")
    assert preempted.exit_code == 143
    refused = program.run(*JOB, "attention.layout=contiguous", name="interrupted")
    assert refused.exit_code == 1
    names(refused.stderr, "2 sequences", "2 x 1 x 1", 1, "engine.train_batch_size=2")
    assert refused.stdout == ""  # no ranks were started
    other = ["attention.layout=contiguous", "engine.train_batch_size=2", "engine.zero_stage=3", "launch.num_ranks=1"]
    resumed = program.run(*JOB, *other, name="interrupted")
    assert resumed.exit_code == 0, resumed.stderr
    changes = ("attention.layout zigzag -> contiguous", "parallelism.data_degree 2 -> 1")
    some_line_names(resumed.stdout.splitlines(), *changes, "engine.zero_stage 1 -> 3", "launch.num_ranks 2 -> 1")
    some_line_names(resumed.stdout.splitlines(), "resharding", "checkpoint")
    assert resumed.summary["validation_loss"] < resumed.metrics[0]["train/loss"]  # it keeps learning
    assert [row["train/data_sequence"] for row in resumed.metrics] == [2 * row["step"] for row in resumed.metrics]
