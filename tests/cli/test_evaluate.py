"""recipe=evaluate of a Hugging Face folder and of a run, killed and resumed, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from recipes.dashboard import page
from recipes.run.run_dir import load_runs
from tests.cli.program import ENDS_WITHIN_S, SMALL, Finished, Program
from tests.errors import names, some_line_names

ASKED = [
    "recipe=evaluate",
    "launch.num_ranks=2",
    "data.validation_sequences=2",
    "evaluate.lengths=[512,256]",
    "evaluate.tasks=[loss,niah_single,aggregation]",
    "evaluate.samples=4",
]


def evaluation(finished: Finished) -> dict[str, Any]:
    return json.loads((finished.run_dir / "evaluation.json").read_text())


@pytest.mark.slow
def test_a_killed_evaluation_resumes_with_equal_results(program: Program, tiny_llama: Path):
    asked = [*ASKED, f"evaluate.model={tiny_llama}", "evaluate.context=64"]
    with program.started(*asked, name="interrupted") as running:
        running.until(lambda: re.search(r"^4/13 ", running.stdout, re.MULTILINE))
        running.family()
        running.process.send_signal(signal.SIGKILL)
        killed = running.finish(ENDS_WITHIN_S)
        running.assert_nothing_is_left()
    file_of_killed = evaluation(killed)
    before = file_of_killed["cells"]
    assert 4 <= len(before) < 13

    resumed = program.run(*asked, name="interrupted")
    assert resumed.exit_code == 0, resumed.stderr
    left = 13 - len(before)
    some_line_names(resumed.stdout.splitlines(), f"{left}/{left}", "aggregation", "512 tokens")
    reference = program.run(*asked, name="reference")
    assert reference.exit_code == 0, reference.stderr
    found = evaluation(resumed)["cells"]
    assert found[: len(before)] == before
    assert found == evaluation(reference)["cells"]
    assert evaluation(resumed)["elapsed_s"] > file_of_killed["elapsed_s"]

    loss, *retrieval = found
    assert (loss["task"], loss["source"], loss["length"], loss["context"]) == ("loss", "stdlib", 512, 64)
    assert [(row["task"], row["length"], row.get("depth")) for row in retrieval] == [
        (task, length, depth)
        for length in (256, 512)
        for task, depths in (("niah_single", (0.0, 0.25, 0.5, 0.75, 1.0)), ("aggregation", (None,)))
        for depth in depths
    ]
    assert [row["step"] for row in resumed.metrics] == [*range(1, 14)]
    assert resumed.metrics[1]["evaluation/accuracy/niah_single"] == retrieval[0]["accuracy"]
    assert resumed.summary["loss/stdlib/512"] == loss["loss"]
    assert resumed.summary.keys() >= {"accuracy/niah_single/256", "accuracy/aggregation/512"}
    assert (resumed.run_dir / "evaluation.png").exists()
    some_line_names(resumed.stdout.splitlines(), "heat map", resumed.run_dir / "evaluation.png")
    text = page.render(load_runs([resumed.run_dir]))
    assert all(f"{resumed.run_dir.name}: {task}" in text for task in ("niah_single", "aggregation"))

    other = program.run(*asked, "evaluate.seed=1", name="interrupted")
    assert other.exit_code == 1
    names(other.stderr, "evaluate.seed=0", 1, "hydra.run.dir")
    assert "starting" not in other.stdout


def test_a_run_is_evaluated_at_its_newest_checkpoint(program: Program):
    asked = [*ASKED, "evaluate.tasks=[niah_single,loss]", "evaluate.lengths=[256]", "evaluate.depths=1"]
    trained = program.run("+experiment=ra_sp", *SMALL, "num_steps=2", "breakdown=false")
    assert trained.exit_code == 0, trained.stderr
    evaluated = program.run(*asked, f"evaluate.model={trained.run_dir}", name="evaluated")
    assert evaluated.exit_code == 0, evaluated.stderr
    loss, retrieval = evaluation(evaluated)["cells"]
    assert abs(loss["loss"] - trained.summary["validation_loss"]) < 1e-3  # of bf16 weights beside others in bf16
    names(evaluation(evaluated)["settings"]["evaluate.model"], "step_00000002")
    assert (retrieval["task"], retrieval["depth"], retrieval["accuracy"]) == ("niah_single", 0.5, 0.0)
    assert (evaluated.run_dir / "evaluation.png").exists()
    assert "!!!" not in evaluated.stdout

    longer = program.run(*asked, f"evaluate.model={trained.run_dir}", "evaluate.lengths=[512]", name="longer")
    assert longer.exit_code == 1
    names(longer.stderr, "data.validation_sequences=2 x 256", "2 x 512", "data.validation_sequences=1")
    assert not longer.ranks_were_started


def test_mistakes_are_refused_before_ranks_start(program: Program, tiny_llama: Path):
    model = f"evaluate.model={tiny_llama}"
    for arguments, parts in [
        ([model, "evaluate.tasks=[niah]"], ["niah", "niah_single"]),
        ([model, "evaluate.lengths=[16]"], ["niah_single", "length=16"]),
        ([], ["recipe=evaluate", "evaluate.model=RUN_DIR"]),
        ([model, "parallelism=tensor_pipeline"], ["recipe=evaluate", "parallelism=tensor_pipeline"]),
        (["recipe=pretrain", model], [model, "recipe=evaluate"]),
    ]:
        finished = program.run(*ASKED, *arguments, name="refused")
        assert finished.exit_code == 1
        assert finished.stderr.count("\n") == 1, finished.stderr
        names(finished.stderr, *parts)
        assert not finished.ranks_were_started


@pytest.mark.slow
def test_a_length_beyond_the_rotary_embeddings_is_warned_of(program: Program, tiny_llama: Path):
    finished = program.run(*ASKED, f"evaluate.model={tiny_llama}", "evaluate.lengths=[4096]", "explain=true")
    assert finished.exit_code == 0, finished.stderr
    some_line_names(finished.stdout.splitlines(), "!!!", "4,096", "2,048", "model.rope='{rope_type:yarn,factor:2}'")
