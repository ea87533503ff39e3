"""If one rank's loss is not finite, no rank applies the step, and training continues as if it had not happened."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from conf.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
)
from recipes.planning.plan import Plan
from tests.corpora import byte_corpus
from tests.pool import WorkerPool, parallel_groups

LENGTH, NUM_STEPS, BAD_STEP, BAD_RANK = 21, 5, 3, 1
CORPUS = byte_corpus(["ring attention " * 40, "DeepSpeed " * 50], LENGTH)
Trained = tuple[list[float], list[bool], list[int]]


def train(config: Config, bad: str) -> Trained:
    """On a rank: the losses, which steps were applied, and the ranks with a bad loss.

    Args:
        bad: the loss of step 3 on rank 1 becomes this, nan or inf; "left out" leaves the step out.
    """
    import deepspeed.comm as dist

    import recipes.engine.pipeline_engine
    from recipes.engine.build import build_engine, build_feed

    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    plan.resolve_config()
    is_pipeline = config.parallelism.method == "tensor_pipeline"
    engine = build_engine(plan, None if is_pipeline else parallel_groups(1, 2))
    owner, name = (recipes.engine.pipeline_engine, "cross_entropy_sum") if is_pipeline else (engine, "_loss_sum")
    loss_sum = getattr(owner, name)
    losses, applied, ranks = [], [], []
    steps = build_feed(plan, engine, CORPUS).steps()
    for step, batch in zip(range(1, NUM_STEPS + 1), steps, strict=False):
        is_bad = step == BAD_STEP
        if is_bad and bad == "left out":
            continue
        factor = float(bad) if is_bad and dist.get_rank() == BAD_RANK else 1.0
        with mock.patch.object(owner, name, lambda *arguments, factor=factor: loss_sum(*arguments) * factor):
            result = engine.train_step(batch.micro_batches)
        losses.append(result.loss.item())
        applied.append(result.applied)
        if not result.applied:
            ranks = engine.ranks_with_nonfinite_loss()
    engine.close()
    return losses, applied, ranks


def configuration(zero_stage: int, dtype: str, **more: Any) -> Config:
    return Config(
        model=ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64),
        engine=EngineConfig(dtype=dtype, zero_stage=zero_stage, gradient_accumulation_steps=2),
        optimizer=OptimizerConfig(lr=1e-2),
        data=DataConfig(sequence_length=LENGTH, document_mask="parallelism" not in more),
        num_steps=NUM_STEPS,
        **more,
    )


def check(pool: WorkerPool, config: Config, bad: str, named: list[int]) -> None:
    expected = pool.run(train, config, "left out", num_ranks=2)
    found = pool.run(train, config, bad, num_ranks=2)
    for (losses, applied, ranks), (others, all_applied, _) in zip(found, expected, strict=True):
        assert applied == [True, True, False, True, True]
        assert all_applied == [True] * 4
        assert losses[:2] + losses[3:] == others
        assert losses[2] != others[2]
        assert ranks == named


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_no_rank_applies_a_step_with_a_bad_loss(pool: WorkerPool, zero_stage: int, dtype: str):
    check(pool, configuration(zero_stage, dtype), "inf" if zero_stage == 2 else "nan", [BAD_RANK])


def test_no_pipeline_rank_applies_a_step_with_a_bad_loss(pool: WorkerPool):
    parallelism = ParallelismConfig(method="tensor_pipeline", tensor_degree=1, pipeline_degree=2)
    config = configuration(1, "bf16", parallelism=parallelism, attention=AttentionConfig(method="local"))
    check(pool, config, "nan", [])
