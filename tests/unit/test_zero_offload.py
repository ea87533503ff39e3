"""DeepSpeed's settings for ZeRO-Offload."""

from __future__ import annotations

import pytest
from torch import nn

from conf.schema import Config, EngineConfig
from recipes.engine.base import deepspeed_config
from recipes.engine.optimizer import optimizer_arguments


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, set()),
        ({"offload_optimizer": True}, {"offload_optimizer"}),
        ({"offload_parameters": True}, {"offload_param"}),
        ({"offload_optimizer": True, "offload_parameters": True}, {"offload_optimizer", "offload_param"}),
    ],
)
def test_settings_offload_what_was_asked_and_no_optimizer_in_forward_passes(fields, expected):
    for recipe, keys in (("pretrain", expected), ("forward", expected - {"offload_optimizer"})):
        config = Config(recipe=recipe, engine=EngineConfig(zero_stage=3, **fields))
        zero = deepspeed_config(config, 1000, 1)["zero_optimization"]
        assert {key for key in zero if key.startswith("offload")} == keys
        assert all(zero[key]["device"] == "cpu" for key in keys)
        arguments = optimizer_arguments(nn.Linear(2, 2), config)
        assert bool(arguments) == (recipe == "pretrain")
        if arguments:
            assert arguments["optimizer"].defaults["fused"] == ("offload_optimizer" in expected)
