"""The memory of a step, predicted, against what GPUs were seen to give out; on the CPU: tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import Config, EngineConfig
from recipes.planning.memory_timeline import memory_timeline, refused
from recipes.planning.plan import Plan
from tests.tools.long_step import composed, predicted_again

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MEASURED_IN = [
    "memory_H200.json",
    "million_H200.json",
    "half_million_H100.json",
    "long_steps_2xH200.json",
    "flat_4xH100.json",
    "tools_H100.json",
]
MEASURED = [
    pytest.param(row, id=f"{row['device']}: {row['setting']}")
    for name in MEASURED_IN
    for row in json.loads((RESULTS / name).read_text())
    if "error" not in row and "offload_parameters" not in row["setting"]  # of which nothing is predicted
]


@pytest.mark.parametrize("row", MEASURED)
def test_a_step_took_what_was_predicted(row):  # the goal is 10 %
    assert predicted_again(row)["predicted_gib"] == pytest.approx(row["peak_gib"], rel=0.01)


@pytest.mark.parametrize(
    ("engine", "on_gpu", "reason"),
    [
        ({"offload_optimizer": True}, True, None),
        ({"offload_optimizer": True}, False, "the optimizer on the host is predicted for GPUs only"),
        ({"offload_optimizer": True, "dtype": "fp32"}, True, "the optimizer on the host is predicted for bf16 on ZeRO"),
        ({"offload_optimizer": True, "zero_stage": 3}, True, "the optimizer on the host is predicted for bf16 on ZeRO"),
        ({"offload_parameters": True, "zero_stage": 3}, True, "steps with weights on the host are not predicted"),
    ],
)
def test_states_on_the_host_are_predicted_where_they_were_counted(engine, on_gpu, reason):
    said = refused(Config(engine=EngineConfig(**engine)), on_gpu)
    assert said is None if reason is None else said is not None and said.startswith(reason)


def parts(moment: str, setting: str) -> dict[str, float]:
    """Of a step of 8B's shape on one H100, in GiB."""
    plan = Plan(composed(f"model=llama_8b model.num_layers=4 {setting}"), 1, "cuda", "NVIDIA H100", None, 1)
    found = memory_timeline(plan.config, plan.degrees, plan.method, plan.local_tokens, on_gpu=True)
    return next({name: size / 2**30 for name, size in one.parts.items()} for one in found if one.name == moment)


COME = "gradients and what makes them"
LAST_MLP = "the last layer's MLP, backward"


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "stand_gib"),
    [
        ("bf16", 128_256, 5.2071),  # the head fills a bucket alone: sums of the matrices, as Adam has them in groups
        ("bf16", 120_000, 0.0),  # less than a bucket, which the MLP's gradients fill only after all tiles
        ("fp32", 128_256, 7.1642),  # of all
    ],
)
def test_sums_of_gradients_stand_once_a_bucket_was_reduced(dtype, vocab_size, stand_gib):
    setting = (
        f"engine.dtype={dtype} model.vocab_size={vocab_size} data.sequence_length=32768 engine.recompute=selective"
    )
    summed = parts(LAST_MLP, f"{setting} engine.zero_stage=2")[COME]
    not_summed = parts(LAST_MLP, f"{setting} engine.zero_stage=0")[COME]
    head_gib = (4 if dtype == "fp32" else 2) * (vocab_size + 1) * 4096 / 2**30
    assert summed - (not_summed - head_gib) == pytest.approx(stand_gib, abs=1e-4)
