"""How a workload is downscaled to the hardware."""

from __future__ import annotations

import copy
import functools

import pytest

from conf.schema import Config, Degrees
from recipes.benchmark import downscale
from tests.unit.test_schema import compose

composed = functools.cache(compose)  # 0.1 s each


def paper(workload: str, recipe: str = "forward") -> Config:
    return copy.deepcopy(composed("compare=paper_table", f"workload={workload}", f"recipe={recipe}"))


@pytest.mark.parametrize(
    ("recipe", "grids", "batch"),
    [
        # a forward pass of a sequence is 6.5e13 operations, so 4 s of a GPU's 5e14 a second are 25 of them: 16
        ("forward", [(1, 1, 1)], 16),
        ("forward", [(1, 2, 1)], 32),
        ("forward", [(8, 1, 1)], 128),
        ("pretrain", [(1, 1, 1)], 8),  # three times the work
        ("forward", [(1, 2, 1), (1, 1, 1, 1, 2)], 64),  # 16 micro-batches of any size for the pipeline
        ("forward", [(1, 64, 1)], 1024),
        ("forward", [(1, 256, 1)], 1024),  # never more than the workload's
        ("forward", [(512, 1, 1)], 2048),  # unless the micro-batches need it
    ],
)
def test_the_batch_on_gpus(recipe, grids, batch):
    config = paper("paper_10k", recipe)
    entries = [(config, Degrees(*grid)) for grid in grids]
    assert downscale.common_batch(entries, config.engine.train_batch_size, on_gpu=True) == batch


@pytest.mark.parametrize("workload", ["paper_10k", "paper_100k"])
@pytest.mark.parametrize("recipe", ["forward", "pretrain"])
@pytest.mark.parametrize(
    "grids", [[(1, 1, 1)], [(2, 1, 1), (1, 1, 1, 1, 2)], [(8, 1, 1), (2, 1, 1, 2, 2)], [(16, 1, 1)]]
)
def test_all_micro_batch_sizes_divide_the_batch_and_keep_pipelines_full(workload, recipe, grids):
    config = paper(workload, recipe)
    entries = [(config, Degrees(*grid)) for grid in grids]
    batch = downscale.common_batch(entries, config.engine.train_batch_size, on_gpu=True)
    for degrees in (degrees for _, degrees in entries):
        for size in config.compare.micro_batch_sizes:
            micro_batches, rest = divmod(batch, degrees.data * size)
            assert rest == 0
            assert degrees.pipeline == 1 or micro_batches >= 16 * (degrees.pipeline - 1)


def test_the_larger_workload_gets_a_smaller_batch():
    assert downscale.common_batch([(paper("paper_100k"), Degrees(1, 8, 1))], 128, on_gpu=True) == 32


def test_an_unset_batch_is_what_the_step_time_allows():
    config = compose("compare.micro_batch_sizes=[1]", "recipe=forward", "compare.step_time_s=1")
    # 2,048 tokens of 1.9e6 operations are 3.9e9 a sequence, and the CPU does 2e10 a second: 5 of them, so 4
    assert downscale.common_batch([(config, Degrees(1, 4, 1))], None, on_gpu=False) == 4


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        ("paper_10k", [
            "model.hidden_size 8192 -> 128", "model.head_dim 512 -> 8", "model.mlp_size 32768 -> 512",
            "engine.dtype fp16 -> bf16", "data.sequence_length 10000 -> 1250", "data.validation_sequences 8 -> 1",
            "compare.micro_batch_sizes [1, 2, 4] -> [1]",
        ]),
        ("paper_100k", [
            "model.hidden_size 4096 -> 128", "model.num_heads 32 -> 16", "model.num_kv_heads 32 -> 16",
            "model.head_dim 128 -> 8", "model.mlp_size 16384 -> 512", "data.sequence_length 100000 -> 2500",
            "data.validation_sequences 8 -> 1", "compare.micro_batch_sizes [1, 2, 4] -> [1]",
        ]),
    ],
)  # fmt: skip
def test_on_the_cpu_every_size_shrinks_and_every_change_is_listed(workload, expected):
    before, after = paper(workload), paper(workload)
    assert downscale.changes(before, after) == []
    downscale.downscale_to_cpu(after, after.data.sequence_length)
    assert downscale.changes(before, after) == expected
    assert after.model.num_heads * after.model.head_dim == after.model.hidden_size
