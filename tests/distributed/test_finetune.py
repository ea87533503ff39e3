"""Hugging Face models through the recipe's engine against eager attention in one process, without the recipe's code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.parity import Cell, run_cell, train_on_ranks
from tests.families import tiny_model
from tests.pool import WorkerPool
from tests.tools.measure import relative_error

CELLS = [  # dtype, stage, ring, data, accumulation, length
    Cell("fp32", 0, 2, 1, 1, 29),
    Cell("fp32", 1, 2, 1, 2, 29),
    Cell("fp32", 2, 2, 2, 1, 32),
    Cell("fp32", 3, 2, 1, 2, 29),
    Cell("fp32", 3, 2, 2, 1, 29, recompute="selective", tile_tokens=8, offload_activations=True),
    Cell("bf16", 1, 2, 1, 2, 29),
    Cell("bf16", 3, 2, 1, 1, 29, recompute="selective"),
    Cell("fp32", 3, 1, 1, 1, 29, method="ulysses", ulysses_degree=2),
    Cell("fp32", 1, 2, 1, 1, 29, method="all_gather", recompute="full", tile_tokens=8),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose matrices are large enough for ZeRO-3 to cut."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gemma2", "qwen3_moe"):
        tiny_model(family, "eager", vocab_size=320, hidden_size=512).save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("cell", [pytest.param(cell, id=str(cell)) for cell in CELLS])
def test_training_equals_one_process(pool: WorkerPool, folders: Path, cell: Cell):
    outcome = run_cell(pool, replace(cell, path=str(folders / "llama")))
    assert outcome.passes, outcome


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_training_other_families_equals_one_process(pool: WorkerPool, folders: Path, family: str):
    outcome = run_cell(pool, Cell("fp32", 3, 2, 1, 1, 29, recompute="selective", path=str(folders / family)))
    assert outcome.passes, outcome


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_training_lora_on_ranks_equals_one_rank(pool: WorkerPool, folders: Path, zero_stage: int):
    cell = Cell("fp32", zero_stage, 2, 1, 2, 29, path=str(folders / "llama"), lora_rank=4)
    alone = pool.run(train_on_ranks, replace(cell, zero_stage=1, ring_degree=1), num_ranks=1)[0]
    ours = pool.run(train_on_ranks, cell, num_ranks=2)[0]
    assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
    trained = [name for name in alone.parameters if "lora_" in name]
    assert len(trained) == 2 * 7 * 2  # two matrices beside each of seven, in two layers
    for name in trained:
        assert alone.parameters[name].any(), name
        assert relative_error(ours.parameters[name], alone.parameters[name]) < 1e-5, name
