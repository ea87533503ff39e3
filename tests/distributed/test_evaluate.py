"""The validation loss on many ranks equals that of one process, even where data ranks do not divide the sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conf.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
)
from data.shard import Sharder
from recipes.model.transformer import Transformer
from recipes.planning.plan import Plan
from ring_attention import LocalAttention, RingAttention
from tests.corpora import packs_of
from tests.pool import WorkerPool, parallel_groups

MODEL = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64)
LENGTH = 21
SEQUENCES = np.random.default_rng(0).integers(0, 257, (3, LENGTH + 1))  # 3 sequences on 2 data ranks


def validation_loss(data_degree: int, ring_degree: int, zero_stage: int) -> float:
    from recipes.engine.deepspeed_engine import TrainingEngine

    groups = parallel_groups(data_degree, ring_degree)
    attention = RingAttention("auto", groups.get_sequence_parallel_group(), layout="zigzag")
    config = Config(model=MODEL, engine=EngineConfig(dtype="fp32", zero_stage=zero_stage), seed=0)
    engine = TrainingEngine(config, groups, attention)
    sharder = Sharder(attention.layout(LENGTH), attention.sequence_rank, groups.data_rank, data_degree, 1)
    return engine.mean_loss(sharder.validation(packs_of(SEQUENCES))).item()


def one_process_loss() -> float:
    sequences = torch.from_numpy(SEQUENCES)
    model = Transformer(MODEL, LocalAttention("auto"))
    return model(sequences[:, :-1], torch.arange(LENGTH).unsqueeze(0), sequences[:, 1:]).item() / (3 * LENGTH)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_validation_loss_equals_one_process(pool: WorkerPool, zero_stage: int):
    losses = pool.run(validation_loss, 2, 2, zero_stage, num_ranks=4)
    assert losses == [pytest.approx(one_process_loss(), rel=1e-5)] * 4


def pipelined_validation_loss(tensor_degree: int, pipeline_degree: int) -> float:
    """After a training step with larger micro-batches and learning rate 0."""
    from recipes.engine.build import build_engine

    config = Config(
        model=MODEL,
        attention=AttentionConfig(method="local"),
        parallelism=ParallelismConfig(
            "tensor_pipeline", tensor_degree=tensor_degree, pipeline_degree=pipeline_degree, data_degree=1
        ),
        engine=EngineConfig(dtype="fp32", micro_batch_size=2),
        optimizer=OptimizerConfig(lr=0.0),
        data=DataConfig(sequence_length=LENGTH, document_mask=False),
        num_steps=1,
    )
    num_ranks = tensor_degree * pipeline_degree
    plan = Plan(config, num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)
    engine = build_engine(plan)
    sharder = Sharder(plan.layout, engine.sequence_rank, engine.data_rank, 1, 2, document_mask=False)
    engine.train_step([sharder.token_batch(packs_of(SEQUENCES[:2]))])
    loss = engine.mean_loss(sharder.validation(packs_of(SEQUENCES))).item()
    engine.close()
    return loss


@pytest.mark.parametrize(("tensor_degree", "pipeline_degree"), [(1, 2), (2, 2)])
def test_validation_loss_of_a_pipeline_equals_one_process(pool: WorkerPool, tensor_degree: int, pipeline_degree: int):
    num_ranks = tensor_degree * pipeline_degree
    losses = pool.run(pipelined_validation_loss, tensor_degree, pipeline_degree, num_ranks=num_ranks)
    assert losses == [pytest.approx(one_process_loss(), rel=1e-5)] * num_ranks
