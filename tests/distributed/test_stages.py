"""A run whose sequences grow: resumed within or at the end of a stage, it is bit-identical; on another grid, close."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.schema import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelismConfig,
)
from recipes.planning.plan import Plan
from tests.corpora import byte_corpus
from tests.pool import WorkerPool, parallel_groups

STAGES, LENGTH, NUM_STEPS = [[1, 21], [3, 45], [5, 64]], 64, 6
CORPUS = byte_corpus(["ring attention " * 40, "DeepSpeed " * 50, "long " * 90], LENGTH, stages=STAGES)


def trained(
    run_dir: Path, grid: ParallelismConfig, zero_stage: int, layout: str, accumulation_steps: int
) -> list[float]:
    """The losses from the newest checkpoint on. A new run saves one after the steps 2, 3 and 6."""
    from recipes.checkpoint.manager import Checkpoints, choose_checkpoint
    from recipes.engine.build import build_engine, build_feed

    config = Config(
        model=ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64),
        attention=AttentionConfig(layout=layout),
        parallelism=grid,
        engine=EngineConfig(dtype="fp32", zero_stage=zero_stage, gradient_accumulation_steps=accumulation_steps),
        data=DataConfig(sequence_length=LENGTH, stages=STAGES),
        checkpoint=CheckpointConfig(keep=3),
        num_steps=NUM_STEPS,
    )
    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    plan.resolve_config()
    resumed = choose_checkpoint(config, run_dir, lambda line: None)
    engine = build_engine(plan, parallel_groups(plan.degrees.data, plan.degrees.ring))
    checkpoints = Checkpoints(config, run_dir, engine)
    if resumed:
        checkpoints.load(resumed)
    first = resumed.step + 1 if resumed else 1
    steps = build_feed(plan, engine, CORPUS).steps(last_read=resumed.last_read if resumed else None, first_step=first)
    losses = []
    for step in range(first, NUM_STEPS + 1):
        batch = next(steps)
        losses.append(engine.train_step(batch.micro_batches).loss.item())
        if not resumed and step in (2, 3, NUM_STEPS):
            checkpoints.save(step, batch.last, 0.0, "")
    steps.close()
    engine.close()
    return losses


@pytest.mark.parametrize(("zero_stage", "layout"), [(1, "zigzag"), (3, "balanced")])
def test_a_resumed_run_is_bit_identical_and_on_another_grid_close(
    pool: WorkerPool, tmp_path: Path, zero_stage: int, layout: str
):
    ring, data = (ParallelismConfig(data_degree=data, ring_degree=2 // data) for data in (1, 2))
    whole, _ = pool.run(trained, tmp_path, ring, zero_stage, layout, 2, num_ranks=2)
    assert len(whole) == NUM_STEPS
    newest = [tmp_path / "checkpoints" / f"step_0000000{step}" for step in (6, 3)]
    for checkpoint, done in zip(newest, (3, 2), strict=True):  # in the second stage, and after the first
        checkpoint.rename(tmp_path / checkpoint.name)
        again, other = pool.run(trained, tmp_path, ring, zero_stage, layout, 2, num_ranks=2)
        assert again == other == whole[done:]
        on_data_ranks, _ = pool.run(trained, tmp_path, data, zero_stage, layout, 1, num_ranks=2)
        assert on_data_ranks == pytest.approx(whole[done:], rel=1e-4)
