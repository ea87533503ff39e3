"""The memory of a step, predicted, against what the real engine was seen to hold: `python -m tests.tools.memory` has more."""

from __future__ import annotations

import dataclasses
import re

import pytest

from conf.schema import Config, EngineConfig, ParallelismConfig
from recipes.planning.engine_memory import num_persistent_parameters
from recipes.planning.memory import num_parameters
from recipes.planning.memory_timeline import lines, longest_length, memory_timeline
from tests.pool import WorkerPool
from tests.tools.memory import SETTINGS, Setting, count_step

LIMIT = 0.05
COVERING = [SETTINGS[number] for number in (1, 2, 4, 5, 8, 11, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24)]


@pytest.mark.parametrize("setting", COVERING, ids=lambda s: f"{s.dtype}-zero{s.zero_stage}-{s.recompute}-{s.num_ranks}")
def test_a_step_holds_what_was_predicted(pool: WorkerPool, setting: Setting):
    counted = max(pool.run(count_step, setting, num_ranks=setting.num_ranks))
    assert setting.predicted[1] == pytest.approx(counted, rel=LIMIT)


def test_each_moment_is_the_fullest_of_some_setting():
    assert {setting.predicted[0] for setting in COVERING} == {
        "the loss, backward",
        "the last layer's MLP, backward",
        "the last layer's attention, backward",
        "the last layer's second norm, backward",
        "the end of the step",
    }


def test_the_longest_sequence_fits_and_one_token_more_per_rank_does_not():
    plan = Setting("bf16", 1, num_ranks=4).plan
    memory_bytes = 2**30
    length = longest_length(plan.config, plan.degrees, plan.method, memory_bytes, False)
    assert length % 4 == 0

    def peak(local_length: int) -> float:
        return max(
            moment.total for moment in memory_timeline(plan.config, plan.degrees, plan.method, local_length, False)
        )

    assert peak(length // 4) <= memory_bytes < peak(length // 4 + 1)
    assert longest_length(plan.config, plan.degrees, plan.method, 1000, False) == 0


def test_the_report_adds_up():
    plan = Setting("bf16", 1).plan
    text = lines(plan.config, plan.degrees, plan.method, 1024, 2**30, on_gpu=False)
    numbers = [float(match[1]) for line in text if (match := re.match(r" +([\d.]+) GiB  ", line))]
    total = re.match(
        r"memory of a step, per rank: ([\d.]+) GiB when fullest, which is at: the loss, backward$", text[0]
    )
    assert total is not None
    assert sum(numbers) == pytest.approx(float(total[1]), rel=0.1)  # each rounded to two digits
    assert re.fullmatch(r"  1.00 GiB hold sequences of [\d,]+ tokens with engine.recompute=none", text[-2])
    assert re.fullmatch(r"  1.00 GiB hold sequences of [\d,]+ tokens with engine.recompute=selective", text[-1])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(recipe="forward"), "a step of recipe=forward is not predicted"),
        (Config(parallelism=ParallelismConfig("tensor_pipeline")), "the layers of tensor and pipeline ranks are not"),
        (
            Config(engine=EngineConfig(gradient_accumulation_steps=2)),
            "steps of several micro-batches are not predicted",
        ),
        (Config(engine=EngineConfig(dtype="fp16")), "fp16 is not predicted"),
    ],
)
def test_what_is_not_predicted_is_said(config: Config, reason: str):
    assert lines(config, Setting("bf16", 1).plan.degrees, "ring", 8, None, on_gpu=False)[0].startswith(
        f"memory of a step: {reason}"
    )


def test_parameters_that_zero_3_keeps_whole_are_told_by_their_size():
    model = dataclasses.replace(Setting("bf16", 3).plan.config.model, mlp_size=1024)  # up is 262,144, down 131,072
    matrices = model.num_layers * 3 * 1024 * model.hidden_size
    assert num_persistent_parameters(model) == num_parameters(model) - matrices
