"""An evaluation between two steps changes nothing of the training: losses and random states are bit-identical."""

from __future__ import annotations

import pytest

from conf.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    ParallelismConfig,
)
from recipes.planning.plan import Plan
from tests.corpora import byte_corpus
from tests.pool import WorkerPool, parallel_groups

LENGTH, NUM_STEPS = 320, 4
CORPUS = byte_corpus([f"{number} ring attention " * 90 for number in range(8)], LENGTH, validation_sequences=3)


def trained(data: int, ring: int, zero_stage: int, layout: str, evaluates: bool) -> tuple[list[float], list[dict]]:
    """The loss of each step, and the rows of each evaluation; every second step is followed by one."""
    from recipes.checkpoint.manager import random_states
    from recipes.engine.build import build_engine, build_feed
    from recipes.engine.deepspeed_engine import TrainingEngine
    from recipes.evaluation.cells import planned_cells
    from recipes.evaluation.measurement import Measurement

    config = Config(
        model=ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64),
        attention=AttentionConfig(layout=layout),
        parallelism=ParallelismConfig(data_degree=data, ring_degree=ring),
        engine=EngineConfig(dtype="fp32", zero_stage=zero_stage, gradient_accumulation_steps=2),
        data=DataConfig(sequence_length=LENGTH),
        evaluate=EvaluateConfig(
            tasks=["loss", "niah_single"], lengths=[LENGTH, 150], depths=2, samples=3, every_n_steps=2
        ),
        num_steps=NUM_STEPS,
    )
    plan = Plan(config, data * ring, "cpu", "CPU", None, ranks_per_host=data * ring)
    engine = build_engine(plan, parallel_groups(data, ring))
    assert isinstance(engine, TrainingEngine)
    cells = planned_cells(config)
    measure = Measurement(plan, engine, cells, {"stdlib": CORPUS.validation()["texts"]})
    steps = build_feed(plan, engine, CORPUS).steps()
    losses, rows = [], []
    for step in range(1, NUM_STEPS + 1):
        losses.append(engine.train_step(next(steps).micro_batches).loss.item())
        if evaluates and step % 2 == 0:
            before = random_states()
            rows += [cell.named() | measure(cell) for cell in cells]
            after = random_states()
            assert str(before.pop("torch").tolist()) == str(after.pop("torch").tolist())
            assert before == after
    steps.close()
    engine.close()
    return losses, rows


@pytest.mark.parametrize(
    ("data", "ring", "zero_stage", "layout"),
    [(1, 2, 3, "zigzag"), pytest.param(2, 2, 1, "balanced", marks=pytest.mark.slow)],
)
def test_training_goes_on_as_without_it(pool: WorkerPool, data: int, ring: int, zero_stage: int, layout: str):
    arguments = data, ring, zero_stage, layout
    with_it = pool.run(trained, *arguments, True, num_ranks=data * ring)
    without = pool.run(trained, *arguments, False, num_ranks=data * ring)
    assert [losses for losses, _ in with_it] == [losses for losses, _ in without]
    assert len(set(with_it[0][0])) == NUM_STEPS
    rows = with_it[0][1]
    assert all(of_rank == rows for _, of_rank in with_it)
    of_cells = [(row["task"], row["length"], row.get("depth")) for row in rows]
    retrieval = [("niah_single", length, depth) for length in (150, LENGTH) for depth in (0.0, 1.0)]
    assert of_cells == 2 * [("loss", LENGTH, None), *retrieval]
    assert rows[5]["loss"] < rows[0]["loss"]  # it measures the weights of its step
    assert all(later["answer_loss"] != row["answer_loss"] for row, later in zip(rows[1:5], rows[6:], strict=True))
