"""Which of DeepSpeed's stages sums the gradients, and in which dtype."""

from __future__ import annotations

from typing import Any

import pytest

from conf.schema import AttentionConfig, Config, DataConfig, EngineConfig, ParallelismConfig
from recipes.engine.base import deepspeed_config

FP32, BF16, FP16 = (1, "fp32"), (1, "bf16"), (1, "fp16")
SHARDED = (2, "fp32")


@pytest.mark.parametrize(
    ("fields", "num_ranks", "accumulation_steps", "expected"),
    [
        ({}, 1, 1, BF16),
        ({"zero_stage": 2}, 1, 1, BF16),
        ({"dtype": "fp16"}, 1, 1, FP16),
        ({"offload_optimizer": True}, 1, 1, (2, "bf16")),  # stage 2 sends each bucket to the host
        ({}, 1, 2, SHARDED),
        ({}, 2, 1, SHARDED),
        ({"dtype": "fp16"}, 2, 2, SHARDED),
        ({"offload_optimizer": True}, 2, 1, SHARDED),
        ({"dtype": "fp32"}, 1, 1, FP32),
        ({"dtype": "fp32"}, 2, 2, FP32),
        ({"zero_stage": 3}, 1, 1, (3, "fp32")),
    ],
)
def test_half_precision_has_fp32_sums_of_a_rank_s_share_or_none(
    fields: dict[str, Any], num_ranks: int, accumulation_steps: int, expected: tuple[int, str]
):
    config = Config(engine=EngineConfig(**fields, gradient_accumulation_steps=accumulation_steps))
    settings = deepspeed_config(config, 1000, num_ranks)
    zero = settings["zero_optimization"]
    assert (zero["stage"], settings["data_types"]["grad_accum_dtype"]) == expected
    assert settings["communication_data_type"] == "fp32"
    has_buckets = zero.get("contiguous_gradients", True)
    assert has_buckets == zero["overlap_comm"] == (expected not in (BF16, FP16))


def test_pipelines_keep_stage_1_and_forward_passes_have_no_stage():
    attention, parallelism = AttentionConfig("local"), ParallelismConfig("tensor_pipeline")
    pipeline = Config(attention=attention, parallelism=parallelism, data=DataConfig(document_mask=False))
    assert deepspeed_config(pipeline, 1000, 1)["zero_optimization"]["stage"] == 1
    assert deepspeed_config(Config(recipe="forward"), 1000, 1)["zero_optimization"]["stage"] == 0
