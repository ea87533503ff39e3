"""What DeepSpeed is told to keep on the host."""

from __future__ import annotations

import pytest
from torch import nn

from conf.schema import EngineConfig, OptimizerConfig
from recipes.engine.deepspeed_engine import deepspeed_config, optimizer_arguments


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, set()),
        ({"offload_optimizer": True}, {"offload_optimizer"}),
        ({"offload_parameters": True}, {"offload_param"}),
        ({"offload_optimizer": True, "offload_parameters": True}, {"offload_optimizer", "offload_param"}),
    ],
)
def test_deepspeed_is_told_what_was_asked_and_without_an_optimizer_nothing_of_it(fields, expected):
    settings = deepspeed_config(EngineConfig(zero_stage=3, **fields), 1000)
    for num_steps, keys in ((10, expected), (None, expected - {"offload_optimizer"})):
        arguments = optimizer_arguments(nn.Linear(2, 2), settings, OptimizerConfig(), num_steps)
        zero = arguments["config"]["zero_optimization"]
        assert {key for key in zero if key.startswith("offload")} == keys
        assert all(zero[key]["device"] == "cpu" for key in keys)
        if num_steps:
            assert arguments["optimizer"].defaults["fused"] == ("offload_optimizer" in expected)
