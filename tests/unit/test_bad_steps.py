"""Which steps are bad, and the messages when a run stops or skips."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from conf.schema import Config, EngineConfig
from recipes.checkpoint.manifest import step_name
from recipes.engine.base import StepResult
from recipes.launch.stopping import MAX_BAD_STEPS, BadSteps
from recipes.run.errors import RunFailed
from tests.errors import is_named, names, refused

DATA = mock.Mock(**{"last.position": (1, 2999), "last.sha256.return_value": "abc"})


def result(loss: float, applied: bool) -> StepResult:
    return StepResult(torch.tensor(loss), 1.0, torch.tensor(0.0), applied)


def bad_steps(policy: str, run_dir: Path, dtype: str = "bf16", ranks: tuple[int, ...] = (1, 2)) -> BadSteps:
    plan = mock.Mock(config=Config(engine=EngineConfig(dtype=dtype, on_bad_step=policy)), sequences_per_step=8)
    return BadSteps(plan, mock.Mock(**{"ranks_with_nonfinite_loss.return_value": list(ranks)}), run_dir)


@pytest.mark.parametrize("step", [None, 2])
def test_the_message_of_a_stopped_run_identifies_the_batch(tmp_path, step):
    if step is not None:
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    with pytest.raises(RunFailed) as caught:
        bad_steps("stop", tmp_path).check(3, result(float("nan"), applied=False), DATA)
    assert caught.value.of_all_ranks
    batch, advice = str(caught.value).splitlines()
    names(batch, "step 3", "nan", "1, 2", "8", "2,999", "1", "abc")
    names(advice, "engine.on_bad_step=skip")
    assert is_named(advice, "step_00000002") == (step is not None)  # the checkpoint to resume from


def test_gradients_can_be_bad_with_a_finite_loss(tmp_path):
    line = bad_steps("skip", tmp_path, ranks=()).check(1, result(2.5, applied=False), DATA)
    assert line is not None
    names(line, "step 1", "gradients", "2.5000", "2,999", "abc")


def test_fp16_steps_skipped_for_the_loss_scale_are_good_if_the_loss_is_finite(tmp_path):
    steps = bad_steps("stop", tmp_path, dtype="fp16")
    assert steps.check(1, result(2.5, applied=False), DATA) is None
    with refused(RunFailed, "step 2", "inf"):
        steps.check(2, result(float("inf"), applied=False), DATA)


def test_ten_bad_steps_in_a_row_stop_a_run_that_skips(tmp_path):
    steps, bad = bad_steps("skip", tmp_path), result(float("nan"), applied=False)
    for step in range(1, MAX_BAD_STEPS):
        assert steps.check(step, bad, DATA)
    assert steps.check(MAX_BAD_STEPS, result(1.0, applied=True), DATA) is None
    for step in range(1, MAX_BAD_STEPS):
        assert steps.check(step, bad, DATA)
    (tmp_path / "checkpoints" / step_name(2)).mkdir(parents=True)
    with pytest.raises(RunFailed) as caught:
        steps.check(MAX_BAD_STEPS, bad, DATA)
    bad_batch, advice, resume = str(caught.value).splitlines()
    names(bad_batch, "step 10", "nan", "1, 2")
    names(advice, "10", "+debug=anomaly")
    names(resume, "step_00000002")
