"""The validation loss of a data x ring grid is that of one process, also where sequences do not divide the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conf.schema import EngineConfig, ModelConfig, OptimizerConfig
from data.shard import Sharder
from recipes.transformer import Transformer
from ring_attention import LocalAttention, RingAttention
from tests.pool import WorkerPool, parallel_groups

MODEL = ModelConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=64)
LENGTH = 21
SEQUENCES = np.random.default_rng(0).integers(0, 257, (3, LENGTH + 1))  # 3 over 2 data ranks


def validation_loss(data_degree: int, ring_degree: int, zero_stage: int) -> float:
    from recipes.engine import TrainingEngine

    groups = parallel_groups(data_degree, ring_degree)
    attention = RingAttention("auto", groups.get_sequence_parallel_group(), layout="zigzag")
    engine = TrainingEngine(
        lambda: Transformer(MODEL, attention),
        groups,
        attention.sequence_rank,
        EngineConfig(dtype="fp32", zero_stage=zero_stage),
        OptimizerConfig(),
        num_steps=1,
    )
    sharder = Sharder(attention.layout(LENGTH), attention.sequence_rank, groups.data_rank, data_degree, 1)
    return engine.mean_loss(sharder.validation(SEQUENCES)).item()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_validation_loss_is_that_of_one_process(pool: WorkerPool, zero_stage: int):
    model = Transformer(MODEL, LocalAttention("auto"))
    whole = torch.from_numpy(SEQUENCES)
    expected = model(whole[:, :-1], torch.arange(LENGTH).unsqueeze(0), whole[:, 1:]).item() / (3 * LENGTH)
    losses = pool.run(validation_loss, 2, 2, zero_stage, num_ranks=4)
    assert losses == [pytest.approx(expected, rel=1e-5)] * 4
