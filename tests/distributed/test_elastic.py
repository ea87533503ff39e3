"""A run that goes on with another arrangement of the same ranks: other methods, layouts and degrees, one ZeRO stage.

The parameters that it begins with are those that were saved, bit for bit; its losses are those of the run that kept
its arrangement, up to the rounding of fp32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.schema import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelismConfig,
)
from data.pack import Corpus
from recipes.export import export
from recipes.plan import Plan
from tests.pool import WorkerPool, parallel_groups

LENGTH, SAVED, NUM_STEPS = 21, 2, 5
CORPUS = Corpus(["ring attention " * 40, "DeepSpeed " * 50], LENGTH, validation_sequences=1)
# losses of 3 steps are about 5: 8 units in the last place of fp32 (2^-21 each from 4 to 8), which Adam's division
# of rounded gradients by their own size may make larger than the 1 or 2 that a single forward pass is off
TOLERANCE = 8 * 2**-21

RING, CONTIGUOUS, ULYSSES, DATA = "ring", "contiguous", "ulysses", "data"


def configuration(arrangement: str, zero_stage: int, dtype: str = "fp32") -> Config:
    method = {RING: "ring", CONTIGUOUS: "ring", ULYSSES: "ulysses", DATA: "local"}[arrangement]
    is_data = arrangement == DATA
    return Config(
        model=ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64),
        attention=AttentionConfig(method=method, layout="contiguous" if arrangement == CONTIGUOUS else "zigzag"),
        parallelism=ParallelismConfig(data_degree=2 if is_data else 1),
        engine=EngineConfig(dtype=dtype, zero_stage=zero_stage, gradient_accumulation_steps=1 if is_data else 2),
        data=DataConfig(sequence_length=LENGTH),
        checkpoint=CheckpointConfig(keep=3),
        num_steps=NUM_STEPS,
    )


def train(config: Config, run_dir: Path) -> tuple[list[str], list[float]]:
    """On a rank: all steps, from the newest checkpoint on; saves after SAVED, or, where it goes on from it, at once."""
    from recipes.build import build_engine, build_sharder
    from recipes.checkpoint import Checkpoints, TrainingData, choose_checkpoint

    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    plan.settle()
    told: list[str] = []
    resumed = choose_checkpoint(config, run_dir, told.append)
    engine = build_engine(plan, parallel_groups(plan.degrees.data, 2 // plan.degrees.data))
    checkpoints = Checkpoints(config, run_dir, engine)
    data = TrainingData(CORPUS, resumed)
    if resumed:
        checkpoints.load(resumed)
        checkpoints.save(SAVED, resumed.data_cursor, resumed.last_sequence_sha256, 0.0, "")
    steps = build_sharder(plan, engine).steps(data, plan.accumulation_steps)
    losses: list[float] = []
    for step in range(resumed.step + 1 if resumed else 1, NUM_STEPS + 1):
        losses.append(engine.train_step(next(steps)).loss.item())
        if step == SAVED:
            checkpoints.save(step, step * plan.data_tokens_per_step, data.last_sha256, 0.0, "")
    engine.close()
    return told, losses


@pytest.mark.parametrize(
    ("before", "after", "zero_stage", "dtype"),
    [
        (RING, ULYSSES, 1, "fp32"),
        (RING, CONTIGUOUS, 2, "fp32"),
        (DATA, RING, 3, "fp32"),
        (RING, DATA, 1, "fp32"),
        (ULYSSES, DATA, 0, "fp32"),
        (CONTIGUOUS, ULYSSES, 3, "fp32"),
        (DATA, RING, 1, "bf16"),
        (RING, ULYSSES, 2, "bf16"),
    ],
)
def test_another_arrangement_goes_on_where_the_other_was(
    pool: WorkerPool, tmp_path: Path, before, after, zero_stage, dtype
):
    old, new = (configuration(arrangement, zero_stage, dtype) for arrangement in (before, after))
    (_, uninterrupted), _ = pool.run(train, old, tmp_path, num_ranks=2)
    export(tmp_path, tmp_path / "saved.safetensors")
    (told, losses), _ = pool.run(train, new, tmp_path, num_ranks=2)
    assert told[-1].startswith(f"going on after step {SAVED}, arranged otherwise: ")
    export(tmp_path, tmp_path / "loaded.safetensors")
    saved, loaded = (load_file(tmp_path / f"{name}.safetensors") for name in ("saved", "loaded"))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    difference = max(abs(a - b) for a, b in zip(losses, uninterrupted[SAVED:], strict=True))
    if dtype == "fp32":
        assert difference <= TOLERANCE
    else:  # activations are rounded to 8 bits in other places
        assert difference <= 2**-8 * uninterrupted[0]
