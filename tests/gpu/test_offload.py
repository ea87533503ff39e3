"""Offload to the host with a GPU: activations (bit-identical, with a lower peak) and ZeRO's states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.schema import Config, DataConfig, EngineConfig, ModelConfig
from data.shard import TokenBatch
from recipes.model.transformer import Transformer
from recipes.planning.plan import Plan
from ring_attention import LocalAttention
from tests.distributed.parity import Cell, run_cell
from tests.pool import WorkerPool, parallel_groups

pytestmark = pytest.mark.gpu
NUM_LAYERS, HIDDEN, LENGTH = 8, 1024, 16384
SAVED_BYTES = {"full": 2 * HIDDEN * LENGTH, "selective": (4 * HIDDEN + 4 * 8) * LENGTH}  # per layer


def train(recompute: str, offload: bool) -> tuple[list[torch.Tensor], int, list[int]]:
    """Gradients after three steps, each with micro-batches of two lengths; peak memory of the last two steps, in which
    gradients are allocated from the start; memory after each step.
    """
    config = ModelConfig(
        num_layers=NUM_LAYERS, hidden_size=HIDDEN, num_heads=8, num_kv_heads=8, head_dim=128, mlp_size=2048
    )
    with torch.device("cuda"):
        model = Transformer(config, LocalAttention("auto"), recompute=recompute, offload=offload).bfloat16()
    generator = torch.Generator().manual_seed(1)
    allocated = []
    for step in range(3):
        model.zero_grad(set_to_none=False)
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        for length in (LENGTH, LENGTH // 2):
            tokens = torch.randint(257, (1, length), generator=generator).cuda()
            loss = model(tokens, torch.arange(length, device="cuda").unsqueeze(0), tokens)
            loss.backward()
            del loss
        allocated.append(torch.cuda.memory_allocated())
    gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
    return gradients, torch.cuda.max_memory_allocated(), allocated


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_are_bit_identical_and_the_peak_is_lower(recompute: str):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(recompute, offload=False)  # compiles kernels, and allocates what libraries cache
        expected, peak_without, _ = train(recompute, offload=False)
        gradients, peak, allocated = train(recompute, offload=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, expected_gradient)
    assert len(set(allocated)) == 1
    assert peak_without - peak > 0.8 * (NUM_LAYERS - 2) * SAVED_BYTES[recompute]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_offload_equals_one_process(gpu_pool: WorkerPool, zero_stage: int):
    cell = Cell("bf16", zero_stage, 1, 1, 2, 29, offload_optimizer=True, offload_parameters=zero_stage == 3)
    outcome = run_cell(gpu_pool, cell)
    assert outcome.passes, outcome


def test_offload_of_weights_only_equals_one_process(gpu_pool: WorkerPool):
    outcome = run_cell(gpu_pool, Cell("bf16", 3, 1, 1, 2, 29, offload_parameters=True))
    assert outcome.passes, outcome


def test_all_memory_savers_together_equal_one_process(gpu_pool: WorkerPool):
    cell = Cell("bf16", 3, 1, 1, 2, 29, model="deep", recompute="selective", offload_activations=True, tile_tokens=16)
    outcome = run_cell(gpu_pool, replace(cell, offload_optimizer=True))
    assert outcome.passes, outcome


def allocated_after_a_step(offload: bool) -> int:
    """On a rank: bytes of tensors on the GPU after a step of ZeRO-3."""
    config = Config(
        model=ModelConfig(num_layers=4, hidden_size=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_size=2816),
        engine=EngineConfig(zero_stage=3, offload_optimizer=offload, offload_parameters=offload),
        data=DataConfig(sequence_length=512),
    )
    from recipes.engine.build import build_engine

    plan = Plan(config, 1, "cuda", "GPU", torch.cuda.get_device_capability(), ranks_per_host=1)
    engine = build_engine(plan, parallel_groups(1, 1))
    tokens = torch.arange(512).unsqueeze(0) % 257
    engine.train_step([TokenBatch(tokens, torch.arange(512).unsqueeze(0), tokens)])
    allocated = torch.cuda.memory_allocated()
    engine.close()
    return allocated


def test_zero_offload_removes_states_from_the_gpu(gpu_pool: WorkerPool):
    on_gpu, on_host = (gpu_pool.run(allocated_after_a_step, offload, num_ranks=1)[0] for offload in (False, True))
    assert on_host < on_gpu / 2
