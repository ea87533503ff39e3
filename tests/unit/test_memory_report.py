"""The memory of a step, predicted, against what GPUs were seen to give out; on the CPU: tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import Config, EngineConfig
from recipes.memory_report import refused
from tests.long_step import predicted_again

RESULTS = Path(__file__).parents[2] / "docs" / "results"
LIMITS = {  # the goal is 10 %
    "memory_H200.json": 0.02,
    "million_H200.json": 0.01,
    "half_million_H100.json": 0.01,
    "long_steps_2xH200.json": 0.02,
    "flat_4xH100.json": 0.01,
    "tools_H100.json": 0.05,
}
MEASURED = [
    pytest.param(row, limit, id=f"{row['device']}: {row['setting']}")
    for name, limit in LIMITS.items()
    for row in json.loads((RESULTS / name).read_text())
    if "error" not in row and "offload_parameters" not in row["setting"]  # of which nothing is predicted
]


@pytest.mark.parametrize(("row", "limit"), MEASURED)
def test_a_step_took_what_was_predicted(row, limit):
    assert predicted_again(row)["predicted_gib"] == pytest.approx(row["peak_gib"], rel=limit)


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
