"""Resuming, on equal ranks and ZeRO stages, a run whose gradients were summed otherwise: equal bits, or to 1e-4."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from recipes.planning.plan import Plan
from tests.distributed.test_checkpoint import CORPUS, configuration
from tests.pool import WorkerPool, parallel_groups

SAVED_AFTER, NUM_STEPS = 2, 4
BF16_OPTIMIZER = "BF16_Optimizer"  # with fp32 sums of all gradients on every rank, as runs on ZeRO 1 once had


def train_on(run_dir: Path, num_ranks: int, accumulation_steps: int, optimizer: str) -> list[float]:
    """On a rank: the losses from the newest checkpoint, if any, to the last step; the first start saves one.

    Two sequences a step, in one or two micro-batches.
    """
    import recipes.engine.base
    from recipes.checkpoint.manager import Checkpoints, choose_checkpoint
    from recipes.engine.build import build_engine, build_feed

    config = configuration(1, "bf16", tied_head=False)
    config.engine.micro_batch_size = 2 // accumulation_steps
    config.engine.gradient_accumulation_steps = accumulation_steps
    plan = Plan(config, num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)
    plan.resolve_config()
    resumed = choose_checkpoint(config, run_dir, lambda _: None)
    with mock.patch.object(recipes.engine.base, "has_sharded_sums", return_value=optimizer != BF16_OPTIMIZER):
        engine = build_engine(plan, parallel_groups(1, num_ranks))
    assert type(engine.deepspeed.optimizer).__name__ == optimizer
    checkpoints = Checkpoints(config, run_dir, engine)
    if resumed:
        checkpoints.load(resumed)
    losses, steps = [], build_feed(plan, engine, CORPUS).steps(last_read=resumed.last_read if resumed else None)
    for step in range(resumed.step + 1 if resumed else 1, NUM_STEPS + 1):
        batch = next(steps)
        losses.append(engine.train_step(batch.micro_batches).loss.item())
        if step == SAVED_AFTER and not resumed:
            checkpoints.save(step, batch.last, 0.0, "")
    engine.close()
    return losses


@pytest.mark.parametrize(
    ("num_ranks", "before", "after", "optimizer", "tolerance"),
    [
        (1, 1, 1, "DeepSpeedZeroOptimizer", 0),
        (1, 1, 1, BF16_OPTIMIZER, 0),
        (3, 1, 1, BF16_OPTIMIZER, 0),  # whose last shard is padded
        (1, 2, 1, "DeepSpeedZeroOptimizer", 1e-4),  # stops summing: the same up to rounding
        (1, 1, 2, "DeepSpeedZeroOptimizer", 1e-4),
    ],
)
def test_a_run_resumes_whatever_summed_its_gradients(
    pool: WorkerPool, tmp_path: Path, num_ranks: int, before: int, after: int, optimizer: str, tolerance: float
):
    uninterrupted = pool.run(train_on, tmp_path, num_ranks, before, optimizer, num_ranks=num_ranks)[0]
    resumed = pool.run(train_on, tmp_path, num_ranks, after, "DeepSpeedZeroOptimizer", num_ranks=num_ranks)[0]
    assert len(resumed) == NUM_STEPS - SAVED_AFTER
    assert resumed == pytest.approx(uninterrupted[SAVED_AFTER:], rel=tolerance, abs=0)
