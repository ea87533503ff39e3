"""A closed engine holds no memory: comparisons build many engines, one after another, in the same processes."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from conf.schema import AttentionConfig, Config, DataConfig, EngineConfig, ModelConfig, ParallelismConfig
from recipes.planning.plan import Plan
from tests.corpora import byte_corpus
from tests.pool import WorkerPool, parallel_groups

LENGTH = 16
DOCUMENTS = ["enough words for two steps and one validation sequence " * 8]


def held_tensors() -> list[torch.Tensor]:
    """All that Python's garbage collector sees, without those of a compilation, which hold no memory."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and not tensor.is_meta]


def held_bytes(without: Sequence[torch.Tensor] = ()) -> int:
    """Bytes of all tensors but some."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held_tensors()}
    left_out = {tensor.untyped_storage().data_ptr() for tensor in without}
    return sum(size for address, size in storages.items() if address not in left_out)


def bytes_of_an_engine(recipe: str, method: str, dtype: str, zero_stage: int) -> tuple[int, int]:
    """(bytes held by the engine after two steps of two micro-batches, bytes still held after it is closed)."""
    from recipes.engine.build import build_engine, build_feed

    tensor_degree, pipeline_degree = {"tensor": (2, 1), "pipeline": (1, 2)}.get(method, (None, None))
    config = Config(
        model=ModelConfig(),
        attention=AttentionConfig(method="ring" if method == "ring" else "local"),
        parallelism=ParallelismConfig(
            "sequence" if method == "ring" else "tensor_pipeline",
            tensor_degree=tensor_degree,
            pipeline_degree=pipeline_degree,
            data_degree=1,
        ),
        engine=EngineConfig(dtype=dtype, zero_stage=zero_stage, gradient_accumulation_steps=2),
        data=DataConfig(sequence_length=LENGTH, document_mask=method == "ring"),
        recipe=recipe,
        num_steps=2,
    )
    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    groups = parallel_groups(1, 2) if method == "ring" else None
    before = held_bytes()
    engine = build_engine(plan, groups)
    steps = build_feed(plan, engine, byte_corpus(DOCUMENTS, LENGTH)).steps()
    for _ in range(2):
        if plan.trains:
            engine.train_step(next(steps).micro_batches)
        else:
            engine.mean_loss(next(steps).micro_batches)
    during = held_bytes()
    engine.close()
    del engine, steps
    return during - before, held_bytes() - before


@pytest.mark.parametrize(
    ("method", "dtype", "zero_stage"),
    [
        ("ring", "fp32", 0),
        ("ring", "fp32", 1),
        ("ring", "bf16", 0),
        ("ring", "bf16", 1),
        ("ring", "bf16", 2),
        ("ring", "bf16", 3),
        ("tensor", "bf16", 1),
        ("pipeline", "fp32", 1),
    ],
)
@pytest.mark.parametrize("recipe", ["pretrain", "forward"])
def test_a_closed_engine_holds_no_memory(pool: WorkerPool, recipe: str, method: str, dtype: str, zero_stage: int):
    for during, after in pool.run(bytes_of_an_engine, recipe, method, dtype, zero_stage, num_ranks=2):
        assert during > 100_000
        assert after < 10_000  # scalars that libraries allocate with the first engine
