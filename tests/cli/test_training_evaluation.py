"""Evaluations of a run in training: they leave it as it is, and its best checkpoint survives a kill."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.export import export
from tests.cli.program import ENDS_WITHIN_S, Finished, Program
from tests.errors import names, some_line_names

JOB = [
    "+experiment=ra_sp",
    "launch.num_ranks=2",
    "data.sequence_length=512",
    "data.validation_sequences=2",
    "engine.dtype=fp32",
    "optimizer.lr=0.02",  # so high that the best step is not the last
    "num_steps=9",
    "logging.every_n_steps=1",
    "breakdown=false",
    "checkpoint.every_n_steps=4",
    "checkpoint.keep=1",
]
ASKED = [
    "evaluate.tasks=[loss,niah_single,aggregation]",
    "evaluate.lengths=[512,300]",
    "evaluate.depths=2",
    "evaluate.samples=3",
]
EVALUATED = [*ASKED, "evaluate.every_n_steps=1", "checkpoint.keep_best=true"]
TASKS = [f"evaluation/accuracy/{task}/{length}" for task in ("niah_single", "aggregation") for length in (300, 512)]


def trained(finished: Finished) -> list[tuple[float, ...]]:
    return [(row["train/loss"], row["train/grad_norm"], row["train/data_sequence"]) for row in finished.metrics]


def evaluations(finished: Finished) -> dict[int, dict[str, float]]:
    """By step."""
    return {
        row["step"]: {name: row[name] for name in row if name.startswith("evaluation/")} for row in finished.metrics
    }


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    output = run_dir.parent / f"{run_dir.name}.safetensors"
    export(run_dir, output)
    return load_file(output)


@pytest.mark.slow
def test_it_changes_nothing_of_the_training_and_the_best_survives_a_kill(program: Program):
    plain = program.run(*JOB, name="plain")
    evaluated = program.run(*JOB, *EVALUATED, name="evaluated")
    assert (plain.exit_code, evaluated.exit_code) == (0, 0), evaluated.stderr
    assert trained(evaluated) == trained(plain)
    expected, found = weights(plain.run_dir), weights(evaluated.run_dir)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    of_steps = evaluations(evaluated)
    assert [*of_steps] == [*range(1, 10)]
    assert all(row.keys() >= {"evaluation/accuracy", "evaluation/loss", *TASKS} for row in of_steps.values())
    last = evaluated.metrics[-1]
    assert last["evaluation/loss"] == pytest.approx(last["validation/loss"], rel=1e-6)
    best = max(of_steps, key=lambda n: (of_steps[n]["evaluation/accuracy"], -of_steps[n]["evaluation/answer_loss"]))
    folder = f"step_{best:08d}"
    assert best < 9
    assert checkpoints(evaluated.run_dir) == {"latest", "best", "step_00000009", folder}
    assert (evaluated.run_dir / "checkpoints" / "best").read_text() == folder
    assert evaluated.summary["best_checkpoint"] == f"checkpoints/{folder}"
    some_line_names(evaluated.stdout.splitlines(), "best checkpoint", evaluated.run_dir / "checkpoints" / folder)

    with program.started(*JOB, *EVALUATED, name="killed") as running:
        running.until(lambda: re.search("^step 7: evaluation", running.stdout, re.MULTILINE))
        running.family()
        running.process.send_signal(signal.SIGKILL)
        running.finish(ENDS_WITHIN_S)
        running.assert_nothing_is_left()
    assert folder in checkpoints(program.folder / "killed")
    resumed = program.run(*JOB, *EVALUATED, name="killed")
    assert resumed.exit_code == 0, resumed.stderr
    some_line_names(resumed.stdout.splitlines(), "resuming")
    assert evaluations(resumed) == of_steps
    assert checkpoints(resumed.run_dir) == checkpoints(evaluated.run_dir)
    assert resumed.summary["best_checkpoint"] == f"checkpoints/{folder}"

    asked = ["recipe=evaluate", "launch.num_ranks=2", "data.validation_sequences=2", *ASKED]
    afterwards = program.run(*asked, f"evaluate.model={resumed.run_dir / 'checkpoints' / folder}", name="afterwards")
    assert afterwards.exit_code == 0, afterwards.stderr
    for name in TASKS:
        assert afterwards.summary[name.removeprefix("evaluation/")] == of_steps[best][name]
    cells = json.loads((afterwards.run_dir / "evaluation.json").read_text())["cells"]
    losses = [cell["answer_loss"] for cell in cells if cell["task"] != "loss"]
    assert sum(losses) / len(losses) == pytest.approx(of_steps[best]["evaluation/answer_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_signal_ends_an_evaluation(program: Program):
    with program.started(*JOB, *EVALUATED, "evaluate.samples=1000", name="preempted") as running:
        running.until(lambda: "evaluating ..." in running.stdout)
        running.family()
        running.process.send_signal(signal.SIGTERM)
        preempted = running.finish(ENDS_WITHIN_S)
        running.assert_nothing_is_left()
    assert (preempted.exit_code, preempted.stderr) == (143, "")
    some_line_names(preempted.stdout.splitlines(), "step 1", "evaluation", "signal")
    assert not any(evaluations(preempted).values())
    assert "latest" in checkpoints(preempted.run_dir)


def test_mistakes_are_refused_before_ranks_start(program: Program):
    for arguments, parts in [
        (["evaluate.lengths=[100]"], ["aggregation", "length=100"]),
        (["evaluate.lengths=[4096]"], ["evaluate.lengths=[4096]", "data.sequence_length=512"]),
    ]:
        finished = program.run(*JOB, *EVALUATED, *arguments, name="refused")
        assert finished.exit_code == 1
        names(finished.stderr, *parts)
        assert not finished.ranks_were_started
