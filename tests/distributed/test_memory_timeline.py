"""The predicted memory of a step against tensors counted in the engine. `python -m tests.tools.memory` has more."""

from __future__ import annotations

import dataclasses
import re

import pytest

from conf.schema import Config, DataConfig, Degrees, EngineConfig, ParallelismConfig
from recipes.planning.engine_memory import sharded_parameters
from recipes.planning.explain import step_memory_lines
from recipes.planning.memory_timeline import StepMemory
from tests.errors import names
from tests.pool import WorkerPool
from tests.tools.memory import SETTINGS, Setting, count_step

pytestmark = pytest.mark.slow

LIMIT = 0.05
COVERING = [SETTINGS[number] for number in (1, 2, 4, 5, 8, 11, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24)]


@pytest.mark.parametrize("setting", COVERING, ids=lambda s: f"{s.dtype}-zero{s.zero_stage}-{s.recompute}-{s.num_ranks}")
def test_the_counted_peak_is_predicted(pool: WorkerPool, setting: Setting):
    counted = max(pool.run(count_step, setting, num_ranks=setting.num_ranks))
    assert setting.predicted[1] == pytest.approx(counted, rel=LIMIT)


def test_each_point_is_the_peak_of_some_setting():
    assert {setting.predicted[0] for setting in COVERING} == {
        "the loss, backward",
        "the last layer's MLP, backward",
        "the last layer's attention, backward",
        "the last layer's second norm, backward",
        "the end of the step",
    }


def test_the_longest_sequence_fits_and_one_token_more_per_rank_does_not():
    step, memory_bytes = Setting("bf16", 1, num_ranks=4).plan.step_memory, 2**30
    local_length, rest = divmod(step.longest_length(memory_bytes), 4)
    assert rest == 0
    assert dataclasses.replace(step, local_tokens=local_length).peak.total <= memory_bytes
    assert dataclasses.replace(step, local_tokens=local_length + 1).peak.total > memory_bytes
    assert step.longest_length(1000) == 0


def test_the_report_adds_up():
    text = step_memory_lines(dataclasses.replace(Setting("bf16", 1).plan, memory_bytes=2**30))
    numbers = [float(match[1]) for line in text if (match := re.match(r" +([\d.]+) GiB  ", line))]
    names(text[0], "peak", "the loss, backward")
    [total] = re.findall(r"([\d.]+) GiB", text[0])
    assert sum(numbers) == pytest.approx(float(total), rel=0.1)  # each rounded to two digits
    lengths = []
    for line, recompute in zip(text[-2:], ("none", "selective"), strict=True):
        names(line, "1.00 GiB", f"engine.recompute={recompute}")
        lengths += re.findall(r"([\d,]+) tokens", line)
    none, selective = (int(length.replace(",", "")) for length in lengths)
    assert 0 < none < selective


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(recipe="forward"), "recipe=forward"),
        (
            Config(parallelism=ParallelismConfig("tensor_pipeline"), data=DataConfig(document_mask=False)),
            "parallelism=tensor_pipeline",
        ),
        (Config(engine=EngineConfig(gradient_accumulation_steps=2)), "gradient accumulation over 2 micro-batches"),
        (Config(engine=EngineConfig(dtype="fp16")), "engine.dtype=fp16"),
    ],
)
def test_unsupported_configurations_are_named(config: Config, reason: str):
    unsupported = StepMemory(config, Degrees(1, 1, 1), "ring", 8, on_gpu=False, ranks_per_host=1).unsupported
    assert unsupported is not None
    names(unsupported, reason)


def test_zero_3_never_shards_small_parameters():
    model = dataclasses.replace(Setting("bf16", 3).plan.config.model, mlp_size=1024)  # up is 262,144, down 131,072
    matrices = model.num_layers * 3 * 1024 * model.hidden_size
    assert sharded_parameters(model) == matrices
