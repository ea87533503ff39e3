"""Packed documents through the real engine: equal to each document trained alone, by one process in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from ring_attention import Mask
from tests.distributed.parity import FP32_LIMIT, Cell, Trained, run_cell, train_on_ranks
from tests.families import tiny_model
from tests.pool import WorkerPool

CELL = Cell("fp32", 1, 2, 1, 1, 29, packed=True)
FAST = {
    "ring, padded, accumulated, data ranks": replace(CELL, accumulation_steps=2, data_degree=2),
    "ring of 4": replace(CELL, ring_degree=4, length=32),
    "ulysses, ZeRO-3": replace(CELL, ring_degree=1, ulysses_degree=2, method="ulysses", zero_stage=3),
    "all-gather, contiguous, selective": replace(
        CELL, method="all_gather", layout="contiguous", zero_stage=0, recompute="selective"
    ),
    "balanced": replace(CELL, ring_degree=4, length=64, layout="balanced", accumulation_steps=2),
    "balanced, in one exchange, selective": replace(
        CELL, layout="balanced", accumulation_steps=2, recompute="selective"
    ),
    "balanced hybrid": replace(CELL, layout="balanced", method="hybrid", ulysses_degree=2, length=63),
    "one rank": replace(CELL, ring_degree=1, method="local", zero_stage=2),
    "bf16": replace(CELL, dtype="bf16", zero_stage=2),
}
METHODS = [("ring", 2, 1), ("ring", 4, 1), ("hybrid", 2, 2), ("ulysses", 1, 2), ("all_gather", 2, 1), ("local", 1, 1)]
SLOW = [
    Cell(dtype, stage, ring, 1, 2, 29, layout, method=method, ulysses_degree=ulysses, packed=True)
    for method, ring, ulysses in METHODS
    for layout in ("zigzag", "contiguous", "balanced")
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    if dtype == "fp32" or (layout != "contiguous" and stage in (1, 3))
]


def check(pool: WorkerPool, cell: Cell) -> None:
    outcome = run_cell(pool, cell)
    assert outcome.passes, outcome


@pytest.mark.parametrize("cell", FAST.values(), ids=FAST)
def test_documents_do_not_see_each_other(pool: WorkerPool, cell: Cell):
    check(pool, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", SLOW, ids=str)
def test_documents_on_all_methods_layouts_and_stages(pool: WorkerPool, cell: Cell):
    check(pool, cell)


@pytest.mark.parametrize("family", ["llama", "gemma2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_documents_of_hugging_face_models(pool: WorkerPool, tmp_path: Path, family: str):
    tiny_model(family, "eager", vocab_size=320).save_pretrained(tmp_path)
    outcome = run_cell(pool, replace(CELL, path=str(tmp_path)))
    assert outcome.passes, outcome


def without_masks(cell: Cell) -> Trained:
    with mock.patch.object(Mask, "packed", lambda mask, _: mask):
        return train_on_ranks(cell)


def test_documents_that_see_each_other_would_be_noticed(pool: WorkerPool):
    masked, unmasked = (pool.run(train, CELL, num_ranks=2)[0].losses for train in (train_on_ranks, without_masks))
    assert abs(unmasked[0] / masked[0] - 1) > 10 * FP32_LIMIT
