"""What a step that was not applied means, and what people are told."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from conf.schema import Config, EngineConfig
from recipes.checkpoint.manifest import step_name
from recipes.engine.base import StepResult
from recipes.launch.bad_steps import MOST_IN_A_ROW, BadSteps
from recipes.run.errors import RunFailed

DATA = mock.Mock(last_sha256="abc")


def result(loss: float, applied: bool) -> StepResult:
    return StepResult(torch.tensor(loss), 1.0, torch.tensor(0.0), applied)


def bad_steps(policy: str, run_dir: Path, dtype: str = "bf16", ranks: tuple[int, ...] = (1, 2)) -> BadSteps:
    plan = mock.Mock(config=Config(engine=EngineConfig(dtype=dtype, on_bad_step=policy)), data_tokens_per_step=1000)
    return BadSteps(plan, mock.Mock(**{"ranks_with_nonfinite_loss.return_value": list(ranks)}), run_dir)


@pytest.mark.parametrize(
    ("step", "goes_on"),
    [(None, "there is no checkpoint yet"), (2, "the same command resumes from step_00000002")],
)
def test_a_run_stops_with_the_identity_of_the_batch(tmp_path, step, goes_on):
    if step is not None:
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    with pytest.raises(RunFailed) as caught:
        bad_steps("stop", tmp_path).check(3, result(float("nan"), applied=False), DATA)
    assert caught.value.of_all_ranks
    assert str(caught.value) == (
        "step 3: the loss is nan, that of the tokens of ranks 1, 2; its batch: training tokens 2,000 to 2,999, the "
        f"last sequence with SHA-256 abc\nnothing of it was applied; {goes_on}: engine.on_bad_step=skip leaves "
        "such batches out"
    )


def test_gradients_alone_can_be_bad(tmp_path):
    told = bad_steps("skip", tmp_path, ranks=()).check(1, result(2.5, applied=False), DATA)
    assert told is not None
    assert told.startswith("step 1: the gradients of a loss of 2.5000 are not finite; its batch: training tokens 0 to ")
    assert told.endswith(": skipped")


def test_steps_that_fp16_skips_to_find_its_scale_are_good_unless_their_loss_is_bad(tmp_path):
    steps = bad_steps("stop", tmp_path, dtype="fp16")
    assert steps.check(1, result(2.5, applied=False), DATA) is None
    with pytest.raises(RunFailed, match="the loss is inf"):
        steps.check(2, result(float("inf"), applied=False), DATA)


def test_so_many_in_a_row_are_not_the_batch(tmp_path):
    steps, bad = bad_steps("skip", tmp_path), result(float("nan"), applied=False)
    for step in range(1, MOST_IN_A_ROW):
        assert steps.check(step, bad, DATA)
    assert steps.check(MOST_IN_A_ROW, result(1.0, applied=True), DATA) is None
    for step in range(1, MOST_IN_A_ROW):
        assert steps.check(step, bad, DATA)
    (tmp_path / "checkpoints" / step_name(2)).mkdir(parents=True)
    not_the_batch = (
        "10 steps in a row were skipped, so it is not the batch: +debug=anomaly names the operation that makes the "
        "first NaN, and a run with a smaller optimizer.lr, and a hydra.run.dir of its own, may make none\n"
        "the same command resumes from step_00000002"
    )
    with pytest.raises(RunFailed, match=re.escape(not_the_batch)):
        steps.check(MOST_IN_A_ROW, bad, DATA)
