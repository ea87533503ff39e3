"""What a rank holds of gradients after a backward pass: fp32 sums of its share, or none if nothing is summed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from data.shard import TokenBatch
from tests.distributed.test_close import held_bytes, held_tensors
from tests.pool import WorkerPool, parallel_groups
from tests.tools.memory import Setting

WEIGHTS, OPTIMIZER = 2, 12  # bytes per parameter in half precision
TOLERANCE = 0.02
LETS_GO_WITHIN_S = 20.0  # gloo's threads, of a collective's tensors once it is done: a moment, longer on a busy machine


def held_after_backward(setting: Setting, accumulation_steps: int, expected: float) -> float:
    """On a rank: bytes per parameter that the engine holds after the backward passes of a second step.

    More than `expected` is what it still holds after a while.
    """
    from recipes.engine.build import build_engine
    from recipes.engine.deepspeed_engine import TrainingEngine
    from recipes.planning.memory import num_parameters

    plan = setting.plan
    plan.config.engine.gradient_accumulation_steps = accumulation_steps
    before = held_tensors()  # stay as long as this list, so no new tensor has the address of one that gloo lets go
    engine = build_engine(plan, parallel_groups(1, setting.num_ranks))
    assert isinstance(engine, TrainingEngine)
    tokens = torch.arange(plan.config.data.sequence_length).unsqueeze(0) % 257
    own = plan.layout.shard(tokens, engine.sequence_rank, dim=1)
    batch = TokenBatch(own, plan.layout.positions(engine.sequence_rank).unsqueeze(0), own)
    micro_batches = [replace(batch) for _ in range(accumulation_steps)]
    engine.train_step(micro_batches)  # afterwards there are Adam's moments
    engine.accumulate(micro_batches)
    deadline = time.monotonic() + LETS_GO_WITHIN_S
    while True:
        held = held_bytes(without=before) / num_parameters(plan.config.model)
        if held <= expected * (1 + TOLERANCE) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    engine.deepspeed.step()
    engine.close()
    return held


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize(
    ("num_ranks", "accumulation_steps", "gradients"),
    [(1, 1, 2), (1, 2, 4), (2, 1, 4 / 2), (2, 2, 4 / 2), (4, 1, 4 / 4)],
)
def test_a_rank_sums_only_its_share_and_only_if_there_is_something_to_sum(
    pool: WorkerPool, zero_stage: int, num_ranks: int, accumulation_steps: int, gradients: float
):
    setting = Setting("bf16", zero_stage, num_ranks, local_length=16)
    expected = WEIGHTS + OPTIMIZER / num_ranks + gradients
    for held in pool.run(held_after_backward, setting, accumulation_steps, expected, num_ranks=num_ranks):
        assert held == pytest.approx(expected, rel=TOLERANCE)
