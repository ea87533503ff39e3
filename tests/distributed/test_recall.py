"""Context crosses ranks: a recall task whose answer is more than L/P tokens back, on another rank.

A sequence is noise with one value token in its second or third chunk of eight. At the last position the model must name
it. With ring attention the model learns this; with attention among a rank's own tokens it cannot, in either layout.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conf.schema import Config, EngineConfig, ModelConfig, OptimizerConfig
from data.shard import IGNORED_LABEL, TokenBatch
from ring_attention import Layout, LocalAttention, RingAttention
from tests.pool import WorkerPool, parallel_groups

pytestmark = pytest.mark.slow

LENGTH, NUM_RANKS, NUM_VALUES, BATCH_SIZE, NUM_STEPS = 64, 4, 16, 64, 80
MODEL = ModelConfig(num_layers=1, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_size=128)


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, L]: values are 0..15, noise is 16..31, and the distance to the answer is at least 40."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(NUM_VALUES, 2 * NUM_VALUES, (BATCH_SIZE, LENGTH), generator=generator)
    position = torch.randint(LENGTH // 8, 3 * LENGTH // 8, (BATCH_SIZE, 1), generator=generator)
    value = torch.randint(0, NUM_VALUES, (BATCH_SIZE, 1), generator=generator)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    labels[:, -1:] = value
    return tokens.scatter(1, position, value), labels


def recall_accuracy(method: str, layout_name: str, num_steps: int) -> float | None:
    """Accuracy on new sequences after training; None on ranks without the last position."""
    from recipes.engine.deepspeed_engine import TrainingEngine

    groups = parallel_groups(data_degree=1, sequence_degree=NUM_RANKS)
    layout = Layout(layout_name, NUM_RANKS, LENGTH)
    group = groups.get_sequence_parallel_group()
    attention = RingAttention("auto", group, layout=layout_name) if method == "ring" else LocalAttention("auto", group)
    config = Config(
        model=MODEL,
        engine=EngineConfig(dtype="fp32", zero_stage=1, micro_batch_size=BATCH_SIZE),
        optimizer=OptimizerConfig(lr=5e-3, weight_decay=0.0),
        num_steps=num_steps,
        seed=0,
    )
    engine = TrainingEngine(config, groups, attention)

    def batch(seed: int) -> TokenBatch:
        tokens, labels = draw(seed)
        return TokenBatch(
            layout.shard(tokens, groups.get_sequence_parallel_rank(), dim=1),
            layout.positions(groups.get_sequence_parallel_rank()).unsqueeze(0),
            layout.shard(labels, groups.get_sequence_parallel_rank(), dim=1, pad_value=IGNORED_LABEL),
        )

    for step in range(num_steps):
        engine.train_step([batch(step)])
    num_correct = num_labels = 0
    with torch.no_grad():
        for seed in range(10**6, 10**6 + 4):
            new = batch(seed)
            answers = engine.model(new.tokens_BS, new.positions_BS).argmax(-1)
            valid = new.labels_BS != IGNORED_LABEL
            num_labels += int(valid.sum())
            num_correct += int((answers == new.labels_BS)[valid].sum())
    return num_correct / num_labels if num_labels else None


@pytest.mark.parametrize("layout_name", ["zigzag", "contiguous"])
def test_the_ring_recalls_tokens_of_another_rank(pool: WorkerPool, layout_name: str):
    [accuracy] = [
        a for a in pool.run(recall_accuracy, "ring", layout_name, NUM_STEPS, num_ranks=NUM_RANKS) if a is not None
    ]
    assert accuracy > 0.99


@pytest.mark.parametrize("layout_name", ["zigzag", "contiguous"])
def test_without_the_ring_accuracy_is_chance(pool: WorkerPool, layout_name: str):
    [accuracy] = [
        a for a in pool.run(recall_accuracy, "local", layout_name, NUM_STEPS, num_ranks=NUM_RANKS) if a is not None
    ]
    assert accuracy < 3 / NUM_VALUES  # chance is 1/16
