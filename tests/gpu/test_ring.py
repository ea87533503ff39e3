"""Every method on all GPUs of this machine, over NCCL: attention and training against one process."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ring_attention import CAUSAL, FULL, Mask, RingAttention
from ring_attention.kernels import KERNELS
from ring_attention.key_gradients import sums_travel
from ring_attention.kv import KeysValues
from ring_attention.ring import backward_calls, forward_calls
from ring_attention.transport import (
    TRANSPORTS,
    CopyEngineTransport,
    P2PMessage,
    Transfer,
    release_symmetric_buffers,
)
from tests.cases import Case, attend, build, check, draw, many_on_rank, world
from tests.distributed.parity import Cell, run_cell
from tests.distributed.test_attention import batches, grid
from tests.distributed.test_direct import random_cases
from tests.errors import names
from tests.pool import RankError, WorkerPool

pytestmark = pytest.mark.gpu

NUM_RANKS = torch.cuda.device_count()
LENGTH = 301
MASKS = [
    CAUSAL,
    FULL.packed([0, LENGTH]),
    Mask(left=40),
    Mask(left=30, right=20).packed([0, LENGTH]),
    CAUSAL.packed([0, 100, 101, 101, 200, LENGTH]),
    Mask(left=50).packed([[0, 150, LENGTH], [0, 20, 290, LENGTH]]),
]


@pytest.mark.parametrize(
    ("method", "transport"),
    [("ring", "p2p"), ("ring", "copy_engine"), ("ulysses", "p2p"), ("hybrid", "p2p"), ("all_gather", "p2p")],
)
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.float64, "reference"),
        (torch.float32, "auto"),
        (torch.bfloat16, "aten_flash"),
        (torch.bfloat16, "cudnn"),
        (torch.bfloat16, "mem_efficient"),
        (torch.bfloat16, "ffpa"),
        (torch.bfloat16, "auto"),
        (torch.float16, "auto"),
    ],
    ids=str,
)
def test_every_method_equals_whole_attention(
    gpu_pool: WorkerPool, method: str, transport: str, dtype: torch.dtype, kernel: str
):
    """With every layout, order of dims and mask that the kernel supports."""
    if transport == "copy_engine" and NUM_RANKS < 2:
        pytest.skip("needs two GPUs")
    head_dim, cases = 512 if kernel == "ffpa" else 64, []
    for layout in ("zigzag", "contiguous"):
        for mask in MASKS:
            if kernel in ("cudnn", "ffpa", "mem_efficient") and (mask.left, mask.right) not in (
                (None, 0),
                (None, None),
            ):
                continue  # has no sliding window
            for batch, batch_dim_idx in itertools.product(batches(method, mask), (0, 1)):
                case = Case(
                    method, NUM_RANKS, 1, layout, mask, LENGTH, batch, 8, 4, head_dim, dtype=dtype, kernel=kernel
                )
                case = replace(case, transport=transport)
                cases.append(grid(replace(case, batch_dim_idx=batch_dim_idx, contiguous=batch_dim_idx == 0)))
    if None in cases:
        pytest.skip(f"{method} is not for {NUM_RANKS} ranks")
    ranks = gpu_pool.run(many_with_poison, cases, num_ranks=NUM_RANKS)
    for case, shards in zip(cases, zip(*ranks, strict=True), strict=True):
        check(case, list(shards))


def many_with_poison(cases: list[Case]) -> list[list[torch.Tensor]]:
    """On each rank: results. A receive buffer is overwritten with NaN once its next receive is posted."""
    post = CopyEngineTransport.post

    def poisoning(
        self: CopyEngineTransport, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]
    ) -> Transfer:
        for message in receives:  # on the computing stream, which the copy stream must wait for
            message.tensor.fill_(float("nan"))
        return post(self, purpose, sends, receives)

    with patch.object(CopyEngineTransport, "post", poisoning):
        return many_on_rank(cases, "cuda")


@pytest.mark.skipif(NUM_RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transport", ["p2p", "copy_engine"])
@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float64, "reference"), (torch.bfloat16, "auto")], ids=str)
def test_packed_documents_in_one_exchange(gpu_pool: WorkerPool, transport: str, dtype: torch.dtype, kernel: str):
    changes = {"transport": transport, "kernel": kernel, "head_dim": 64, "value_head_dim": None, "softcap": None}
    cases = [replace(case, **changes) for case in random_cases(NUM_RANKS, 30, dtype)]
    ranks = gpu_pool.run(many_with_poison, cases, num_ranks=NUM_RANKS)
    for case, shards in zip(cases, zip(*ranks, strict=True), strict=True):
        check(case, list(shards))


@pytest.mark.skipif(NUM_RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transport", ["p2p", "copy_engine"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_key_gradients_that_travel_as_the_kernels_sums(gpu_pool: WorkerPool, transport: str, head_dim: int):
    pytest.importorskip("flash_attn.cute")
    length = 768 * NUM_RANKS  # chunks of whole tiles
    sizes: dict[str, Any] = {"length": length, "num_heads": 8, "num_kv_heads": 2, "head_dim": head_dim}
    case = Case("ring", NUM_RANKS, dtype=torch.bfloat16, kernel="flash_attn_4", transport=transport, **sizes)
    q, k, v, _ = draw(case)
    assert sums_travel(KERNELS["flash_attn_4"], case.global_layout, case.mask, q, KeysValues.of_parts(k, v))
    ranks = gpu_pool.run(many_with_poison, [case], num_ranks=NUM_RANKS)
    check(case, [shards for (shards,) in ranks])


@pytest.mark.skipif(NUM_RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", [CAUSAL, FULL, Mask(left=200)], ids=str)
def test_replayed_passes_equal_whole_attention(gpu_pool: WorkerPool, layout: str, mask: Mask):
    pytest.importorskip("flash_attn.cute")
    sizes: dict[str, Any] = {"length": 768 * NUM_RANKS, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    case = Case("ring", NUM_RANKS, 1, layout, mask, dtype=torch.bfloat16, kernel="flash_attn_4", **sizes)
    case = replace(case, transport="copy_engine")
    ranks = gpu_pool.run(last_of_replayed_passes, case, num_ranks=NUM_RANKS)
    check(case, [shards for shards, _ in ranks])
    assert [num_graphs for _, num_graphs in ranks] == [2] * NUM_RANKS


def last_of_replayed_passes(case: Case) -> tuple[list[torch.Tensor], int]:
    release_symmetric_buffers()  # with the graphs of other tests
    module = build(case, world())
    inputs = [x.cuda() for x in draw(case)]
    assert isinstance(module, RingAttention)
    for factor in (3.0, 2.0, 0.5, 5.0):
        with torch.inference_mode():  # makes the receive buffers and captures the forward pass, for training too
            module(*(case.global_layout.shard(x, module.sequence_rank, dim=1) for x in inputs[:3]), 0)
        attend(case, module, [factor * x for x in inputs])
    for plan in (forward_calls, backward_calls):  # frees what no graph keeps, to be overwritten
        plan.cache_clear()
    overwritten = [torch.full((64,), 2**20, device="cuda", dtype=torch.int32) for _ in range(4096)]
    assert module._transport is not None
    assert module._transport.graphs is not None
    results = attend(case, module, inputs), len(module._transport.graphs)
    del overwritten
    return results


@pytest.mark.skipif(NUM_RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_with_copies_equals_one_process(gpu_pool: WorkerPool, zero_stage, dtype):
    cell = Cell(dtype, zero_stage, NUM_RANKS, 1, 2, 29, transport="copy_engine")
    outcome = run_cell(gpu_pool, cell)
    assert outcome.passes, outcome


def attention_many_times(num_passes: int) -> tuple[int, int]:
    """On each rank: how many outputs have the bits of the first, and how many do not. Alternates between transports."""
    import deepspeed.comm as dist

    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    q, k, v, dout = (
        torch.randn(1, 2048, 8, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)
    )
    modules = [RingAttention("aten_flash", dist.get_world_group(), layout="zigzag", transport=t) for t in TRANSPORTS]
    outputs = []
    for number in range(num_passes):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        outputs.append(modules[number % len(modules)](*leaves, 0))
        outputs[-1].backward(dout)
        if number % 3 == dist.get_rank() % 3:
            time.sleep(5e-3)  # ranks drift apart
    same = sum(torch.equal(output, outputs[0]) for output in outputs)
    return same, num_passes - same


@pytest.mark.skipif(NUM_RANKS < 2, reason="needs two GPUs")
def test_all_transports_give_equal_bits_while_ranks_drift_apart(gpu_pool: WorkerPool):
    assert gpu_pool.run(attention_many_times, 300, num_ranks=NUM_RANKS) == [(300, 0)] * NUM_RANKS


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


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["ulysses", "all_gather"])
def test_training_with_every_method_equals_one_process(gpu_pool: WorkerPool, zero_stage, dtype, method):
    ring, ulysses = (1, NUM_RANKS) if method == "ulysses" else (NUM_RANKS, 1)
    if ulysses > 2:
        pytest.skip("the model has two key-value heads")
    outcome = run_cell(gpu_pool, Cell(dtype, zero_stage, ring, 1, 1, 29, method=method, ulysses_degree=ulysses))
    assert outcome.passes, outcome


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp16_with_its_loss_scale_equals_one_process(gpu_pool: WorkerPool, zero_stage):
    outcome = run_cell(gpu_pool, Cell("fp16", zero_stage, NUM_RANKS, 1, 2, 29))
    assert outcome.passes, outcome


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_tied_head_biases_and_layer_norms(gpu_pool: WorkerPool, zero_stage):
    outcome = run_cell(gpu_pool, Cell("fp32", zero_stage, NUM_RANKS, 1, 1, 29, model="gpt"))
    assert outcome.passes, outcome


def attention_beside_a_stalled_rank(stderr_path: str, transport: str) -> None:
    """Rank 0 stalls after one good pass. The last rank's stderr goes to a file, because that rank will abort."""
    import os

    import deepspeed.comm as dist

    attention = RingAttention("auto", dist.get_world_group(), transport=transport)
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    attention(q, q, q, 0)
    torch.cuda.synchronize()
    if attention.sequence_rank == 0:
        time.sleep(25)
        return
    if attention.sequence_rank == NUM_RANKS - 1:
        os.dup2(os.open(stderr_path, os.O_CREAT | os.O_WRONLY), 2)
        print(f"posting at {time.time()}", file=sys.stderr, flush=True)
    attention(q, q, q, 0)  # returns at once: the host does not wait
    torch.cuda.synchronize()


@pytest.mark.skipif(NUM_RANKS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stalled_neighbour_is_named_and_aborts_the_rank_within_the_group_timeout(tmp_path, transport: str):
    own_pool, stderr_path = WorkerPool("cuda", timeout_s=10), tmp_path / "stderr"
    with pytest.raises(RankError, match="died"):
        own_pool.run(attention_beside_a_stalled_rank, str(stderr_path), transport, num_ranks=NUM_RANKS)
    own_pool.close()
    posted, *lines = stderr_path.read_text().splitlines()
    peer = NUM_RANKS - 2
    [line] = [line for line in lines if line.startswith("TransferError: ")][:1]
    own = f"ring rank {NUM_RANKS - 1} of {NUM_RANKS}"
    names(line, "forward K,V after ring step 0", own, f"ring rank {peer}", f"global rank {peer}")
    assert stderr_path.stat().st_mtime - float(posted.split()[-1]) < 10 + 2
