"""The ring over all GPUs of this machine, on NCCL: attention and training against one process."""

import pytest
import torch

from ring_attention import Layout
from tests.distributed.parity import Cell, run_cell
from tests.distributed.test_attention import check, ring_result
from tests.pool import WorkerPool

pytestmark = pytest.mark.gpu

NUM_RANKS = torch.cuda.device_count()


@pytest.mark.parametrize("layout_name", ["zigzag", "contiguous"])
@pytest.mark.parametrize("length", [256, 1001])
@pytest.mark.parametrize("batch_dim_idx", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        (torch.float64, "reference"),
        (torch.float32, "auto"),
        (torch.bfloat16, "cudnn"),
        (torch.bfloat16, "aten_flash"),
        (torch.bfloat16, "auto"),
    ],
    ids=str,
)
def test_the_ring_equals_whole_attention(gpu_pool: WorkerPool, layout_name, length, batch_dim_idx, dtype, block):
    shards = gpu_pool.run(ring_result, length, layout_name, dtype, block, batch_dim_idx, "cuda", num_ranks=NUM_RANKS)
    check(shards, Layout(layout_name, NUM_RANKS, length), dtype)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("accumulation_steps", "length"), [(1, 29), (2, 32)])
@pytest.mark.parametrize("ring_degree", sorted({1, NUM_RANKS}))
def test_training_on_ranks_equals_one_process(
    gpu_pool: WorkerPool, zero_stage, dtype, accumulation_steps, length, ring_degree
):
    cell = Cell(dtype, zero_stage, ring_degree, NUM_RANKS // ring_degree, accumulation_steps, length)
    outcome = run_cell(gpu_pool, cell)
    assert outcome.passes, outcome


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp16_with_its_loss_scale_equals_one_process(gpu_pool: WorkerPool, zero_stage):
    outcome = run_cell(gpu_pool, Cell("fp16", zero_stage, NUM_RANKS, 1, 2, 29))
    assert outcome.passes, outcome


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_tied_head_biases_and_layer_norms(gpu_pool: WorkerPool, zero_stage):
    outcome = run_cell(gpu_pool, Cell("fp32", zero_stage, NUM_RANKS, 1, 1, 29, model="gpt"))
    assert outcome.passes, outcome
